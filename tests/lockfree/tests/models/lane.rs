//! The lane: every item is claimed once, and nothing is lost, whoever dies after whichever access.

use std::sync::Arc;

use forkring_lockfree::{
    check::{Check, Mortal},
    ring::{GENERATION_BITS, Hint, INDEX_BITS, Lane},
    sync::{AtomicU64, Fault, Ordering::*},
    word::{Phase, Word},
};

use super::{
    mutants::Vyukov,
    world::{MORTAL, OTHER, Ring, Shipped, World, join, spawn},
};

fn two_pushers_one_taker<R: Ring>() {
    let world = World::<R>::new(2, 2);
    join([
        spawn(&world, |world| world.offer(0)),
        spawn(&world, |world| world.offer(1)),
        spawn(&world, |world| {
            world.take(OTHER);
            world.take(OTHER);
        }),
    ]);
    world.settle();
}

fn one_pusher_two_takers<R: Ring>() {
    let world = World::<R>::new(2, 3);
    world.offer(0);
    join([
        spawn(&world, |world| {
            world.offer(1);
            world.offer(2);
        }),
        spawn(&world, |world| world.take(MORTAL)),
        spawn(&world, |world| world.take(OTHER)),
    ]);
    world.settle();
}

/// With a single cell every push is a lap.
fn laps<R: Ring>() {
    let world = World::<R>::new(1, 2);
    join([
        spawn(&world, |world| {
            world.offer(0);
            world.offer(1);
        }),
        spawn(&world, |world| world.take(MORTAL)),
        spawn(&world, |world| world.take(OTHER)),
    ]);
    world.settle();
}

/// A front's successor pushes again what its predecessor may have pushed.
fn hints_are_doubled<R: Ring>() {
    let world = World::<R>::new(4, 2);
    world.offer(0);
    join([
        spawn(&world, |world| {
            world.push(0, 1);
            world.offer(1);
        }),
        spawn(&world, |world| world.take(MORTAL)),
        spawn(&world, |world| world.take(OTHER)),
    ]);
    world.settle();
}

fn a_pusher_dies<R: Ring>(mortal: Mortal) {
    let world = World::<R>::new(2, 2);
    join([
        spawn(&world, move |world| mortal.live(|| world.offer(0))),
        spawn(&world, |world| world.offer(1)),
        spawn(&world, |world| world.take(OTHER)),
    ]);
    world.settle();
}

fn a_taker_dies<R: Ring>(mortal: Mortal) {
    let world = World::<R>::new(2, 2);
    world.offer(0);
    join([
        spawn(&world, |world| world.offer(1)),
        spawn(&world, move |world| mortal.live(|| (world.take(MORTAL), world.take(MORTAL)))),
        spawn(&world, |world| world.take(OTHER)),
    ]);
    world.settle();
}

/// A pusher sleeps while others push and take for more than half of all laps: to it a cell in use looks too old to be one.
fn half_of_all_laps_go_by() {
    const USED_BITS: u32 = INDEX_BITS + GENERATION_BITS;
    /// With a single cell every position is a lap. To zero the first is older than all, and the second by one.
    const LONG_AGO: [u64; 2] = [1 << (62 - USED_BITS), (1 << (63 - USED_BITS)) - 1];
    for later in LONG_AGO {
        let world = Arc::new(([(); 2].map(|()| AtomicU64::new(0)), [AtomicU64::new(0)]));
        let newest = later << (USED_BITS + 1) | 1 << USED_BITS;
        join([
            spawn(&world, |world| {
                let ([head, tail], cells) = &**world;
                let _ = Lane::new(head, tail, cells).push(Hint { index: 7, generation: 7 });
            }),
            // What is left of it all.
            spawn(&world, move |world| {
                let ([head, tail], cells) = &**world;
                head.store(later, Relaxed);
                tail.store(later, Relaxed);
                cells[0].swap(newest, Release);
            }),
        ]);
        assert_eq!(world.1[0].load(Relaxed), newest, "a cell in use was written over");
    }
}

#[test]
fn nothing_is_lost_or_claimed_twice() {
    Check::new("lane, 2 pushers, 1 taker", 4).holds(two_pushers_one_taker::<Shipped>);
    Check::new("lane, 1 pusher, 2 takers", 3).holds(one_pusher_two_takers::<Shipped>);
}

#[test]
fn laps_and_doubled_hints_do_no_harm() {
    Check::new("lane, a lap at every push", 4).holds(laps::<Shipped>);
    Check::new("lane, doubled hints", 3).holds(hints_are_doubled::<Shipped>);
    Check::new("lane, half of all laps go by", 4).holds(half_of_all_laps_go_by);
}

#[test]
fn a_pusher_may_die_anywhere() {
    Check::new("lane, a pusher dies", 3).holds_after_every_death(a_pusher_dies::<Shipped>);
}

#[test]
fn a_taker_may_die_anywhere() {
    Check::new("lane, a taker dies", 3).holds_after_every_death(a_taker_dies::<Shipped>);
}

/// The mutants pass where nobody dies, so that it is the deaths that they fail by.
#[test]
fn mutants_die() {
    Check::new("mutant, 2 pushers, 1 taker", 2).holds(two_pushers_one_taker::<Vyukov>);
    Check::new("mutant reserve-then-publish, a pusher dies", 2)
        .fails_after_some_death("lost: item 1 was pushed", a_pusher_dies::<Vyukov>);
    Check::new("mutant pop-then-claim, a taker dies", 2)
        .fails_after_some_death("lost: item 0 was pushed", a_taker_dies::<Vyukov>);
}

/// L0 and L0': without them a taker may find the item not yet READY, and remove its hint. L1': without it a pusher may not see
/// how long it slept.
#[test]
fn the_orderings_are_needed() {
    Check::new("lane without orderings", 2)
        .without(Fault::Ordering)
        .fails("lost: item 0 was pushed", two_pushers_one_taker::<Shipped>);
    Check::new("lane without orderings, half of all laps go by", 4)
        .without(Fault::Ordering)
        .fails("a cell in use was written over", half_of_all_laps_go_by);
}

/// What makes a claim safe is that it is one step.
#[test]
fn a_claim_in_two_steps_is_noticed() {
    fn claim(word: &AtomicU64) -> bool {
        let seen = Word::load(word);
        let ready = seen.phase() == Phase::Ready;
        if ready {
            seen.with(Phase::Claimed, OTHER).store(word, seen);
        }
        ready
    }
    Check::new("lane, claims by load and store", 2).fails("claimed twice", || {
        let world = World::<Shipped>::new(2, 1);
        world.offer(0);
        let take = |world: &Arc<World<Shipped>>| {
            world.ring.take(|hint| {
                let item = &world.items[hint.index as usize];
                let claimed = claim(&item.word);
                if claimed {
                    item.was_claimed(hint);
                }
                claimed
            });
        };
        join([spawn(&world, take), spawn(&world, take)]);
    });
}
