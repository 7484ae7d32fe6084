//! What a worker waits for in the middle of an item: room for its result, and credit for the next partial one.
//!
//! Either borrows nothing of the worker, so that it can be waited for without a lock that guards that, such as an
//! interpreter's. No wake is lost, as with all who sleep: the worker shows that it sleeps before it looks for the last time,
//! and the front looks for sleepers after it has given anything back.

use std::{io, sync::Arc, sync::atomic::Ordering::Relaxed, time::Duration};

use super::{
    Bells,
    output::{Lent, Target},
};
use crate::{
    process::now,
    segment::{Segment, Slot, Stage},
};

/// Who waits.
pub(super) struct Waiter<'s> {
    pub segment: &'s Segment,
    pub bells: Arc<Bells>,
    pub worker: u16,
}

impl Waiter<'_> {
    fn wait(&self, is_there: impl FnOnce() -> bool, at_most: Option<Duration>) -> io::Result<()> {
        let door = self.segment.sleeping(Slot::Worker(self.worker));
        let bell = self.bells.worker(self.worker);
        door.enter(0);
        let slept = match at_most {
            _ if is_there() => Ok(()),
            None => bell.wait(),
            Some(time) => bell.wait_at_most(time),
        };
        door.leave(0);
        slept
    }
}

/// What a worker waits for that may not send another partial result yet: that its front has taken one.
pub struct Credit<'s> {
    pub(super) waiter: Waiter<'s>,
    pub(super) target: Target<'s>,
    pub(super) number: u32,
}

impl Credit<'_> {
    /// Whether it is worth trying again: there is credit, or there never will be.
    pub fn is_there(&self) -> bool {
        self.target.has_credit(self.number)
            || self.target.end().is_some()
            || self.waiter.segment.stage() == Stage::Stopping
    }

    /// Sleeps until it may be worth trying again.
    pub fn wait(&self) -> io::Result<()> {
        let deadline = self.target.record.deadline.load(Relaxed);
        let left = (deadline != 0).then(|| Duration::from_nanos(deadline.saturating_sub(now())));
        self.waiter.wait(|| self.is_there(), left)
    }
}

/// What a worker waits for that has no memory for a result: that its front has released one.
pub struct Room<'s> {
    pub(super) waiter: Waiter<'s>,
    /// The item, if results of its own are in the way.
    pub(super) own: Option<Target<'s>>,
    /// All that there are.
    pub(super) results: Vec<Lent>,
    pub(super) left: Duration,
}

impl Room<'_> {
    /// Sleeps until it may be worth trying again.
    pub fn wait(&self) -> io::Result<()> {
        let is_over = || self.own.as_ref().and_then(Target::end).is_some();
        let is_released = || self.results.iter().any(|lent| lent.is_released(self.waiter.segment));
        self.waiter.wait(|| is_over() || is_released(), Some(self.left))
    }
}
