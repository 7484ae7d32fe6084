//! Dispatch: offer, claim, complete, collect, sweep.
//!
//! # What it promises
//!
//! An item whose offer returned Ok is *accepted*: it is executed at least once and completed exactly once while the
//! server lives, or taken back by its own front. A process that dies at any instruction blocks nobody, and
//! [`sweep_worker`] gives back what it held.
//!
//! # Why that holds
//!
//! **The item table is the truth.** An item's word ([`Word`]) alone says whose it is, and each transition of it is one
//! atomic write. Lanes and return rings carry hints about the table, made after the transition they tell of; a stale
//! or doubled hint fails the check against the word, and a lost one is found by scanning the table, which the
//! successor of a dead process does. Allocators and free lists are private to one process and are rebuilt from the
//! table.
//!
//! | record half | written by | while |
//! |---|---|---|
//! | request | front | FREE (before READY is stored) |
//! | result | the claiming worker; the supervisor after the worker's death | CLAIMED (before DONE is stored) |
//! | slots of partial results, there | the claiming worker fills, the front empties | CLAIMED; the front also while DONE |
//! | word | see [`Word`] | |

mod adopt;
mod failure;
mod front;
mod letters;
mod mend;
pub mod metadata;
mod open;
mod output;
mod partial;
mod reply;
mod request;
mod sweep;
#[cfg(test)]
mod tests;
mod waiting;
mod word;
mod worker;

pub use adopt::{Left, adopt, held_by, holders, unanswered};
pub use failure::Failure;
pub(crate) use failure::POOL_FAILING;
pub use front::{Adopted, Broken, Completion, Front, Outcome, Partial};
pub use letters::{DeadLetters, Death};
pub use mend::{begin_lanes, mend};
pub use open::Open;
pub use output::Hold;
pub use reply::{Reply, ReplyError};
pub use request::{Kind, Offer, OfferError, Request};
pub use sweep::{Fate, ItemKey, Swept, SweptItem, sweep_front, sweep_worker};
pub use waiting::{Credit, Room};
pub use word::{FRONT, Phase, SUPERVISOR, Word};
pub use worker::{Claimed, Item, Worker};

use std::{
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
    sync::Arc,
};

use crate::{
    crash_point::crash_point,
    doorbell::Bell,
    segment::{PRIORITIES, Segment, Slot},
};

/// The pools of a server and which worker slots are theirs. Private memory, the same in every process of a server.
#[derive(Clone, Debug, Default)]
pub struct Topology {
    pools: Vec<(u16, u16)>,
}

impl Topology {
    /// Of pools with so many workers each.
    pub fn new(workers: impl IntoIterator<Item = u16>) -> Self {
        let mut first = 0;
        let pools = workers.into_iter().map(|count| {
            first += count;
            (first - count, count)
        });
        Topology { pools: pools.collect() }
    }

    /// The first worker of a pool and their number.
    #[inline]
    pub fn workers(&self, pool: u16) -> (u16, u16) {
        self.pools[usize::from(pool)]
    }

    /// How many pools there are.
    pub fn pools(&self) -> u16 {
        self.pools.len() as u16
    }

    /// How many workers each pool has.
    pub(crate) fn counts(&self) -> Vec<u16> {
        self.pools.iter().map(|(_, count)| *count).collect()
    }

    /// The pool of a worker.
    pub fn pool_of(&self, worker: u16) -> Option<u16> {
        self.pools.iter().position(|(first, count)| (*first..first + count).contains(&worker)).map(|pool| pool as u16)
    }
}

/// The bells of all participants, inherited over fork and, by number, over exec.
#[derive(Debug)]
pub struct Bells {
    fronts: Vec<Bell>,
    workers: Vec<Bell>,
    end: Bell,
}

impl Bells {
    /// One for each slot.
    pub fn new(fronts: u16, workers: u16) -> std::io::Result<Arc<Self>> {
        Ok(Arc::new(Bells {
            fronts: (0..fronts).map(|_| Bell::pollable()).collect::<Result<_, _>>()?,
            workers: (0..workers).map(|_| Bell::blocking()).collect::<Result<_, _>>()?,
            end: Bell::pollable()?,
        }))
    }

