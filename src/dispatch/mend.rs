//! The supervisor's side: what a worker that scribbled over the segment may have left is put right.
//!
//! # What it promises
//!
//! Lanes are lanes again: each that does not fit together any more is emptied, and the fronts are told to push a hint for each
//! of their items that is READY. Made after every death of a worker, for whoever scribbles mostly dies of it. A worker that
//! scribbles and lives on is not found out.
//!
//! # What puts the rest right
//!
//! - Of an item, its front knows what it was offered as; a word that cannot have come of that is damage, and the item fails
//!   (`ITEM_DAMAGED`). See [`super::Front`].
//! - Return rings show their damage to their consumer ([`crate::ring::Consumer`]).
//! - Stage and registry are the supervisor's own, and it writes them again.
//! - The bits of sleepers: everybody is woken after a death.

use std::sync::atomic::Ordering::*;

use super::lanes;
use crate::{process::now, segment::Segment};

/// Of a front's `rescan`: look at every item.
pub(super) const LOOK: u64 = 1;
/// Of a front's `rescan`: no READY item may have a hint any more.
pub(super) const HINT: u64 = 2;

/// Begins lanes of zeros in a later lap than the first: then zeros are in no lane that is in use, and show like other garbage.
pub fn begin_lanes(segment: &Segment) {
    (0..lanes(segment)).for_each(|lane| segment.lane(lane).reset(now()));
}

/// Makes lanes anew that were scribbled over; how many. Ring the fronts after it.
pub fn mend(segment: &Segment) -> u32 {
    for pool in 0..segment.geometry().pools as u16 {
        // Whoever does spin has a companion more for a moment.
        segment.spinning(pool).iter().for_each(|word| word.store(0, Relaxed));
    }
    let mut mended = 0;
    for lane in (0..lanes(segment)).map(|lane| segment.lane(lane)).filter(|lane| !lane.is_sound()) {
        lane.reset(now());
        mended += 1;
    }
    if mended > 0 {
        for front in 0..segment.geometry().fronts {
            // I2: pairs with I2' in the front's scan, which pushes its hints behind the reset.
            segment.rescan(front as u16).fetch_or(LOOK | HINT, Release);
        }
    }
    mended
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::{
        dispatch::{Bells, Front, Kind, Offer, Topology, Worker},
        process::now,
        segment::{Geometry, INLINE, SegmentOwner, Slot},
    };

    fn offer(front: &mut Front<'_>, id: u64) {
        let mut request = front.request(INLINE).unwrap();
        front.write(&mut request, &[id as u8; INLINE]);
        let offer = Offer {
            pool: 0,
            priority: 1,
            id,
            offered: now(),
            deadline: 0,
            kind: Kind::Call,
            subscription: &[],
            metadata: &[],
        };
        front.offer(&offer, &mut request).unwrap();
    }

    const GEOMETRY: Geometry = Geometry {
        items: 64,
        fronts: 1,
        workers: 2,
        pools: 1,
        request_bytes: 1 << 16,
        result_bytes: 1 << 16,
        letter_bytes: 0,
    };

    #[test]
    fn zeros_are_garbage_too() {
        let name = format!("unit-zeros-{}", std::process::id());
        let owner = SegmentOwner::create(&name, GEOMETRY).unwrap();
        let (topology, bells) = (Topology::new([2]), Bells::new(1, 2).unwrap());
        let view = |slot| &*Box::leak(Box::new(Segment::attach(owner.object(), &name, slot).unwrap()));
        let supervisor = view(Slot::Supervisor);
        begin_lanes(supervisor);
        let (mut front, _) = Front::attach(view(Slot::Front(0)), topology.clone(), bells.clone(), 0);
        let mut worker = Worker::attach(view(Slot::Worker(0)), topology, bells, 0).unwrap();
        assert!(front.collect().is_none());
        (1..=3).for_each(|id| offer(&mut front, id));
        (0..lanes(supervisor)).for_each(|lane| supervisor.lane(lane).zero());
        assert!(worker.take().is_none());
        assert_eq!(mend(supervisor), lanes(supervisor));
        assert!(front.collect().is_none());
        front.ring();
        let taken: Vec<_> = std::iter::from_fn(|| worker.take()).map(|claimed| claimed.id()).collect();
        assert_eq!(taken.len(), 3);
    }

    #[test]
    fn nothing_that_was_offered_before_or_after_is_lost() {
        let name = format!("unit-mend-{}", std::process::id());
        let owner = SegmentOwner::create(&name, GEOMETRY).unwrap();
        let (topology, bells) = (Topology::new([2]), Bells::new(1, 2).unwrap());
        let view = |slot| &*Box::leak(Box::new(Segment::attach(owner.object(), &name, slot).unwrap()));
        let (mut front, _) = Front::attach(view(Slot::Front(0)), topology.clone(), bells.clone(), 0);
        let mut workers =
            [0, 1].map(|n| Worker::attach(view(Slot::Worker(n)), topology.clone(), bells.clone(), n).unwrap());
        assert!(front.collect().is_none());
        for round in 0..3 {
            // One is in work, and some wait.
            (1..=5).for_each(|id| offer(&mut front, id));
            let claimed = workers[0].take().unwrap();
            let mut seen = BTreeSet::from([claimed.id()]);
            let supervisor = view(Slot::Supervisor);
            supervisor.scribble();
            assert!(mend(supervisor) > 0);
            // So its lane is not empty when the front comes to look.
            offer(&mut front, 6);
            assert!(front.collect().is_none(), "{round}");
            front.ring();
            workers[0].reply(&claimed, 0).complete(claimed, 0, now(), now());
            while let Some(claimed) = workers[1].take() {
                assert!(seen.insert(claimed.id()));
                workers[1].reply(&claimed, 0).complete(claimed, 0, now(), now());
            }
            assert_eq!(seen, (1..=6).collect(), "{round}: worked on");
            let mut done = BTreeSet::new();
            while let Some(completion) = front.collect() {
                assert!(done.insert(completion.id));
                front.release(completion.index);
            }
            assert_eq!(done, seen, "{round}: collected");
            assert_eq!(front.free_items(), 64);
        }
    }
}
