//! A front's side of partial results: which item has some, and taking them. See `dispatch::partial`.

use std::sync::atomic::fence;

use super::*;
use crate::dispatch::partial::{self, Entry, LEAD};

/// What was taken of an item's partial results.
#[derive(Clone, Copy, Debug)]
pub(super) struct Taken {
    /// Of which attempt.
    generation: u32,
    count: u32,
    /// The item's owner has been told that there are some, and has not found out yet that there are no more.
    is_noticed: bool,
}

impl Taken {
    pub fn none_of(word: Word) -> Self {
        Taken { generation: word.generation(), count: 0, is_noticed: false }
    }
}

/// A partial result that waits to be taken.
#[derive(Clone, Copy, Debug)]
pub struct Partial {
    /// The client's own id of the item.
    pub id: u64,
    /// How many there were before it, of this attempt.
    pub sequence: u32,
    /// How many workers have been given the item.
    pub attempts: u32,
    /// Who has it.
    pub worker: u16,
    /// How many bytes it has.
    pub len: usize,
    index: u32,
    generation: u32,
    entry: Entry,
}

/// What a worker wrote about a partial result is impossible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken;

impl<'s> Front<'s> {
    /// An item whose partial results have begun to wait since this was asked. Its owner takes them by
    /// [`Front::partial`] until there are no more, or the item has ended.
    pub fn noticed(&mut self) -> Option<u32> {
        self.noticed.pop_front()
    }

    /// There may be partial results of a streaming item.
    pub(super) fn notice(&mut self, index: u32) {
        let Some((taken, _, Some(_))) = self.next_entry(index) else { return };
        if !taken.is_noticed {
            taken.is_noticed = true;
            self.noticed.push_back(index);
        }
    }

    fn forget_notice(&mut self, index: u32) {
        if let Some(taken) = &mut self.known_mut(index).stream {
            taken.is_noticed = false;
        }
    }

    /// How many partial results of an item were taken, of the attempt that it is in or ended with.
    pub fn taken(&self, index: u32) -> u32 {
        let Some(taken) = self.known[(index - self.first) as usize].stream else { return 0 };
        let generation = Word::load(&self.segment.item(index).word).generation();
        if taken.generation == generation { taken.count } else { 0 }
    }

    /// What was taken of an item, who has it, and what is in the slot of the next partial result.
    fn next_entry(&mut self, index: u32) -> Option<(&mut Taken, Word, Option<Entry>)> {
        let record = self.segment.item(index);
        let word = Word::load(&record.word);
        let workers = self.segment.geometry().workers;
        let known = self.known_mut(index);
        let is_there = matches!(known.state, State::Waiting | State::Held)
            && word.follows(known.word, workers)
            && matches!(word.phase(), Phase::Claimed | Phase::Done)
            && u32::from(word.owner()) < workers;
        let taken = known.stream.as_mut().filter(|_| is_there)?;
        if taken.generation != word.generation() {
            *taken = Taken { is_noticed: taken.is_noticed, ..Taken::none_of(word) };
        }
        let entry = Entry::look(partial::slot(&record.partials, taken.count), word.generation());
        Some((taken, word, entry))
    }

    /// An item's next partial result, if it has come. Of a completed item those that come before its result.
    pub fn partial(&mut self, index: u32) -> Option<Result<Partial, Broken>> {
        let segment = self.segment;
        let bytes = segment.geometry().result_bytes;
        let Some((taken, word, Some(entry))) = self.next_entry(index) else {
            self.forget_notice(index);
            return None;
        };
        let (sequence, generation) = (taken.count, taken.generation);
        let mut len = [0; 8];
        let is_read = segment.copy_result(word.owner(), entry.offset(), &mut len);
        let len = u64::from_ne_bytes(len);
        let end = entry.offset().checked_add(LEAD).and_then(|start| start.checked_add(len));
        if !is_read || len > MAX_RESULT as u64 || end.is_none_or(|end| end > bytes) {
            if self.is_current(index, generation, word.owner()) {
                return Some(Err(Broken));
            }
            // Its worker has just died, and the memory is another's. What the next attempt sends is noticed anew.
            self.forget_notice(index);
            return None;
        }
        Some(Ok(Partial {
            id: self.id(index),
            sequence,
            attempts: u32::from(word.attempts()) + 1,
            worker: word.owner(),
            len: len as usize,
            index,
            generation,
            entry,
        }))
    }

