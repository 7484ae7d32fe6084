//! Where a worker's results go: memory for them, and the completion of their items.
//!
//! A result block may be used again when its item's word is no longer what it was completed with, and a partial result's also
//! when its slot is empty; the front wakes a worker that waits for either.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{Ordering::*, fence},
    },
    time::{Duration, Instant},
};

use super::{
    Bells, Claimed, Kind, Phase, ReplyError, Word,
    partial::{self, Entry, LEAD},
    request::{self, kind_of},
    waiting::{Credit, Room, Waiter},
    wake, wake_after_exchange,
};
use crate::{
    arena::{Block, Memory, Partition, Span},
    crash_point::crash_point,
    process::now,
    ring::Producer,
    segment::{INLINE, ItemRecord, Segment, Slot, Stage},
};

/// A result that the front may still look at.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lent {
    index: u32,
    /// With what it was completed: the memory is free again when the item's word is another. Of a partial result the
    /// generation counts.
    word: Word,
    /// Which of the item's partial results it is, and what was put into its slot; none: it is the result.
    partial: Option<(u32, Entry)>,
}

impl Lent {
    pub fn is_released(&self, segment: &Segment) -> bool {
        let record = segment.item(self.index);
        let word = Word::load(&record.word);
        match self.partial {
            None => word != self.word,
            Some((n, entry)) => {
                let generation = self.word.generation();
                word.generation() != generation
                    || !matches!(word.phase(), Phase::Claimed | Phase::Done)
                    || Entry::look(partial::slot(&record.partials, n), generation) != Some(entry)
            }
        }
    }
}

/// The same with its memory.
#[derive(Debug)]
struct Kept {
    lent: Lent,
    memory: Memory,
    hold: Option<Hold>,
    /// Its bytes if it is a submitted item's, else 0.
    submitted_bytes: u64,
}

/// Keeps a result's memory from being used again: for a handler in another language, whose views of it nobody can end.
/// Late writes change at worst the bytes of the very result.
#[derive(Clone, Debug, Default)]
pub struct Hold(Arc<()>);

impl Hold {
    /// Whether somebody else has it, too. Not by the count alone: what the others did before they let go is over.
    fn is_shared(&mut self) -> bool {
        Arc::get_mut(&mut self.0).is_none()
    }
}

/// How long a worker waits for room while none of its results is fetched.
const ROOM_PATIENCE: Duration = Duration::from_secs(5);
/// Blocks beside those of results: for partial ones of many items at once. If there are more, they wait for each other.
const PARTIAL_BLOCKS: u32 = 1024;

/// The item that a result is for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target<'s> {
    pub index: u32,
    pub front: u16,
    pub word: Word,
    pub record: &'s ItemRecord,
    pub kind: Kind,
}

impl<'s> Target<'s> {
    #[inline(always)]
    pub fn of(claimed: &Claimed<'s>) -> Self {
        let Claimed { index, front, word, record } = *claimed;
        Target { index, front, word, record, kind: kind_of(record) }
    }

    /// Why nobody will take a partial result, if nobody will.
    pub fn end(&self) -> Option<ReplyError> {
        request::end(self.record, self.word.generation(), now)
    }

    /// Whether there is a free slot for the n-th partial result.
    pub fn has_credit(&self, number: u32) -> bool {
        Entry::look(partial::slot(&self.record.partials, number), self.word.generation()).is_none()
    }
}

/// Where a worker's results go.
pub(super) struct Output<'s> {
    pub segment: &'s Segment,
    bells: Arc<Bells>,
    pub number: u16,
    /// To each front.
    producers: Vec<Producer<'s>>,
    arena: Partition,
    /// Results that the front may still look at, oldest first.
    results: VecDeque<Kept>,
    /// Memory that is nobody's result any more, but held.
    held: Vec<(Memory, Hold)>,
    /// Bytes of those that are submitted items', which may have to wait long for a subscriber.
    submitted_bytes: u64,
    /// Since when none of them was fetched while room was waited for.
    standstill: Option<Instant>,
    /// The front that completed items were returned to since it was looked whether it sleeps.
    unrung: Option<u16>,
}

