//! Front and workers of one segment, in one process: what each sees of what the other does.

mod damage;
mod results;
mod takeover;

use std::{collections::BTreeSet, sync::Arc, sync::atomic::Ordering::Relaxed, time::Duration};

use tonic::Code;

use super::*;
use crate::{
    doorbell::Bell,
    process::now,
    segment::{Geometry, INLINE, SegmentOwner, Stage},
};

const ITEMS: u32 = 8;
const BYTES: u64 = 1 << 17;

/// Three workers, of which the last is in a pool of its own.
struct Rig {
    owner: SegmentOwner,
    topology: Topology,
    bells: Arc<Bells>,
    front: Front<'static>,
    workers: Vec<Worker<'static>>,
    supervisor: &'static Segment,
}

fn rig(test: &str) -> Rig {
    let geometry = Geometry {
        items: ITEMS,
        fronts: 1,
        workers: 4,
        pools: 2,
        request_bytes: BYTES,
        result_bytes: BYTES,
        letter_bytes: 1 << 16,
    };
    let owner = SegmentOwner::create(&format!("unit-dispatch-{test}-{}", std::process::id()), geometry).unwrap();
    let (topology, bells) = (Topology::new([3, 1]), Bells::new(1, 4).unwrap());
    let view = |slot| view(&owner, slot);
    let (mut front, adopted) = Front::attach(view(Slot::Front(0)), topology.clone(), bells.clone(), 0);
    assert!(adopted.is_empty() && front.collect().is_none());
    let worker = |n| Worker::attach(view(Slot::Worker(n)), topology.clone(), bells.clone(), n).unwrap();
    let (workers, supervisor) = ((0..4).map(worker).collect(), view(Slot::Supervisor));
    let rig = Rig { topology, bells, front, workers, supervisor, owner };
    // Of its start it need not be told again.
    rig.rung();
    rig
}

/// Leaked, as by processes that live until the end.
fn view(owner: &SegmentOwner, slot: Slot) -> &'static Segment {
    Box::leak(Box::new(Segment::attach(owner.object(), owner.name(), slot).unwrap()))
}

const CALL: Offer<'_> =
    Offer { pool: 0, priority: 1, id: 1, offered: 0, deadline: 0, kind: Kind::Call, subscription: &[], metadata: &[] };

/// Whether a bell has rung since this was asked.
fn has_rung(bell: &Bell) -> bool {
    let rang = bell.has_rung();
    bell.wait_at_most(Duration::ZERO).unwrap();
    rang
}

impl Rig {
    fn offer(&mut self, offer: Offer<'_>, payload: &[u8]) -> Result<u32, OfferError> {
        let mut request = self.front.request(payload.len())?;
        self.front.write(&mut request, payload);
        let offered = self.front.offer(&offer, &mut request);
        if offered.is_err() {
            self.front.discard(request);
        }
        offered
    }

    fn call(&mut self, id: u64) -> u32 {
        self.offer(Offer { id, ..CALL }, b"").unwrap()
    }

    /// A worker does what there is, one after the other.
    fn work(&mut self, worker: usize) -> Vec<u64> {
        let worker = &mut self.workers[worker];
        let mut ids = Vec::new();
        while let Some(claimed) = worker.take() {
            ids.push(claimed.id());
            worker.reply(&claimed, 0).complete(claimed, 0, 2, 3);
        }
        ids
    }

    /// What is done, and released.
    fn collect(&mut self) -> Vec<u64> {
        let mut ids = Vec::new();
        while let Some(done) = self.front.collect() {
            ids.push(done.id);
            self.front.release(done.index);
        }
        ids
    }

    /// Which workers were rung since this was asked, and whether the front was.
    fn rung(&self) -> (Vec<u16>, bool) {
        let workers = (0..4).filter(|&n| has_rung(self.bells.worker(n))).collect();
        (workers, has_rung(self.bells.front(0)))
    }

    /// A worker dies.
    fn sweep(&mut self, worker: u16, max_attempts: u32) -> Swept {
        let failure = Failure::new(Code::Aborted, "WORKER_CRASHED", "it was killed");
        let death =
            Death { worker, pid: 1, status: std::process::ExitStatus::default(), cause: String::new(), failure };
        let mut letters = DeadLetters::new(vec!["a".to_owned(), "b".to_owned()]);
        sweep_worker(self.supervisor, &self.topology, &self.bells, &death, max_attempts, &mut letters)
    }

