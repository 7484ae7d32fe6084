//! The worker's side: claim, write the result in place, complete.

use std::{
    borrow::Cow,
    cell::RefCell,
    io,
    rc::Rc,
    sync::{Arc, atomic::Ordering::*},
    time::Duration,
};

use super::{
    Bells, Failure, Open, Reply, ReplyError, Topology, Word, lane_of, metadata,
    output::Output,
    reply::Draft,
    request::{self, Line},
    wake_worker,
};
use crate::{
    crash_point::crash_point,
    doorbell::Bell,
    process::{cores, now},
    ring::{Hint, Lane},
    segment::{INLINE, ItemRecord, PRIORITIES, Segment, Slot, Stage},
};

/// An item that this worker has claimed. It must be completed; if the process dies first, the sweep gives it back.
#[derive(Debug)]
pub struct Claimed<'s> {
    pub(super) index: u32,
    pub(super) front: u16,
    pub(super) word: Word,
    pub(super) record: &'s ItemRecord,
}

impl<'s> Claimed<'s> {
    /// For whoever sees to it that one of the two completes the item.
    pub(super) fn duplicate(&self) -> Self {
        let Claimed { index, front, word, record } = *self;
        Claimed { index, front, word, record }
    }
}

impl Claimed<'_> {
    /// Workers that have been given this item, this one included.
    pub fn attempt(&self) -> u32 {
        u32::from(self.word.attempts()) + 1
    }

    /// The client's own id.
    pub fn id(&self) -> u64 {
        self.record.id.load(Relaxed)
    }

    /// When the item was offered.
    pub fn offered(&self) -> u64 {
        self.record.offered.load(Relaxed)
    }

    /// When work on it began, just now. Its worker may have come straight from another item that was done at `last`: that is as
    /// good, for a look at the clock costs as much as an item. But it may have stood still since: so the item was offered first
    /// in any case, and one that has a deadline is worth the look.
    #[inline]
    pub fn began(&self, last: Option<u64>) -> u64 {
        match last {
            Some(last) if self.deadline() == 0 => last.max(self.offered()),
            _ => now(),
        }
    }

    /// When the item expires; 0: never.
    pub fn deadline(&self) -> u64 {
        self.record.deadline.load(Relaxed)
    }

    /// Whether the front has given the item up.
    pub fn is_cancelled(&self) -> bool {
        self.record.is_cancelled(self.word.generation())
    }
}

/// Private copies of a small payload and a small result.
#[derive(Debug, Default)]
pub(super) struct Lines {
    pub request: Line,
    pub result: Line,
}

/// One item, as its handler sees it.
#[derive(Debug)]
pub struct Item<'a> {
    pub(super) claimed: &'a Claimed<'a>,
    pub(super) payload: &'a [u8],
    pub(super) metadata: Cow<'a, [u8]>,
}