impl<'s> Output<'s> {
    /// Takes over from whoever had the worker's slot before: results that were completed and that the front has not
    /// released yet stay where they are, with the partial ones before them.
    pub fn resume(segment: &'s Segment, bells: Arc<Bells>, number: u16) -> Self {
        let geometry = segment.geometry();
        let mut results = VecDeque::new();
        let mut used = Vec::new();
        for index in 0..geometry.items {
            let record = segment.item(index);
            let word = Word::load(&record.word);
            if word.phase() != Phase::Done || word.owner() != number {
                continue;
            }
            let mut found = Vec::new();
            let len = u64::from(record.result_len.load(Relaxed));
            if len > INLINE as u64 {
                let submitted_bytes = if kind_of(record) == Kind::Submit { len } else { 0 };
                found.push((Span { offset: record.result_offset.load(Relaxed), len }, submitted_bytes, None));
            }
            for (slot, n) in record.partials.iter().zip(0..) {
                let Some(entry) = Entry::look(slot, word.generation()) else { continue };
                let mut len = [0; 8];
                if segment.copy_result(number, entry.offset(), &mut len) {
                    let len = LEAD.saturating_add(u64::from_ne_bytes(len));
                    found.push((Span { offset: entry.offset(), len }, 0, Some((n, entry))));
                }
            }
            // The front may have released it meanwhile, and then this is what another worker wrote.
            fence(Acquire);
            if Word::load(&record.word) == word {
                used.extend(found.iter().map(|(span, ..)| *span));
                results.extend(found.into_iter().map(|(span, submitted_bytes, partial)| Kept {
                    lent: Lent { index, word, partial },
                    memory: Memory::Inherited(span),
                    hold: None,
                    submitted_bytes,
                }));
            }
        }
        let blocks = geometry.items + PARTIAL_BLOCKS;
        Output {
            segment,
            bells,
            number,
            producers: (0..geometry.fronts).map(|front| segment.producer(number, front as u16)).collect(),
            arena: Partition::around(geometry.result_bytes, blocks, used),
            submitted_bytes: results.iter().map(|kept| kept.submitted_bytes).sum(),
            results,
            held: Vec::new(),
            standstill: None,
            unrung: None,
        }
    }

    /// Memory in the own partition for a result of an item. Waits a while for results that are in the way; not again for
    /// each item if none is fetched. For partial results of the same item it waits as long as their client takes.
    pub fn allocate(&mut self, len: usize, target: &Target<'s>) -> Result<Block, ReplyError> {
        loop {
            if let Some(block) = self.try_allocate(len, target) {
                return Ok(block);
            }
            self.room(target)?.wait().map_err(|_| ReplyError::NoRoom)?;
        }
    }