    /// A worker dies and is replaced.
    fn kill(&mut self, worker: u16, max_attempts: u32) -> Swept {
        let swept = self.sweep(worker, max_attempts);
        let view = view(&self.owner, Slot::Worker(worker));
        let next = Worker::attach(view, self.topology.clone(), self.bells.clone(), worker);
        self.workers[usize::from(worker)] = next.unwrap();
        self.rung();
        swept
    }

    fn word(&self, index: u32) -> Word {
        Word::load(&self.supervisor.item(index).word)
    }
}

#[test]
fn what_there_is_no_room_for_is_refused_until_there_is() {
    let mut rig = rig("room");
    let items: Vec<_> = (0..u64::from(ITEMS)).map(|id| rig.call(id)).collect();
    assert_eq!((rig.front.free_items(), rig.offer(CALL, b"")), (0, Err(OfferError::Items)));
    let freed = rig.front.freed();
    rig.front.cancel(items[0]);
    assert_eq!((rig.front.free_items(), rig.front.freed()), (1, freed + 1));
    rig.call(100);
    assert_eq!(rig.work(0).len(), ITEMS as usize, "what was taken back is not done");
    assert!(!rig.collect().contains(&0));

    // The payload's memory is free when the item is done, the metadata's when it is released.
    let metadata = [b'm'; 100];
    let index = rig.offer(Offer { metadata: &metadata, ..CALL }, &[7; 1000]).unwrap();
    assert_eq!(rig.front.free_request_bytes(), BYTES - 1024 - 128);
    assert_eq!(rig.offer(CALL, &[7; BYTES as usize]), Err(OfferError::Arena));
    assert_eq!(rig.work(0), [1]);
    let freed = rig.front.freed();
    assert_eq!(rig.front.collect().unwrap().index, index);
    assert_eq!((rig.front.free_request_bytes(), rig.front.freed()), (BYTES - 128, freed + 1));
    rig.front.release(index);
    assert_eq!((rig.front.free_request_bytes(), rig.front.freed()), (BYTES, freed + 2));
    let most = rig.front.largest_request();
    rig.offer(CALL, &vec![7; most as usize]).unwrap();

    // Nor does an offer that is refused for its metadata keep anything.
    let rest = rig.front.free_request_bytes();
    let metadata = [b'm'; INLINE + 1];
    assert_eq!(rig.offer(Offer { metadata: &metadata, ..CALL }, b""), Err(OfferError::Arena));
    assert_eq!((rig.front.free_request_bytes(), rig.front.free_items()), (rest, ITEMS as usize - 1));
}

#[test]
fn a_payload_is_what_was_announced_and_no_more() {
    let mut rig = rig("payload");
    for len in [0, 1, INLINE, INLINE + 1, 5000] {
        let payload: Vec<_> = (0..len).map(|n| n as u8).collect();
        let mut request = rig.front.request(len).unwrap();
        assert!(request.is_empty());
        for piece in payload.chunks(33) {
            rig.front.write(&mut request, piece);
        }
        rig.front.write(&mut request, b"too much");
        assert_eq!((request.len(), request.is_empty()), (len, len == 0));
        let index = rig.front.offer(&Offer { id: 9, ..CALL }, &mut request).unwrap();
        assert_eq!((rig.front.payload_len(index), rig.front.id(index)), (len as u64, 9));
        assert!(request.is_empty(), "it was taken");
        let claimed = rig.workers[0].take().unwrap();
        let (item, mut reply) = rig.workers[0].open(&claimed, 0).unwrap();
        assert_eq!(item.payload(), payload);
        drop(item);
        reply.complete(claimed, 0, 0, 0);
        drop(reply);
        rig.collect();
        // What is not offered after all is given back.
        let request = rig.front.request(len).unwrap();
        assert_eq!(rig.front.discard(request), len > INLINE);
        assert_eq!(rig.front.free_request_bytes(), BYTES);
    }
}

