//! `exec:COMMAND…`: any program is a worker with no SDK. It gets the item on stdin, and what it writes to stdout is the
//! result; a non-zero exit is the item's failure, with the end of stderr.
//!
//! All three pipes are served by one `poll`, so that no program can block by writing much before it has read all, or the
//! other way round; and its end is, so that who closes them all is under the same control. The program dies with its worker;
//! one whose item is cancelled, or that writes more than a result may have, is killed. One that takes too long is told to end
//! when its worker is, and whatever it started with it: of a pipeline, only the shell would die with the worker.

use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Child, Command, Stdio},
};

use nix::sys::{
    signal::{self, SigSet},
    signalfd::{SfdFlags, SignalFd},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    io::Errno,
    process::{Pid, PidfdFlags, Signal, getppid, kill_process_group, pidfd_open},
};
use tonic::Code;

use super::BuiltinError;
use crate::{
    handler::{Failure, Item, Reply},
    process::{self, dies_with_us},
};

/// Bytes of stderr that are kept: what a failure's message has room for behind the rest of it.
const TAIL: usize = 768;
/// How often a running program's item is asked whether it was cancelled.
const CANCEL_CHECK: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// How long a program that was told to end may take: less than its worker may.
const LAST_WORDS: Timespec = Timespec { tv_sec: 0, tv_nsec: 500_000_000 };

/// Splits a command line into words, with quotes as in a shell and nothing else of a shell's.
pub fn split(line: &str) -> Result<Vec<String>, BuiltinError> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    for c in line.chars() {
        match quote {
            Some(open) if c == open => quote = None,
            Some(_) => word.get_or_insert_default().push(c),
            None if c == '\'' || c == '"' => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            None if c.is_whitespace() => words.extend(word.take()),
            None => word.get_or_insert_default().push(c),
        }
    }
    if quote.is_some() {
        return Err(BuiltinError::Quote(line.to_owned()));
    }
    words.extend(word);
    if words.is_empty() { Err(BuiltinError::Command) } else { Ok(words) }
}

pub fn run(command: &[String], item: &Item<'_>, reply: &mut Reply<'_, '_>) -> Result<(), Failure> {
    let Some((program, arguments)) = command.split_first() else {
        return Err(Failure::handler(BuiltinError::Command));
    };
    let mut command = Command::new(program);
    // A group of its own, so that what it starts can be ended with it.
    command.args(arguments).process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = dies_with_us(&mut command).spawn();
    let child = child.map_err(|error| {
        Failure::new(Code::FailedPrecondition, "EXEC_FAILED", format_args!("cannot run `{program}`: {error}"))
    })?;
    let mut child = Running { program: child, reaped: false };
    let mut stderr = Vec::new();
    child.pump(item, reply, &mut stderr)?;
    let status = child.program.wait()?;
    child.reaped = true;
    if status.success() {
        return Ok(());
    }
    let tail = String::from_utf8_lossy(&stderr);
    let tail = tail.trim();
    let colon = if tail.is_empty() { "" } else { ": " };
    Err(Failure::new(Code::Internal, "EXEC_FAILED", format_args!("`{program}` ended with {status}{colon}{tail}")))
}

/// A program that is killed and reaped if its item ends before it does.
struct Running {
    program: Child,
    reaped: bool,
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.reaped {
            return;
        }
        self.signal(Signal::KILL);
        let _ = self.program.wait();
    }
}

/// SIGTERM, which is blocked here, as something to be polled.
struct Orders(SignalFd);

impl Orders {
    fn new() -> Result<Self, Errno> {
        let mut mask = SigSet::empty();
        mask.add(signal::Signal::SIGTERM);
        let fd = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK);
        Ok(Orders(fd.map_err(|error| Errno::from_raw_os_error(error as i32))?))
    }

    /// Whether the supervisor says that this worker shall end. Others send SIGTERM to everybody: it decides what that means.
    fn to_end(&self) -> bool {
        let supervisor = getppid().map(|pid| pid.as_raw_nonzero().get().unsigned_abs());
        matches!(self.0.read_signal(), Ok(Some(signal)) if Some(signal.ssi_pid) == supervisor)
    }
}

