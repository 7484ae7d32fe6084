//! A server as a program of its own. It is drained in the end, or killed when its test fails, and never left behind.

use std::{
    env,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::atomic::{AtomicU32, Ordering::Relaxed},
};

use forkring::client::Client;
use nix::sys::signal::Signal;

use super::{
    files::Files,
    processes::{Process, children, is_alive, signal},
    soon, until,
};

/// Light settings, unless a test wants others: as TOML, and by the names of environment variables.
const SETTINGS: [(&str, &str); 5] =
    [("arena", "1MiB"), ("max_message", "512KiB"), ("capacity", "256"), ("workers", "1"), ("grace", "20s")];

/// See the module.
#[derive(Debug)]
pub struct Server {
    pub name: String,
    pub addr: String,
    child: Child,
    output: Files,
    over: bool,
    left: bool,
}

/// The segment of a server that was killed. It is removed in the end, whoever had it.
#[derive(Debug)]
pub struct Left {
    pub name: String,
}

impl Left {
    pub fn segment(&self) -> PathBuf {
        Path::new("/dev/shm").join(format!("forkring-{}", self.name))
    }
}

impl Drop for Left {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.segment());
    }
}

/// A name that no other test's server has.
pub fn unique_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("test-{}-{}", std::process::id(), NEXT.fetch_add(1, Relaxed))
}

/// The program, with an environment that nobody else's settings are in.
pub fn forkring() -> Command {
    clean(Command::new(env!("CARGO_BIN_EXE_forkring")))
}

fn clean(mut command: Command) -> Command {
    for (variable, _) in env::vars_os() {
        if variable.to_string_lossy().starts_with("FORKRING_") {
            command.env_remove(variable);
        }
    }
    command
}

/// `forkring serve` on a free port, with light settings that `args` go over.
pub fn serve_command(name: &str, args: &[&str]) -> Command {
    let mut command = forkring();
    for (key, value) in SETTINGS {
        command.env(format!("FORKRING_{}", key.to_uppercase()), value);
    }
    command.env("FORKRING_LISTEN", "127.0.0.1:0").env("FORKRING_LOG", "info,forkring=debug");
    command.args(["serve", "--name", name]).args(args);
    command
}

impl Server {
    /// `forkring serve` with these arguments.
    pub async fn serve(args: &[&str]) -> Self {
        let name = unique_name();
        let mut command = serve_command(&name, args);
        // Also if the test is killed and drops nothing.
        command.args(["--parent", &std::process::id().to_string()]);
        Self::start(name, command, Files::new()).await
    }

    /// The example `handlers` with these of its pools, one worker each, and `settings` in TOML.
    pub async fn handlers(pools: &[&str], settings: &str) -> Self {
        Self::handlers_as(&unique_name(), pools, settings).await
    }

    /// The same under a name that another server had.
    pub async fn handlers_as(name: &str, pools: &[&str], settings: &str) -> Self {
        Self::handlers_with(name, pools, settings, &[]).await
    }

    /// The same with these variables.
    pub async fn handlers_with(name: &str, pools: &[&str], settings: &str, variables: &[(&str, &str)]) -> Self {
        let (name, output) = (name.to_owned(), Files::new());
        let is_set = |key: &str| settings.lines().any(|line| line.split('=').next().map(str::trim) == Some(key));
        let mut toml = format!("name = '{name}'\nlisten = '127.0.0.1:0'\n");
        for (key, value) in SETTINGS.iter().filter(|(key, _)| !is_set(key)) {
            let quote = if value.parse::<u32>().is_ok() { "" } else { "'" };
            toml.push_str(&format!("{key} = {quote}{value}{quote}\n"));
        }
        fs::write(output.path("settings.toml"), toml + settings).expect("a settings file");
        let mut command = clean(Command::new(example("handlers")));
        command.arg("--config").arg(output.path("settings.toml")).args(pools).envs(variables.iter().copied());
        Self::start(name, command, output).await
    }

    /// Kills the supervisor, which takes all others along. Nobody waits for them here: that is for whoever comes next.
    pub async fn kill(mut self) -> Left {
        self.signal(Signal::SIGKILL);
        assert_eq!(self.ended().await.code(), None);
        self.leave()
    }

    /// What a server that has ended has left.
    pub fn leave(&mut self) -> Left {
        assert!(self.over && self.segment().exists(), "there is nothing left of {}", self.name);
        self.left = true;
        Left { name: self.name.clone() }
    }

    /// Starts a server that prints `listening on ADDRESS`, and waits for that.
    pub async fn start(name: String, command: Command, output: Files) -> Self {
        Self::try_start(name, command, output).await.unwrap_or_else(|mut ended| {
            let status = ended.has_ended();
            panic!("the server ended: {status:?}\n{}", ended.log())
        })
    }