#[test]
fn a_payload_its_subscription_and_its_metadata_come_apart_again() {
    let mut rig = rig("extra");
    let mut pairs = Vec::new();
    metadata::push(&mut pairs, "key", "one");
    metadata::push(&mut pairs, "key", "two");
    metadata::push(&mut pairs, "other", "three");
    let fits = INLINE - pairs.len() - 2;
    for payload in [0, 1, fits, fits + 1, INLINE, INLINE + 1, 3000] {
        let offer = Offer { kind: Kind::Submit, subscription: b"me", metadata: &pairs, ..CALL };
        rig.offer(offer, &vec![5; payload]).unwrap();
        let claimed = rig.workers[0].take().unwrap();
        let open = rig.workers[0].open_beside(&claimed, 0, 0).unwrap();
        let (item, mut reply) = rig.workers[0].open(&claimed, 0).unwrap();
        for item in [&item, &open.item()] {
            assert_eq!(item.payload(), vec![5; payload]);
            assert_eq!((item.metadata("key"), item.metadata("other")), (Some("two"), Some("three")), "the last counts");
            assert_eq!((item.metadata("none"), item.all_metadata().count()), (None, 3));
        }
        // A front that takes over knows whose it is.
        let view = view(&rig.owner, Slot::Front(0));
        let (mut front, adopted) = Front::attach(view, rig.topology.clone(), rig.bells.clone(), 0);
        assert_eq!(adopted.len(), 1);
        assert_eq!(adopted[0].subscription, b"me");
        assert_eq!(front.payload_len(adopted[0].index), payload as u64);
        std::mem::forget(open);
        drop(item);
        reply.complete(claimed, 0, 0, 0);
        drop(reply);
        let done = front.collect().unwrap();
        assert_eq!((done.index, done.id), (adopted[0].index, 1));
        front.release(done.index);
        assert_eq!(front.free_request_bytes(), BYTES);
        rig.front = front;
    }
}

#[test]
fn higher_priorities_go_first_and_each_pool_takes_its_own() {
    let mut rig = rig("priority");
    for (id, (pool, priority)) in (0..).zip([(0, 0), (0, 3), (1, 3), (0, 0), (0, 2), (0, 3)]) {
        rig.offer(Offer { id, pool, priority, ..CALL }, b"").unwrap();
    }
    assert!(rig.workers.iter().all(Worker::has_work));
    assert_eq!(rig.work(0), [1, 5, 4, 0, 3]);
    assert!(!rig.workers[0].has_work() && rig.workers[3].has_work());
    assert_eq!(rig.work(3), [2]);
}

#[test]
fn an_item_is_claimed_after_it_was_offered_and_before_it_expires() {
    let mut rig = rig("claim-time");
    // Its worker was done with another at 5, and may have stood still since.
    for (offered, last, claimed) in [(3, Some(5), Some(5)), (7, Some(5), Some(7)), (3, None, None)] {
        rig.offer(Offer { offered, ..CALL }, b"").unwrap();
        let begin = now();
        let at = rig.workers[0].take().unwrap().began(last);
        assert!(claimed.map_or(at >= begin, |claimed| at == claimed), "{at}");
    }
    rig.offer(Offer { offered: 3, deadline: 6, ..CALL }, b"").unwrap();
    let begin = now();
    let claimed = rig.workers[0].take().unwrap();
    assert!(claimed.began(Some(5)) >= begin, "it has expired since");
}

#[test]
fn an_item_knows_its_time() {
    let mut rig = rig("time");
    let hour = 3_600_000_000_000;
    for (deadline, is_over) in [(0, false), (1, true), (now() + hour, false)] {
        rig.offer(Offer { deadline, offered: 5, ..CALL }, b"").unwrap();
        let claimed = rig.workers[0].take().unwrap();
        assert_eq!((claimed.deadline(), claimed.offered(), claimed.attempt()), (deadline, 5, 1));
        let (item, reply) = rig.workers[0].open(&claimed, 0).unwrap();
        assert!(!reply.is_streamed());
        assert_eq!(item.deadline(), (deadline > 0).then(|| Duration::from_nanos(deadline)));
        assert_eq!(item.is_cancelled(), is_over);
        assert_eq!(item.given_up(), is_over.then(Failure::deadline));
        match item.remaining() {
            None => assert_eq!(deadline, 0),
            Some(left) => assert!(left <= Duration::from_nanos(hour) && left.is_zero() == is_over, "{left:?}"),
        }
    }
}

#[test]
fn an_item_that_expires_while_it_is_asked_was_not_cancelled() {
    let mut rig = rig("asked");
    let deadline = 1000;
    for (clock, is_given_up, end) in [
        (deadline - 1, false, None),
        (deadline - 1, true, Some(ReplyError::Cancelled)),
        (deadline, false, Some(ReplyError::Expired)),
        (deadline, true, Some(ReplyError::Expired)),
    ] {
        let index = rig.offer(Offer { deadline, ..CALL }, b"").unwrap();
        let generation = rig.workers[0].take().unwrap().word.generation();
        let record = rig.supervisor.item(index);
        if is_given_up {
            record.cancel(generation);
        }
        let asked = request::end(record, generation, || {
            // Just after the clock was read the front sees that the time is over.
            record.cancel(generation);
            clock
        });
        assert_eq!(asked, end);
    }
}

