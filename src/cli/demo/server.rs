//! The demo's server: a child process that cannot be left behind.
//!
//! Dropping it ends it, and the kernel ends it should we die of a signal (`serve --parent`). It has a process group of
//! its own, so that Ctrl-C reaches us alone and we end it in order.

use std::{
    env, fs,
    io::{BufRead as _, BufReader},
    os::unix::process::CommandExt as _,
    process::{self, Child, ChildStdout, Command, ExitStatus, Stdio},
};

use anyhow::{Context as _, bail};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open},
};

use super::POOL;
use crate::{
    cli::{BadUsage, Python},
    config::Config,
    segment::PREFIX,
};

/// How long the server may take to end when it is asked to; it has nothing left to do.
const PATIENCE: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// See the module.
#[derive(Debug)]
pub struct Server {
    child: Child,
    /// Kept open to the end: the server may write more than the line that we want.
    stdout: BufReader<ChildStdout>,
    addr: String,
}

impl Server {
    /// Starts `serve` on a free port and waits until it listens. `python` says how this process was started, if that was
    /// by Python: then this process's own file is the interpreter, which knows no `serve`.
    pub fn start(config: &Config, python: Option<&Python>) -> anyhow::Result<Self> {
        let pid = process::id();
        let mut command = match python {
            Some(python) => Command::new(&python.interpreter),
            None => Command::new(env::current_exe().context("cannot find this program's own file")?),
        };
        command.args(python.into_iter().flat_map(|python| &python.arguments));
        command.args(["serve", "--listen", "127.0.0.1:0"]);
        command.args(["--name", &name(pid)]);
        command.args(["--pool", &format!("{POOL}=sha256")]);
        command.args(["--workers", &config.workers.to_string()]);
        if let Some(arena) = config.arena {
            command.args(["--arena", &arena.to_string()]);
        }
        command.args(["--max-message", &config.max_message().to_string()]);
        command.args(["--parent", &pid.to_string()]);
        // What somebody set for a server of theirs is not meant for this one, but for the log's level.
        for (variable, _) in env::vars_os() {
            let name = variable.to_string_lossy();
            if name.starts_with("FORKRING_") && !["FORKRING_LOG", "FORKRING_CRASH"].contains(&name.as_ref()) {
                command.env_remove(&variable);
            }
        }
        if env::var_os("FORKRING_LOG").is_none() {
            command.env("FORKRING_LOG", "warn");
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).process_group(0);
        let mut child = command.spawn().context("cannot start the server")?;
        let Some(stdout) = child.stdout.take() else { bail!("the server has no stdout") };
        let mut server = Self { child, stdout: BufReader::new(stdout), addr: String::new() };
        server.addr = server.listening()?;
        Ok(server)
    }

    /// Where it listens.
    pub fn addr(&self) -> &str {
        &self.addr
    }

    /// Ends it and makes sure that it ended well.
    pub fn stop(mut self) -> anyhow::Result<()> {
        let status = self.end().context("cannot end the server")?;
        if !status.success() {
            bail!("the server ended badly: {status}");
        }
        Ok(())
    }

    /// Says so when an error is there because the server is not.
    pub fn blame(&mut self, error: anyhow::Error) -> anyhow::Error {
        match self.child.try_wait() {
            Ok(Some(status)) => error.context(format!("the server ended by itself, {status}")),
            _ => error,
        }
    }

    fn listening(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        loop {
            line.clear();
            if self.stdout.read_line(&mut line).context("cannot read from the server")? == 0 {
                let status = self.child.wait().context("cannot wait for the server")?;
                // It has said why on the stderr that we share.
                return Err(BadUsage(format!("the server did not start: {status}")).into());
            }
            if let Some(addr) = line.trim_end().strip_prefix("listening on ") {
                return Ok(addr.to_owned());
            }
        }
    }

    /// SIGTERM, patience, SIGKILL. Twice is as good as once.
    fn end(&mut self) -> std::io::Result<ExitStatus> {
        if let Some(status) = self.child.try_wait()? {
            return Ok(status);
        }
        let pid = Pid::from_child(&self.child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        // Not reaped yet, so the pid is still its own.
        kill_process(pid, Signal::TERM)?;
        let ended = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&PATIENCE))? > 0;
        if !ended {
            self.child.kill()?;
        }
        self.child.wait()
    }
}

/// Of the server that the process with this pid starts; nobody else's.
fn name(pid: u32) -> String {
    format!("demo-{pid}")
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.end().is_err() {
            // Already reaped, or beyond our reach; it ends with us at the latest.
            let _ = self.child.kill();
        }
        // It removes its segment itself, unless it was killed; and no server of this name will come and do it.
        let _ = fs::remove_file(format!("/dev/shm/{PREFIX}{}", name(process::id())));
    }
}
