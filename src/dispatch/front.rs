//! The front's side: offer, collect, cancel, release.
//!
//! Free list, request allocator and what is known of each item are private memory, rebuilt from the item table by
//! [`Front::attach`] (in `takeover`): that is how a front's successor begins.
//!
//! A worker can write over the item table, so what is private decides: an item's word is believed as far as it may have come
//! of what was offered, and an item whose word may not is failed.

mod stream;
mod takeover;

use std::{
    cmp::Reverse,
    collections::VecDeque,
    sync::{Arc, atomic::Ordering::*},
};

pub use stream::{Broken, Partial};
pub use takeover::Adopted;

use super::{
    Bells, FRONT, MAX_RESULT, Phase, SUPERVISOR, Topology, Word, has_waiting, lanes, mend,
    request::{
        Kind, Offer, OfferError, Request, extra_bytes, is_submitted, kind_word, request_spans, share, subscription_len,
    },
    wake, wake_worker,
};
use crate::{
    arena::{Block, Memory, Partition, Span, largest_block},
    crash_point::crash_point,
    process::now,
    ring::{Consumer, Hint, Lane},
    segment::{INLINE, ItemRecord, Liveness, PRIORITIES, Segment, Slot},
};

/// How an item ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The handler succeeded; the result is its own.
    Success,
    /// A google.rpc.Code that is not 0; the result is a failure, see [`crate::handler::Failure`].
    Failure(u32),
    /// What the worker wrote about its result is impossible: there is no result.
    Invalid,
    /// Its deadline passed before a worker claimed it: there is no result.
    Expired,
    /// Somebody wrote over the item's word: there is no result, and whether it ran is not known.
    Damaged,
}

/// A completed item. The result is there until [`Front::release`].
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    /// The item's index.
    pub index: u32,
    /// The client's own id.
    pub id: u64,
    /// How it ended.
    pub outcome: Outcome,
    /// Bytes of result.
    pub len: usize,
    /// The worker that completed it, or [`SUPERVISOR`] if none did.
    pub worker: u16,
    /// How many workers have been given the item.
    pub attempts: u32,
    /// When it was offered, claimed and done.
    pub times: [u64; 3],
    offset: u64,
}

/// What a front knows of each of its items.
#[derive(Debug)]
struct Known {
    state: State,
    /// As what it was offered, or taken over.
    word: Word,
    /// The generation of the last hint that a scan was a reason for: one more at each death would fill the lane.
    hinted: u32,
    id: u64,
    /// When it expires; 0: never.
    deadline: u64,
    payload_len: u32,
    request: Option<Memory>,
    extra: Option<Memory>,
    stream: Option<stream::Taken>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Free,
    /// Offered, and its result is wanted.
    Waiting,
    /// Offered, and its result will be thrown away.
    Abandoned,
    /// Completed and not released.
    Held,
}

/// One front's side of the dispatch.
pub struct Front<'s> {
    segment: &'s Segment,
    topology: Topology,
    bells: Arc<Bells>,
    number: u16,
    /// The first of its items.
    first: u32,
    known: Vec<Known>,
    /// Last in, first out: the record that was used last is still in the cache.
    free: Vec<u32>,
    arena: Partition,
    lanes: Vec<Lane<'s>>,
    consumers: Vec<Consumer<'s>>,
    /// The consumer to ask next.
    cursor: usize,
    /// Items that were found DONE by a scan, or have expired.
    found: Vec<u32>,
    /// Items that have partial results.
    noticed: VecDeque<u32>,
    /// Items that are READY and may have no hint.
    unhinted: Vec<u32>,
    /// Counts what was freed.
    freed: u64,
    /// Pools in whose lanes something was pushed since the last ring, a bit each.
    pushed: u64,
}

impl Known {
    const fn unused() -> Self {
        let word = Word::new(0, 0, 0, Phase::Free, 0);
        let (request, extra, stream) = (None, None, None);
        Known { state: State::Free, word, hinted: 0, id: 0, deadline: 0, payload_len: 0, request, extra, stream }
    }
}