#[test]
fn who_gives_up_gets_nothing_however_far_the_item_is() {
    let mut rig = rig("cancel");
    let waiting = rig.offer(CALL, &[1; 100]).unwrap();
    rig.front.cancel(waiting);
    assert_eq!((rig.front.free_items(), rig.front.free_request_bytes()), (ITEMS as usize, BYTES));
    assert!(rig.work(0).is_empty(), "it never runs");

    let working = rig.offer(CALL, &[1; 100]).unwrap();
    let claimed = rig.workers[0].take().unwrap();
    assert!(!claimed.is_cancelled());
    assert!(rig.workers[0].arm(false));
    rig.front.cancel(working);
    assert!(claimed.is_cancelled());
    assert_eq!(rig.rung().0, [0], "who has it and sleeps is told");
    rig.front.cancel(working);
    assert_eq!((rig.front.free_items(), rig.front.free_request_bytes()), (ITEMS as usize - 1, BYTES - 128));
    rig.workers[0].disarm().unwrap();
    rig.workers[0].reply(&claimed, 0).complete(claimed, 0, 0, 0);
    assert!(rig.front.collect().is_none(), "the result is thrown away");
    assert_eq!((rig.front.free_items(), rig.front.free_request_bytes()), (ITEMS as usize, BYTES));

    let done = rig.call(3);
    rig.work(0);
    rig.front.cancel(done);
    assert!(rig.front.collect().is_none());
    assert_eq!(rig.front.free_items(), ITEMS as usize);

    // What was given back to the workers just when it was cancelled is cancelled all the same.
    let index = rig.call(4);
    rig.workers[0].take().unwrap();
    rig.front.cancel(index);
    let word = rig.word(index);
    word.requeued().store(&rig.supervisor.item(index).word, word);
    rig.supervisor.rescan(0).fetch_or(1, Relaxed);
    assert!(rig.front.collect().is_none());
    assert_eq!(rig.front.free_items(), ITEMS as usize);
    // And so is what another has claimed meanwhile.
    let index = rig.call(5);
    rig.workers[0].take().unwrap();
    rig.front.cancel(index);
    let word = rig.word(index);
    let again = word.requeued().with(Phase::Claimed, 1);
    again.store(&rig.supervisor.item(index).word, word);
    rig.supervisor.rescan(0).fetch_or(1, Relaxed);
    assert!(rig.front.collect().is_none());
    assert!(rig.supervisor.item(index).is_cancelled(again.generation()));
}

/// After 2^28 uses of a record its generation comes again: what was left of the other use is nobody's.
#[test]
fn what_another_use_of_a_record_left_is_not_the_next_ones() {
    let mut rig = rig("again");
    let index = rig.call(1);
    assert_eq!((rig.work(0), rig.collect()), (vec![1], vec![1]));
    let record = rig.supervisor.item(index);
    let next = rig.word(index).offered(1).generation();
    record.cancel(next);
    record.partials.iter().for_each(|slot| partial::Entry::new(next, 0).put(slot));
    assert_eq!(rig.offer(Offer { kind: Kind::Stream, ..CALL }, b""), Ok(index));
    let claimed = rig.workers[0].take().unwrap();
    assert_eq!(claimed.word.generation(), next);
    assert!(!claimed.is_cancelled());
    assert!(rig.front.partial(index).is_none());
}