    /// Takes a partial result: its bytes, piece by piece, and then whether they are right. If not, its worker has died and
    /// they must be thrown away.
    pub fn take_partial(&mut self, partial: &Partial, mut piece: impl FnMut(&[u8])) -> bool {
        let Partial { index, generation, worker, entry, .. } = *partial;
        let mut bytes = [0; 4096];
        let mut at = 0;
        while at < partial.len {
            let bytes = &mut bytes[..(partial.len - at).min(4096)];
            if !self.segment.copy_result(worker, entry.offset() + LEAD + at as u64, bytes) {
                return false;
            }
            piece(bytes);
            at += bytes.len();
        }
        crash_point!("partial.copied");
        if !self.is_current(index, generation, worker) {
            return false;
        }
        let record = self.segment.item(index);
        entry.take(partial::slot(&record.partials, partial.sequence));
        crash_point!("partial.taken");
        // It may wait for credit, or for room.
        self.wake_worker(Word::load(&record.word));
        crash_point!("partial.credited");
        if let Some(taken) = &mut self.known_mut(index).stream {
            taken.count = taken.count.wrapping_add(1);
        }
        true
    }

    /// Whether a worker's attempt was still its own when all that was read before this was read: its memory is another's only
    /// after its death, and a sweep, and a fork.
    fn is_current(&self, index: u32, generation: u32, worker: u16) -> bool {
        fence(Acquire);
        let word = Word::load(&self.segment.item(index).word);
        let is_its = word.generation() == generation && word.owner() == worker;
        is_its && matches!(word.phase(), Phase::Claimed | Phase::Done)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;
    use crate::{
        dispatch::{Claimed, DeadLetters, Death, Failure, ReplyError, Worker, sweep_worker},
        process::now,
        segment::{Geometry, SegmentOwner, WINDOW},
    };

    const BYTES: u64 = 1 << 17;

    /// A front and a worker, and a supervisor's view.
    struct Rig {
        _owner: SegmentOwner,
        supervisor: &'static Segment,
        topology: Topology,
        bells: Arc<Bells>,
        front: Front<'static>,
        worker: Worker<'static>,
    }

    fn rig(test: &str) -> Rig {
        let geometry = Geometry {
            items: 4,
            fronts: 1,
            workers: 1,
            pools: 1,
            request_bytes: BYTES,
            result_bytes: BYTES,
            letter_bytes: 0,
        };
        let owner = SegmentOwner::create(&format!("unit-stream-{test}-{}", std::process::id()), geometry).unwrap();
        let (topology, bells) = (Topology::new([1]), Bells::new(1, 1).unwrap());
        let view = |slot| &*Box::leak(Box::new(Segment::attach(owner.object(), owner.name(), slot).unwrap()));
        let (front, _) = Front::attach(view(Slot::Front(0)), topology.clone(), bells.clone(), 0);
        let worker = Worker::attach(view(Slot::Worker(0)), topology.clone(), bells.clone(), 0).unwrap();
        Rig { supervisor: view(Slot::Supervisor), front, worker, topology, bells, _owner: owner }
    }

    impl Rig {
        fn claim(&mut self, kind: Kind) -> Claimed<'static> {
            let mut request = self.front.request(0).unwrap();
            let subscription = if kind == Kind::Submit { &b"s"[..] } else { &[] };
            let offer =
                Offer { pool: 0, priority: 0, id: 7, offered: now(), deadline: 0, kind, subscription, metadata: &[] };
            self.front.offer(&offer, &mut request).unwrap();
            self.worker.take().unwrap()
        }

        /// The item that the front is told of, and the bytes of its parts.
        fn parts(&mut self) -> (Option<u32>, Vec<Vec<u8>>) {
            assert!(self.front.collect().is_none());
            let index = self.front.noticed();
            let mut parts = Vec::new();
            while let Some(partial) = index.and_then(|index| self.front.partial(index)) {
                let partial = partial.expect("it is right");
                assert_eq!(partial.id, 7);
                let mut bytes = Vec::new();
                assert!(self.front.take_partial(&partial, |piece| bytes.extend_from_slice(piece)));
                assert_eq!(bytes.len(), partial.len);
                parts.push(bytes);
            }
            (index, parts)
        }

        fn kill_the_worker(&mut self) {
            use std::os::unix::process::ExitStatusExt as _;
            let failure = Failure::new(crate::handler::Code::Aborted, "WORKER_CRASHED", "it was killed");
            let death = Death {
                worker: 0,
                pid: 1,
                status: std::process::ExitStatus::from_raw(9),
                cause: String::new(),
                failure,
            };
            let mut letters = DeadLetters::new(vec!["p".to_owned()]);
            sweep_worker(self.supervisor, &self.topology, &self.bells, &death, 9, &mut letters);
            let view = Segment::attach(self._owner.object(), self._owner.name(), Slot::Worker(0)).unwrap();
            let view = &*Box::leak(Box::new(view));
            self.worker = Worker::attach(view, self.topology.clone(), self.bells.clone(), 0).unwrap();
        }
    }

