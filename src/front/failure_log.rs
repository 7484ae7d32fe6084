//! Logs failed items (`--log-failures`), a bounded number of them a second.
//!
//! An item's client learns why the item failed in any case. The log is for the operator of the server and says which items fail, in
//! which pool, at which worker. A handler that fails for every item must not fill a disk: in each second only the first
//! [`LINES`] failures have a line, and one more line counts the others.

use std::{cell::RefCell, rc::Rc, time::Duration};

use tokio::{task::spawn_local, time::sleep};

use super::{output, status::Refusal};
use crate::{
    dispatch::{Completion, Front, Outcome, SUPERVISOR},
    process::now,
    segment::INLINE,
};

/// The number of failures that have lines of their own in a [`WINDOW`].
const LINES: u32 = 10;
/// The length of a window in nanoseconds, the unit of [`now`].
const WINDOW: u64 = 1_000_000_000;
/// Reasons that blame no handler: the client cancelled the item or gave it too little time.
const OF_CLIENTS: [&str; 2] = ["CANCELLED", "DEADLINE_EXCEEDED"];

/// The limiter's decision about a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// The failure has a line of its own.
    Write,
    /// The failure is only counted. `first` is true for the first one since the count was written, so that the caller
    /// schedules the next count.
    Count { first: bool },
}

/// Decides which failures have lines. A window begins with the first failure after the last one has ended.
#[derive(Debug, Default)]
struct Limiter {
    window_ends: u64,
    written: u32,
    counted: u64,
}

impl Limiter {
    fn admit(&mut self, now: u64) -> Verdict {
        if now >= self.window_ends {
            (self.window_ends, self.written) = (now.saturating_add(WINDOW), 0);
        }
        if self.written < LINES {
            self.written += 1;
            return Verdict::Write;
        }
        self.counted += 1;
        Verdict::Count { first: self.counted == 1 }
    }

    /// Takes the number of failures that were only counted since the last time.
    fn take_counted(&mut self) -> u64 {
        std::mem::take(&mut self.counted)
    }
}

/// Logs failed items.
#[derive(Debug, Default)]
pub struct FailureLog(RefCell<Limiter>);

impl FailureLog {
    /// Logs a completed item if its handler or its worker failed.
    pub fn log(self: &Rc<Self>, completion: &Completion, front: &Front<'_>, pools: &[String]) {
        if completion.outcome == Outcome::Success {
            return;
        }
        let mut line = [0; INLINE];
        let inline = front.inline_result(completion, &mut line);
        let result = inline.or_else(|| front.arena_result(completion)).unwrap_or_default();
        let Some(failure) = output::failure(completion, result) else { return };
        if OF_CLIENTS.contains(&&*failure.reason) {
            return;
        }
        let now = now();
        let verdict = self.0.borrow_mut().admit(now);
        match verdict {
            Verdict::Write => write(completion, &failure, front, pools),
            Verdict::Count { first: false } => {}
            Verdict::Count { first: true } => {
                let rest = self.0.borrow().window_ends.saturating_sub(now);
                let log = self.clone();
                spawn_local(async move {
                    sleep(Duration::from_nanos(rest)).await;
                    log.write_count();
                });
            }
        }
    }

    fn write_count(&self) {
        let count = self.0.borrow_mut().take_counted();
        if count > 0 {
            tracing::warn!(count, "more items failed, which have no lines of their own");
        }
    }
}

/// Writes the count of an unfinished window when the front ends.
impl Drop for FailureLog {
    fn drop(&mut self) {
        self.write_count();
    }
}

fn write(completion: &Completion, failure: &Refusal, front: &Front<'_>, pools: &[String]) {
    let pool = pools.get(usize::from(front.pool(completion.index))).map_or("", String::as_str);
    // The supervisor completes an item whose workers have all died; then there is no worker to name.
    let worker = (completion.worker != SUPERVISOR).then_some(completion.worker);
    // Text fields are quoted, so that a handler's message cannot break the line.
    let (reason, error) = (&*failure.reason, &*failure.message);
    let (at, traceback) = (last_frame(&failure.traceback), last_line(&failure.traceback));
    let attempts = completion.attempts;
    tracing::warn!(item = completion.id, pool, worker, attempts, reason, error, at, traceback, "an item failed");
}

/// Returns the line of a Python traceback that says where the exception was raised.
fn last_frame(traceback: &str) -> Option<&str> {
    traceback.lines().map(str::trim).rfind(|line| line.starts_with("File \""))
}

/// Returns the last line of a traceback that has anything in it: of a Python traceback, the exception.
fn last_line(traceback: &str) -> Option<&str> {
    traceback.lines().map(str::trim).rfind(|line| !line.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_lines_a_second_and_the_rest_is_counted() {
        const MS: u64 = WINDOW / 1000;
        let mut limiter = Limiter::default();
        // At each of these milliseconds: how many failures come, how many are written, and whether one of them is the first that is
        // counted.
        for (at, come, written, is_first) in [
            (0, 1, 1, false),
            (1, 8, 8, false),
            (500, 3, 1, true),
            (999, 100, 0, false),
            // The next window begins with the first failure after it, and not on the dot.
            (1300, 10, 10, false),
            (2299, 1, 0, false),
            (2300, 11, 10, false),
        ] {
            let verdicts: Vec<_> = (0..come).map(|_| limiter.admit(at * MS + 7)).collect();
            assert_eq!(verdicts.iter().filter(|verdict| **verdict == Verdict::Write).count(), written, "{at}");
            assert_eq!(verdicts.contains(&Verdict::Count { first: true }), is_first, "{at}");
        }
        assert_eq!(limiter.take_counted(), 2 + 100 + 1 + 1);
        assert_eq!(limiter.take_counted(), 0);
        assert_eq!(limiter.admit(2301 * MS), Verdict::Count { first: true });
        assert_eq!(limiter.admit(u64::MAX), Verdict::Write, "a window's end does not overflow");
    }

    #[test]
    fn of_a_traceback_the_last_frame_and_the_last_line_are_shown() {
        let python = "Traceback (most recent call last):\n  File \"a.py\", line 1, in a\n    b()\n  File \"b.py\", line 2, in b\n    \
                      raise ValueError(7)\nValueError: 7\n\n";
        for (traceback, frame, line) in [
            ("", None, None),
            (" \n\n", None, None),
            ("one line", None, Some("one line")),
            (python, Some("File \"b.py\", line 2, in b"), Some("ValueError: 7")),
        ] {
            assert_eq!((last_frame(traceback), last_line(traceback)), (frame, line));
        }
    }
}