#[test]
fn an_item_that_expires_ends_unless_a_worker_has_it() {
    let mut rig = rig("expire");
    let submit = Offer { kind: Kind::Submit, subscription: b"s", deadline: 1, ..CALL };
    // A result of before is in its record.
    let index = rig.offer(submit, b"").unwrap();
    rig.work(0);
    rig.collect();
    assert_eq!(rig.offer(submit, &[1; 100]), Ok(index));
    assert!(rig.front.expire(index) && !rig.front.expire(index));
    assert!(rig.work(0).is_empty(), "it never runs");
    let done = rig.front.collect().unwrap();
    assert_eq!((done.index, done.id, done.outcome, done.len), (index, 1, Outcome::Expired, 0));
    assert_eq!((done.worker, done.attempts, done.times), (SUPERVISOR, 0, [0, 1, 1]));
    assert!(rig.front.collect().is_none() && !rig.front.expire(index), "once");
    rig.front.release(index);
    assert_eq!((rig.front.free_items(), rig.front.free_request_bytes()), (ITEMS as usize, BYTES));
    // The hint that is left of it leads to nothing, and the record is one like any other.
    assert_eq!(rig.call(2), index);
    assert_eq!((rig.work(0), rig.collect()), (vec![2], vec![2]));

    rig.offer(submit, b"").unwrap();
    let claimed = rig.workers[0].take().unwrap();
    assert!(!rig.front.expire(index));
    assert!(!claimed.is_cancelled(), "it has a deadline, and nobody gave it up");
    assert!(rig.front.collect().is_none());
    rig.workers[0].reply(&claimed, 0).complete(claimed, 0, 2, 3);
    assert!(!rig.front.expire(index));
    let done = rig.front.collect().unwrap();
    assert_eq!((done.outcome, done.worker), (Outcome::Success, 0), "what its worker made of it");
    rig.front.release(index);

    // If that one dies, nobody tells of the deadline again.
    for (deadline, outcome) in [(1, Some(Outcome::Expired)), (u64::MAX, None), (0, None)] {
        rig.offer(Offer { deadline, ..submit }, b"").unwrap();
        rig.workers[0].take().unwrap();
        assert_eq!(rig.kill(0, 9).requeued(), 1);
        let done = rig.front.collect();
        assert_eq!(done.map(|done| (done.outcome, done.attempts)), outcome.map(|outcome| (outcome, 1)));
        match done {
            Some(done) => rig.front.release(done.index),
            None => assert_eq!((rig.work(1), rig.collect()), (vec![1], vec![1])),
        }
    }
    assert_eq!(rig.front.free_items(), ITEMS as usize);
}

#[test]
fn only_who_sleeps_is_rung_and_one_for_each_item() {
    let mut rig = rig("wake");
    rig.call(1);
    rig.front.ring();
    assert_eq!(rig.rung(), (vec![], false), "nobody sleeps");
    assert!(!rig.workers[0].arm(true), "there is something to take");
    rig.call(2);
    rig.front.ring();
    assert_eq!(rig.rung(), (vec![], false), "who finds something does not sleep");
    assert!(!rig.front.somebody_is_late(), "nobody sleeps while they wait");
    rig.front.ring_next();
    assert_eq!(rig.rung().0, [0; 0]);

    assert_eq!(rig.work(0), [1, 2]);
    assert_eq!(rig.rung(), (vec![], false), "the front is awake");
    assert!([0, 1, 2, 3].iter().all(|&worker| rig.workers[worker].arm(true)));
    assert!(!rig.front.somebody_is_late(), "nothing waits");
    rig.offer(Offer { id: 3, pool: 1, ..CALL }, b"").unwrap();
    assert_eq!(rig.rung().0, [0; 0], "not before the front rings");
    rig.front.ring();
    assert_eq!(rig.rung().0, [3], "of the item's pool");
    rig.front.ring();
    assert_eq!(rig.rung().0, [0; 0], "once");
    assert!(!rig.front.somebody_is_late(), "nobody of its pool sleeps any more");

    for id in [4, 5] {
        rig.call(id);
    }
    rig.front.ring();
    let woken = rig.rung().0;
    assert_eq!(woken.len(), 1);
    // It does not come: the next is rung.
    assert!(rig.front.somebody_is_late());
    rig.front.ring_next();
    let next = rig.rung().0;
    assert!(next.len() == 1 && next != woken);
    let worker = usize::from(next[0]);
    rig.workers[worker].disarm().unwrap();
    let first = rig.workers[worker].take().unwrap();
    // It sees more than it has taken, and that somebody sleeps.
    rig.workers[worker].chain();
    assert_eq!(rig.rung().0.len(), 1);
    let second = rig.workers[worker].take().unwrap();
    let sleeper = (0..3).find(|n| ![woken[0], next[0]].contains(n)).unwrap();
    assert!(rig.workers[usize::from(sleeper)].arm(true));
    rig.workers[worker].chain();
    assert_eq!(rig.rung().0, [0; 0], "there is no more");
    assert!(!rig.front.somebody_is_late());

    rig.front.going_to_sleep();
    rig.workers[worker].reply(&first, 0).complete(first, 0, 0, 0);
    rig.workers[worker].ring();
    assert!(rig.rung().1, "a front that sleeps is told");
    rig.front.going_to_sleep();
    rig.front.awake();
    rig.workers[worker].reply(&second, 0).complete(second, 0, 0, 0);
    rig.workers[worker].ring();
    assert!(!rig.rung().1);
    assert_eq!(rig.collect().len(), 4);
}