    /// Those that were inherited.
    pub(crate) fn of(fronts: Vec<OwnedFd>, workers: Vec<OwnedFd>, end: OwnedFd) -> Arc<Self> {
        let bells = |fds: Vec<OwnedFd>| fds.into_iter().map(Bell::from).collect();
        Arc::new(Bells { fronts: bells(fronts), workers: bells(workers), end: end.into() })
    }

    /// How many fronts and workers there are.
    pub(crate) fn counts(&self) -> (u32, u32) {
        (self.fronts.len() as u32, self.workers.len() as u32)
    }

    /// The numbers of the fronts' and the workers' descriptors, and of the one that tells of the end.
    pub(crate) fn numbers(&self) -> (Vec<RawFd>, Vec<RawFd>, RawFd) {
        let numbers = |bells: &[Bell]| bells.iter().map(AsRawFd::as_raw_fd).collect();
        (numbers(&self.fronts), numbers(&self.workers), self.end.as_raw_fd())
    }

    /// All descriptors.
    pub(crate) fn fds(&self) -> impl Iterator<Item = &dyn AsFd> {
        self.fronts.iter().chain(&self.workers).chain([&self.end]).map(|bell| bell as &dyn AsFd)
    }

    /// A front's.
    pub fn front(&self, front: u16) -> &Bell {
        &self.fronts[usize::from(front)]
    }

    /// A worker's.
    pub fn worker(&self, worker: u16) -> &Bell {
        &self.workers[usize::from(worker)]
    }

    /// The supervisor's: the server drains. Ring everybody after it.
    pub fn end(&self) {
        ring(&self.end);
    }

    /// Whether the server drains. This is not in the segment: a worker that scribbles there must not end the front.
    pub fn is_end(&self) -> bool {
        self.end.has_rung()
    }

    #[cold]
    fn ring(&self, slot: Slot) {
        match slot {
            Slot::Front(n) => ring(self.front(n)),
            Slot::Worker(n) => ring(self.worker(n)),
            Slot::Supervisor => {}
        }
    }

    /// Rings everybody, whether they sleep or not: after a death, and to drain.
    pub fn ring_all(&self) {
        self.fronts.iter().chain(&self.workers).for_each(ring);
    }
}

/// Rings; a bell can only fail if it is no eventfd, and then there is nobody to tell.
fn ring(bell: &Bell) {
    if let Err(error) = bell.ring() {
        tracing::error!(%error, "cannot ring a doorbell");
    }
    crash_point!("doorbell.rung");
}

/// Wakes one idle worker of a pool, if there is one. Call it after pushing: it has the waker's fence.
#[inline]
pub(crate) fn wake_worker(segment: &Segment, topology: &Topology, bells: &Bells, pool: u16) -> bool {
    let (first, count) = topology.workers(pool);
    let idle = segment.idle(pool);
    while let Some(bit) = idle.wake_one() {
        // A bit of nobody's, that somebody scribbled there, is cleared by that.
        if bit < usize::from(count) {
            ring(bells.worker(first + bit as u16));
            return true;
        }
    }
    false
}

/// Wakes a participant if it sleeps at its door. Call it after publishing what it waits for.
#[inline]
pub(crate) fn wake(segment: &Segment, bells: &Bells, slot: Slot) {
    if segment.sleeping(slot).wake_one().is_some() {
        bells.ring(slot);
    }
}

/// The same, if the caller has made a successful compare-exchange since it published.
#[inline]
pub(crate) fn wake_after_exchange(segment: &Segment, bells: &Bells, slot: Slot) {
    if segment.sleeping(slot).wake_one_after_exchange().is_some() {
        bells.ring(slot);
    }
}

/// The most bytes of a result that are believed: a gRPC message counts in 32 bits and has other fields.
const MAX_RESULT: usize = u32::MAX as usize - (1 << 20);

/// How many lanes there are.
fn lanes(segment: &Segment) -> u32 {
    segment.geometry().pools * PRIORITIES
}

/// Returns whether an item waits in one of a pool's lanes. A hint that is stale counts, too, until a worker clears it.
pub(crate) fn has_waiting(segment: &Segment, pool: u16) -> bool {
    (0..PRIORITIES).any(|priority| !segment.lane(lane_of(pool, priority).into()).is_empty())
}

/// The lane of a pool and priority.
pub(crate) fn lane_of(pool: u16, priority: u32) -> u8 {
    (u32::from(pool) * PRIORITIES + priority) as u8
}
