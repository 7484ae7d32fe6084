//! The worker's side: claim, write the result in place, complete.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, atomic::Ordering::*},
    time::{Duration, Instant},
};

use super::{Bells, Phase, Topology, Word, front, lane_of, metadata, wake, wake_worker};
use crate::{
    arena::{Block, Memory, Partition, Span},
    crash_point::crash_point,
    process::{cores, now},
    ring::{Hint, Lane, Producer},
    segment::{INLINE, ItemRecord, PRIORITIES, Segment, Slot, Stage},
};

/// An item that this worker has claimed. It must be completed; if the process dies first, the sweep gives it back.
#[derive(Debug)]
pub struct Claimed {
    index: u32,
    word: Word,
    front: u16,
    /// The client's own id.
    pub id: u64,
    /// When the item was offered.
    pub offered: u64,
    /// When the item expires; 0: never.
    pub deadline: u64,
    payload_len: usize,
    request_offset: u64,
    has_extra: bool,
    submitted: bool,
    inline: [u8; INLINE],
}

impl Claimed {
    /// Workers that have been given this item, this one included.
    pub fn attempt(&self) -> u32 {
        u32::from(self.word.attempts()) + 1
    }
}

/// One item, as its handler sees it.
#[derive(Debug)]
pub struct Item<'a> {
    claimed: &'a Claimed,
    payload: &'a [u8],
    metadata: Vec<u8>,
    record: &'a ItemRecord,
}

impl Item<'_> {
    /// What the client sent, in place.
    pub fn payload(&self) -> &[u8] {
        self.payload
    }

    /// The id that the client gave the item.
    pub fn id(&self) -> u64 {
        self.claimed.id
    }

    /// 1 unless earlier workers died of this item.
    pub fn attempt(&self) -> u32 {
        self.claimed.attempt()
    }

    /// The value of a metadata key.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.all_metadata().filter_map(|(name, value)| (name == key).then_some(value)).last()
    }

    /// All metadata, in no particular order.
    pub fn all_metadata(&self) -> impl Iterator<Item = (&str, &str)> {
        metadata::pairs(&self.metadata)
    }

    /// How much time is left; none: as much as it takes.
    pub fn remaining(&self) -> Option<Duration> {
        let deadline = self.claimed.deadline;
        (deadline != 0).then(|| Duration::from_nanos(deadline.saturating_sub(now())))
    }

    /// Whether nobody waits for the result any more: the client went away or gave up, or the deadline has passed. A
    /// handler that takes long does well to ask now and then.
    pub fn is_cancelled(&self) -> bool {
        self.record.is_cancelled(self.claimed.word.generation()) || self.remaining() == Some(Duration::ZERO)
    }
}

/// One worker's side of the dispatch.
pub struct Worker<'s> {
    segment: &'s Segment,
    topology: Topology,
    bells: Arc<Bells>,
    number: u16,
    pool: u16,
    /// How many workers of the pool may spin at a time.
    spinners: u32,
    /// Of the idle bitmap.
    bit: usize,
    /// Highest priority first.
    lanes: Vec<(u8, Lane<'s>)>,
    producers: Vec<Producer<'s>>,
    arena: Partition,
    /// Results that the front may still look at, oldest first.
    results: VecDeque<Kept>,
    /// Bytes of those that are submitted items', which may have to wait long for a subscriber.
    submitted_bytes: u64,
    /// Since when none of them was fetched while room was waited for.
    standstill: Option<Instant>,
}

