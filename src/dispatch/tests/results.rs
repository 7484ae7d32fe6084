//! Results: where they are written, whose memory that is, and what a worker waits for that has none.

use std::io::Write as _;

use super::*;
use crate::segment::{GRANULE, WINDOW};

impl Rig {
    /// Offers an item of this kind, and worker 0 claims it.
    fn claim(&mut self, kind: Kind, id: u64) -> Claimed<'static> {
        let subscription = if kind == Kind::Submit { &b"s"[..] } else { &[] };
        self.offer(Offer { id, kind, subscription, ..CALL }, b"").unwrap();
        self.workers[0].take().unwrap()
    }

    /// Worker 0 does an item of this kind, with a result of so many bytes.
    fn finish(&mut self, kind: Kind, id: u64, len: usize) {
        let claimed = self.claim(kind, id);
        let mut reply = self.workers[0].reply(&claimed, len);
        reply.buffer(len).unwrap().fill(id as u8);
        reply.complete(claimed, 0, 0, 0);
    }

    /// Whether worker 0 could write so long a result for an item of this kind now.
    fn has_room(&mut self, kind: Kind, len: usize) -> bool {
        let claimed = self.claim(kind, 99);
        let mut reply = self.workers[0].reply(&claimed, usize::MAX);
        let has_room = reply.try_reserve(len).unwrap();
        reply.complete(claimed, 0, 0, 0);
        drop(reply);
        let mut others = Vec::new();
        while let Some(done) = self.front.collect() {
            if done.id == 99 { self.front.release(done.index) } else { others.push(done) }
        }
        assert!(others.is_empty(), "collect them before");
        has_room
    }

    fn result(&self, done: &Completion) -> Vec<u8> {
        match done.len {
            0..=INLINE => self.front.inline_result(done, &mut [0; INLINE]).unwrap().to_vec(),
            _ => self.front.arena_result(done).unwrap().to_vec(),
        }
    }
}

const ALL: usize = BYTES as usize;

#[test]
fn a_result_is_what_was_written_last_wherever_that_was() {
    let mut rig = rig("written");
    for len in [0, 1, INLINE, INLINE + 1, 5000] {
        let wanted: Vec<_> = (0..len).map(|n| (n % 251) as u8).collect();
        type Way = fn(&mut Reply<'_, '_>, &[u8]);
        let ways: [Way; 6] = [
            |reply, bytes| reply.write_all(bytes).unwrap(),
            |reply, bytes| bytes.chunks(7).for_each(|piece| reply.write(piece).unwrap()),
            |reply, bytes| reply.buffer(bytes.len()).unwrap().copy_from_slice(bytes),
            |reply, bytes| {
                // Larger at first, and then not.
                reply.buffer(9000).unwrap().fill(1);
                reply.clear();
                assert!(reply.is_empty());
                reply.write(bytes).unwrap();
            },
            |reply, bytes| {
                reply.write(&[1; 100]).unwrap();
                reply.discard();
                assert_eq!(reply.len(), 0);
                reply.write(bytes).unwrap();
            },
            |reply, bytes| {
                // What is there stays when there is to be room for more.
                let (begin, end) = bytes.split_at(bytes.len() / 2);
                reply.write(begin).unwrap();
                assert_eq!(reply.try_reserve(bytes.len()), Ok(true));
                reply.write(end).unwrap();
            },
        ];
        for (n, way) in ways.into_iter().enumerate() {
            for kind in [Kind::Call, Kind::Stream] {
                let claimed = rig.claim(kind, 1);
                let mut reply = rig.workers[0].reply(&claimed, 10_000);
                way(&mut reply, &wanted);
                assert_eq!((reply.len(), reply.is_empty(), reply.max_len()), (len, len == 0, 10_000));
                reply.complete(claimed, 0, 0, 0);
                drop(reply);
                let done = rig.front.collect().unwrap();
                assert_eq!((done.outcome, rig.result(&done)), (Outcome::Success, wanted.clone()), "{n}");
                rig.front.release(done.index);
                assert!(rig.has_room(Kind::Call, ALL), "{n}: no memory was lost");
            }
        }
    }
}

