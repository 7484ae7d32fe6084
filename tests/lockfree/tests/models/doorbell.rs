//! The doorbell, over the lane and the return ring: nobody sleeps while there is something for it to do. A wakeup that
//! is lost is a deadlock of the model.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering::Relaxed as Unmodelled},
};

use forkring_lockfree::{
    check::{Check, Mortal},
    ring::{Consumer, Hint, Producer, returns},
    sleepers::Sleepers,
    sync::{AtomicU64, Fault, Ordering::*},
    word::{Phase, Word},
};
use loom::sync::Notify;

use super::world::{MORTAL, OTHER, Shipped, World, join, spawn};

const FRONT: usize = 2;

/// A front and two workers, each with an eventfd: it remembers that it was rung, and may wake for nothing.
struct House {
    world: Arc<World<Shipped>>,
    returns: [(AtomicU64, Vec<AtomicU64>); 2],
    idle: [AtomicU64; 1],
    door: [AtomicU64; 1],
    bells: [Notify; 3],
    taken: AtomicU64,
}

impl House {
    fn new(items: usize) -> Arc<Self> {
        let zero = || AtomicU64::new(0);
        let world = World::new(2, items);
        // What happens before a hint is pushed belongs to the models of the lane.
        for index in 0..items {
            world.fill(index as u32);
        }
        Arc::new(House {
            world,
            returns: [(); 2].map(|()| (zero(), [0, 1].map(|at| AtomicU64::new(returns::unused(at, 2))).into())),
            idle: [zero()],
            door: [zero()],
            bells: [(); 3].map(|()| Notify::new()),
            taken: zero(),
        })
    }

    fn idle(&self) -> Sleepers<'_> {
        Sleepers::new(&self.idle)
    }

    fn has_work(&self) -> bool {
        !self.world.ring.lane().is_empty()
    }

    /// After publishing to workers.
    fn wake_worker(&self) {
        if let Some(bit) = self.idle().wake_one() {
            self.bells[bit].notify();
        }
    }

    fn ring_all(&self) {
        self.bells.iter().for_each(Notify::notify);
    }

    fn worker_sleeps(&self, worker: usize) {
        self.idle().enter(worker);
        if !self.has_work() && self.taken.load(Relaxed) < self.world.items.len() as u64 {
            self.bells[worker].wait();
        }
        self.idle().leave(worker);
    }

    /// A worker's life, until it has taken an item.
    fn work_once(&self, worker: usize, owner: u16) -> Hint {
        loop {
            match self.world.take(owner) {
                Some(hint) => return hint,
                None => self.worker_sleeps(worker),
            }
        }
    }

    fn complete(&self, hint: Hint, producer: &mut Producer<'_>) {
        self.return_hint(hint, producer);
        if Sleepers::new(&self.door).wake_one().is_some() {
            self.bells[FRONT].notify();
        }
    }

    /// Without the waker's half.
    fn return_hint(&self, hint: Hint, producer: &mut Producer<'_>) {
        let word = &self.world.items[hint.index as usize].word;
        let claimed = Word::load(word);
        claimed.with(Phase::Done, claimed.owner()).store(word, claimed);
        assert!(producer.push(hint.index));
    }

    fn producer(&self, worker: usize) -> Producer<'_> {
        Producer::resume(&self.returns[worker].0, &self.returns[worker].1)
    }

    /// A front's life, until it has collected so many items.
    fn collect(&self, mut wanted: usize) {
        let mut consumers = self.returns.each_ref().map(|(head, entries)| Consumer::resume(head, entries));
        let mut pop = || consumers.iter_mut().find_map(Consumer::pop);
        let door = Sleepers::new(&self.door);
        while wanted > 0 {
            let mut popped = pop();
            if popped.is_none() {
                door.enter(0);
                popped = pop();
                if popped.is_none() {
                    self.bells[FRONT].wait();
                }
                door.leave(0);
            }
            if let Some(index) = popped {
                assert_eq!(Word::load(&self.world.items[index as usize].word).phase(), Phase::Done);
                wanted -= 1;
            }
        }
    }
}

fn there() {
    let house = House::new(1);
    join([
        spawn(&house, |house| {
            house.world.push(0, 1);
            house.wake_worker();
        }),
        spawn(&house, |house| house.work_once(0, OTHER)),
    ]);
}

fn there_and_back() {
    let house = House::new(1);
    join([
        spawn(&house, |house| {
            house.world.push(0, 1);
            house.wake_worker();
            house.collect(1);
        }),
        spawn(&house, |house| {
            let hint = house.work_once(0, OTHER);
            house.complete(hint, &mut house.producer(0));
        }),
    ]);
}

/// The worker looks whether the front sleeps when it has claimed its next item, which it may never complete.
fn back_before_the_next() {
    let house = House::new(2);
    house.world.push(0, 1);
    house.world.push(1, 1);
    join([
        spawn(&house, |house| house.collect(1)),
        spawn(&house, |house| {
            let hint = house.work_once(0, OTHER);
            house.return_hint(hint, &mut house.producer(0));
            house.work_once(0, OTHER);
            if Sleepers::new(&house.door).wake_one_after_exchange().is_some() {
                house.bells[FRONT].notify();
            }
        }),
    ]);
}

