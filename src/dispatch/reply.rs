//! Results: memory for them, their bytes, and the completion of their items.
//!
//! A result block may be used again when its item's word is no longer what it was completed with; the front wakes a
//! worker that waits for that.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, atomic::Ordering::*},
    time::{Duration, Instant},
};

use super::{
    Bells, Claimed, Phase, Word,
    request::{self, Line},
    wake,
};
use crate::{
    arena::{Block, Memory, Partition, Span},
    crash_point::crash_point,
    ring::Producer,
    segment::{INLINE, Segment, Slot, Stage},
};

/// A result that the front may still look at.
#[derive(Debug)]
struct Kept {
    index: u32,
    /// With what it was completed: the memory is free again when the item's word is another.
    word: Word,
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

/// Why there is no memory for a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReplyError {
    /// It can never be had.
    #[error("a result of {len} bytes is too large: at most {most} are possible (--max-message)")]
    TooLarge {
        /// Bytes that were asked for.
        len: usize,
        /// Bytes that can be had.
        most: usize,
    },
    /// The worker's earlier results are in the way, and nobody fetches them.
    #[error("there is no room for the result: the worker's earlier results wait for their subscribers (--arena)")]
    NoRoom,
}

impl From<ReplyError> for io::Error {
    fn from(error: ReplyError) -> Self {
        io::Error::new(io::ErrorKind::StorageFull, error)
    }
}

/// Where a worker's results go.
pub(super) struct Output<'s> {
    segment: &'s Segment,
    bells: Arc<Bells>,
    number: u16,
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
}

impl<'s> Output<'s> {
    /// Takes over from whoever had the worker's slot before: results that were completed and that the front has not
    /// released yet stay where they are.
    pub fn resume(segment: &'s Segment, bells: Arc<Bells>, number: u16) -> Self {
        let geometry = segment.geometry();
        let mut results = VecDeque::new();
        let mut used = Vec::new();
        for index in 0..geometry.items {
            let record = segment.item(index);
            let word = Word::load(&record.word);
            let len = u64::from(record.result_len.load(Relaxed));
            if word.phase() == Phase::Done && word.owner() == number && len > INLINE as u64 {
                let span = Span { offset: record.result_offset.load(Relaxed), len };
                used.push(span);
                let submitted_bytes = if request::is_submitted(record) { len } else { 0 };
                results.push_back(Kept { index, word, memory: Memory::Inherited(span), hold: None, submitted_bytes });
            }
        }
        Output {
            segment,
            bells,
            number,
            producers: (0..geometry.fronts).map(|front| segment.producer(number, front as u16)).collect(),
            arena: Partition::around(geometry.result_bytes, geometry.items, used),
            submitted_bytes: results.iter().map(|kept| kept.submitted_bytes).sum(),
            results,
            held: Vec::new(),
            standstill: None,
        }
    }

    /// Memory in the own partition for a result of an item. Waits a while for results that are in the way; not again for
    /// each item if none is fetched.
    fn allocate(&mut self, len: usize, submitted: bool) -> Result<Block, ReplyError> {
        if !self.held.is_empty() {
            self.give_back_held();
        }
        // In order of completion is about the order of release: most of the time this finds all there is to find.
        while self.results.front().is_some_and(|kept| self.is_released(kept)) {
            self.reclaim(0);
        }
        // Results that wait for subscribers may have half of the partition: the rest is for those who wait for them.
        let half = self.segment.geometry().result_bytes / 2;
        loop {
            let may = !submitted || self.submitted_bytes == 0 || self.submitted_bytes + len as u64 <= half;
            if let Some(block) = may.then(|| self.arena.allocate(len as u64)).flatten() {
                self.standstill = None;
                return Ok(block);
            }
            if self.reclaim_all() {
                continue;
            }
            let since = *self.standstill.get_or_insert_with(Instant::now);
            let left = ROOM_PATIENCE.saturating_sub(since.elapsed());
            if self.results.is_empty() || left.is_zero() || self.segment.stage() == Stage::Stopping {
                return Err(ReplyError::NoRoom);
            }
            let door = self.segment.sleeping(Slot::Worker(self.number));
            door.enter(0);
            let slept = if self.results.iter().any(|kept| self.is_released(kept)) {
                Ok(())
            } else {
                self.bells.worker(self.number).wait_at_most(left)
            };
            door.leave(0);
            slept.map_err(|_| ReplyError::NoRoom)?;
        }
    }