#[test]
fn a_result_may_be_as_large_as_it_may_be_and_no_larger() {
    let mut rig = rig("large");
    for most in [0, 10, INLINE + 1, 5000] {
        let claimed = rig.claim(Kind::Call, 1);
        let mut reply = rig.workers[0].reply(&claimed, most);
        let refused = ReplyError::TooLarge { len: most + 1, most };
        assert_eq!(reply.try_reserve(most + 1), Err(refused));
        assert_eq!(reply.buffer(most + 1).unwrap_err(), refused);
        assert_eq!(reply.try_reserve(most), Ok(true));
        assert_eq!(reply.buffer(most).unwrap().len(), most);
        reply.clear();
        assert_eq!(reply.write(&vec![0; most]), Ok(()));
        assert_eq!(reply.write(&[0]), Err(refused), "nor byte by byte");
        reply.complete(claimed, 0, 0, 0);
        drop(reply);
        assert_eq!(rig.front.collect().unwrap().len, most);
    }
}

#[test]
fn a_result_that_grows_is_moved_seldom_also_where_twice_as_much_does_not_fit_beside_it() {
    let mut rig = rig("grows");
    for kind in [Kind::Call, Kind::Submit, Kind::Stream] {
        let claimed = rig.claim(kind, 1);
        let mut reply = rig.workers[0].reply(&claimed, ALL - 2 * GRANULE as usize);
        reply.write(&[1; ALL * 3 / 8]).unwrap();
        let mut places = Vec::new();
        for _ in 0..60 {
            reply.write(&[2; 1024]).unwrap();
            let len = reply.len();
            places.push(reply.buffer(len).unwrap().as_ptr());
        }
        places.dedup();
        assert!(places.len() <= 2, "{places:?}");
        let written = reply.buffer(ALL * 3 / 8 + 60 * 1024).unwrap();
        assert!(written.iter().enumerate().all(|(at, byte)| *byte == if at < ALL * 3 / 8 { 1 } else { 2 }));
        reply.complete(claimed, 0, 0, 0);
        drop(reply);
        rig.collect();
    }
}

#[test]
fn the_memory_of_a_result_is_its_until_it_is_released() {
    let mut rig = rig("lent");
    rig.finish(Kind::Call, 1, 1000);
    rig.finish(Kind::Call, 2, 2000);
    let [first, second] = [0; 2].map(|_| rig.front.collect().unwrap());
    for _ in 0..2 {
        assert!(rig.has_room(Kind::Call, ALL / 2) && !rig.has_room(Kind::Call, ALL));
        // The worker's successor leaves them where they are.
        rig.kill(0, 9);
        assert_eq!((rig.result(&first), rig.result(&second)), (vec![1; 1000], vec![2; 2000]));
    }
    rig.rung();
    assert!(rig.workers[0].arm(false));
    // In any order.
    rig.front.release(second.index);
    assert_eq!(rig.rung().0, [0], "it may wait for that");
    assert!(!rig.has_room(Kind::Call, ALL));
    rig.front.release(first.index);
    assert!(rig.has_room(Kind::Call, ALL));

    // Each worker has memory of its own, and so has its successor.
    rig.call(3);
    let claimed = rig.workers[1].take().unwrap();
    let mut reply = rig.workers[1].reply(&claimed, ALL);
    reply.buffer(ALL).unwrap();
    reply.complete(claimed, 0, 0, 0);
    drop(reply);
    let _kept = rig.front.collect().unwrap();
    // A small result has none.
    rig.finish(Kind::Call, 4, INLINE);
    let _small = rig.front.collect().unwrap();
    rig.kill(0, 9);
    assert!(rig.has_room(Kind::Call, ALL));

    // What is released behind one that is not is room all the same.
    rig.finish(Kind::Call, 5, 1000);
    rig.finish(Kind::Call, 6, ALL / 2);
    let [_first, second] = [0; 2].map(|_| rig.front.collect().unwrap());
    rig.front.release(second.index);
    assert!(rig.has_room(Kind::Call, ALL / 2));
}

