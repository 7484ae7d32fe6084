//! The supervisor's side: what a dead process held is given back.
//!
//! A sweep is only made after the proof of death (the pidfd fired), so nobody else may write what it writes. Each of
//! its steps is one store, and running it again, by whoever takes over from a supervisor that died in the middle,
//! does nothing twice: an item that was given back is no longer CLAIMED by the dead, and one that is filed as a dead letter
//! before it is completed is not filed again.

use std::sync::atomic::Ordering::*;

use super::{Bells, DeadLetters, Death, Failure, Phase, SUPERVISOR, Topology, Word, lanes, request};
use crate::{
    crash_point::crash_point,
    ring::Hint,
    segment::{INLINE, ItemRecord, Segment},
};

/// What a sweep found: the items that the dead worker held.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// The dead worker's items, in the order of the item table.
    pub items: Vec<SweptItem>,
}

/// An item that a dead worker held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SweptItem {
    /// Which item it is.
    pub key: ItemKey,
    /// The client's id of it.
    pub id: u64,
    /// How many workers had been given it, the dead one included.
    pub attempt: u32,
    /// What becomes of it.
    pub fate: Fate,
}

/// Tells an item from all others, over all its attempts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ItemKey {
    /// Its record.
    pub index: u32,
    /// When it was offered.
    pub offered: u64,
}

/// What becomes of an item that a dead worker held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Other workers may claim it again.
    Retried,
    /// It was completed with a failure, being out of attempts.
    Failed,
    /// It was completed with a failure, because its client had given it up.
    Cancelled,
}

impl Swept {
    /// Returns how many items other workers may claim again.
    pub fn requeued(&self) -> usize {
        self.items.iter().filter(|item| item.fate == Fate::Retried).count()
    }

    /// Returns how many items were completed with a failure.
    pub fn failed(&self) -> usize {
        self.items.len() - self.requeued()
    }
}

/// Gives back what a dead worker had claimed. An item that had `max_attempts` is a dead letter, and fails.
pub fn sweep_worker(
    segment: &Segment,
    topology: &Topology,
    bells: &Bells,
    death: &Death,
    max_attempts: u32,
    letters: &mut DeadLetters,
) -> Swept {
    let Death { worker, ref failure, .. } = *death;
    let mut swept = Swept::default();
    if let Some(pool) = topology.pool_of(worker) {
        // It sleeps no more: let nobody ring it in vain.
        segment.idle(pool).leave(usize::from(worker - topology.workers(pool).0));
        crash_point!("sweep.left");
    }
    for index in 0..segment.geometry().items {
        let record = segment.item(index);
        let word = Word::load(&record.word);
        if word.phase() != Phase::Claimed || word.owner() != worker {
            continue;
        }
        let cancelled = record.is_cancelled(word.generation());
        // A worker that scribbled over the word must not take the supervisor along.
        let is_broken = u32::from(word.lane()) >= lanes(segment);
        let was_last = u32::from(word.attempts()) + 1 >= max_attempts;
        if was_last && !is_broken {
            letters.file(segment, index, word, death);
        }
        let fate = match (is_broken || was_last, cancelled) {
            (true, _) => Fate::Failed,
            (false, true) => Fate::Cancelled,
            (false, false) => Fate::Retried,
        };
        let key = ItemKey { index, offered: record.offered.load(Relaxed) };
        swept.items.push(SweptItem { key, id: record.id.load(Relaxed), attempt: u32::from(word.attempts()) + 1, fate });
        if fate != Fate::Retried {
            fail(record, word, failure);
        } else {
            let ready = word.requeued();
            letters.retry(index, record, word, ready, death);
            ready.store(&record.word, word);
            crash_point!("sweep.ready");
            let hint = Hint { index, generation: ready.generation() };
            // If it is full of stale hints, the front finds the item when it looks through its own, below.
            let _ = segment.lane(ready.lane().into()).push(hint);
            crash_point!("sweep.pushed");
        }
    }
    letters.forget_completed(segment);
    // It may have completed items without telling their fronts, or have been woken for work it did not take.
    for front in 0..segment.geometry().fronts {
        // I2: pairs with I2' in the front's scan.
        segment.rescan(front as u16).fetch_or(1, Release);
    }
    crash_point!("sweep.told");
    bells.ring_all();
    crash_point!("sweep.rung");
    swept
}

/// Completes an item with a failure, in a dead worker's stead.
pub(super) fn fail(record: &ItemRecord, word: Word, failure: &Failure) {
    let mut text = failure.encode();
    text.truncate(INLINE);
    record.result.store(&text);
    record.result_len.store(text.len() as u32, Relaxed);
    record.code.store(failure.code.into(), Relaxed);
    let now = crate::process::now();
    record.claimed.store(now, Relaxed);
    record.done.store(now, Relaxed);
    crash_point!("sweep.written");
    let done = Word::new(word.generation(), word.lane(), SUPERVISOR, Phase::Done, word.attempts().saturating_add(1));
    done.store(&record.word, word);
    crash_point!("sweep.done");
}

/// Cleans up after a dead front: hints of its items may be missing, which its successor mends in
/// [`super::Front::attach`]; what its calls' handlers still do is told to stop.
pub fn sweep_front(segment: &Segment, bells: &Bells, number: u16) {
    let (first, count) = request::share(segment, number);
    for index in first..first + count {
        let record = segment.item(index);
        let word = Word::load(&record.word);
        if word.phase() == Phase::Claimed && !request::is_submitted(record) {
            record.cancel(word.generation());
            crash_point!("sweep.cancelled");
        }
    }
    bells.ring_all();
    crash_point!("sweep.front");
}