/// However many items, one ring: who is woken wakes the next. Who takes the last item stops the house.
fn two_workers(items: u32) {
    let house = House::new(items as usize);
    let work = |worker: usize| {
        move |house: &Arc<House>| {
            while house.taken.load(Relaxed) < u64::from(items) {
                if house.world.take(OTHER).is_none() {
                    house.worker_sleeps(worker);
                    continue;
                }
                if house.has_work() && house.idle().any() {
                    house.wake_worker();
                }
                if house.taken.fetch_add(1, Release) + 1 == u64::from(items) {
                    house.ring_all();
                }
            }
        }
    };
    join([
        spawn(&house, move |house| {
            (0..items).for_each(|index| house.world.push(index, 1));
            house.wake_worker();
        }),
        spawn(&house, work(0)),
        spawn(&house, work(1)),
    ]);
}

/// A front dies, perhaps between clearing a bit and ringing. Its successor sees to its item.
fn a_waker_dies(mortal: Mortal, ring_all: bool) {
    let house = House::new(1);
    join([
        spawn(&house, |house| house.work_once(0, OTHER)),
        spawn(&house, move |house| {
            mortal.live(|| {
                house.world.push(0, 1);
                house.wake_worker();
            });
            if ring_all {
                house.ring_all();
            }
            let word = Word::load(&house.world.items[0].word);
            if word.phase() == Phase::Ready {
                house.world.push(0, word.generation());
                house.wake_worker();
            }
        }),
    ]);
}

/// Of two workers the one that is rung dies, with the item or without.
fn a_woken_worker_dies(mortal: Mortal, ring_all: bool) {
    let house = House::new(1);
    join([
        spawn(&house, |house| {
            house.world.push(0, 1);
            house.wake_worker();
        }),
        spawn(&house, |house| house.work_once(1, OTHER)),
        spawn(&house, move |house| {
            mortal.live(|| {
                house.idle().enter(0);
                if house.has_work() {
                    house.idle().leave(0);
                    house.world.take(MORTAL);
                }
                // Killed at last in its sleep or at its work.
            });
            let word = Word::load(&house.world.items[0].word);
            if word.phase() == Phase::Claimed && word.owner() == MORTAL {
                let ready = word.requeued();
                ready.store(&house.world.items[0].word, word);
                house.world.push(0, ready.generation());
            }
            if ring_all {
                house.idle().leave(0);
                house.ring_all();
            }
        }),
    ]);
}

/// A bit is one sleeper's and is taken once: by one of two wakers, or by the sleeper itself.
fn bits_are_taken_once() {
    let house = House::new(0);
    house.idle().enter(0);
    house.idle().enter(1);
    let rung = Arc::new(AtomicU32::new(0));
    let ring = || {
        let rung = Arc::clone(&rung);
        spawn(&house, move |house| {
            if let Some(bit) = house.idle().wake_one() {
                assert_eq!(rung.fetch_or(1 << bit, Unmodelled) & 1 << bit, 0, "rung twice");
            }
        })
    };
    let (one, other) = (ring(), ring());
    let left = Arc::clone(&rung);
    let leave = spawn(&house, move |house| {
        if house.idle().leave(1) {
            assert_eq!(left.fetch_or(1 << 1, Unmodelled) & 1 << 1, 0, "rung and not awake by it");
        }
    });
    join([one, other, leave]);
    assert_eq!(rung.load(Unmodelled), 0b11, "a bit is gone, and nobody was rung for it");
}

#[test]
fn no_wakeup_is_lost() {
    Check::new("doorbell, bits are taken once", 4).holds(bits_are_taken_once);
    Check::new("doorbell, there", 3).holds(there);
    Check::new("doorbell, there and back", 3).holds(there_and_back);
    Check::new("doorbell, back before the next", 3).holds(back_before_the_next);
    Check::new("doorbell, two workers, an item", 2).holds(|| two_workers(1));
    Check::new("doorbell, two workers, two items", 1).holds(|| two_workers(2));
}

#[test]
fn whoever_dies_everybody_is_rung() {
    Check::new("doorbell, a waker dies", 3).holds_after_every_death(|mortal| a_waker_dies(mortal, true));
    Check::new("doorbell, a woken worker dies", 1).holds_after_every_death(|mortal| a_woken_worker_dies(mortal, true));
}

#[test]
fn a_death_that_nobody_is_told_of_is_noticed() {
    Check::new("doorbell, a waker dies, no ring", 3)
        .fails_after_some_death("deadlock", |mortal| a_waker_dies(mortal, false));
    Check::new("doorbell, a woken worker dies, no ring", 1)
        .fails_after_some_death("deadlock", |mortal| a_woken_worker_dies(mortal, false));
}

#[test]
fn the_fences_are_needed() {
    Check::new("doorbell without fences", 3).without(Fault::Fence).fails("deadlock", there);
    Check::new("doorbell without fences, back", 3).without(Fault::Fence).fails("deadlock", there_and_back);
    Check::new("doorbell without fences, back before the next", 3)
        .without(Fault::Fence)
        .fails("deadlock", back_before_the_next);
    Check::new("doorbell with AcqRel fences", 3).without(Fault::FenceOrder).fails("deadlock", there);
}

#[test]
fn sleeping_without_a_second_look_is_noticed() {
    Check::new("doorbell without a second look", 3).fails("deadlock", || {
        let house = House::new(1);
        join([
            spawn(&house, |house| {
                house.world.push(0, 1);
                house.wake_worker();
            }),
            spawn(&house, |house| {
                while house.world.take(OTHER).is_none() {
                    house.idle().enter(0);
                    house.bells[0].wait();
                    house.idle().leave(0);
                }
            }),
        ]);
    });
}