    #[test]
    fn as_many_wait_as_there_are_slots_and_then_none_until_one_is_taken() {
        let mut rig = rig("credit");
        let claimed = rig.claim(Kind::Stream);
        let mut open = rig.worker.open_beside(&claimed, 30_000, now()).unwrap();
        let lens = [0, 1, 64, 65, 20_000];
        let (mut sent, mut taken) = (0, 0);
        for _ in 0..50 {
            for _ in 0..WINDOW {
                open.reply().write(&vec![sent as u8; lens[sent % 5]]).unwrap();
                assert_eq!(open.reply().try_send(), Ok(true));
                assert!(open.reply().is_empty());
                sent += 1;
            }
            open.reply().write(&vec![sent as u8; lens[sent % 5]]).unwrap();
            assert_eq!(open.reply().try_send(), Ok(false), "there is no credit");
            assert!(!open.reply().credit().unwrap().is_there());
            let (index, parts) = rig.parts();
            assert!(index.is_some());
            for part in parts {
                assert_eq!(part, vec![taken as u8; lens[taken % 5]]);
                taken += 1;
            }
            assert_eq!(taken, sent);
            assert!(open.reply().credit().unwrap().is_there());
            // What was not sent is still there.
            assert_eq!(open.reply().try_send(), Ok(true));
            sent += 1;
            assert_eq!(rig.parts().1.len(), 1);
            taken += 1;
        }
        // The last ones come with the end.
        open.reply().write(b"last").unwrap();
        open.reply().send().unwrap();
        open.reply().write(&[9; 100]).unwrap();
        open.complete();
        let done = rig.front.collect().unwrap();
        let last = rig.front.partial(done.index).unwrap().unwrap();
        assert_eq!((last.sequence as usize, last.len), (sent, 4));
        assert!(rig.front.take_partial(&last, |_| {}));
        assert!(rig.front.partial(done.index).is_none());
        assert_eq!(rig.front.taken(done.index) as usize, sent + 1);
        assert_eq!(rig.front.arena_result(&done).unwrap(), [9; 100]);
        rig.front.release(done.index);
        let claimed = rig.claim(Kind::Call);
        let (_, mut reply) = rig.worker.open(&claimed, BYTES as usize).unwrap();
        reply.buffer(BYTES as usize).expect("all of it is free");
    }

    #[test]
    fn to_a_call_nothing_is_sent_before_the_end() {
        for kind in [Kind::Call, Kind::Submit] {
            let mut rig = rig("whole");
            let claimed = rig.claim(kind);
            let (item, mut reply) = rig.worker.open(&claimed, 100).unwrap();
            for part in [b"ab", b"cd"] {
                reply.write(part).unwrap();
                reply.send().unwrap();
            }
            assert!(reply.credit().is_none() && item.payload().is_empty());
            drop(item);
            reply.complete(claimed, 0, 1, 1);
            let done = rig.front.collect().unwrap();
            assert!(rig.front.partial(done.index).is_none());
            assert_eq!(rig.front.inline_result(&done, &mut [0; INLINE]), Some(&b"abcd"[..]));
        }
    }