/// A result that the front may still look at.
#[derive(Debug)]
struct Kept {
    index: u32,
    /// With what it was completed: the memory is free again when the item's word is another.
    word: Word,
    memory: Memory,
    /// Its bytes if it is a submitted item's, else 0.
    submitted_bytes: u64,
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

impl<'s> Worker<'s> {
    /// Takes a worker's slot over. Results that its predecessor completed and the front has not released yet stay where
    /// they are.
    pub fn attach(segment: &'s Segment, topology: Topology, bells: Arc<Bells>, number: u16) -> Option<Self> {
        let pool = topology.pool_of(number)?;
        let geometry = *segment.geometry();
        if !segment.occupy(Slot::Worker(number)) {
            return None;
        }
        let mut results = VecDeque::new();
        let mut used = Vec::new();
        for index in 0..geometry.items {
            let record = segment.item(index);
            let word = Word::load(&record.word);
            let len = u64::from(record.result_len.load(Relaxed));
            if word.phase() == Phase::Done && word.owner() == number && len > INLINE as u64 {
                let span = Span { offset: record.result_offset.load(Relaxed), len };
                used.push(span);
                let submitted_bytes = if front::is_submitted(record) { len } else { 0 };
                results.push_back(Kept { index, word, memory: Memory::Inherited(span), submitted_bytes });
            }
        }
        let bit = usize::from(number - topology.workers(pool).0);
        // The predecessor may have died spinning or asleep.
        segment.spinning(pool)[bit / 64].fetch_and(!(1 << (bit % 64)), Relaxed);
        segment.idle(pool).leave(bit);
        Some(Worker {
            segment,
            spinners: (cores() / 2).clamp(1, 2) as u32,
            bit,
            lanes: (0..PRIORITIES)
                .rev()
                .map(|priority| lane_of(pool, priority))
                .map(|lane| (lane, segment.lane(lane.into())))
                .collect(),
            producers: (0..geometry.fronts).map(|front| segment.producer(number, front as u16)).collect(),
            arena: Partition::around(geometry.result_bytes, geometry.items, used),
            topology,
            bells,
            number,
            pool,
            submitted_bytes: results.iter().map(|kept: &Kept| kept.submitted_bytes).sum(),
            results,
            standstill: None,
        })
    }

    /// The worker's number, over all pools.
    pub fn number(&self) -> u16 {
        self.number
    }

    /// The segment.
    pub fn segment(&self) -> &'s Segment {
        self.segment
    }

    /// Claims the next item of the pool: the oldest of the highest priority.
    #[inline]
    pub fn take(&mut self) -> Option<Claimed> {
        let (segment, number) = (self.segment, self.number);
        for &(lane_number, lane) in &self.lanes {
            let mut word = None;
            let claim = |hint: Hint| {
                word = claim(segment, hint, lane_number, number);
                word.is_some()
            };
            if let (Some(hint), Some(word)) = (lane.take(claim), word) {
                crash_point!("take.claimed");
                return Some(self.claimed(hint.index, word));
            }
        }
        None
    }

    #[inline]
    fn claimed(&self, index: u32, word: Word) -> Claimed {
        let record = self.segment.item(index);
        let payload_len = record.payload_len.load(Relaxed) as usize;
        let mut inline = [0; INLINE];
        if payload_len <= INLINE {
            record.request.load(&mut inline);
        }
        Claimed {
            index,
            word,
            front: front::front_of(self.segment, index),
            id: record.id.load(Relaxed),
            offered: record.offered.load(Relaxed),
            deadline: record.deadline.load(Relaxed),
            payload_len,
            request_offset: record.request_offset.load(Relaxed),
            has_extra: record.extra_len.load(Relaxed) != 0,
            submitted: front::is_submitted(record),
            inline,
        }
    }

