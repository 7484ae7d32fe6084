//! The supervisor's side: what a dead server left is made ready for the next.
//!
//! # What it promises
//!
//! Of a segment whose every participant is dead, submitted items stay: those that were completed as they are, the others to
//! be worked on, in the order in which they were offered. Calls go, because their callers are gone.
//!
//! # Why that holds
//!
//! **The item table is the truth**, so everything else between header and items is zeroed: it was about processes that
//! are dead, or hints, which the front pushes again when it takes its items over ([`super::Front::attach`]), as after a front's
//! death. There it frees the calls, of which nobody has had a hint since. Nobody else is there (the segment's lock is the proof), so each step may be a store. Each item's is one store of
//! its word, and an adoption that dies in between is made again by the next, which finds less to do.
//!
//! An item that a worker had claimed is an attempt the more, like after any death of its worker: its handler may have run.
//! But it is never failed for that, however many attempts it had: its worker was killed, not by it. One that is a dead letter
//! had its attempts before; the supervisor that filed it died before it could complete it.

use std::{io, sync::atomic::Ordering::Relaxed};

use tonic::Code;

use super::{Failure, Phase, Word, lanes, letters, request, sweep};
use crate::{
    crash_point::crash_point,
    segment::{ItemRecord, Segment},
};

/// Submitted items in a segment whose server is gone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// Accepted and not completed.
    pub pending: u32,
    /// Completed; nobody has fetched their results.
    pub done: u32,
}

impl Left {
    /// Counts them.
    pub fn of(segment: &Segment) -> Self {
        let mut left = Left::default();
        for record in (0..segment.geometry().items).map(|index| segment.item(index)) {
            match Word::load(&record.word).phase() {
                Phase::Ready | Phase::Claimed if request::is_submitted(record) => left.pending += 1,
                Phase::Done if request::is_submitted(record) => left.done += 1,
                _ => {}
            }
        }
        left
    }
}

/// Returns how many calls have no answer yet: items that somebody waits for on a connection.
pub fn unanswered(segment: &Segment) -> u32 {
    let records = (0..segment.geometry().items).map(|index| segment.item(index));
    let waits =
        |record: &&ItemRecord| Word::load(&record.word).phase() != Phase::Free && !request::is_submitted(record);
    records.filter(waits).count() as u32
}

/// Returns, for each worker, whether it holds an item.
pub fn holders(segment: &Segment) -> Vec<bool> {
    let mut holders = vec![false; segment.geometry().workers as usize];
    for record in (0..segment.geometry().items).map(|index| segment.item(index)) {
        let word = Word::load(&record.word);
        if word.phase() == Phase::Claimed
            && let Some(holds) = holders.get_mut(usize::from(word.owner()))
        {
            *holds = true;
        }
    }
    holders
}

/// Returns the clients' ids of the items that a worker holds.
pub fn held_by(segment: &Segment, worker: u16) -> Vec<u64> {
    let records = (0..segment.geometry().items).map(|index| segment.item(index));
    let held = records.filter(|record| {
        let word = Word::load(&record.word);
        word.phase() == Phase::Claimed && word.owner() == worker
    });
    held.map(|record| record.id.load(Relaxed)).collect()
}