    #[test]
    fn what_an_attempt_left_is_nothing_to_the_next() {
        let mut rig = rig("attempts");
        let claimed = rig.claim(Kind::Stream);
        let index = claimed.index;
        let (_, mut reply) = rig.worker.open(&claimed, 30_000).unwrap();
        for n in 0..3 {
            reply.write(&[n; 20_000]).unwrap();
            reply.send().unwrap();
        }
        assert!(rig.front.collect().is_none());
        assert_eq!(rig.front.noticed(), Some(index));
        let first = rig.front.partial(index).unwrap().unwrap();
        assert!(rig.front.take_partial(&first, |_| {}));
        let second = rig.front.partial(index).unwrap().unwrap();
        drop(reply);
        rig.kill_the_worker();
        assert!(!rig.front.take_partial(&second, |_| {}), "it may have been anything");
        assert!(rig.front.partial(index).is_none());

        let claimed = rig.worker.take().unwrap();
        assert_eq!(claimed.index, index);
        // The front is late: nothing of the next attempt is taken by what it knows of this one.
        let (_, mut reply) = rig.worker.open(&claimed, BYTES as usize).unwrap();
        reply.buffer(BYTES as usize - 4096).expect("the memory is free").fill(5);
        reply.send().unwrap();
        assert!(!rig.front.take_partial(&second, |_| {}));
        drop(reply);
        let (_, parts) = rig.parts();
        assert!(parts.len() == 1 && parts[0] == vec![5; BYTES as usize - 4096]);
        assert_eq!(rig.front.taken(index), 1);
    }

    #[test]
    fn garbage_in_a_slot_is_broken_or_nothing() {
        let mut rig = rig("garbage");
        let claimed = rig.claim(Kind::Stream);
        let index = claimed.index;
        let record = rig.supervisor.item(index);
        let generation = Word::load(&record.word).generation();
        for offset in [BYTES, BYTES + 64, u64::MAX] {
            Entry::new(generation, offset).put(&record.partials[0]);
            assert_eq!(rig.front.partial(index).unwrap().unwrap_err(), Broken, "{offset}");
        }
        for other in [0, u64::MAX, u64::from(generation) << 36] {
            record.partials[0].store(other, Relaxed);
            assert!(rig.front.partial(index).is_none(), "{other:x}");
        }
        // A length that is none, wherever the worker can write.
        let mut bytes = [0u8; 128];
        bytes[..8].copy_from_slice(&(BYTES - 63).to_ne_bytes());
        let (_, mut reply) = rig.worker.open(&claimed, 200).unwrap();
        reply.write(&bytes).unwrap();
        reply.send().unwrap();
        let good = rig.front.partial(index).unwrap().unwrap();
        assert_eq!(good.len, 128);
        Entry::new(generation, good.entry.offset() + LEAD).put(&record.partials[0]);
        assert_eq!(rig.front.partial(index).unwrap().unwrap_err(), Broken);
    }

    #[test]
    fn who_gave_up_takes_nothing_and_is_sent_nothing() {
        let mut rig = rig("cancel");
        let claimed = rig.claim(Kind::Stream);
        let index = claimed.index;
        let mut open = rig.worker.open_beside(&claimed, 100, now()).unwrap();
        for _ in 0..WINDOW {
            open.reply().send().unwrap();
        }
        rig.front.cancel(index);
        assert_eq!(open.reply().send(), Err(ReplyError::Cancelled), "and it does not wait");
        assert!(open.reply().credit().unwrap().is_there());
        assert!(rig.front.partial(index).is_none());
        drop(open);
        assert!(rig.front.collect().is_none() && rig.front.noticed().is_none());
        assert_eq!(rig.front.free_items(), 4);
        let claimed = rig.claim(Kind::Call);
        let (_, mut reply) = rig.worker.open(&claimed, BYTES as usize).unwrap();
        reply.buffer(BYTES as usize).expect("all of it is free");
    }
}