impl Running {
    /// To all of a pipeline, not only its shell. It fails if nobody is left, which is just as well.
    fn signal(&self, signal: Signal) {
        if let Some(group) = Pid::from_raw(self.program.id().cast_signed()) {
            let _ = kill_process_group(group, signal);
        }
    }

    /// Ends the program and then this worker: the item is to be given to another, or to fail.
    fn end(&self, exit: &OwnedFd) -> ! {
        self.signal(Signal::TERM);
        let _ = poll(&mut [PollFd::new(exit, PollFlags::IN)], Some(&LAST_WORDS));
        self.signal(Signal::KILL);
        process::die()
    }

    /// Feeds stdin and reads the other two until both are closed and the program has ended. What it has started may hold them
    /// open for longer than it runs.
    fn pump(&mut self, item: &Item<'_>, reply: &mut Reply<'_, '_>, tail: &mut Vec<u8>) -> Result<(), Failure> {
        let mut stdin = self.program.stdin.take();
        let mut stdout = self.program.stdout.take();
        let mut stderr = self.program.stderr.take();
        let pipes =
            [stdin.as_ref().map(AsFd::as_fd), stdout.as_ref().map(AsFd::as_fd), stderr.as_ref().map(AsFd::as_fd)];
        for pipe in pipes.into_iter().flatten() {
            let flags = fcntl_getfl(pipe).map_err(io::Error::from)?;
            fcntl_setfl(pipe, flags | OFlags::NONBLOCK).map_err(io::Error::from)?;
        }
        // It is not reaped yet, so its pid is its own.
        let pid = Pid::from_raw(self.program.id().cast_signed()).ok_or(io::Error::from(Errno::SRCH))?;
        let exit = pidfd_open(pid, PidfdFlags::empty()).map_err(io::Error::from)?;
        let mut running = true;
        let orders = Orders::new().map_err(io::Error::from)?;
        let mut input = item.payload();
        let mut buffer = [0; 64 << 10];
        while running || stdout.is_some() || stderr.is_some() {
            if input.is_empty() {
                stdin = None;
            }
            let mut polls = Vec::with_capacity(5);
            polls.push(PollFd::new(&orders.0, PollFlags::IN));
            // Last words are read after the end, which then need not be told again.
            polls.extend(running.then(|| PollFd::new(&exit, PollFlags::IN)));
            polls.extend(stdin.as_ref().map(|fd| PollFd::new(fd, PollFlags::OUT)));
            polls.extend(stdout.as_ref().map(|fd| PollFd::new(fd, PollFlags::IN)));
            polls.extend(stderr.as_ref().map(|fd| PollFd::new(fd, PollFlags::IN)));
            match poll(&mut polls, Some(&CANCEL_CHECK)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(io::Error::from(error).into()),
            }
            running = running && polls[1].revents().is_empty();
            drop(polls);
            if orders.to_end() {
                self.end(&exit);
            }
            if let Some(failure) = item.given_up() {
                return Err(failure);
            }
            if let Some(pipe) = &mut stdin {
                match pipe.write(input) {
                    Ok(n) => input = &input[n..],
                    // It need not read all that it is given.
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => stdin = None,
                    Err(error) => again(error)?,
                }
            }
            if let Some(n) = read(&mut stdout, &mut buffer)? {
                reply.write(&buffer[..n])?;
            }
            if let Some(n) = read(&mut stderr, &mut buffer)? {
                tail.extend_from_slice(&buffer[..n]);
                tail.drain(..tail.len().saturating_sub(TAIL));
            }
        }
        Ok(())
    }
}

/// Reads what is there; a pipe at its end becomes None.
fn read<P: Read>(pipe: &mut Option<P>, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    let Some(open) = pipe else { return Ok(None) };
    match open.read(buffer) {
        Ok(0) => {
            *pipe = None;
            Ok(None)
        }
        Ok(n) => Ok(Some(n)),
        Err(error) => again(error).map(|()| None),
    }
}

fn again(error: io::Error) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(()),
        _ => Err(error),
    }
}