    /// The item as its handler sees it, and an empty result of at most `most` bytes. None if the front wrote something
    /// impossible.
    #[inline]
    pub fn open<'w, 'c>(&'w mut self, claimed: &'c Claimed, most: usize) -> Option<(Item<'c>, Reply<'w, 's>)>
    where
        's: 'c,
    {
        let record = self.segment.item(claimed.index);
        let payload = match claimed.payload_len {
            len @ 0..=INLINE => &claimed.inline[..len],
            len => self.segment.read_request(claimed.front, claimed.request_offset, len as u64)?,
        };
        let metadata =
            if claimed.has_extra { front::metadata(self.segment, claimed.front, record) } else { Vec::new() };
        Some((Item { claimed, payload, metadata, record }, self.reply(claimed, most)))
    }

    /// An empty result alone, for an item that is not handled.
    pub fn reply(&mut self, claimed: &Claimed, most: usize) -> Reply<'_, 's> {
        Reply { submitted: claimed.submitted, worker: self, most, len: 0, inline: [0; INLINE], block: None }
    }

    /// Whether the front has given the item up.
    pub fn is_cancelled(&self, claimed: &Claimed) -> bool {
        self.segment.item(claimed.index).is_cancelled(claimed.word.generation())
    }

    /// Whether there is something in the pool's lanes.
    pub fn has_work(&self) -> bool {
        self.lanes.iter().any(|(_, lane)| !lane.is_empty())
    }

    /// Wakes another worker of the pool if there is more to do and one sleeps.
    #[inline]
    pub fn chain(&self) {
        if self.has_work() && self.segment.idle(self.pool).any() {
            wake_worker(self.segment, &self.topology, &self.bells, self.pool);
        }
    }

    /// Whether this worker may spin for work: only a few of a pool do, so that they do not fight over the head of the
    /// lane. If so, `end_spin` must follow.
    pub fn begin_spin(&self) -> bool {
        let spinning = self.segment.spinning(self.pool);
        let others: u32 = spinning.iter().map(|word| word.load(Relaxed).count_ones()).sum();
        if others >= self.spinners {
            return false;
        }
        // Two may begin at once and be one too many for a moment: it is only a matter of speed.
        spinning[self.bit / 64].fetch_or(1 << (self.bit % 64), Relaxed);
        true
    }

    /// The counterpart of `begin_spin`.
    pub fn end_spin(&self) {
        self.segment.spinning(self.pool)[self.bit / 64].fetch_and(!(1 << (self.bit % 64)), Relaxed);
    }

    /// Sleeps until there may be something to do.
    pub fn sleep(&self) -> io::Result<()> {
        let idle = self.segment.idle(self.pool);
        idle.enter(self.bit);
        let slept = if self.has_work() || self.segment.stage() == Stage::Stopping {
            Ok(())
        } else {
            self.bells.worker(self.number).wait()
        };
        idle.leave(self.bit);
        slept
    }

    /// Memory in the own partition for a result of an item. Waits a while for results that are in the way; not again for
    /// each item if none is fetched.
    fn allocate(&mut self, len: usize, submitted: bool) -> Result<Block, ReplyError> {
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

    fn is_released(&self, kept: &Kept) -> bool {
        Word::load(&self.segment.item(kept.index).word) != kept.word
    }

    fn reclaim(&mut self, at: usize) {
        if let Some(kept) = self.results.remove(at) {
            self.arena.give_back(kept.memory);
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
    #[inline]
    fn complete(&mut self, claimed: Claimed, code: u32, times: [u64; 2], result: (usize, Option<Block>)) {
        let record = self.segment.item(claimed.index);
        let (len, block) = result;
        record.code.store(code, Relaxed);
        record.result_len.store(len as u32, Relaxed);
        record.claimed.store(times[0], Relaxed);
        record.done.store(times[1], Relaxed);
        let done = claimed.word.with(Phase::Done, self.number);
        if let Some(block) = block {
            record.result_offset.store(block.offset(), Relaxed);
            let submitted_bytes = if claimed.submitted { len as u64 } else { 0 };
            self.submitted_bytes += submitted_bytes;
            self.results.push_back(Kept {
                index: claimed.index,
                word: done,
                memory: Memory::Own(block),
                submitted_bytes,
            });
        }
        crash_point!("complete.written");
        // The completion point.
        done.store(&record.word, claimed.word);
        crash_point!("complete.done");
        if !self.producers[usize::from(claimed.front)].push(claimed.index) {
            // I2: pairs with I2' in the front's scan: whoever sees the flag finds the item DONE.
            self.segment.rescan(claimed.front).fetch_or(1, Release);
        }
        wake(self.segment, &self.bells, Slot::Front(claimed.front));
        crash_point!("complete.told");
    }
}

/// Claims the item of a hint, if it is READY in that generation and lane.
#[inline]
fn claim(segment: &Segment, hint: Hint, lane: u8, worker: u16) -> Option<Word> {
    if hint.index >= segment.geometry().items {
        return None;
    }
    let word = &segment.item(hint.index).word;
    // Try what it most likely is, without looking first: the line moves here once, for writing.
    let mut ready = Word::new(hint.generation, lane, 0, Phase::Ready, 0);
    loop {
        let claimed = ready.with(Phase::Claimed, worker);
        match claimed.exchange(word, ready) {
            Ok(()) => return Some(claimed),
            Err(seen)
                if seen == Word::new(hint.generation, lane, 0, Phase::Ready, seen.attempts()) && seen != ready =>
            {
                ready = seen;
            }
            Err(_) => return None,
        }
    }
}

/// The result of a claimed item, written in place: in the item's record if it is small, in the worker's partition of
/// the result arena if not.
pub struct Reply<'w, 's> {
    worker: &'w mut Worker<'s>,
    submitted: bool,
    most: usize,
    len: usize,
    inline: [u8; INLINE],
    block: Option<Block>,
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
        let segment = self.worker.segment;
        let place = match &mut self.block {
            None => self.inline.get_mut(..self.len),
            Some(block) => segment.write_result(self.worker.number, block, self.len as u64),
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
        let block = self.worker.allocate(len, self.submitted)?;
        self.fill(block, &kept);
        self.len = written;
        Ok(())
    }

    /// Moves to a block of so many bytes, if it can be had at once.
    fn grow(&mut self, len: usize) -> Option<()> {
        if len > self.most || self.submitted && self.worker.submitted_bytes > 0 {
            return None;
        }
        let block = self.worker.arena.allocate(len as u64)?;
        let kept = std::mem::take(&mut self.block);
        let segment = self.worker.segment;
        let number = self.worker.number;
        match kept {
            None => {
                let line = self.inline;
                self.fill(block, &line[..self.len.min(INLINE)]);
            }
            Some(old) => {
                let mut block = block;
                let bytes = segment.read_result(number, old.offset(), self.len as u64).unwrap_or_default();
                if let Some(new) = segment.write_result(number, &mut block, self.len as u64) {
                    new.copy_from_slice(bytes);
                }
                self.block = Some(block);
                self.worker.arena.free(old);
            }
        }
        Some(())
    }

    /// Goes on in a new block, with these bytes.
    fn fill(&mut self, mut block: Block, bytes: &[u8]) {
        let segment = self.worker.segment;
        if let Some(new) = segment.write_result(self.worker.number, &mut block, bytes.len() as u64) {
            new.copy_from_slice(bytes);
        }
        self.block = Some(block);
    }

    fn free_block(&mut self) {
        if let Some(old) = self.block.take() {
            self.worker.arena.free(old);
        }
    }

    /// Completes the item with these bytes as its result; `code` is 0 or that of the failure they describe.
    pub fn complete(mut self, claimed: Claimed, code: u32, claimed_at: u64, done_at: u64) {
        let block = self.block.take();
        let result = match block {
            // It turned out small enough.
            Some(block) if self.len <= INLINE => {
                let mut line = [0; INLINE];
                if let Some(bytes) =
                    self.worker.segment.read_result(self.worker.number, block.offset(), self.len as u64)
                {
                    line[..self.len].copy_from_slice(bytes);
                }
                self.worker.segment.item(claimed.index).result.store(&line[..self.len]);
                self.worker.arena.free(block);
                (self.len, None)
            }
            Some(block) => (self.len, Some(block)),
            None => {
                self.worker.segment.item(claimed.index).result.store(&self.inline[..self.len]);
                (self.len, None)
            }
        };
        self.worker.complete(claimed, code, [claimed_at, done_at], result);
    }
}

impl Drop for Reply<'_, '_> {
    fn drop(&mut self) {
        self.free_block();
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