#[test]
fn what_waits_for_subscribers_leaves_half_to_those_who_wait_for_results() {
    let mut rig = rig("half");
    rig.finish(Kind::Submit, 1, 1000);
    let done = rig.front.collect().unwrap();
    for _ in 0..2 {
        assert!(rig.has_room(Kind::Submit, ALL / 2 - 1000));
        assert!(!rig.has_room(Kind::Submit, ALL / 2 - 999));
        assert!(rig.has_room(Kind::Call, ALL / 2));
        // It is known to the worker's successor, too.
        rig.kill(0, 9);
    }
    // Nor does it grow beyond that. Of a server that stops nobody waits.
    rig.supervisor.set_stage(Stage::Stopping);
    let claimed = rig.claim(Kind::Submit, 2);
    let mut reply = rig.workers[0].reply(&claimed, ALL);
    assert_eq!(reply.buffer(ALL / 2 - 999).unwrap_err(), ReplyError::NoRoom);
    assert!(reply.buffer(ALL / 2 - 1000).is_ok());
    drop(reply);
    rig.front.release(done.index);
    rig.workers[0].reply(&claimed, 0).complete(claimed, 0, 0, 0);
    rig.collect();
    // Alone it may be as large as any.
    assert!(rig.has_room(Kind::Submit, ALL));
}

#[test]
fn memory_that_is_held_is_not_used_again() {
    let mut rig = rig("hold");
    let claimed = rig.claim(Kind::Call, 1);
    let mut reply = rig.workers[0].reply(&claimed, ALL);
    reply.write(b"small").unwrap();
    assert!(reply.hold().is_none(), "it is in no memory of the arena");
    reply.buffer(1000).unwrap();
    let (held, again) = (reply.hold().unwrap(), reply.hold());
    reply.discard();
    drop(again);
    reply.write(b"other").unwrap();
    reply.complete(claimed, 0, 0, 0);
    drop(reply);
    rig.collect();
    assert!(!rig.has_room(Kind::Call, ALL));
    drop(held);
    assert!(rig.has_room(Kind::Call, ALL));

    // Nobody tells when a hold is dropped: it is not waited for.
    let claimed = rig.claim(Kind::Call, 3);
    let mut reply = rig.workers[0].reply(&claimed, ALL);
    reply.buffer(ALL).unwrap();
    let hold = reply.hold().unwrap();
    reply.discard();
    assert_eq!(reply.try_reserve(100), Ok(false));
    assert_eq!(reply.lacks_room().err(), Some(ReplyError::NoRoom));
    reply.complete(claimed, 0, 0, 0);
    drop((reply, hold));
    rig.collect();

    // Of a result, not before it is released and the hold is dropped.
    for release_first in [true, false] {
        let claimed = rig.claim(Kind::Call, 2);
        let mut reply = rig.workers[0].reply(&claimed, ALL);
        reply.buffer(1000).unwrap();
        let hold = reply.hold().unwrap();
        reply.complete(claimed, 0, 0, 0);
        drop(reply);
        let done = rig.front.collect().unwrap();
        if release_first {
            rig.front.release(done.index);
            assert!(!rig.has_room(Kind::Call, ALL));
            drop(hold);
        } else {
            drop(hold);
            assert!(!rig.has_room(Kind::Call, ALL));
            rig.front.release(done.index);
        }
        assert!(rig.has_room(Kind::Call, ALL));
    }
}

#[test]
fn a_failure_is_told_however_little_room_there_is() {
    let mut rig = rig("failure");
    let failure = Failure::new(Code::Internal, "LONG", "x".repeat(500));
    let claimed = rig.claim(Kind::Call, 1);
    let mut reply = rig.workers[0].reply(&claimed, 10);
    reply.write(b"begun").unwrap();
    reply.fail(claimed, &failure, 0, 0);
    drop(reply);
    let done = rig.front.collect().unwrap();
    let code = Code::Internal as u32;
    assert_eq!(done.outcome, Outcome::Failure(code));
    let told = Failure::from_result(code, &rig.result(&done));
    assert_eq!((told.reason.as_ref(), told.message.as_str()), ("LONG", "x".repeat(500).as_str()));
    rig.front.release(done.index);

    // Nobody will ever release what is in the way.
    rig.finish(Kind::Call, 2, ALL);
    rig.supervisor.set_stage(Stage::Stopping);
    let claimed = rig.claim(Kind::Call, 3);
    let mut reply = rig.workers[0].reply(&claimed, ALL);
    assert_eq!(reply.try_reserve(100), Ok(false));
    assert_eq!(reply.lacks_room().err(), Some(ReplyError::NoRoom));
    assert_eq!(reply.buffer(100).unwrap_err(), ReplyError::NoRoom);
    reply.fail(claimed, &failure, 0, 0);
    drop(reply);
    rig.front.collect().unwrap();
    let done = rig.front.collect().unwrap();
    assert_eq!((done.outcome, done.len), (Outcome::Failure(code), INLINE));
    assert_eq!(Failure::from_result(code, &rig.result(&done)).reason, "LONG");
}