/// Makes a dead server's segment ready, before anybody is forked.
pub fn adopt(segment: &Segment) -> io::Result<Left> {
    segment.reset()?;
    for index in 0..segment.geometry().items {
        let record = segment.item(index);
        let word = Word::load(&record.word);
        // A worker that scribbled over the word must not leave an item that nobody can claim.
        let is_ready = word.phase() == Phase::Ready;
        let is_broken =
            u32::from(word.lane()) >= lanes(segment) || is_ready && !word.may_end(segment.geometry().workers);
        match word.phase() {
            Phase::Ready | Phase::Claimed if is_broken => {
                // No longer than its record has room for.
                let damaged =
                    Failure::new(Code::DataLoss, "ITEM_DAMAGED", "its record in shared memory was written over");
                sweep::fail(record, word, &damaged);
            }
            Phase::Claimed if letters::is_filed(segment, index, word) => {
                let poison =
                    Failure::new(Code::Aborted, "WORKER_CRASHED", "its workers died of it: forkring dead list");
                sweep::fail(record, word, &poison);
            }
            Phase::Claimed => {
                word.requeued().store(&record.word, word);
                crash_point!("adopt.requeued");
            }
            Phase::Free | Phase::Ready | Phase::Done => {}
        }
    }
    crash_point!("adopt.settled");
    Ok(Left::of(segment))
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, process::ExitStatus, sync::Arc};

    use super::*;
    use crate::{
        dispatch::{Bells, DeadLetters, Death, Front, Kind, Offer, Outcome, Topology, Worker},
        process::now,
        segment::{Geometry, SegmentOwner, Slot, Stage},
    };

    /// Of both kinds, in the record and in the arena.
    const LENS: [usize; 3] = [10, 64, 5000];

    fn payload(id: u64) -> Vec<u8> {
        vec![id as u8; LENS[id as usize % LENS.len()]]
    }

    /// A segment and views of it, as if each were another process's.
    struct Rig {
        owner: SegmentOwner,
        topology: Topology,
        bells: Arc<Bells>,
    }

    impl Rig {
        fn new(test: &str) -> Self {
            let geometry = Geometry {
                items: 64,
                fronts: 1,
                workers: 2,
                pools: 1,
                request_bytes: 1 << 18,
                result_bytes: 1 << 18,
                letter_bytes: 1 << 16,
            };
            let name = format!("unit-{test}-{}", std::process::id());
            Rig {
                owner: SegmentOwner::create(&name, geometry).unwrap(),
                topology: Topology::new([2]),
                bells: Bells::new(1, 2).unwrap(),
            }
        }

        /// Leaked, as by processes that live until the end.
        fn view(&self, slot: Slot) -> &'static Segment {
            Box::leak(Box::new(Segment::attach(self.owner.object(), self.owner.name(), slot).unwrap()))
        }

        fn front(&self) -> (Front<'static>, usize) {
            let (front, adopted) =
                Front::attach(self.view(Slot::Front(0)), self.topology.clone(), self.bells.clone(), 0);
            assert!(adopted.iter().all(|one| one.subscription == b"s"));
            (front, adopted.len())
        }

        fn worker(&self, number: u16) -> Worker<'static> {
            let view = self.view(Slot::Worker(number));
            Worker::attach(view, self.topology.clone(), self.bells.clone(), number).unwrap()
        }
    }

    fn offer(front: &mut Front<'_>, id: u64, kind: Kind) {
        let mut request = front.request(payload(id).len()).unwrap();
        front.write(&mut request, &payload(id));
        let subscription = if kind == Kind::Submit { &b"s"[..] } else { &[] };
        let offer = Offer { pool: 0, priority: 1, id, offered: now(), deadline: 0, kind, subscription, metadata: &[] };
        front.offer(&offer, &mut request).unwrap();
        front.ring();
    }

    /// Works on an item: its payload is its result.
    fn work(worker: &mut Worker<'_>) -> Option<u64> {
        let claimed = worker.take()?;
        let (item, mut reply) = worker.open(&claimed, 1 << 16).unwrap();
        assert_eq!(item.payload(), payload(item.id()));
        reply.write(item.payload()).unwrap();
        let id = item.id();
        reply.complete(claimed, 0, now(), now());
        Some(id)
    }

    /// What is delivered: ids and attempts.
    fn deliver(front: &mut Front<'_>) -> BTreeMap<u64, u32> {
        let mut all = BTreeMap::new();
        while let Some(done) = front.collect() {
            let mut line = [0; crate::segment::INLINE];
            let bytes = match done.len {
                0..=64 => front.inline_result(&done, &mut line).unwrap(),
                _ => front.arena_result(&done).unwrap(),
            };
            assert_eq!(bytes, payload(done.id));
            assert_eq!(all.insert(done.id, done.attempts), None);
            front.release(done.index);
        }
        all
    }

    #[test]
    fn what_is_pending_runs_what_is_done_stays_and_calls_go() {
        let rig = Rig::new("adopt");
        {
            let (mut front, _) = rig.front();
            let mut workers = [rig.worker(0), rig.worker(1)];
            for id in 1..=6 {
                offer(&mut front, id, Kind::Submit);
                offer(&mut front, id + 100, Kind::Call);
            }
            for _ in 0..4 {
                work(&mut workers[0]).unwrap();
            }
            // Two have an item each: 3 and 103.
            assert!(workers.each_mut().map(|worker| worker.take()).iter().all(Option::is_some));
            // Dead while they slept, spun, were stopped.
            front.going_to_sleep();
            assert!(workers[1].begin_spin());
        }
        let supervisor = rig.view(Slot::Supervisor);
        supervisor.set_stage(Stage::Stopping);
        // However often it is begun.
        for _ in 0..3 {
            assert_eq!(adopt(supervisor).unwrap(), Left { pending: 4, done: 2 });
        }
        assert_eq!((supervisor.stage(), supervisor.idle(0).any()), (Stage::Serving, false));
        assert!(!supervisor.sleeping(Slot::Front(0)).any());

        let (mut front, adopted) = rig.front();
        let mut workers = [rig.worker(0), rig.worker(1)];
        assert_eq!((adopted, front.free_items()), (6, 64 - 6));
        assert!(!workers[0].has_work(), "there are no hints yet");
        front.ring();
        offer(&mut front, 7, Kind::Call);
        let order: Vec<_> = std::iter::from_fn(|| work(&mut workers[1])).collect();
        assert_eq!(order, [3, 4, 5, 6, 7], "in the order in which they were offered");
        let delivered = deliver(&mut front);
        assert_eq!(delivered, [(1, 1), (2, 1), (3, 2), (4, 1), (5, 1), (6, 1), (7, 1)].into());
        assert_eq!(front.free_items(), 64);
        assert_eq!(front.free_request_bytes(), 1 << 18);
    }

    #[test]
    fn garbage_in_all_but_the_items_does_no_harm() {
        let rig = Rig::new("adopt-garbage");
        let (mut front, _) = rig.front();
        let supervisor = rig.view(Slot::Supervisor);
        for id in 1..=5 {
            offer(&mut front, id, Kind::Submit);
        }
        assert_eq!(work(&mut rig.worker(0)), Some(1));
        // In a lane that there is not.
        let broken =
            (0..64).map(|index| &supervisor.item(index).word).find(|word| Word::load(word).phase() == Phase::Ready);
        let broken = broken.unwrap();
        let word = Word::load(broken);
        broken.store(
            broken.load(std::sync::atomic::Ordering::Relaxed) | 0xff << 28,
            std::sync::atomic::Ordering::Relaxed,
        );
        assert_ne!(Word::load(broken).lane(), word.lane());
        supervisor.scribble();

        assert_eq!(adopt(supervisor).unwrap(), Left { pending: 3, done: 2 });
        let (mut front, adopted) = rig.front();
        assert_eq!(adopted, 5);
        front.ring();
        let mut worker = rig.worker(0);
        assert_eq!(std::iter::from_fn(|| work(&mut worker)).count(), 3);
        let mut failed = 0;
        while let Some(done) = front.collect() {
            failed += u32::from(done.outcome == Outcome::Damaged);
            front.release(done.index);
        }
        assert_eq!((failed, front.free_items()), (1, 64));
    }

    #[test]
    fn an_item_is_not_failed_for_the_death_of_its_server() {
        let rig = Rig::new("adopt-attempts");
        let (mut front, _) = rig.front();
        let supervisor = rig.view(Slot::Supervisor);
        offer(&mut front, 1, Kind::Submit);
        let word = &supervisor.item(63).word;
        let word = if Word::load(word).phase() == Phase::Ready { word } else { &supervisor.item(0).word };
        let now = Word::load(word);
        // It has been given to workers as often as can be counted.
        let tried = Word::new(now.generation(), now.lane(), 1, Phase::Claimed, u8::MAX);
        assert!(tried.exchange(word, now).is_ok());
        for _ in 0..2 {
            assert_eq!(adopt(supervisor).unwrap(), Left { pending: 1, done: 0 });
            assert_eq!((Word::load(word).phase(), Word::load(word).attempts()), (Phase::Ready, u8::MAX));
        }
    }

    /// Writes over the word of the item that is in this phase; its index.
    fn write_over(segment: &Segment, phase: Phase, with: impl Fn(Word) -> Word) -> u32 {
        let index = (0..64).find(|&index| Word::load(&segment.item(index).word).phase() == phase).unwrap();
        let word = Word::load(&segment.item(index).word);
        with(word).store(&segment.item(index).word, word);
        index
    }

    #[test]
    fn an_owner_that_there_is_not_keeps_nobody_from_an_item() {
        let rig = Rig::new("adopt-owner");
        let (mut front, _) = rig.front();
        let supervisor = rig.view(Slot::Supervisor);
        let word = |index| Word::load(&supervisor.item(index).word);
        (1..=2).for_each(|id| offer(&mut front, id, Kind::Submit));
        rig.worker(0).take().unwrap();
        let claimed = write_over(supervisor, Phase::Claimed, |word| word.with(Phase::Claimed, 2));
        // No hint leads to such an item: it could never be claimed.
        let ready = write_over(supervisor, Phase::Ready, |word| word.with(Phase::Ready, 1));
        assert_eq!(adopt(supervisor).unwrap(), Left { pending: 1, done: 1 });
        assert_eq!((word(claimed).phase(), word(claimed).owner()), (Phase::Ready, 0));
        assert_eq!(word(ready).phase(), Phase::Done);
        let (mut front, _) = rig.front();
        let done = front.collect().unwrap();
        assert_eq!((done.index, done.outcome), (ready, Outcome::Failure(Code::DataLoss as u32)));
        let mut line = [0; crate::segment::INLINE];
        let failure = Failure::from_result(Code::DataLoss as u32, front.inline_result(&done, &mut line).unwrap());
        assert_eq!(
            (&*failure.reason, &*failure.message),
            ("ITEM_DAMAGED", "its record in shared memory was written over")
        );
    }

    #[test]
    fn an_item_that_is_a_dead_letter_is_not_tried_again() {
        let rig = Rig::new("adopt-filed");
        let (mut front, _) = rig.front();
        let supervisor = rig.view(Slot::Supervisor);
        (1..=2).for_each(|id| offer(&mut front, id, Kind::Submit));
        let mut workers = [rig.worker(0), rig.worker(1)];
        let [poison, _harmless] = workers.each_mut().map(|worker| worker.take().unwrap());
        // The supervisor died between filing it and completing it.
        let failure = Failure::new(Code::Aborted, "WORKER_CRASHED", "it crashed");
        let death = Death { worker: 0, pid: 1, status: ExitStatus::default(), cause: String::new(), failure };
        DeadLetters::new(vec!["pool".to_owned()]).file(supervisor, poison.index, poison.word, &death);
        assert_eq!(adopt(supervisor).unwrap(), Left { pending: 1, done: 1 });
        let (mut front, _) = rig.front();
        let done = front.collect().unwrap();
        assert_eq!((done.id, done.outcome), (1, Outcome::Failure(Code::Aborted as u32)));
        assert_eq!(supervisor.letter_log().unwrap().count(), 1);
    }
}
