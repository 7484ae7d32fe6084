//! A child that runs as far as it is told.

use std::{mem::offset_of, ptr::without_provenance_mut};

use forkring::process::{self, Child};
use nix::{
    libc,
    sys::{
        ptrace,
        signal::{Signal, raise},
        wait::{WaitStatus, waitpid},
    },
    unistd::Pid,
};

/// See the module.
pub struct Stepped {
    child: Child,
    pid: Pid,
}

/// The instructions that a child went through, by their addresses.
pub struct Trace(Vec<u64>);

impl Trace {
    /// How many there were.
    pub fn len(&self) -> usize {
        self.0.len()
    }
}

impl Stepped {
    /// Forks a child that runs `prepare`, and stops before it runs `body` with what that gave.
    pub fn fork<T>(prepare: impl FnOnce() -> T, body: impl FnOnce(&mut T)) -> Self {
        let child = process::fork("stepped", || {
            let mut prepared = prepare();
            ptrace::traceme().expect("nobody traces us yet");
            raise(Signal::SIGSTOP).expect("a signal to ourselves");
            body(&mut prepared);
            raise(Signal::SIGSTOP).expect("a signal to ourselves");
            0
        });
        let child = child.unwrap_or_else(|error| panic!("{error}"));
        let stepped = Stepped { pid: Pid::from_raw(child.pid().cast_signed()), child };
        assert!(!stepped.goes_on(), "it stops before its body");
        stepped
    }

    /// Waits until it stops; false if by itself.
    fn goes_on(&self) -> bool {
        match waitpid(self.pid, None).expect("our child") {
            WaitStatus::Stopped(_, Signal::SIGTRAP) => true,
            WaitStatus::Stopped(_, Signal::SIGSTOP) => false,
            other => panic!("the child ended: {other:?}"),
        }
    }

    fn step(&self) -> bool {
        ptrace::step(self.pid, None).expect("a stopped child");
        self.goes_on()
    }

    /// Steps to the end.
    pub fn trace(&self) -> Trace {
        let mut trace = Vec::new();
        loop {
            trace.push(ptrace::getregs(self.pid).expect("a stopped child").rip);
            if !self.step() {
                return Trace(trace);
            }
        }
    }

    /// Runs the first `n` instructions of a trace: by a breakpoint at the next one, which holds as often as the trace
    /// comes by there. False if it went another way and is at its end.
    pub fn run(&self, trace: &Trace, n: usize) -> bool {
        // Before the first step a breakpoint may be where it stands.
        if n == 0 || !self.step() || n == 1 {
            return true;
        }
        let next = trace.0[n];
        let debug_register = |i: usize| without_provenance_mut(offset_of!(libc::user, u_debugreg) + 8 * i);
        ptrace::write_user(self.pid, debug_register(0), next.cast_signed()).expect("a debug register");
        // Enabled, for execution.
        ptrace::write_user(self.pid, debug_register(7), 1).expect("a debug register");
        trace.0[2..=n].iter().filter(|address| **address == next).all(|_| {
            ptrace::cont(self.pid, None).expect("a stopped child");
            self.goes_on()
        })
    }

    /// Kills it where it is, and has `sweep` done between the proof of its death and its burial.
    pub fn kill(self, sweep: impl FnOnce()) {
        self.child.kill().expect("our child");
        self.child.peek().expect("our child");
        sweep();
        self.child.reap().expect("our child");
    }
}