/// A handler may take long, or for ever: what was completed before it must be known by then.
#[test]
fn a_front_is_woken_before_its_worker_does_anything_else() {
    let mut rig = rig("wake-front");
    for id in [1, 2] {
        rig.call(id);
    }
    let first = rig.workers[0].take().unwrap();
    rig.front.going_to_sleep();
    rig.workers[0].reply(&first, 0).complete(first, 0, 0, 0);
    let second = rig.workers[0].take().unwrap();
    assert!(rig.rung().1, "the next item is claimed");
    rig.front.going_to_sleep();
    rig.workers[0].reply(&second, 0).complete(second, 0, 0, 0);
    assert!(rig.workers[0].take().is_none());
    assert!(rig.rung().1, "there is no more");
    rig.front.going_to_sleep();
    assert!(rig.workers[0].take().is_none());
    rig.workers[0].ring();
    assert!(!rig.rung().1, "once");

    for id in [3, 4] {
        rig.call(id);
    }
    for ends in [Open::complete, |open: Open<'_>| open.fail(&Failure::deadline())] {
        let claimed = rig.workers[0].take().unwrap();
        let open = rig.workers[0].open_beside(&claimed, 0, now()).unwrap();
        rig.front.going_to_sleep();
        ends(open);
        assert!(rig.rung().1, "who has others open may come back late");
    }
    assert_eq!(rig.collect(), [1, 2, 3, 4]);
}

#[test]
fn a_worker_sleeps_until_there_is_something_to_do() {
    let mut rig = rig("sleep");
    // These would sleep for ever if they slept.
    rig.call(1);
    rig.workers[0].sleep().unwrap();
    assert!(!rig.supervisor.idle(0).any(), "it does not say so any more");
    rig.work(0);
    rig.supervisor.set_stage(Stage::Stopping);
    rig.workers[0].sleep().unwrap();
    rig.supervisor.set_stage(Stage::Serving);
    // And this one returns because of the bell, of which nothing is left after it.
    rig.workers[0].bell().ring().unwrap();
    rig.workers[0].sleep().unwrap();
    assert!(!rig.workers[0].bell().has_rung() && !rig.supervisor.idle(0).any());
    // Open items, and nothing more wanted: it is not rung for items.
    assert!(rig.workers[0].arm(false));
    assert!(!rig.supervisor.idle(0).any() && rig.supervisor.sleeping(Slot::Worker(0)).any());
    rig.workers[0].bell().ring().unwrap();
    rig.workers[0].disarm().unwrap();
    assert!(!rig.supervisor.sleeping(Slot::Worker(0)).any() && !rig.workers[0].bell().has_rung());
    rig.call(2);
    assert!(!rig.workers[0].arm(true) && rig.workers[0].arm(false));
}

#[test]
fn few_of_a_pool_spin_and_each_pool_has_its_own() {
    let rig = rig("spin");
    let spin = |worker: &Worker<'_>| worker.begin_spin();
    let spinning: Vec<_> = rig.workers[..3].iter().map(spin).collect();
    let most = spinning.iter().filter(|spins| **spins).count();
    assert!((1..=2).contains(&most) && spinning[..most].iter().all(|spins| *spins));
    assert!(rig.workers[3].begin_spin(), "another pool");
    rig.workers[0].end_spin();
    for (next, other) in [(2, 0), (0, 2), (2, 0)] {
        assert!(rig.workers[next].begin_spin() && !rig.workers[other].begin_spin());
        rig.workers[next].end_spin();
    }
    assert!(rig.workers[2].begin_spin());
    // Who dies in it spins no more.
    let view = view(&rig.owner, Slot::Worker(2));
    let next = Worker::attach(view, rig.topology.clone(), rig.bells.clone(), 2).unwrap();
    assert!(next.begin_spin());
    assert!(Worker::attach(rig.supervisor, rig.topology.clone(), rig.bells.clone(), 4).is_none(), "of no pool");
}