    /// What to wait for when there is no room. An error, if it was waited for long enough.
    pub fn room(&mut self, target: &Target<'s>) -> Result<Room<'s>, ReplyError> {
        let own = self.waits_for_client(target).then_some(*target);
        if let Some(end) = own.as_ref().and_then(Target::end) {
            return Err(end);
        }
        let since = *self.standstill.get_or_insert_with(Instant::now);
        let left = if own.is_some() { ROOM_PATIENCE } else { ROOM_PATIENCE.saturating_sub(since.elapsed()) };
        if self.results.is_empty() || left.is_zero() || self.segment.stage() == Stage::Stopping {
            return Err(ReplyError::NoRoom);
        }
        let results = self.results.iter().map(|kept| kept.lent).collect();
        Ok(Room { waiter: self.waiter(), own, results, left })
    }

    /// The same without waiting; none, if results are in the way.
    pub fn try_allocate(&mut self, len: usize, target: &Target<'_>) -> Option<Block> {
        if !self.held.is_empty() {
            self.give_back_held();
        }
        // In order of completion is about the order of release: most of the time this finds all there is to find.
        while self.results.front().is_some_and(|kept| kept.lent.is_released(self.segment)) {
            self.reclaim(0);
        }
        let submitted = target.kind == Kind::Submit;
        // Results that wait for subscribers may have half of the partition: the rest is for those who wait for them.
        let half = self.segment.geometry().result_bytes / 2;
        loop {
            let may = !submitted || self.submitted_bytes == 0 || self.submitted_bytes + len as u64 <= half;
            if let Some(block) = may.then(|| self.arena.allocate(len as u64)).flatten() {
                self.standstill = None;
                return Some(block);
            }
            if !self.reclaim_all() {
                return None;
            }
        }
    }

    /// The same if it is free already. Not for submitted items' results while others' are there: they have a limit.
    pub fn allocate_now(&mut self, len: usize, target: &Target<'_>) -> Option<Block> {
        let is_limited = target.kind == Kind::Submit && self.submitted_bytes > 0;
        if is_limited { None } else { self.arena.allocate(len as u64) }
    }

    /// Memory that nobody's result is in any more.
    pub fn give_back(&mut self, memory: Memory, hold: Option<Hold>) {
        if let Some(mut hold) = hold
            && hold.is_shared()
        {
            self.held.push((memory, hold));
        } else {
            self.arena.give_back(memory);
        }
    }

    #[cold]
    fn give_back_held(&mut self) {
        for (memory, hold) in std::mem::take(&mut self.held) {
            self.give_back(memory, Some(hold));
        }
    }

    fn reclaim(&mut self, at: usize) {
        if let Some(kept) = self.results.remove(at) {
            self.give_back(kept.memory, kept.hold);
            self.submitted_bytes -= kept.submitted_bytes;
            self.standstill = None;
        }
    }

    fn reclaim_all(&mut self) -> bool {
        let before = self.results.len();
        for at in (0..before).rev() {
            if self.results[at].lent.is_released(self.segment) {
                self.reclaim(at);
            }
        }
        self.results.len() < before
    }

    /// Whether partial results of an item wait to be taken.
    fn waits_for_client(&self, target: &Target<'_>) -> bool {
        let mut partial = self.results.iter().map(|kept| kept.lent).filter(|lent| lent.partial.is_some());
        partial.any(|lent| lent.index == target.index && !lent.is_released(self.segment))
    }

    /// Keeps a completed item's result until the front has released it.
    pub fn keep(&mut self, target: &Target<'_>, block: Block, hold: Option<Hold>, len: usize) {
        let submitted_bytes = if target.kind == Kind::Submit { len as u64 } else { 0 };
        self.submitted_bytes += submitted_bytes;
        let lent = Lent { index: target.index, word: target.word.with(Phase::Done, self.number), partial: None };
        self.results.push_back(Kept { lent, memory: Memory::Own(block), hold, submitted_bytes });
    }

    /// Whether the n-th partial result of an item may be sent now.
    pub fn may_send(&self, target: &Target<'_>, number: u32) -> Result<bool, ReplyError> {
        if let Some(end) = target.end() {
            return Err(end);
        }
        let has_credit = target.has_credit(number);
        // Of a stopping server the front is gone.
        if !has_credit && self.segment.stage() == Stage::Stopping {
            return Err(ReplyError::Cancelled);
        }
        Ok(has_credit)
    }

    /// Hands a partial result to the front.
    pub fn send(&mut self, target: &Target<'_>, number: u32, block: Block, hold: Option<Hold>) {
        let entry = Entry::new(target.word.generation(), block.offset());
        crash_point!("partial.written");
        entry.put(partial::slot(&target.record.partials, number));
        crash_point!("partial.put");
        let lent = Lent { index: target.index, word: target.word, partial: Some((number, entry)) };
        self.results.push_back(Kept { lent, memory: Memory::Own(block), hold, submitted_bytes: 0 });
        self.hint(target.front, target.index);
        wake(self.segment, &self.bells, Slot::Front(target.front));
        crash_point!("partial.told");
    }

    /// Stores DONE and tells the front. [`Output::ring`] or [`Output::ring_after_claim`] must follow, to wake it.
    #[inline(always)]
    pub fn complete(&mut self, claimed: &Claimed<'_>, code: u32, times: [u64; 2]) {
        let record = claimed.record;
        record.code.store(code, Relaxed);
        record.claimed.store(times[0], Relaxed);
        record.done.store(times[1], Relaxed);
        crash_point!("complete.written");
        // The completion point.
        claimed.word.with(Phase::Done, self.number).store(&record.word, claimed.word);
        crash_point!("complete.done");
        if self.unrung.is_some_and(|unrung| unrung != claimed.front) {
            self.ring();
        }
        self.hint(claimed.front, claimed.index);
        self.unrung = Some(claimed.front);
        crash_point!("complete.told");
    }

    /// Wakes the front that completed items were returned to, if it sleeps.
    #[inline]
    pub fn ring(&mut self) {
        if let Some(front) = self.unrung.take() {
            wake(self.segment, &self.bells, Slot::Front(front));
            crash_point!("complete.rung");
        }
    }

    /// The same, if this worker has just claimed another item.
    #[inline(always)]
    pub fn ring_after_claim(&mut self) {
        if let Some(front) = self.unrung.take() {
            wake_after_exchange(self.segment, &self.bells, Slot::Front(front));
            crash_point!("complete.rung");
        }
    }

    /// There is something to see of an item. Wake its front after it.
    #[inline(always)]
    fn hint(&mut self, front: u16, index: u32) {
        if !self.producers[usize::from(front)].push(index) {
            // I2: pairs with I2' in the front's scan: whoever sees the flag finds the item DONE, or its slots full.
            self.segment.rescan(front).fetch_or(1, Release);
        }
    }

    /// What is waited for when there is no credit.
    pub fn credit(&self, target: Target<'s>, number: u32) -> Credit<'s> {
        Credit { waiter: self.waiter(), target, number }
    }

    fn waiter(&self) -> Waiter<'s> {
        Waiter { segment: self.segment, bells: self.bells.clone(), worker: self.number }
    }
}