    /// The same; what is left of it, if it ended before that.
    pub async fn try_start(name: String, mut command: Command, output: Files) -> Result<Self, Self> {
        let file = |name| File::create(output.path(name)).expect("a file for the output");
        command.stdin(Stdio::null()).stdout(file("stdout")).stderr(file("stderr"));
        let child = command.spawn().expect("the program");
        let mut server = Server { name, addr: String::new(), child, output, over: false, left: false };
        match until("the line `listening on`", || server.listening()).await {
            Some(addr) => {
                server.addr = addr;
                Ok(server)
            }
            None => Err(server),
        }
    }

    /// Where it listens, once it does; none, if it never will.
    fn listening(&mut self) -> Option<Option<String>> {
        let ended = self.has_ended();
        let lines = self.output.lines("stdout");
        let found = lines.iter().find_map(|line| line.strip_prefix("listening on ")).map(str::to_owned);
        (found.is_some() || ended.is_some()).then_some(found)
    }

    /// How the supervisor has ended, if it has.
    pub fn has_ended(&mut self) -> Option<ExitStatus> {
        let ended = self.child.try_wait().expect("our child");
        self.over |= ended.is_some();
        ended
    }

    pub async fn client(&self) -> Client {
        soon("a connection", Client::connect(&self.addr)).await.expect("a connection")
    }

    /// The supervisor's pid.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// What it has written to stderr so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.output.path("stderr")).unwrap_or_default()
    }

    /// Waits until it has written a line that contains this.
    pub async fn logged(&self, what: &str) -> String {
        let line = || self.log().lines().find(|line| line.contains(what)).map(str::to_owned);
        until(&format!("`{what}` in the log"), line).await
    }

    /// Front and workers.
    pub fn children(&self) -> Vec<Process> {
        children(self.pid()).into_iter().filter(|process| process.name.starts_with("forkring-")).collect()
    }

    /// The same, once so many workers and the front are there.
    pub async fn family(&self, workers: usize) -> Vec<Process> {
        until("all children", || Some(self.children()).filter(|family| family.len() == workers + 1)).await
    }

    /// The pid of the front (`front`) or of a worker (`w0`), which may have to be started yet.
    pub async fn child(&self, name: &str) -> i32 {
        self.successor(name, 0).await
    }

    /// The same, once it is another than it was.
    pub async fn successor(&self, name: &str, before: i32) -> i32 {
        let name = format!("forkring-{name}");
        let named = |process: &Process| process.name == name && process.pid != before;
        until(&name, || self.children().into_iter().find(named)).await.pid
    }

    pub fn signal(&self, to_send: Signal) {
        signal(self.pid(), to_send);
    }

    /// Waits until the supervisor has ended by itself.
    pub async fn ended(&mut self) -> ExitStatus {
        until("the end of the server", || self.has_ended()).await
    }

    /// Ends it in order: everything was finished, nobody is left, nothing is left. What it logged.
    pub async fn drain(self) -> String {
        self.drain_by(Signal::SIGTERM).await
    }

    pub async fn drain_by(mut self, by: Signal) -> String {
        let family = self.children();
        self.signal(by);
        let status = self.ended().await;
        let log = self.log();
        self.assert_drained(status, &family);
        log
    }

    /// It ended well, and nobody and nothing is left.
    pub fn assert_drained(&self, status: ExitStatus, family: &[Process]) {
        let log = self.log();
        assert_eq!(status.code(), Some(0), "{log}");
        assert!(!log.contains("panicked at src/"), "{log}");
        assert!(!log.contains("a word was changed by somebody else"), "{log}");
        self.assert_gone(family);
        assert!(!self.segment().exists(), "the segment is left\n{log}");
    }

    /// None of these processes is left.
    pub fn assert_gone(&self, family: &[Process]) {
        let left: Vec<_> = family.iter().filter(|process| is_alive(process.pid)).collect();
        assert!(left.is_empty(), "{left:?} outlived their parent\n{}", self.log());
    }

    /// The segment's name in the file system.
    pub fn segment(&self) -> PathBuf {
        Path::new("/dev/shm").join(format!("forkring-{}", self.name))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if !self.over {
            // A test that failed, or one that needs no more of this server.
            println!("log of {}:\n{}", self.name, self.log());
            // Its children die with it.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if !self.left {
            let _ = fs::remove_file(self.segment());
        }
    }
}

/// An example's program: `cargo test` builds them, next to the tests' own.
pub fn example(name: &str) -> PathBuf {
    let program = Path::new(env!("CARGO_BIN_EXE_forkring")).with_file_name("examples").join(name);
    assert!(program.exists(), "no {}: build it with `cargo build --examples`", program.display());
    program
}