impl<'s> Front<'s> {
    /// The pools and their workers.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// The segment.
    pub fn segment(&self) -> &'s Segment {
        self.segment
    }

    /// Items that are not in use.
    pub fn free_items(&self) -> usize {
        self.free.len()
    }

    /// Bytes of the request arena that are free, in however many pieces.
    pub fn free_request_bytes(&self) -> u64 {
        self.arena.free_bytes()
    }

    /// Whether the server drains.
    pub fn is_draining(&self) -> bool {
        self.bells.is_end()
    }

    /// Counts the items and payloads that were freed: when it changes, there is room.
    pub fn freed(&self) -> u64 {
        self.freed
    }

    /// The longest payload that an empty arena can take.
    pub fn largest_request(&self) -> u64 {
        largest_block(self.segment.geometry().request_bytes)
    }

    /// Memory for a payload of so many bytes.
    #[inline(always)]
    pub fn request(&mut self, len: usize) -> Result<Request, OfferError> {
        if len <= INLINE {
            return Ok(Request { most: len, ..Request::default() });
        }
        let block = self.arena.allocate(len as u64).ok_or(OfferError::Arena)?;
        Ok(Request { most: len, block: Some(block), ..Request::default() })
    }

    /// Appends bytes to a payload. What goes beyond the announced length is left out.
    #[inline]
    pub fn write(&self, request: &mut Request, bytes: &[u8]) {
        let start = request.len;
        let bytes = &bytes[..bytes.len().min(request.most - start)];
        let written = match &request.block {
            None => {
                request.line.0[start..start + bytes.len()].copy_from_slice(bytes);
                true
            }
            Some(block) => self.segment.write_request(self.number, block.offset() + start as u64, bytes),
        };
        if written {
            request.len += bytes.len();
        }
    }

    /// Gives the memory of a payload back that is not offered after all; whether there was any.
    pub fn discard(&mut self, request: Request) -> bool {
        let block = request.block.map(|block| self.arena.free(block));
        block.is_some()
    }

    /// Bytes of payload that an item was offered with.
    pub fn payload_len(&self, index: u32) -> u64 {
        self.known[(index - self.first) as usize].payload_len.into()
    }

    /// Returns the pool of an item.
    pub fn pool(&self, index: u32) -> u16 {
        u16::from(self.known[(index - self.first) as usize].word.lane()) / PRIORITIES as u16
    }

    /// The client's id of an item.
    pub fn id(&self, index: u32) -> u64 {
        self.known[(index - self.first) as usize].id
    }

    /// Offers an item; its index, once it is accepted. `request` is taken only then. The workers are told by
    /// [`Front::ring`], once for any number of offers.
    #[inline(always)]
    pub fn offer(&mut self, offer: &Offer<'_>, request: &mut Request) -> Result<u32, OfferError> {
        let &index = self.free.last().ok_or(OfferError::Items)?;
        let record = self.segment.item(index);
        let word = Word::load(&record.word);

        match &request.block {
            None => record.request.store(&request.line.0[..request.len]),
            Some(block) => record.request_offset.store(block.offset(), Relaxed),
        }
        record.payload_len.store(request.len as u32, Relaxed);
        let extra_len = offer.subscription.len() + offer.metadata.len();
        let extra = if extra_len == 0 { None } else { self.write_extra(record, request, offer)? };
        record.extra_len.store(extra_len as u32, Relaxed);
        record.id.store(offer.id, Relaxed);
        record.offered.store(offer.offered, Relaxed);
        record.deadline.store(offer.deadline, Relaxed);
        record.kind.store(kind_word(offer.kind, offer.subscription.len()), Relaxed);
        // What another use left: its generation comes again after 2^28 uses.
        record.cancelled.store(0, Relaxed);
        if offer.kind == Kind::Stream {
            record.partials.iter().for_each(|slot| slot.store(0, Relaxed));
        }
        crash_point!("offer.filled");

        let lane = super::lane_of(offer.pool, offer.priority);
        let ready = word.offered(lane);
        ready.store(&record.word, word);
        crash_point!("offer.ready");
        let hint = Hint { index, generation: ready.generation() };
        // Without a hint nobody claims it, unless there is an old one of a generation that has come again: then it was as good.
        if self.lanes[usize::from(lane)].push(hint).is_err()
            && ready.with(Phase::Free, 0).exchange(&record.word, ready).is_ok()
        {
            if let Some(block) = extra {
                self.arena.free(block);
            }
            return Err(OfferError::Lane);
        }
        crash_point!("offer.pushed");
        self.free.pop();
        self.pushed |= 1 << offer.pool;
        let known = self.known_mut(index);
        known.state = State::Waiting;
        known.word = ready;
        known.id = offer.id;
        known.deadline = offer.deadline;
        known.stream = (offer.kind == Kind::Stream).then(|| stream::Taken::none_of(ready));
        known.payload_len = request.len as u32;
        if let Some(block) = extra {
            known.extra = Some(Memory::Own(block));
        }
        if let Some(block) = request.block.take() {
            known.request = Some(Memory::Own(block));
        }
        (request.len, request.most) = (0, 0);
        Ok(index)
    }

    /// Writes subscription and metadata behind an inline payload, or else into a block of their own.
    #[cold]
    fn write_extra(
        &mut self,
        record: &ItemRecord,
        request: &Request,
        offer: &Offer<'_>,
    ) -> Result<Option<Block>, OfferError> {
        let len = offer.subscription.len() + offer.metadata.len();
        let inline_len = if request.block.is_some() { 0 } else { request.len };
        if inline_len + len <= INLINE {
            let mut line = request.line.0;
            let (subscription, metadata) = line[inline_len..inline_len + len].split_at_mut(offer.subscription.len());
            subscription.copy_from_slice(offer.subscription);
            metadata.copy_from_slice(offer.metadata);
            record.request.store(&line[..inline_len + len]);
            return Ok(None);
        }
        let block = self.arena.allocate(len as u64).ok_or(OfferError::Arena)?;
        self.segment.write_request(self.number, block.offset(), offer.subscription);
        let metadata_at = block.offset() + offer.subscription.len() as u64;
        self.segment.write_request(self.number, metadata_at, offer.metadata);
        record.extra_offset.store(block.offset(), Relaxed);
        Ok(Some(block))
    }

    /// Wakes a worker of each pool in which items were offered since the last ring, if one sleeps.
    #[inline]
    pub fn ring(&mut self) {
        if !self.unhinted.is_empty() {
            self.push_hints();
        }
        let mut pools = std::mem::take(&mut self.pushed);
        while pools != 0 {
            let pool = pools.trailing_zeros() as u16;
            pools &= pools - 1;
            wake_worker(self.segment, &self.topology, &self.bells, pool);
            crash_point!("offer.told");
        }
    }

    /// Whether items wait in a lane while a worker of its pool sleeps: one that was woken may not have come (stopped,
    /// frozen, swapped out), and [`Front::ring_next`] should follow in a while.
    pub fn somebody_is_late(&self) -> bool {
        !self.unhinted.is_empty() || (0..self.topology.pools()).any(|pool| self.is_late(pool))
    }

    /// Rings the next sleeper of each pool in whose lanes items still wait.
    pub fn ring_next(&self) {
        for pool in (0..self.topology.pools()).filter(|&pool| self.is_late(pool)) {
            wake_worker(self.segment, &self.topology, &self.bells, pool);
        }
    }

    /// Returns whether an item waits in any lane.
    pub fn has_waiting(&self) -> bool {
        (0..self.topology.pools()).any(|pool| has_waiting(self.segment, pool))
    }

    fn is_late(&self, pool: u16) -> bool {
        self.segment.idle(pool).any() && has_waiting(self.segment, pool)
    }

    fn known_mut(&mut self, index: u32) -> &mut Known {
        &mut self.known[(index - self.first) as usize]
    }

    /// The next completed item, if there is one.
    // Inlined, here and below, so that what is returned stays in registers: see `Line` for what a copy would wait for.
    #[inline(always)]
    pub fn collect(&mut self) -> Option<Completion> {
        loop {
            let index = match self.found.pop().or_else(|| self.pop()) {
                Some(index) => index,
                None if self.segment.rescan(self.number).load(Relaxed) != 0 => {
                    self.scan();
                    continue;
                }
                None => return None,
            };
            // A hint: anything may be wrong with it.
            let Some(known) = index.checked_sub(self.first).and_then(|i| self.known.get_mut(i as usize)) else {
                continue;
            };
            let record = self.segment.item(index);
            let word = Word::load(&record.word);
            let state = known.state;
            let is_damaged = !word.follows(known.word, self.segment.geometry().workers);
            if matches!(state, State::Free | State::Held) || !is_damaged && word.phase() != Phase::Done {
                if state == State::Waiting && known.stream.is_some() {
                    self.notice(index);
                }
                continue;
            }
            known.state = State::Held;
            // Nobody reads the payload any more, and the result may have to wait.
            if let Some(payload) = known.request.take() {
                self.arena.give_back(payload);
                self.freed += 1;
            }
            if state == State::Abandoned {
                self.release(index);
                continue;
            }
            crash_point!("collect.held");
            return Some(self.completion(index, record, word, is_damaged));
        }
    }

    #[inline]
    fn pop(&mut self) -> Option<u32> {
        for _ in 0..self.consumers.len() {
            let consumer = &mut self.consumers[self.cursor];
            if let Some(index) = consumer.pop() {
                self.segment.fetch(index);
                // Two ahead: one is too late while more than the first-level cache holds are in flight.
                if let Some(after_next) = consumer.peek(1) {
                    self.segment.fetch(after_next);
                }
                return Some(index);
            }
            if consumer.take_lost() {
                self.segment.rescan(self.number).fetch_or(mend::LOOK, Relaxed);
            }
            self.cursor += 1;
            if self.cursor == self.consumers.len() {
                self.cursor = 0;
            }
        }
        None
    }

    /// A return ring was full, or somebody died: looks at every item for what no hint tells.
    #[cold]
    fn scan(&mut self) {
        // I2': pairs with I2, and before the look: whoever sets it again later has completed something later.
        let asked = self.segment.rescan(self.number).swap(0, AcqRel);
        crash_point!("scan.begun");
        self.consumers.iter_mut().for_each(Consumer::check);
        // Who died may have written where these were last.
        self.lanes.iter_mut().for_each(Lane::forget);
        let (workers, now) = (self.segment.geometry().workers, now());
        for index in self.first..self.first + self.known.len() as u32 {
            let record = self.segment.item(index);
            let word = Word::load(&record.word);
            let known = &mut self.known[(index - self.first) as usize];
            match (word.phase(), known.state) {
                (_, State::Waiting | State::Abandoned) if !word.follows(known.word, workers) => self.found.push(index),
                (Phase::Done, State::Waiting | State::Abandoned) => self.found.push(index),
                // Given back by a sweep when its deadline had passed: nobody will tell of that any more.
                (Phase::Ready, State::Waiting) if (1..=now).contains(&known.deadline) => _ = self.expire(index),
                // Given back by a sweep, which may have found the lane full; or its hint is gone, for no lane is empty that
                // has one.
                (Phase::Ready, State::Waiting)
                    if word.attempts() > 0 && known.hinted != word.generation()
                        || asked & mend::HINT != 0
                        || self.lanes.get(usize::from(word.lane())).is_some_and(Lane::is_empty) =>
                {
                    known.hinted = word.generation();
                    self.unhinted.push(index);
                }
                // Given back by a sweep just when it was cancelled.
                (Phase::Ready | Phase::Claimed, State::Abandoned) => {
                    known.state = State::Waiting;
                    self.cancel(index);
                }
                (Phase::Claimed, State::Waiting) => self.notice(index),
                // It is nobody's: let nobody take it for his.
                (Phase::Ready | Phase::Claimed | Phase::Done, State::Free) => {
                    word.discarded().store(&record.word, word);
                }
                _ => {}
            }
        }
        // The last is taken first: the one that was done first.
        let segment = self.segment;
        self.found.sort_by_cached_key(|&index| Reverse(segment.item(index).done.load(Relaxed)));
    }

    /// Pushes hints for items that may have none. Those that do not fit are tried again.
    fn push_hints(&mut self) {
        let (segment, lanes) = (self.segment, &mut self.lanes);
        let mut pushed = 0;
        self.unhinted.retain(|&index| {
            let word = Word::load(&segment.item(index).word);
            let Some(lane) = lanes.get_mut(usize::from(word.lane())).filter(|_| word.phase() == Phase::Ready) else {
                return false;
            };
            let full = lane.push(Hint { index, generation: word.generation() }).is_err();
            pushed |= 1 << (u32::from(word.lane()) / PRIORITIES);
            full
        });
        self.pushed |= pushed;
    }

    #[inline(always)]
    fn completion(&self, index: u32, record: &ItemRecord, word: Word, is_damaged: bool) -> Completion {
        let len = record.result_len.load(Relaxed) as usize;
        let offset = record.result_offset.load(Relaxed);
        let inside =
            len <= INLINE || len <= MAX_RESULT && self.segment.read_result(word.owner(), offset, len as u64).is_some();
        let outcome = match record.code.load(Relaxed) {
            _ if is_damaged => Outcome::Damaged,
            _ if word.owner() == FRONT => return self.expired(index, record, word),
            _ if !inside => Outcome::Invalid,
            0 => Outcome::Success,
            code => Outcome::Failure(code),
        };
        let (worker, attempts) = if is_damaged { (SUPERVISOR, 0) } else { (word.owner(), word.attempts()) };
        Completion {
            index,
            id: self.id(index),
            outcome,
            len: if inside && !is_damaged { len } else { 0 },
            worker,
            attempts: u32::from(attempts) + u32::from(worker != SUPERVISOR),
            times: [&record.offered, &record.claimed, &record.done].map(|time| time.load(Relaxed)),
            offset,
        }
    }

    /// The end of an item that no worker completed: its record's other half is that of an earlier one.
    #[cold]
    fn expired(&self, index: u32, record: &ItemRecord, word: Word) -> Completion {
        // The same whoever looks at it.
        let deadline = self.known[(index - self.first) as usize].deadline;
        Completion {
            index,
            id: self.id(index),
            outcome: Outcome::Expired,
            len: 0,
            worker: SUPERVISOR,
            attempts: word.attempts().into(),
            times: [record.offered.load(Relaxed), deadline, deadline],
            offset: 0,
        }
    }

    /// The bytes of a result that travelled in its record, copied out.
    #[inline]
    pub fn inline_result<'a>(&self, completion: &Completion, into: &'a mut [u8; INLINE]) -> Option<&'a [u8]> {
        let into = into.get_mut(..completion.len)?;
        self.segment.item(completion.index).result.load(into);
        Some(into)
    }

    /// The bytes of a result in the arena, in place.
    pub fn arena_result(&self, completion: &Completion) -> Option<&[u8]> {
        self.lasting_result(completion)
    }

    /// The same for whoever sees to it that they are not looked at after [`Front::release`].
    pub(crate) fn lasting_result(&self, completion: &Completion) -> Option<&'s [u8]> {
        self.segment.read_result(completion.worker, completion.offset, completion.len as u64)
    }

    /// Gives up a completed item: its record and its memory may be used again.
    #[inline]
    pub fn release(&mut self, index: u32) {
        let record = self.segment.item(index);
        let word = Word::load(&record.word);
        let workers = self.segment.geometry().workers;
        let known = self.known_mut(index);
        if known.state != State::Held {
            debug_assert!(false, "released an item that is {:?}", known.state);
            return;
        }
        let free = if word.follows(known.word, workers) { word.with(Phase::Free, 0) } else { known.word.discarded() };
        let in_arena = known.stream.is_some() || record.result_len.load(Relaxed) as usize > INLINE;
        free.store(&record.word, word);
        crash_point!("release.freed");
        if in_arena {
            // It may wait for room in its result arena.
            self.wake_worker(word);
            crash_point!("release.told");
        }
        self.forget(index);
    }

    /// Wakes the worker that has an item, if it sleeps at its door.
    fn wake_worker(&self, word: Word) {
        if u32::from(word.owner()) < self.segment.geometry().workers {
            wake(self.segment, &self.bells, Slot::Worker(word.owner()));
        }
    }

    /// Takes an offered item back if no worker has claimed it: then it never runs. If one has, its handler can see
    /// that nobody waits any more, and the result will be thrown away.
    pub fn cancel(&mut self, index: u32) {
        if self.known_mut(index).state != State::Waiting {
            return;
        }
        self.known_mut(index).state = State::Abandoned;
        let record = self.segment.item(index);
        loop {
            let word = Word::load(&record.word);
            match word.phase() {
                Phase::Ready => {
                    // The claim of a worker competes with this.
                    if word.with(Phase::Free, 0).exchange(&record.word, word).is_ok() {
                        crash_point!("cancel.freed");
                        self.forget(index);
                        return;
                    }
                }
                Phase::Claimed => {
                    record.cancel(word.generation());
                    crash_point!("cancel.flagged");
                    self.wake_worker(word);
                    // If its worker died meanwhile and it was given back, cancel it again.
                    if Word::load(&record.word).generation() == word.generation() {
                        return;
                    }
                }
                // `collect` releases it.
                Phase::Done | Phase::Free => return,
            }
        }
    }

    /// Returns whether all workers of a pool are in a crash loop.
    pub fn is_failing(&self, pool: u16) -> bool {
        let (first, count) = self.topology.workers(pool);
        (first..first + count).all(|n| matches!(self.segment.liveness(Slot::Worker(n)), Liveness::Failing(_)))
    }

    /// Takes an offered item back if no worker has claimed it and it is one of these pools, a bit each. Returns its pool; then
    /// the item never runs again.
    pub fn take_back(&mut self, index: u32, pools: u64) -> Option<u16> {
        let record = self.segment.item(index);
        let word = Word::load(&record.word);
        let known = self.known_mut(index);
        // The lane as it was offered: a worker can write over the other.
        let pool = u32::from(known.word.lane()) / PRIORITIES;
        let is_waiting = known.state == State::Waiting && word.phase() == Phase::Ready;
        // The claim of a worker competes with this.
        let is_taken =
            is_waiting && pools & 1 << pool != 0 && word.with(Phase::Free, 0).exchange(&record.word, word).is_ok();
        if !is_taken {
            return None;
        }
        self.forget(index);
        u16::try_from(pool).ok()
    }

    /// Ends an item whose deadline has passed, if no worker has claimed it: then it never runs, and [`Front::collect`] has its
    /// end. That is in shared memory at once, where a successor of this front finds it. Whether it ended it; if not, its end
    /// comes of the worker, and should that one die and the item be given back, of the look through all items after it.
    pub fn expire(&mut self, index: u32) -> bool {
        let record = self.segment.item(index);
        let word = Word::load(&record.word);
        let workers = self.segment.geometry().workers;
        let known = self.known_mut(index);
        let is_damaged = !word.follows(known.word, workers);
        let is_ready = word.phase() == Phase::Ready;
        // The claim of a worker competes with this. What is damaged has no other end.
        let has_ended = known.state == State::Waiting
            && (is_damaged || is_ready && word.with(Phase::Done, FRONT).exchange(&record.word, word).is_ok());
        if has_ended {
            crash_point!("expire.done");
            self.found.push(index);
        }
        has_ended
    }

    #[inline]
    fn forget(&mut self, index: u32) {
        let known = &mut self.known[(index - self.first) as usize];
        known.state = State::Free;
        known.stream = None;
        if let Some(memory) = known.request.take() {
            self.arena.give_back(memory);
        }
        if let Some(memory) = known.extra.take() {
            self.arena.give_back(memory);
        }
        self.free.push(index);
        self.freed += 1;
    }

    /// Says that this front is about to sleep. Then look once more with [`Front::collect`]; if there is nothing, sleep
    /// at the front's bell, and call [`Front::awake`] after that.
    pub fn going_to_sleep(&self) {
        self.segment.sleeping(Slot::Front(self.number)).enter(0);
    }

    /// The counterpart of [`Front::going_to_sleep`].
    pub fn awake(&self) {
        self.segment.sleeping(Slot::Front(self.number)).leave(0);
    }
}