    /// Memory that nobody's result is in any more.
    fn give_back(&mut self, memory: Memory, hold: Option<Hold>) {
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

    fn is_released(&self, kept: &Kept) -> bool {
        Word::load(&self.segment.item(kept.index).word) != kept.word
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
            if self.is_released(&self.results[at]) {
                self.reclaim(at);
            }
        }
        self.results.len() < before
    }

    /// Stores DONE, tells the front, and wakes it if it sleeps.
    #[inline(always)]
    fn complete(&mut self, claimed: &Claimed<'_>, code: u32, times: [u64; 2]) {
        let record = claimed.record;
        record.code.store(code, Relaxed);
        record.claimed.store(times[0], Relaxed);
        record.done.store(times[1], Relaxed);
        crash_point!("complete.written");
        // The completion point.
        claimed.word.with(Phase::Done, self.number).store(&record.word, claimed.word);
        crash_point!("complete.done");
        if !self.producers[usize::from(claimed.front)].push(claimed.index) {
            // I2: pairs with I2' in the front's scan: whoever sees the flag finds the item DONE.
            self.segment.rescan(claimed.front).fetch_or(1, Release);
        }
        wake(self.segment, &self.bells, Slot::Front(claimed.front));
        crash_point!("complete.told");
    }
}

/// The result of a claimed item, written in place: in the item's record if it is small, in the worker's partition of
/// the result arena if not.
pub struct Reply<'w, 's> {
    output: &'w mut Output<'s>,
    line: &'w mut Line,
    submitted: bool,
    most: usize,
    len: usize,
    block: Option<Block>,
    hold: Option<Hold>,
}

impl<'w, 's> Reply<'w, 's> {
    /// An empty result of at most `most` bytes. `line` has room for a small one.
    #[inline(always)]
    pub(super) fn new(output: &'w mut Output<'s>, line: &'w mut Line, claimed: &Claimed<'_>, most: usize) -> Self {
        Reply { output, line, submitted: request::is_submitted(claimed.record), most, len: 0, block: None, hold: None }
    }
}

impl Reply<'_, '_> {
    /// Bytes so far.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The most bytes that a result may have.
    pub fn max_len(&self) -> usize {
        self.most
    }

    /// Throws away what was written.
    pub fn clear(&mut self) {
        self.len = 0;
    }

    /// Makes the result `len` bytes long and lends them for writing. New bytes have any value.
    pub fn buffer(&mut self, len: usize) -> Result<&mut [u8], ReplyError> {
        self.reserve(len)?;
        self.len = len;
        Ok(self.bytes())
    }

    /// Keeps the memory that the result has now, if it is in the arena, until the hold is dropped and the result, too, needs
    /// it no more.
    pub fn hold(&mut self) -> Option<Hold> {
        self.block.as_ref()?;
        Some(self.hold.get_or_insert_default().clone())
    }