#[test]
fn a_sweep_gives_back_what_the_dead_had_and_counts_it() {
    let mut rig = rig("sweep");
    (1..=4).for_each(|id| _ = rig.call(id));
    let mine: Vec<_> = (0..3).map(|_| rig.workers[0].take().unwrap()).collect();
    let others = rig.workers[1].take().unwrap();
    rig.front.cancel(mine[2].index);
    // Of two attempts each has one more, but the one that nobody waits for.
    let swept = rig.kill(0, 2);
    assert_eq!((swept.requeued(), swept.failed()), (2, 1));
    let fates: Vec<_> = swept.items.iter().map(|item| (item.id, item.attempt, item.fate)).collect();
    assert_eq!(fates.len(), 3);
    for item in [(1, 1, Fate::Retried), (2, 1, Fate::Retried), (3, 1, Fate::Cancelled)] {
        assert!(fates.contains(&item), "{fates:?}");
    }
    assert_eq!(rig.word(others.index), others.word, "another's is not touched");
    assert!(rig.front.collect().is_none());
    let again: Vec<_> = (0..2).map(|_| rig.workers[0].take().unwrap()).collect();
    assert!(rig.workers[0].take().is_none());
    for claimed in &again {
        let (item, _) = rig.workers[0].open(claimed, 0).unwrap();
        assert_eq!((claimed.attempt(), item.attempt()), (2, 2));
    }
    let swept = rig.kill(0, 2);
    assert_eq!((swept.requeued(), swept.failed()), (0, 2));
    for _ in 0..2 {
        let done = rig.front.collect().unwrap();
        assert_eq!((done.outcome, done.worker), (Outcome::Failure(Code::Aborted as u32), SUPERVISOR));
        assert_eq!((done.attempts, done.times[1]), (2, done.times[2]));
        let mut line = [0; INLINE];
        let failure = Failure::from_result(Code::Aborted as u32, rig.front.inline_result(&done, &mut line).unwrap());
        assert_eq!((failure.reason.as_ref(), failure.message.as_str()), ("WORKER_CRASHED", "it was killed"));
        rig.front.release(done.index);
    }
}

/// However often others die meanwhile: each death is a reason to look at all items.
#[test]
fn what_was_given_back_is_hinted_once_more_and_not_at_each_look() {
    let mut rig = rig("hints");
    let lane = |rig: &Rig| rig.supervisor.lane(lane_of(CALL.pool, CALL.priority).into());
    rig.call(1);
    let taken = rig.workers[0].take().unwrap();
    rig.call(2);
    rig.kill(0, 3);
    for _ in 0..5 {
        assert!(rig.front.collect().is_none());
        rig.front.ring();
        rig.kill(3, 3);
    }
    let mut hints = Vec::new();
    lane(&rig).take(|hint| {
        hints.push(hint.index);
        false
    });
    let of_it = hints.iter().filter(|index| **index == taken.index).count();
    assert!((1..=2).contains(&of_it), "the sweep's and the front's, not {hints:?}");
}

#[test]
fn only_the_supervisor_can_tell_a_front_that_this_is_the_end() {
    let rig = rig("end");
    // A worker can do both.
    rig.supervisor.set_stage(Stage::Stopping);
    rig.bells.ring_all();
    assert!(!rig.front.is_draining());
    rig.bells.end();
    assert!(rig.front.is_draining() && rig.front.is_draining());
}

#[test]
fn a_bit_of_nobodys_wakes_nobody() {
    let mut rig = rig("nobody");
    rig.supervisor.idle(1).enter(1);
    rig.offer(Offer { pool: 1, ..CALL }, b"").unwrap();
    rig.front.ring();
    assert_eq!((rig.rung(), rig.supervisor.idle(1).any()), ((vec![], false), false));
}

#[test]
fn bells_are_known_by_the_numbers_of_their_descriptors() {
    let bells = Bells::new(2, 3).unwrap();
    let (fronts, workers, end) = bells.numbers();
    assert_eq!((bells.counts(), fronts.len(), workers.len()), ((2, 3), 2, 3));
    let all: Vec<_> = bells.fds().map(|fd| fd.as_fd().as_raw_fd()).collect();
    assert_eq!(all, [fronts, workers, vec![end]].concat());
    assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), 6);
}

#[test]
fn workers_are_numbered_through_all_pools() {
    let rig = rig("topology");
    let topology = rig.front.topology();
    assert_eq!((topology.pools(), topology.counts()), (2, vec![3, 1]));
    assert_eq!([0, 1].map(|pool| topology.workers(pool)), [(0, 3), (3, 1)]);
    assert_eq!([0, 2, 3, 4].map(|worker| topology.pool_of(worker)), [Some(0), Some(0), Some(1), None]);
    assert_eq!(rig.workers.iter().map(Worker::number).collect::<Vec<_>>(), [0, 1, 2, 3]);
}

