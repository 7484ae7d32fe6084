//! Dead letters: what becomes of an item that killed all the workers that it was given to.
//!
//! The sweep files it before it completes the item, while its payload is still in the request arena, so that an item whose
//! client is told that it is over can be looked at and requeued. Whoever takes over from a supervisor that died in between
//! finds the letter there and files no other: the log tells items apart.
//!
//! A letter's head is the proto's own `DeadLetter` without number and payload. How an item's earlier workers died is
//! private memory of the supervisor: a successor of it knows how many they were, which the item's word says.

use std::{
    collections::HashMap, os::unix::process::ExitStatusExt as _, process::ExitStatus, sync::atomic::Ordering::*,
    time::SystemTime,
};

use prost::Message as _;

use super::{
    Failure, Phase, Word,
    request::{extra_bytes, front_of, is_submitted, metadata, request_spans},
};
use crate::{
    dispatch::metadata::pairs,
    proto::v1::{Attempt, DeadLetter, attempt::End},
    segment::{INLINE, ItemRecord, LetterKey, PRIORITIES, Segment},
};

/// Of a payload that is too large to be kept, the bytes that are.
const KEPT: usize = 4096;
/// The front takes no more subscription and metadata than this; a record that has more is broken.
const EXTRA: u32 = 17 << 10;

/// How a worker died.
#[derive(Clone, Debug)]
pub struct Death {
    /// Its number.
    pub worker: u16,
    /// Its pid.
    pub pid: u32,
    /// How it ended.
    pub status: ExitStatus,
    /// The exit status in words, as the log has it.
    pub cause: String,
    /// What becomes of an item that it had as the last of all.
    pub failure: Failure,
}

/// What the supervisor knows of items that their workers died of.
#[derive(Debug, Default)]
pub struct DeadLetters {
    pools: Vec<String>,
    /// Of items that have been given to another worker, by index: who they are now, and their attempts so far.
    histories: HashMap<u32, (LetterKey, Vec<Attempt>)>,
}

impl DeadLetters {
    /// For a server with these pools.
    pub fn new(pools: Vec<String>) -> Self {
        DeadLetters { pools, histories: HashMap::new() }
    }

    /// A worker died of an item, and another gets it.
    pub(super) fn retry(&mut self, index: u32, record: &ItemRecord, word: Word, requeued: Word, death: &Death) {
        let history = self.history(index, record, word, death);
        self.histories.insert(index, (key(index, record, requeued), history));
    }

    /// A worker died of an item, and no other gets it: files it. Before DONE is stored.
    pub(super) fn file(&mut self, segment: &Segment, index: u32, word: Word, death: &Death) {
        let record = segment.item(index);
        let history = self.history(index, record, word, death);
        let Some(log) = segment.letter_log() else { return };
        let mut line = [0; INLINE];
        let payload = payload(segment, index, record, &mut line);
        let lane = u32::from(word.lane());
        let pool = self.pools.get((lane / PRIORITIES) as usize).cloned().unwrap_or_default();
        let id = record.id.load(Relaxed);
        let mut letter = DeadLetter {
            pool: pool.clone(),
            id,
            priority: lane % PRIORITIES,
            payload_size: record.payload_len.load(Relaxed).into(),
            truncated: payload.is_none(),
            time: Some(SystemTime::now().into()),
            attempts: u32::from(word.attempts()) + 1,
            history,
            ..DeadLetter::default()
        };
        if record.extra_len.load(Relaxed) <= EXTRA {
            let front = front_of(segment, index);
            let extra = extra_bytes(segment, front, record).unwrap_or_default();
            let metadata = metadata(segment, front, record);
            letter.metadata = pairs(&metadata).map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
            // Two looks at what a worker can write over: the second may have seen more than the first.
            let subscription = &extra[..extra.len().saturating_sub(metadata.len())];
            letter.subscription = is_submitted(record).then(|| String::from_utf8_lossy(subscription).into_owned());
        }
        let mut payload = payload.unwrap_or_default();
        let mut head = letter.encode_to_vec();
        if head.len().saturating_add(payload.len()) > log.largest() {
            payload = &payload[..payload.len().min(KEPT)];
            letter.truncated = true;
            head = letter.encode_to_vec();
        }
        match log.file(key(index, record, word), &head, payload) {
            Some(number) => tracing::warn!(
                pool,
                id,
                letter = number,
                attempts = letter.attempts,
                cause = death.cause,
                "an item is a dead letter: its workers died of it"
            ),
            None => tracing::error!(pool, id, "an item that its workers died of is too large for the dead letters"),
        }
    }

    /// How an item's workers died, the last one included.
    fn history(&mut self, index: u32, record: &ItemRecord, word: Word, death: &Death) -> Vec<Attempt> {
        let mut history = match self.histories.remove(&index) {
            Some((of, history)) if of == key(index, record, word) => history,
            _ => Vec::new(),
        };
        history.push(Attempt {
            attempt: u32::from(word.attempts()) + 1,
            worker: death.worker.into(),
            pid: death.pid,
            cause: death.cause.clone(),
            time: Some(SystemTime::now().into()),
            end: death.status.signal().map(End::Signal).or_else(|| death.status.code().map(End::ExitCode)),
        });
        history
    }

