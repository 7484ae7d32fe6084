//! Hints that are lost, and records that somebody wrote over.

use super::*;
use crate::{ring::Hint, segment::GRANULE};

#[test]
fn what_no_hint_tells_is_found_by_looking() {
    let mut rig = rig("scan");
    let done: Vec<_> = (1..=3).map(|id| rig.call(id)).collect();
    // As if their returns were lost: what was done first comes first.
    for (worker, time) in [(0, 30), (1, 10), (2, 20)] {
        let claimed = rig.workers[worker].take().unwrap();
        let (record, word) = (claimed.record, claimed.word);
        record.done.store(time, Relaxed);
        word.with(Phase::Done, worker as u16).store(&record.word, word);
    }
    assert!(rig.front.collect().is_none());
    assert_eq!(done.iter().map(|&index| rig.word(index).phase()).collect::<Vec<_>>(), [Phase::Done; 3]);
    rig.supervisor.rescan(0).fetch_or(1, Relaxed);
    assert_eq!(rig.collect(), [2, 3, 1]);
    assert_eq!(rig.front.free_items(), ITEMS as usize);

    // A record that is in no use is not let become an item by somebody who scribbles.
    for phase in [Phase::Ready, Phase::Claimed, Phase::Done] {
        let index = (0..ITEMS).find(|&index| rig.word(index).phase() == Phase::Free).unwrap();
        let word = rig.word(index);
        word.offered(1).with(phase, 0).store(&rig.supervisor.item(index).word, word);
        rig.supervisor.rescan(0).fetch_or(1, Relaxed);
        assert!(rig.front.collect().is_none());
        assert_eq!(rig.word(index).phase(), Phase::Free);
    }
    // All of them are as good as before.
    let ids: BTreeSet<_> = (10..10 + u64::from(ITEMS)).collect();
    ids.iter().for_each(|&id| _ = rig.call(id));
    assert_eq!(rig.work(0).into_iter().collect::<BTreeSet<_>>(), ids);
    assert_eq!(rig.collect().into_iter().collect::<BTreeSet<_>>(), ids);
}

#[test]
fn a_result_that_there_was_no_room_to_tell_of_is_found() {
    let mut rig = rig("returns");
    let stream = rig.offer(Offer { id: 1, kind: Kind::Stream, ..CALL }, b"").unwrap();
    let claimed = rig.workers[0].take().unwrap();
    let mut reply = rig.workers[0].reply(&claimed, 0);
    assert!(reply.is_streamed());
    let mut told = 0;
    // The front takes parts and does not look at what tells of them.
    while rig.supervisor.rescan(0).load(Relaxed) == 0 {
        reply.send().unwrap();
        let part = rig.front.partial(stream).unwrap().unwrap();
        assert!(rig.front.take_partial(&part, |_| {}));
        told += 1;
    }
    assert!(told > ITEMS, "each item has room to be told of");
    drop(reply);
    rig.supervisor.rescan(0).store(0, Relaxed);
    rig.call(2);
    assert_eq!(rig.work(0), [2]);
    assert_eq!(rig.collect(), [2]);
}

#[test]
fn an_item_whose_hint_is_gone_is_hinted_again() {
    let mut rig = rig("hints");
    for (pool, worker) in [(0, 1), (1, 3)] {
        // Somebody took the hint and died before the claim.
        rig.offer(Offer { id: 1, pool, ..CALL }, b"").unwrap();
        rig.front.ring();
        rig.supervisor.lane(lane_of(pool, 1).into()).take_ahead(|_| false, |_| {});
        assert!(rig.workers[worker].arm(true));
        rig.supervisor.rescan(0).fetch_or(1, Relaxed);
        assert!(rig.front.collect().is_none() && rig.front.somebody_is_late(), "a hint is missing");
        rig.front.ring();
        assert_eq!(rig.rung().0, [worker as u16]);
        assert!(!rig.front.somebody_is_late());
        rig.workers[worker].disarm().unwrap();
        assert_eq!((rig.work(worker), rig.collect()), (vec![1], vec![1]));
    }
}

#[test]
fn an_item_that_was_given_back_is_hinted_although_others_wait() {
    let mut rig = rig("given-back");
    rig.call(1);
    let claimed = rig.workers[0].take().unwrap();
    rig.call(2);
    // A sweep that found the lane full.
    claimed.word.requeued().store(&claimed.record.word, claimed.word);
    rig.supervisor.rescan(0).fetch_or(1, Relaxed);
    assert!(rig.front.collect().is_none());
    rig.front.ring();
    assert_eq!(rig.work(1), [2, 1]);
}

#[test]
fn a_part_that_no_hint_tells_of_is_noticed_by_looking() {
    let mut rig = rig("part");
    for (kind, is_noticed) in [(Kind::Call, false), (Kind::Stream, true)] {
        let index = rig.offer(Offer { kind, ..CALL }, b"").unwrap();
        let claimed = rig.workers[0].take().unwrap();
        partial::Entry::new(claimed.word.generation(), 0).put(&claimed.record.partials[0]);
        assert!(rig.front.collect().is_none() && rig.front.noticed().is_none());
        rig.supervisor.rescan(0).fetch_or(1, Relaxed);
        assert!(rig.front.collect().is_none());
        assert_eq!(rig.front.noticed(), is_noticed.then_some(index));
    }
}