#[test]
fn an_open_item_ends_as_its_handler_says_and_never_not_at_all() {
    let mut rig = rig("open");
    let refused = Failure::new(Code::NotFound, "NOT_THERE", "no");
    type End = fn(Open<'static>, &Failure);
    let ends: [(End, Outcome); 3] = [
        (|open, _| open.complete(), Outcome::Success),
        (|open, failure| open.fail(failure), Outcome::Failure(Code::NotFound as u32)),
        (|open, _| drop(open), Outcome::Failure(Code::Internal as u32)),
    ];
    for (end, outcome) in ends {
        for len in [3, 500] {
            let claimed = rig.claim(Kind::Call, 1);
            let mut open = rig.workers[0].open_beside(&claimed, 1000, 77).unwrap();
            open.reply().write(&vec![4; len]).unwrap();
            end(open, &refused);
            let done = rig.front.collect().unwrap();
            assert_eq!((done.outcome, done.times[1]), (outcome, 77));
            let result = rig.result(&done);
            match outcome {
                Outcome::Failure(code) => {
                    let told = Failure::from_result(code, &result).reason;
                    assert!(told == if code == Code::NotFound as u32 { "NOT_THERE" } else { "ITEM_DROPPED" });
                }
                _ => assert_eq!(result, vec![4; len]),
            }
            rig.front.release(done.index);
            assert!(rig.has_room(Kind::Call, ALL));
        }
    }
}

#[test]
fn what_waits_for_room_is_in_nobodys_way_nor_in_its_own() {
    let mut rig = rig("aside");
    let begun: Vec<_> = (0..ALL / 2).map(|n| (n % 251) as u8).collect();
    type Way = fn(&mut Rig, &mut Reply<'_, '_>) -> usize;
    // How it goes on, and how long it is in the end.
    let ways: [Way; 5] = [
        |_, reply| {
            assert_eq!(reply.try_reserve(ALL), Ok(true));
            ALL / 2
        },
        |_, reply| {
            reply.write(&[0; 100]).unwrap();
            reply.buffer(ALL / 2).unwrap();
            ALL / 2
        },
        |_, reply| reply.buffer(100).unwrap().len(),
        |rig, reply| {
            rig.supervisor.set_stage(Stage::Stopping);
            reply.clear();
            assert_eq!(reply.try_reserve(INLINE), Ok(true), "for that it needs none");
            0
        },
        // It ends as it is.
        |_, _| ALL / 2,
    ];
    for way in ways {
        let claimed = rig.claim(Kind::Call, 1);
        let mut open = rig.workers[0].open_beside(&claimed, ALL, 0).unwrap();
        open.reply().write(&begun).unwrap();
        assert_eq!(open.reply().try_reserve(ALL), Ok(true), "alone it has all there is");
        let mut reply = open.reply();
        reply.discard();
        reply.write(&begun).unwrap();
        drop(reply);
        let claimed = rig.claim(Kind::Call, 2);
        let mut other = rig.workers[0].open_beside(&claimed, ALL, 0).unwrap();
        other.reply().buffer(ALL / 4).unwrap();
        for _ in 0..2 {
            assert_eq!(open.reply().try_reserve(ALL), Ok(false));
        }
        assert_eq!(open.reply().len(), begun.len());
        assert_eq!(other.reply().try_reserve(ALL / 4 * 3), Ok(true));
        other.fail(&Failure::cancelled());
        let len = way(&mut rig, &mut open.reply());
        open.complete();
        rig.front.collect().map(|done| rig.front.release(done.index)).unwrap();
        let done = rig.front.collect().unwrap();
        assert_eq!((done.outcome, rig.result(&done)), (Outcome::Success, begun[..len].to_vec()));
        rig.front.release(done.index);
        rig.supervisor.set_stage(Stage::Serving);
        assert!(rig.has_room(Kind::Call, ALL));
    }

    // And if there never is any, it fails.
    let claimed = rig.claim(Kind::Call, 3);
    let mut open = rig.workers[0].open_beside(&claimed, ALL, 0).unwrap();
    open.reply().write(&begun).unwrap();
    rig.finish(Kind::Call, 4, ALL / 4);
    assert_eq!(open.reply().try_reserve(ALL), Ok(false));
    rig.finish(Kind::Call, 5, ALL / 2);
    rig.supervisor.set_stage(Stage::Stopping);
    open.complete();
    let outcomes: Vec<_> = std::iter::from_fn(|| rig.front.collect()).map(|done| (done.id, done.outcome)).collect();
    let failed = Outcome::Failure(Code::ResourceExhausted as u32);
    assert_eq!(outcomes, [(4, Outcome::Success), (5, Outcome::Success), (3, failed)]);
}

#[test]
fn who_waits_sleeps_until_it_is_rung_and_not_for_what_is_there() {
    let mut rig = rig("waits");
    let hour = Duration::from_secs(3600).as_nanos() as u64;
    for deadline in [0, now() + hour] {
        let offer = Offer { kind: Kind::Stream, deadline, ..CALL };
        rig.offer(offer, b"").unwrap();
        let claimed = rig.workers[0].take().unwrap();
        let mut open = rig.workers[0].open_beside(&claimed, ALL, 0).unwrap();
        let part = ALL / WINDOW - 4096;
        for _ in 0..WINDOW {
            open.reply().buffer(part).unwrap();
            assert_eq!(open.reply().try_send(), Ok(true));
        }
        let credit = open.reply().credit().unwrap();
        open.reply().write(&[1; 4]).unwrap();
        assert_eq!(open.reply().try_reserve(part), Ok(false), "it has all that there is");
        let room = open.reply().lacks_room().unwrap();
        let bell = rig.bells.worker(0);
        let is_asleep = || rig.supervisor.sleeping(Slot::Worker(0)).any();
        for wait in [&|| credit.wait().unwrap(), &|| room.wait().unwrap()] as [&dyn Fn(); 2] {
            // Had it not slept, the ring would be there still.
            bell.ring().unwrap();
            wait();
            assert!(!bell.has_rung() && !is_asleep());
        }
        assert!(rig.front.collect().is_none());
        let index = rig.front.noticed().unwrap();
        let first = rig.front.partial(index).unwrap().unwrap();
        assert!(rig.front.take_partial(&first, |_| {}));
        // There is credit and room: it would sleep for ever if it slept.
        assert!(credit.is_there());
        credit.wait().unwrap();
        room.wait().unwrap();
        assert!(!is_asleep());
        open.complete();
        rig.collect();
    }
}

#[test]
fn who_waits_for_credit_waits_no_longer_than_the_item_lasts() {
    let mut rig = rig("ends");
    // By its deadline, its client, or the server's end.
    for end in 0..3 {
        let deadline = if end == 0 { now() + 30_000_000 } else { 0 };
        let index = rig.offer(Offer { kind: Kind::Stream, deadline, ..CALL }, b"").unwrap();
        let claimed = rig.workers[0].take().unwrap();
        let mut open = rig.workers[0].open_beside(&claimed, ALL, 0).unwrap();
        let mut sent = 0;
        while sent < WINDOW && open.reply().try_send() == Ok(true) {
            sent += 1;
        }
        let credit = open.reply().credit().unwrap();
        match end {
            0 => {}
            1 => rig.front.cancel(index),
            _ => rig.supervisor.set_stage(Stage::Stopping),
        }
        while !credit.is_there() {
            credit.wait().unwrap();
        }
        let error = if end == 0 { ReplyError::Expired } else { ReplyError::Cancelled };
        assert_eq!(open.reply().send(), Err(error));
        drop(open);
        rig.collect();
    }
}

#[test]
fn parts_outlive_their_worker_until_they_are_taken() {
    let mut rig = rig("parts");
    let claimed = rig.claim(Kind::Stream, 1);
    let mut reply = rig.workers[0].reply(&claimed, ALL);
    for n in 1..=2 {
        reply.buffer(30_000).unwrap().fill(n);
        reply.send().unwrap();
    }
    reply.complete(claimed, 0, 0, 0);
    drop(reply);
    let done = rig.front.collect().unwrap();
    assert!(rig.front.collect().is_none() && rig.front.noticed().is_none(), "who has the item knows");
    rig.kill(0, 9);
    let mut room = vec![rig.has_room(Kind::Call, ALL - 32_000)];
    for n in 1..=2 {
        // Nothing of what comes next is written over them.
        let claimed = rig.claim(Kind::Call, 2);
        let mut reply = rig.workers[0].reply(&claimed, ALL);
        reply.buffer(60_000).unwrap().fill(9);
        drop(reply);
        rig.front.cancel(claimed.index);
        rig.workers[0].reply(&claimed, 0).complete(claimed, 0, 0, 0);
        let part = rig.front.partial(done.index).unwrap().unwrap();
        let mut bytes = Vec::new();
        assert!(rig.front.take_partial(&part, |piece| bytes.extend_from_slice(piece)));
        assert_eq!(bytes, vec![n; 30_000]);
        assert!(rig.front.collect().is_none());
        room.push(rig.has_room(Kind::Call, ALL));
    }
    assert_eq!(room, [false, false, true]);
}

#[test]
fn an_item_is_noticed_once_whichever_attempt_has_parts() {
    let mut rig = rig("noticed");
    let index = rig.claim(Kind::Stream, 1).index;
    rig.sweep(0, 9);
    for attempt in 2..5 {
        let claimed = rig.workers[0].take().unwrap();
        let mut reply = rig.workers[0].reply(&claimed, ALL);
        for _ in 0..2 {
            reply.write(&[attempt; 10]).unwrap();
            reply.send().unwrap();
        }
        drop(reply);
        assert!(rig.front.collect().is_none());
        if attempt < 4 {
            rig.kill(0, 9);
        }
    }
    assert_eq!((rig.front.noticed(), rig.front.noticed()), (Some(index), None));
    let part = rig.front.partial(index).unwrap().unwrap();
    assert_eq!((part.attempts, part.worker, part.sequence, part.len), (4, 0, 0, 10));
}

#[test]
fn a_part_may_be_as_large_as_a_result() {
    let mut rig = rig("whole");
    let claimed = rig.claim(Kind::Stream, 1);
    let most = ALL - GRANULE as usize;
    let mut reply = rig.workers[0].reply(&claimed, most);
    reply.buffer(most).unwrap().fill(8);
    assert_eq!(reply.try_send(), Ok(true));
    drop(reply);
    assert!(rig.front.collect().is_none());
    let part = rig.front.partial(claimed.index).unwrap().unwrap();
    let mut bytes = 0;
    assert!(rig.front.take_partial(&part, |piece| bytes += piece.iter().filter(|byte| **byte == 8).count()));
    assert_eq!(bytes, most);
}

#[test]
fn who_is_cancelled_waits_for_its_own_parts_no_longer() {
    let mut rig = rig("own");
    let stream = rig.claim(Kind::Stream, 1);
    let call = rig.claim(Kind::Call, 2);
    let mut open = rig.workers[0].open_beside(&stream, ALL, 0).unwrap();
    let mut other = rig.workers[0].open_beside(&call, ALL, 0).unwrap();
    open.reply().buffer(ALL - GRANULE as usize).unwrap();
    open.reply().send().unwrap();
    for open in [&mut open, &mut other] {
        assert_eq!(open.reply().try_reserve(100), Ok(false));
        assert!(open.reply().lacks_room().is_ok());
    }
    // The client that does not take them is another's: there may be room in a while, as at any time.
    rig.front.cancel(call.index);
    assert!(other.reply().lacks_room().is_ok());
    rig.front.cancel(stream.index);
    assert_eq!(open.reply().lacks_room().err(), Some(ReplyError::Cancelled));
    // What they say when they are dropped shall not wait for room.
    rig.supervisor.set_stage(Stage::Stopping);
}