    /// Forgets those that somebody completed after all.
    pub(super) fn forget_completed(&mut self, segment: &Segment) {
        self.histories.retain(|&index, (of, _)| {
            let record = segment.item(index);
            let word = Word::load(&record.word);
            matches!(word.phase(), Phase::Ready | Phase::Claimed) && *of == key(index, record, word)
        });
    }
}

/// Whether an item was filed by somebody who died before it was completed.
pub(super) fn is_filed(segment: &Segment, index: u32, word: Word) -> bool {
    segment.letter_log().is_some_and(|log| log.find(key(index, segment.item(index), word)).is_some())
}

fn key(index: u32, record: &ItemRecord, word: Word) -> LetterKey {
    LetterKey { index, generation: word.generation(), offered: record.offered.load(Relaxed) }
}

/// The payload of an item; none if the record is broken.
fn payload<'a>(segment: &'a Segment, index: u32, record: &ItemRecord, line: &'a mut [u8; INLINE]) -> Option<&'a [u8]> {
    match request_spans(record) {
        (Some(span), _) => segment.read_request(front_of(segment, index), span.offset, span.len),
        (None, _) => {
            let payload = line.get_mut(..record.payload_len.load(Relaxed) as usize)?;
            record.request.load(payload);
            Some(payload)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use tonic::Code;

    use super::*;
    use crate::{
        dispatch::{Bells, Front, Kind, Offer, Topology, Worker, lane_of, metadata, sweep_worker},
        segment::{Geometry, SegmentOwner, Slot},
    };

    /// A front with one worker that has claimed an item, and a supervisor's view.
    struct Rig {
        _owner: SegmentOwner,
        supervisor: Segment,
        front: &'static Segment,
        topology: Topology,
        bells: std::sync::Arc<Bells>,
        front_side: Front<'static>,
        worker_side: Worker<'static>,
    }

    fn rig(test: &str) -> Rig {
        let geometry = Geometry {
            items: 4,
            fronts: 1,
            workers: 1,
            pools: 2,
            request_bytes: 1 << 17,
            result_bytes: 4096,
            letter_bytes: 1 << 16,
        };
        let name = format!("unit-letters-{test}-{}", std::process::id());
        let owner = SegmentOwner::create(&name, geometry).unwrap();
        let attach = |slot| Segment::attach(owner.object(), &name, slot).unwrap();
        let leak = |slot| &*Box::leak(Box::new(attach(slot)));
        let (supervisor, front, worker) = (attach(Slot::Supervisor), leak(Slot::Front(0)), leak(Slot::Worker(0)));
        let (topology, bells) = (Topology::new([0, 1]), Bells::new(1, 1).unwrap());
        let front_side = Front::attach(front, topology.clone(), bells.clone(), 0).0;
        let worker_side = Worker::attach(worker, topology.clone(), bells.clone(), 0).unwrap();
        Rig { _owner: owner, supervisor, front, topology, bells, front_side, worker_side }
    }

    impl Rig {
        /// Offers a submitted item to the worker, which claims it; its index.
        fn claim(&mut self, id: u64, payload: &[u8]) -> u32 {
            let mut request = self.front_side.request(payload.len()).unwrap();
            self.front_side.write(&mut request, payload);
            let mut pairs = Vec::new();
            metadata::push(&mut pairs, "key", "value");
            let offer = Offer {
                pool: 1,
                priority: 3,
                id,
                offered: 1000 + id,
                deadline: 0,
                kind: Kind::Submit,
                subscription: b"mine",
                metadata: &pairs,
            };
            let index = self.front_side.offer(&offer, &mut request).unwrap();
            assert_eq!(self.worker_side.take().unwrap().id(), id);
            index
        }

        /// The worker takes an item that was given back, and does it.
        fn complete(&mut self) {
            let claimed = self.worker_side.take().unwrap();
            self.worker_side.reply(&claimed, 100).complete(claimed, 0, 1, 1);
        }

        fn sweep(&mut self, letters: &mut DeadLetters, pid: u32, max_attempts: u32) {
            sweep_worker(&self.supervisor, &self.topology, &self.bells, &death(pid), max_attempts, letters);
        }

        fn letter(&self, number: u64) -> (DeadLetter, Vec<u8>) {
            let letter = self.front.letters().unwrap().read(number, true).unwrap();
            (DeadLetter::decode(&letter.head[..]).unwrap(), letter.body)
        }

        fn newest(&self) -> u64 {
            self.front.letters().unwrap().range().1
        }
    }

    fn death(pid: u32) -> Death {
        let failure = Failure::new(Code::Aborted, "WORKER_CRASHED", "the worker crashed");
        Death { worker: 0, pid, status: ExitStatus::from_raw(11), cause: "killed by SIGSEGV".to_owned(), failure }
    }

    fn letters() -> DeadLetters {
        DeadLetters::new(vec!["other".to_owned(), "pool".to_owned()])
    }

    #[test]
    fn a_letter_is_filed_once_by_however_many_sweeps() {
        let mut rig = rig("again");
        let payload = [7; 5000];
        let index = rig.claim(42, &payload);
        let word = Word::load(&rig.supervisor.item(index).word);
        // The supervisor dies before it stores DONE, and its successor knows nothing; twice.
        for pid in [10, 11] {
            letters().file(&rig.supervisor, index, word, &death(pid));
            assert_eq!(rig.newest(), 1);
        }
        rig.sweep(&mut letters(), 12, 1);
        assert_eq!(rig.newest(), 1);
        assert_eq!(Word::load(&rig.supervisor.item(index).word).phase(), Phase::Done);
        let (letter, body) = rig.letter(1);
        assert_eq!((letter.pool.as_str(), letter.id, letter.priority), ("pool", 42, 3));
        assert_eq!((letter.subscription.as_deref(), &letter.metadata["key"][..]), (Some("mine"), "value"));
        assert_eq!((letter.attempts, letter.history.len(), letter.history[0].pid), (1, 1, 10));
        assert_eq!(letter.history[0].end, Some(End::Signal(11)));
        assert_eq!((letter.payload_size, letter.truncated), (5000, false));
        assert!(letter.time.is_some());
        assert_eq!(body, payload);

        // The same record again is another item.
        let completion = rig.front_side.collect().unwrap();
        rig.front_side.release(completion.index);
        assert_eq!(rig.claim(43, b"next"), index);
        rig.sweep(&mut letters(), 13, 1);
        assert_eq!((rig.newest(), rig.letter(2).0.id), (2, 43));
    }

    #[test]
    fn a_history_is_of_one_item_and_is_forgotten_when_that_is_done() {
        let mut rig = rig("history");
        let mut known = letters();
        let index = rig.claim(1, b"");
        for pid in [10, 11] {
            rig.sweep(&mut known, pid, 3);
            assert_eq!(rig.worker_side.take().unwrap().id(), 1);
        }
        rig.sweep(&mut known, 12, 3);
        let (letter, _) = rig.letter(1);
        assert_eq!(
            letter.history.iter().map(|one| (one.attempt, one.pid)).collect::<Vec<_>>(),
            [(1, 10), (2, 11), (3, 12)]
        );
        assert!(known.histories.is_empty());

        let completion = rig.front_side.collect().unwrap();
        rig.front_side.release(completion.index);
        assert_eq!(rig.claim(2, b""), index);
        rig.sweep(&mut known, 20, 3);
        assert_eq!(known.histories.len(), 1);
        // It is done; the next sweep, whosever, forgets it.
        rig.complete();
        rig.sweep(&mut known, 21, 3);
        assert!(known.histories.is_empty());

        // Nor is it told of the next item in its record, if no sweep came between.
        let completion = rig.front_side.collect().unwrap();
        rig.front_side.release(completion.index);
        assert_eq!(rig.claim(3, b""), index);
        rig.sweep(&mut known, 30, 3);
        rig.complete();
        let completion = rig.front_side.collect().unwrap();
        rig.front_side.release(completion.index);
        assert_eq!(rig.claim(4, b""), index);
        rig.sweep(&mut known, 40, 1);
        let (letter, _) = rig.letter(2);
        assert_eq!(letter.history.iter().map(|one| (one.attempt, one.pid)).collect::<Vec<_>>(), [(1, 40)]);
    }

    #[test]
    fn of_a_payload_that_no_letter_has_room_for_the_beginning_is_kept() {
        let mut rig = rig("large");
        let payload: Vec<_> = (0..100_000).map(|n| n as u8).collect();
        rig.claim(1, &payload);
        rig.sweep(&mut letters(), 10, 1);
        let (letter, body) = rig.letter(1);
        assert_eq!((letter.payload_size, letter.truncated), (100_000, true));
        assert_eq!(body, payload[..KEPT]);
    }

    #[test]
    fn a_record_that_its_worker_scribbled_over_is_a_letter_all_the_same() {
        let mut rig = rig("scribbled");
        let index = rig.claim(1, &[1; 100]);
        let record = rig.supervisor.item(index);
        record.request_offset.store(u64::MAX, Relaxed);
        record.extra_len.store(u32::MAX, Relaxed);
        record.kind.store(u32::MAX, Relaxed);
        let word = Word::new(1, lane_of(1, 2), 0, Phase::Claimed, 255);
        letters().file(&rig.supervisor, index, word, &death(10));
        let (letter, body) = rig.letter(1);
        assert_eq!((letter.truncated, letter.metadata.len(), letter.attempts, body.len()), (true, 0, 256, 0));

        record.extra_len.store(EXTRA, Relaxed);
        record.extra_offset.store(0, Relaxed);
        record.payload_len.store(INLINE as u32, Relaxed);
        let word = Word::new(2, lane_of(1, 2), 0, Phase::Claimed, 0);
        letters().file(&rig.supervisor, index, word, &death(10));
        assert_eq!(rig.newest(), 2);
    }
}