#[test]
fn nobody_waits_for_the_dead() {
    let mut rig = rig("dead");
    for (worker, pool) in [(1, 0), (3, 1)] {
        assert!(rig.workers[worker].arm(true));
        rig.sweep(worker as u16, 3);
        assert!(!rig.supervisor.idle(pool).any(), "it is not rung while there is no successor");
    }
    assert_eq!(rig.rung(), (vec![0, 1, 2, 3], true));
    // A front died: its calls' handlers are told, and those of its subscribers are not.
    rig.call(1);
    rig.offer(Offer { id: 2, kind: Kind::Submit, subscription: b"s", ..CALL }, b"").unwrap();
    rig.call(3);
    let [call, submitted] = [0, 1].map(|worker| rig.workers[worker].take().unwrap());
    sweep_front(rig.supervisor, &rig.bells, 0);
    assert_eq!((call.is_cancelled(), submitted.is_cancelled()), (true, false));
    assert_eq!(rig.rung().0, [0, 1, 2, 3], "whoever waits for the front looks again");
}

#[test]
fn fronts_share_the_items_and_nothing_else() {
    // Which are not as many for each.
    let geometry = Geometry {
        items: 11,
        fronts: 3,
        workers: 1,
        pools: 1,
        request_bytes: BYTES,
        result_bytes: BYTES,
        letter_bytes: 0,
    };
    let owner = SegmentOwner::create(&format!("unit-dispatch-fronts-{}", std::process::id()), geometry).unwrap();
    let (topology, bells) = (Topology::new([1]), Bells::new(3, 1).unwrap());
    let view = |slot| view(&owner, slot);
    let mut fronts = [0, 1, 2].map(|n| Front::attach(view(Slot::Front(n)), topology.clone(), bells.clone(), n).0);
    let mut worker = Worker::attach(view(Slot::Worker(0)), topology.clone(), bells.clone(), 0).unwrap();
    let supervisor = view(Slot::Supervisor);

    let mut indices = BTreeSet::new();
    let free = fronts.each_ref().map(Front::free_items);
    assert_eq!((free.iter().sum::<usize>(), free.iter().min()), (11, Some(&3)));
    for (n, front) in fronts.iter_mut().enumerate() {
        for _ in 0..free[n] {
            let mut request = front.request(100).unwrap();
            front.write(&mut request, &[n as u8; 100]);
            let index = front.offer(&Offer { id: n as u64, ..CALL }, &mut request).unwrap();
            assert_eq!((front.id(index), front.payload_len(index), front.taken(index)), (n as u64, 100, 0));
            assert!(indices.insert(index));
        }
    }
    assert_eq!(indices, (0..11).collect(), "each has its own");
    let mut claimed = Vec::new();
    while let Some(one) = worker.take() {
        let id = one.id();
        assert_eq!(worker.open(&one, 0).unwrap().0.payload(), [id as u8; 100], "of its front's memory");
        claimed.push(one);
    }
    sweep_front(supervisor, &bells, 1);
    [0, 1, 2].iter().for_each(|&n| _ = has_rung(bells.front(n)));
    fronts.iter().for_each(Front::going_to_sleep);
    for one in claimed {
        assert_eq!(one.is_cancelled(), one.id() == 1, "its front is dead");
        worker.reply(&one, 0).complete(one, 0, 0, 0);
    }
    let rung = || [0, 1, 2].map(|n| has_rung(bells.front(n)));
    assert_eq!(rung(), [true, true, false], "the last may have more");
    worker.ring();
    assert_eq!(rung(), [false, false, true]);
    fronts.iter().for_each(Front::awake);
    for (n, front) in fronts.iter_mut().enumerate() {
        while let Some(done) = front.collect() {
            assert_eq!(done.id, n as u64);
            front.release(done.index);
        }
        assert_eq!((front.free_items(), front.free_request_bytes()), (free[n], BYTES));
    }
    // Each is replaced by itself.
    fronts[2].offer(&Offer { kind: Kind::Submit, subscription: b"s", ..CALL }, &mut Request::default()).unwrap();
    let adopted = [1, 2].map(|n| Front::attach(view(Slot::Front(n)), topology.clone(), bells.clone(), n).1.len());
    assert_eq!(adopted, [0, 1]);
    // The next worker's death is told to each of them.
    [0, 1, 2].iter().for_each(|&n| _ = has_rung(bells.front(n)));
    let failure = Failure::new(Code::Aborted, "WORKER_CRASHED", "it was killed");
    let death = Death { worker: 0, pid: 1, status: std::process::ExitStatus::default(), cause: String::new(), failure };
    sweep_worker(supervisor, &topology, &bells, &death, 1, &mut DeadLetters::default());
    assert!([0, 1, 2].iter().all(|&n| has_rung(bells.front(n)) && supervisor.rescan(n).load(Relaxed) != 0));
}