impl<'a> Item<'a> {
    /// What the client sent, in place.
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }

    /// The id that the client gave the item.
    pub fn id(&self) -> u64 {
        self.claimed.id()
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

    /// When the item expires, on the clock that [`now`] reads; none: never.
    pub fn deadline(&self) -> Option<Duration> {
        let deadline = self.claimed.deadline();
        (deadline != 0).then(|| Duration::from_nanos(deadline))
    }

    /// How much time is left; none: as much as it takes.
    pub fn remaining(&self) -> Option<Duration> {
        let deadline = self.claimed.deadline();
        (deadline != 0).then(|| Duration::from_nanos(deadline.saturating_sub(now())))
    }

    /// Whether nobody waits for the result any more: the client went away or gave up, or the deadline has passed. A
    /// handler that takes long does well to ask now and then.
    pub fn is_cancelled(&self) -> bool {
        self.end().is_some()
    }

    /// The same, and which of the two it is: what the item fails with.
    pub fn given_up(&self) -> Option<Failure> {
        self.end().map(Failure::from)
    }

    fn end(&self) -> Option<ReplyError> {
        request::end(self.claimed.record, self.claimed.word.generation(), now)
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
    /// The item whose cache lines were asked for ahead of its claim.
    fetched: Option<u32>,
    lines: Lines,
    /// Shared with the items that are [open](Worker::open_beside) beside each other.
    output: Rc<RefCell<Output<'s>>>,
}

impl<'s> Worker<'s> {
    /// Takes a worker's slot over. Results that its predecessor completed and the front has not released yet stay where
    /// they are.
    pub fn attach(segment: &'s Segment, topology: Topology, bells: Arc<Bells>, number: u16) -> Option<Self> {
        let pool = topology.pool_of(number)?;
        if !segment.occupy(Slot::Worker(number)) {
            return None;
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
            output: Rc::new(RefCell::new(Output::resume(segment, bells.clone(), number))),
            fetched: None,
            lines: Lines::default(),
            topology,
            bells,
            number,
            pool,
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

    /// Claims the next item of the pool: the oldest of the highest priority. Wakes the front of the items completed before it.
    #[inline(always)]
    pub fn take(&mut self) -> Option<Claimed<'s>> {
        let Worker { segment, number, lanes, fetched, output, .. } = self;
        let (segment, number) = (*segment, *number);
        for (lane_number, lane) in lanes {
            let mut word = None;
            let before = *fetched;
            let claim = |hint: Hint| {
                if before != Some(hint.index) {
                    segment.fetch(hint.index);
                }
                word = claim(segment, hint, *lane_number, number);
                if word.is_none() {
                    // There may be many stale hints before the next item.
                    output.borrow_mut().ring();
                }
                word.is_some()
            };
            // While this item is worked on, the next one's lines are on their way.
            let ahead = |next: Hint| {
                segment.fetch(next.index);
                *fetched = Some(next.index);
            };
            if let (Some(hint), Some(word)) = (lane.take_ahead(claim, ahead), word) {
                crash_point!("take.claimed");
                // Before anything else is done: it may take long.
                output.borrow_mut().ring_after_claim();
                let front = request::front_of(segment, hint.index);
                return Some(Claimed { index: hint.index, front, word, record: segment.item(hint.index) });
            }
        }
        self.ring();
        None
    }

    /// Wakes the front of the items completed since the last [`Worker::take`], which does that, too: for who takes no more.
    #[inline]
    pub fn ring(&self) {
        self.output.borrow_mut().ring();
    }

    /// The item as its handler sees it, and an empty result of at most `most` bytes. None if the front wrote something
    /// impossible.
    #[inline(always)]
    pub fn open<'w: 'c, 'c>(&'w mut self, claimed: &'c Claimed<'s>, most: usize) -> Option<(Item<'c>, Reply<'w, 's>)> {
        let Lines { request, result } = &mut self.lines;
        let record = claimed.record;
        let payload = match record.payload_len.load(Relaxed) as usize {
            len @ 0..=INLINE => {
                // Of a length that is not known: then the copy is made like those of handlers, and what loads its bytes in
                // one does not wait for several stores.
                record.request.load(&mut request.0[..len]);
                &request.0[..len]
            }
            len => self.segment.read_request(claimed.front, record.request_offset.load(Relaxed), len as u64)?,
        };
        let metadata = match record.extra_len.load(Relaxed) {
            0 => Cow::Borrowed(&[][..]),
            _ => Cow::Owned(request::metadata(self.segment, claimed.front, record)),
        };
        let reply = Reply::new(&self.output, result, Draft::of(claimed, most), None);
        Some((Item { claimed, payload, metadata }, reply))
    }

    /// An empty result alone, for an item that is not handled.
    pub fn reply(&mut self, claimed: &Claimed<'s>, most: usize) -> Reply<'_, 's> {
        Reply::new(&self.output, &mut self.lines.result, Draft::of(claimed, most), None)
    }

    /// The item and its result as one, to be open beside others; claimed at `began`. None if the front wrote something
    /// impossible.
    pub fn open_beside(&self, claimed: &Claimed<'s>, most: usize, began: u64) -> Option<Open<'s>> {
        Open::new(self.segment, self.output.clone(), claimed, most, began)
    }

    /// Whether there is something in the pool's lanes.
    pub fn has_work(&self) -> bool {
        self.lanes.iter().any(|(_, lane)| !lane.is_empty())
    }

    /// Wakes another worker of the pool if there is more to do and one sleeps.
    #[inline]
    pub fn chain(&self) {
        if self.segment.idle(self.pool).any() && self.has_work() {
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
        crash_point!("spin.begun");
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

    /// Says that this worker is about to sleep while items are open: from now on its [bell](Worker::bell) rings when a partial
    /// result was taken, an item was cancelled, a result fetched or the server stops; and when there is an item to take, if
    /// `for_items`. Who says so must take it. False if there is one: then all is as after [`Worker::disarm`].
    ///
    /// Look once more, after this, at whatever else is waited for, and sleep only if there is nothing.
    pub fn arm(&self, for_items: bool) -> bool {
        if for_items {
            self.segment.idle(self.pool).enter(self.bit);
        }
        self.segment.sleeping(Slot::Worker(self.number)).enter(0);
        let has_work = for_items && self.has_work();
        if has_work {
            self.leave();
        }
        !has_work
    }

    /// The counterpart of [`Worker::arm`], once the bell has rung or something else was to do. Forgets the rings so far.
    pub fn disarm(&self) -> io::Result<()> {
        self.leave();
        self.bell().wait_at_most(Duration::ZERO)
    }

    fn leave(&self) {
        self.segment.idle(self.pool).leave(self.bit);
        self.segment.sleeping(Slot::Worker(self.number)).leave(0);
    }

    /// What this worker sleeps at. It may also ring for nothing.
    pub fn bell(&self) -> &Bell {
        self.bells.worker(self.number)
    }
}

/// Claims the item of a hint, if there is such an item and it may be claimed.
#[inline]
fn claim(segment: &Segment, hint: Hint, lane: u8, worker: u16) -> Option<Word> {
    let is_one = hint.index < segment.geometry().items;
    is_one.then(|| Word::claim(&segment.item(hint.index).word, hint.generation, lane, worker)).flatten()
}