    /// Appends bytes.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), ReplyError> {
        let start = self.len;
        let end = start.saturating_add(bytes.len());
        if end > self.room() {
            // Twice what is needed if that is to be had, so that many small writes copy little.
            let roomy = if start == 0 { end } else { end.saturating_mul(2).clamp(end, self.most.max(end)) };
            if self.grow(roomy).is_none() {
                self.reserve(end)?;
            }
        }
        self.len = end;
        self.bytes()[start..].copy_from_slice(bytes);
        Ok(())
    }

    fn room(&self) -> usize {
        self.block.as_ref().map_or(INLINE, |block| block.len() as usize)
    }

    fn bytes(&mut self) -> &mut [u8] {
        let segment = self.output.segment;
        let place = match &mut self.block {
            None => self.line.0.get_mut(..self.len),
            Some(block) => segment.write_result(self.output.number, block, self.len as u64),
        };
        place.unwrap_or_default()
    }

    fn reserve(&mut self, len: usize) -> Result<(), ReplyError> {
        if len > self.most {
            return Err(ReplyError::TooLarge { len, most: self.most });
        }
        if len <= self.room() || self.grow(len).is_some() {
            return Ok(());
        }
        // What was written so far may be what is in the way: it steps aside.
        let kept = self.bytes().to_vec();
        self.free_block();
        let written = std::mem::take(&mut self.len);
        let block = self.output.allocate(len, self.submitted)?;
        self.fill(block, &kept);
        self.len = written;
        Ok(())
    }

    /// Moves to a block of so many bytes, if it can be had at once.
    fn grow(&mut self, len: usize) -> Option<()> {
        if len > self.most || self.submitted && self.output.submitted_bytes > 0 {
            return None;
        }
        let block = self.output.arena.allocate(len as u64)?;
        let kept = std::mem::take(&mut self.block);
        let segment = self.output.segment;
        let number = self.output.number;
        match kept {
            None => {
                let line = self.line.0;
                self.fill(block, &line[..self.len.min(INLINE)]);
            }
            Some(old) => {
                let mut block = block;
                let bytes = segment.read_result(number, old.offset(), self.len as u64).unwrap_or_default();
                if let Some(new) = segment.write_result(number, &mut block, self.len as u64) {
                    new.copy_from_slice(bytes);
                }
                self.block = Some(block);
                self.output.give_back(Memory::Own(old), self.hold.take());
            }
        }
        Some(())
    }

    /// Goes on in a new block, with these bytes.
    fn fill(&mut self, mut block: Block, bytes: &[u8]) {
        let segment = self.output.segment;
        if let Some(new) = segment.write_result(self.output.number, &mut block, bytes.len() as u64) {
            new.copy_from_slice(bytes);
        }
        self.block = Some(block);
    }

    fn free_block(&mut self) {
        if let Some(old) = self.block.take() {
            self.output.give_back(Memory::Own(old), self.hold.take());
        }
    }

    /// Completes the item with these bytes as its result; `code` is 0 or that of the failure they describe.
    #[inline(always)]
    pub fn complete(mut self, claimed: Claimed<'_>, code: u32, claimed_at: u64, done_at: u64) {
        if self.block.is_some() {
            self.settle(&claimed);
        } else {
            claimed.record.result.store(&self.line.0[..self.len]);
        }
        claimed.record.result_len.store(self.len as u32, Relaxed);
        self.output.complete(&claimed, code, [claimed_at, done_at]);
    }

    /// Says where a result is that has a block.
    #[cold]
    fn settle(&mut self, claimed: &Claimed<'_>) {
        let Some(block) = self.block.take() else { return };
        let output = &mut *self.output;
        if self.len <= INLINE {
            // It turned out small enough.
            let bytes = output.segment.read_result(output.number, block.offset(), self.len as u64);
            claimed.record.result.store(bytes.unwrap_or_default());
            output.give_back(Memory::Own(block), self.hold.take());
            return;
        }
        claimed.record.result_offset.store(block.offset(), Relaxed);
        let submitted_bytes = if self.submitted { self.len as u64 } else { 0 };
        output.submitted_bytes += submitted_bytes;
        let word = claimed.word.with(Phase::Done, output.number);
        output.results.push_back(Kept {
            index: claimed.index,
            word,
            memory: Memory::Own(block),
            hold: self.hold.take(),
            submitted_bytes,
        });
    }
}

impl Drop for Reply<'_, '_> {
    #[inline]
    fn drop(&mut self) {
        if self.block.is_some() {
            self.free_block();
        }
    }
}

impl io::Write for Reply<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Reply::write(self, bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
