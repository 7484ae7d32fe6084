//! The words for a death: the one place that says how a process died and what becomes of its items.
//!
//! The log, the dead letters and the failures of items use the same words, so that a reader can search for one of them and
//! find the others.

use std::{fmt, os::unix::process::ExitStatusExt as _, process::ExitStatus, time::Duration};

use nix::sys::signal::Signal;
use tonic::Code;

use crate::dispatch::{Failure, Fate, SweptItem};

/// How many of a worker's items a line names.
const NAMED: usize = 3;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    Exit(i32),
    Signal(i32),
    /// The supervisor ended it because it took longer for an item than this.
    ItemTimeout(Duration),
}

impl Cause {
    /// Reads an exit status. `item_timeout` is the limit for which the supervisor ended the process, if it did.
    pub(super) fn new(status: ExitStatus, item_timeout: Option<Duration>) -> Self {
        match (item_timeout, status.signal()) {
            (Some(limit), _) => Cause::ItemTimeout(limit),
            (None, Some(signal)) => Cause::Signal(signal),
            (None, None) => Cause::Exit(status.code().unwrap_or(0)),
        }
    }

    /// Returns the failure of an item whose last attempt ended by this worker's death. It must be short: it travels in the
    /// item's record, which has room for [`INLINE`](crate::segment::INLINE) bytes. The dead letter says the rest.
    pub(super) fn failure(self, worker: u16) -> Failure {
        let (code, reason) = match self {
            Cause::ItemTimeout(_) => (Code::DeadlineExceeded, "ITEM_TIMEOUT"),
            Cause::Exit(_) | Cause::Signal(_) => (Code::Aborted, "WORKER_CRASHED"),
        };
        Failure::new(code, reason, format_args!("worker {worker} died: {self}"))
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::Exit(code) => write!(f, "exit code {code}"),
            Cause::Signal(number) => match Signal::try_from(*number) {
                Ok(signal) => write!(f, "killed by {signal}"),
                Err(_) => write!(f, "killed by signal {number}"),
            },
            Cause::ItemTimeout(limit) => write!(f, "ended after --item-timeout {limit:?}"),
        }
    }
}

/// A process of the server, by its role.
#[derive(Clone, Copy, Debug)]
pub(super) enum Process<'a> {
    Front { number: u16, pid: u32 },
    Worker { number: u16, pool: &'a str, pid: u32 },
    Zygote { pool: &'a str, pid: u32 },
}

impl fmt::Display for Process<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Process::Front { number, pid } => write!(f, "front {number} (pid {pid})"),
            Process::Worker { number, pool, pid } => write!(f, "worker {number} (pool {pool:?}, pid {pid})"),
            Process::Zygote { pool, pid } => write!(f, "the zygote of pool {pool:?} (pid {pid})"),
        }
    }
}

/// The items that a worker held when it died, and what becomes of them.
pub(super) struct Items<'a> {
    pub items: &'a [SweptItem],
    pub max_attempts: u32,
}

impl fmt::Display for Items<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (nth, item) in self.items.iter().take(NAMED).enumerate() {
            let lead = if nth == 0 { "; its item" } else { ", item" };
            let fate = match item.fate {
                Fate::Retried => "is retried",
                Fate::Failed => "fails",
                Fate::Cancelled => "was cancelled",
            };
            write!(f, "{lead} {} {fate} (attempt {} of {})", item.id, item.attempt, self.max_attempts)?;
        }
        match self.items.len().saturating_sub(NAMED) {
            0 => Ok(()),
            more => write!(f, ", and {more} more"),
        }
    }
}

/// The items that a living worker holds, by the ids of their clients.
pub(super) struct Held<'a>(pub &'a [u64]);

impl fmt::Display for Held<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [] => write!(f, "item"),
            [id] => write!(f, "item {id}"),
            [first, others @ ..] => {
                write!(f, "item, one of {first}")?;
                others.iter().take(NAMED - 1).try_for_each(|id| write!(f, ", {id}"))?;
                match self.0.len().saturating_sub(NAMED) {
                    0 => Ok(()),
                    more => write!(f, " and {more} more"),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{dispatch::ItemKey, segment::INLINE};

    #[test]
    fn a_cause_is_told_in_the_same_words_everywhere() {
        let second = Duration::from_secs(1);
        for (raw, timeout, says) in [
            (0, None, "exit code 0"),
            (3 << 8, None, "exit code 3"),
            (9, None, "killed by SIGKILL"),
            (11, None, "killed by SIGSEGV"),
            (40, None, "killed by signal 40"),
            (9, Some(5 * second), "ended after --item-timeout 5s"),
            (15, Some(second / 4), "ended after --item-timeout 250ms"),
        ] {
            let cause = Cause::new(ExitStatus::from_raw(raw), timeout);
            assert_eq!(cause.to_string(), says);
            let failure = cause.failure(255);
            assert_eq!(failure.message, format!("worker 255 died: {says}"));
            assert!(failure.encode().len() <= INLINE, "{failure:?}");
            let reason = if timeout.is_some() { "ITEM_TIMEOUT" } else { "WORKER_CRASHED" };
            assert_eq!(failure.reason, reason);
        }
    }

    #[test]
    fn processes_are_named_by_their_roles() {
        assert_eq!(Process::Front { number: 0, pid: 7 }.to_string(), "front 0 (pid 7)");
        let worker = Process::Worker { number: 3, pool: "hash", pid: 123 };
        assert_eq!(worker.to_string(), "worker 3 (pool \"hash\", pid 123)");
        assert_eq!(Process::Zygote { pool: "a", pid: 7 }.to_string(), "the zygote of pool \"a\" (pid 7)");
    }

    #[test]
    fn a_worker_holds_an_item_or_one_of_several() {
        for (ids, says) in [
            (&[][..], "item"),
            (&[17], "item 17"),
            (&[17, 18], "item, one of 17, 18"),
            (&[17, 18, 19], "item, one of 17, 18, 19"),
            (&[17, 18, 19, 20, 21], "item, one of 17, 18, 19 and 2 more"),
        ] {
            assert_eq!(Held(ids).to_string(), says);
        }
    }

    #[test]
    fn a_few_items_are_named_and_the_others_counted() {
        let item = |id, fate| SweptItem { key: ItemKey { index: 0, offered: id }, id, attempt: 1, fate };
        let items: Vec<_> = [
            item(17, Fate::Retried),
            item(18, Fate::Failed),
            item(19, Fate::Cancelled),
            item(20, Fate::Retried),
            item(21, Fate::Retried),
        ]
        .into();
        let text = |count: usize| Items { items: &items[..count], max_attempts: 3 }.to_string();
        assert_eq!(text(0), "");
        assert_eq!(text(1), "; its item 17 is retried (attempt 1 of 3)");
        assert_eq!(text(2), "; its item 17 is retried (attempt 1 of 3), item 18 fails (attempt 1 of 3)");
        assert!(text(5).ends_with(", item 19 was cancelled (attempt 1 of 3), and 2 more"), "{}", text(5));
    }
}