#[test]
fn a_word_that_cannot_have_come_of_the_item_is_damage() {
    let mut rig = rig("damage");
    for (n, damage) in [
        |word: Word| word.with(Phase::Claimed, 4),
        |word: Word| word.with(Phase::Free, 0),
        |word: Word| Word::new(word.generation() ^ (1 << 20), word.lane(), 0, Phase::Done, 0),
    ]
    .into_iter()
    .enumerate()
    {
        let index = rig.offer(CALL, &[1; 100]).unwrap();
        let claimed = rig.workers[0].take().unwrap();
        let record = claimed.record;
        // As if its worker could wait for room.
        record.result_len.store(900, Relaxed);
        damage(claimed.word).store(&record.word, claimed.word);
        rig.supervisor.rescan(0).fetch_or(1, Relaxed);
        let done = rig.front.collect().unwrap();
        assert_eq!((done.index, done.id, done.outcome, done.len), (index, 1, Outcome::Damaged, 0), "{n}");
        assert_eq!((done.worker, done.attempts), (SUPERVISOR, 0));
        rig.front.release(index);
        assert_eq!((rig.front.free_items(), rig.front.free_request_bytes()), (ITEMS as usize, BYTES));
        assert_eq!(rig.call(2), index);
        assert_eq!(rig.work(0), [2]);
        assert_eq!(rig.collect(), [2]);
    }
}

#[test]
fn damage_is_found_at_the_deadline_at_the_latest() {
    let mut rig = rig("damaged-deadline");
    let index = rig.offer(Offer { kind: Kind::Submit, subscription: b"s", deadline: 1, ..CALL }, b"").unwrap();
    let word = rig.word(index);
    word.with(Phase::Claimed, 4).store(&rig.supervisor.item(index).word, word);
    assert!(rig.front.collect().is_none());
    assert!(rig.front.expire(index));
    let done = rig.front.collect().unwrap();
    assert_eq!((done.index, done.outcome), (index, Outcome::Damaged));
    rig.front.release(index);
    assert_eq!(rig.front.free_items(), ITEMS as usize);
}

#[test]
fn a_result_that_is_impossible_is_none() {
    let mut rig = rig("invalid");
    // Where it ends decides: at the end of the partition, or behind it.
    for (len, offset, outcome) in [
        (BYTES as u32, 0, Outcome::Success),
        (BYTES as u32, GRANULE, Outcome::Invalid),
        (u32::MAX, 0, Outcome::Invalid),
        (65, u64::MAX, Outcome::Invalid),
        (64, u64::MAX, Outcome::Success),
    ] {
        rig.call(1);
        let claimed = rig.workers[1].take().unwrap();
        let (record, word) = (claimed.record, claimed.word);
        record.result_len.store(len, Relaxed);
        record.result_offset.store(offset, Relaxed);
        rig.workers[1].reply(&claimed, 0);
        word.with(Phase::Done, 1).store(&record.word, word);
        rig.supervisor.rescan(0).fetch_or(1, Relaxed);
        let done = rig.front.collect().unwrap();
        assert_eq!((done.outcome, done.worker, done.attempts), (outcome, 1, 1), "{len} {offset}");
        assert_eq!(done.len, if outcome == Outcome::Success { len as usize } else { 0 });
        rig.front.release(done.index);
    }
    // A failure is what the worker says it is.
    rig.call(2);
    let claimed = rig.workers[1].take().unwrap();
    rig.workers[1].reply(&claimed, 0).complete(claimed, 5, 20, 30);
    let done = rig.front.collect().unwrap();
    assert_eq!((done.outcome, done.times), (Outcome::Failure(5), [0, 20, 30]));
}

#[test]
fn a_hint_of_no_item_leads_to_none() {
    let mut rig = rig("hints");
    for index in [ITEMS, ITEMS + 1, (1 << 20) - 1] {
        rig.supervisor.lane(0).push(Hint { index, generation: 0 }).unwrap();
    }
    assert!(rig.workers[0].take().is_none());
    rig.call(1);
    assert_eq!((rig.work(0), rig.collect()), (vec![1], vec![1]));
}

/// A lane may have been written over so that it looks as if nothing had ever been pushed: that is sound. A front that has
/// looked after the death goes by what is there now.
#[test]
fn a_front_that_has_looked_pushes_where_the_lane_begins() {
    let mut rig = rig("gap");
    rig.call(1);
    assert_eq!((rig.work(0), rig.collect()), (vec![1], vec![1]));
    let lane = rig.supervisor.lane(lane_of(0, CALL.priority).into());
    lane.zero();
    assert!(lane.is_sound());
    rig.supervisor.rescan(0).fetch_or(mend::LOOK, Relaxed);
    assert!(rig.front.collect().is_none());
    rig.call(2);
    assert_eq!((rig.work(0), rig.collect()), (vec![2], vec![2]));
}
