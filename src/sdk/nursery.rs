//! A nursery: a program that loads what takes long once, and forks workers that share it. It must have one thread.
//!
//! ```text
//! nursery ─ fork ─> middle ─ fork ─> worker        the middle ends at once, and the worker is the supervisor's child
//! ```
//!
//! # What it promises
//!
//! - Workers are children of the supervisor like any other: it reaps them, and the nursery's death does nothing to them.
//! - A worker touches nothing of the server before the supervisor knows its pid.
//!
//! # Why that holds
//!
//! The supervisor adopts orphans, so the end of the middle makes it the worker's parent. The worker waits for
//! a word from the nursery. The nursery has waited for the middle, has sent the pid and heard that the supervisor knows it when
//! it gives that word; if it dies before, or hears the opposite, the worker reads the end of a pipe, and ends.
//!
//! The forks are the program's own, because an interpreter has something to do about them.

use std::{
    collections::BTreeMap,
    env, fs, io,
    os::{
        fd::{OwnedFd, RawFd},
        unix::net::UnixDatagram,
    },
    sync::PoisonError,
};

use super::{AttachError, HERITAGE, Heritage};
use crate::{
    contract::{
        ContractError,
        nursery::{self, News, Order, VARIABLE},
    },
    crash_point::crash_point,
    process,
};

/// The longest order: what a Unix socket sends by default.
const LONGEST: usize = 1 << 18;

/// A process that is a nursery, or a worker that it has just forked.
#[derive(Debug)]
pub struct Nursery {
    socket: UnixDatagram,
    /// By the numbers that contracts call them.
    inherited: BTreeMap<RawFd, OwnedFd>,
    order: Option<Order>,
    pool: String,
}

impl Nursery {
    /// Takes up what the server that started this process has left for it.
    pub fn from_env() -> Result<Self, AttachError> {
        let text = env::var(VARIABLE).map_err(|_| AttachError::NoServer(VARIABLE))?;
        let contract = nursery::Nursery::from_text(&text)?;
        if !process::die_with_supervisor(contract.supervisor)? {
            return Err(AttachError::NotItsChild);
        }
        let _ = fs::write("/proc/self/comm", &contract.name);
        let take = |fd: &RawFd| Ok((*fd, process::inherited(*fd)?));
        Ok(Nursery {
            socket: process::inherited(contract.socket)?.into(),
            inherited: contract.inherited.iter().map(take).collect::<io::Result<_>>()?,
            order: None,
            pool: contract.pool,
        })
    }

    /// Shows in `ps` what this process is: the zygote of its pool, and after [`Nursery::wait`] and the forks the worker that was
    /// wanted. It is for programs that have no better title. A process that cannot have one goes on without.
    pub fn set_title(&self, is_worker: bool) {
        let title = match self.order.as_ref().filter(|_| is_worker) {
            Some(order) => process::worker_title(order.contract.worker, &order.contract.pool),
            None => format!("forkring: zygote {}", self.pool),
        };
        super::show(&title);
    }

    /// Says that all is loaded.
    pub fn ready(&self) -> io::Result<()> {
        self.tell(&News::Ready)?;
        crash_point!("sdk.ready");
        Ok(())
    }

    /// Waits until a worker is wanted. It never ends in vain: the nursery is killed when no more are.
    pub fn wait(&mut self) -> Result<(), AttachError> {
        let order = serde_json::from_slice(&self.hear()?);
        crash_point!("sdk.ordered");
        self.order = Some(order.map_err(|error| ContractError::Malformed { variable: "an order", error })?);
        Ok(())
    }

    /// Says that the worker is there, and the supervisor's child. Whether the supervisor knows it now: if not, it must end, and
    /// another will be wanted.
    pub fn born(&self, pid: u32) -> io::Result<bool> {
        crash_point!("sdk.forked");
        self.tell(&News::Born(pid))?;
        crash_point!("sdk.born");
        Ok(serde_json::from_slice(&self.hear()?)?)
    }

    /// Says why it is not.
    pub fn stillborn(&self, why: &str) -> io::Result<()> {
        self.tell(&News::Stillborn(why.to_owned()))
    }

    fn hear(&self) -> io::Result<Vec<u8>> {
        let mut text = vec![0; LONGEST];
        loop {
            match self.socket.recv(&mut text) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                received => {
                    text.truncate(received?);
                    return Ok(text);
                }
            }
        }
    }

    fn tell(&self, news: &News) -> io::Result<()> {
        self.socket.send(&serde_json::to_vec(news)?).map(|_| ())
    }

    /// In the worker, once it has the word: ties it to the supervisor and sets it up. The variables that it is to have in its
    /// environment, which are the program's to set.
    pub fn settle_in(&self) -> Result<Vec<(String, String)>, AttachError> {
        let order = self.order.as_ref().ok_or(AttachError::Mismatch)?;
        if !process::die_with_supervisor(order.contract.supervisor)? {
            return Err(AttachError::NotItsChild);
        }
        let _ = fs::write("/proc/self/comm", format!("forkring-w{}", order.contract.worker));
        crash_point!("sdk.settled");
        order.cpu.map_or(Ok(()), process::keep_to)?;
        order.memory.map_or(Ok(()), process::limit_memory)?;
        Ok(order.variables.clone())
    }

    /// In the worker: leaves what [`Attached::from_env`](super::Attached::from_env) takes up. What it has no use for is closed.
    pub fn hand_over(mut self) -> Result<(), AttachError> {
        let Order { contract, .. } = self.order.take().ok_or(AttachError::Mismatch)?;
        let missing = || io::Error::other("the server names a descriptor that it did not hand on");
        let mut take = |number: RawFd| Ok((number, self.inherited.remove(&number).ok_or_else(missing)?));
        let fds = contract.fds().map(&mut take).collect::<io::Result<_>>()?;
        *HERITAGE.lock().unwrap_or_else(PoisonError::into_inner) = Heritage::Taken(Box::new(contract), fds);
        Ok(())
    }
}
