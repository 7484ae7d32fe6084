//! The return ring: what was pushed is popped, once and in order, and successors of the dead go on where those were.

use std::sync::{Arc, Mutex};

use forkring_lockfree::{
    check::{Check, Mortal},
    ring::{Consumer, INDEX_BITS, Producer, returns},
    sync::{AtomicU64, Fault, Ordering::*},
    word::{Phase, Word},
};

use super::world::{MORTAL, join, spawn};

#[derive(Default)]
struct Log(Mutex<Vec<u32>>);

impl Log {
    fn add(&self, index: u32) {
        self.0.lock().unwrap().push(index);
    }

    fn all(&self) -> Vec<u32> {
        self.0.lock().unwrap().clone()
    }
}

struct World {
    head: AtomicU64,
    entries: Vec<AtomicU64>,
    words: Vec<AtomicU64>,
    rescan: AtomicU64,
    /// What was pushed, in the order it was begun, and of that what the ring said it has.
    begun: Log,
    pushed: Log,
    popped: Log,
}

impl World {
    /// A ring of so many entries, and claimed items.
    fn new(entries: usize, items: usize) -> Arc<Self> {
        Arc::new(World {
            head: AtomicU64::new(0),
            entries: (0..entries).map(|at| AtomicU64::new(returns::unused(at, entries))).collect(),
            words: (0..items).map(|_| AtomicU64::new(0)).collect(),
            rescan: AtomicU64::new(0),
            begun: Log::default(),
            pushed: Log::default(),
            popped: Log::default(),
        })
    }

    fn producer(&self) -> Producer<'_> {
        Producer::resume(&self.head, &self.entries)
    }

    fn consumer(&self) -> Consumer<'_> {
        Consumer::resume(&self.head, &self.entries)
    }

    /// As a worker completes: DONE, and then the hint.
    fn complete(&self, producer: &mut Producer<'_>, index: u32) {
        let word = &self.words[index as usize];
        Word::new(1, 0, MORTAL, Phase::Done, 0).store(word, Word::load(word));
        self.begun.add(index);
        if producer.push(index) {
            self.pushed.add(index);
        } else {
            self.rescan.fetch_or(1, Release);
        }
    }

    /// The dead did not live to see its last push return: the ring itself says whether it is in.
    fn log_last_push(&self) {
        let Some(&last) = self.begun.all().last() else { return };
        let is_last = |entry: u64| entry != 0 && entry % (1 << INDEX_BITS) == u64::from(last);
        if !self.pushed.all().contains(&last) && self.entries.iter().any(|entry| is_last(entry.load(Relaxed))) {
            self.pushed.add(last);
        }
    }

    fn is_done(&self, index: u32) -> bool {
        Word::load(&self.words[index as usize]).phase() == Phase::Done
    }

    fn pop(&self, consumer: &mut Consumer<'_>) -> bool {
        let Some(index) = consumer.pop() else { return false };
        assert!(self.is_done(index), "told of item {index}, which is not DONE");
        self.popped.add(index);
        true
    }

    /// Everything that the ring took was popped, once and in order, and nothing else but what was on its way in.
    fn assert_popped(&self) {
        let (begun, pushed, popped) = (self.begun.all(), self.pushed.all(), self.popped.all());
        let expected: Vec<_> = begun.into_iter().filter(|i| pushed.contains(i) || popped.contains(i)).collect();
        assert_eq!(popped, expected, "popped is not what was pushed");
    }
}

/// Pops so often while the other thread runs, and the rest when it is over.
fn race(world: &Arc<World>, pops: u32, produce: impl FnOnce(&Arc<World>) + 'static) {
    let producer = spawn(world, produce);
    join([spawn(world, move |world| {
        let mut consumer = world.consumer();
        for _ in 0..pops {
            world.pop(&mut consumer);
        }
        join([producer]);
        while world.pop(&mut consumer) {}
    })]);
    world.assert_popped();
}

fn laps() {
    let world = World::new(2, 4);
    race(&world, 3, |world| {
        let mut producer = world.producer();
        (0..4).for_each(|index| world.complete(&mut producer, index));
    });
}

/// A ring large enough that its head is told only every quarter lap, nearly full.
fn quarter_laps() {
    let world = World::new(8, 11);
    let mut producer = world.producer();
    (0..7).for_each(|index| world.complete(&mut producer, index));
    race(&world, 3, |world| {
        let mut producer = world.producer();
        (7..11).for_each(|index| world.complete(&mut producer, index));
    });
}

/// The producer's successor starts after the proof of its death.
fn a_producer_dies(mortal: Mortal) {
    let world = World::new(2, 5);
    world.complete(&mut world.producer(), 0);
    race(&world, 2, move |world| {
        mortal.live(|| {
            let mut producer = world.producer();
            (1..4).for_each(|index| world.complete(&mut producer, index));
        });
        world.log_last_push();
        world.complete(&mut world.producer(), 4);
    });
}

/// The consumer's successor may see again what was popped. It misses nothing but what the dead had in hand.
fn a_consumer_dies(mortal: Mortal) {
    let world = World::new(8, 5);
    let producer = spawn(&world, |world| {
        let mut producer = world.producer();
        (0..5).for_each(|index| world.complete(&mut producer, index));
    });
    join([spawn(&world, move |world| {
        mortal.live(|| {
            let mut consumer = world.consumer();
            for _ in 0..3 {
                world.pop(&mut consumer);
            }
        });
        let before = world.popped.all();
        let mut consumer = world.consumer();
        world.pop(&mut consumer);
        join([producer]);
        while world.pop(&mut consumer) {}
        let all = world.popped.all();
        let after = &all[before.len()..];
        assert!(after[0] as usize <= before.len() + 1, "skipped: {before:?}, {after:?}");
        assert!(after.iter().copied().eq(after[0]..5), "popped is not what was pushed: {after:?}");
    })]);
}

/// As a front collects: what is DONE and has no hint, because the ring was full, is found by the scan that the worker
/// asks for.
fn full() {
    let world = World::new(1, 3);
    let producer = spawn(&world, |world| {
        let mut producer = world.producer();
        (0..3).for_each(|index| world.complete(&mut producer, index));
    });
    join([spawn(&world, move |world| {
        let mut consumer = world.consumer();
        let mut collected = [false; 3];
        let mut collect = || {
            if world.rescan.load(Relaxed) != 0 {
                world.rescan.swap(0, AcqRel);
                (0..3).for_each(|index| collected[index as usize] |= world.is_done(index));
            }
            if let Some(index) = consumer.pop() {
                collected[index as usize] |= world.is_done(index);
            }
        };
        collect();
        collect();
        join([producer]);
        collect();
        collect();
        assert_eq!(collected, [true; 3], "lost: an item is DONE, and nobody finds it");
    })]);
}

#[test]
fn nothing_is_lost_or_reordered() {
    Check::new("returns, laps and a full ring", 5).holds(laps);
    Check::new("returns, head told every quarter lap", 5).holds(quarter_laps);
}

#[test]
fn what_does_not_fit_is_found_by_a_scan() {
    Check::new("returns, full, with a scan", 5).holds(full);
}

#[test]
fn successors_go_on_where_the_dead_were() {
    Check::new("returns, a producer dies", 5).holds_after_every_death(a_producer_dies);
    Check::new("returns, a consumer dies", 5).holds_after_every_death(a_consumer_dies);
}

/// R0 and R0': an entry may be seen before the item is DONE.
#[test]
fn the_orderings_are_needed() {
    Check::new("returns without orderings", 2).without(Fault::Ordering).fails("which is not DONE", laps);
}

/// A successor that does not wait for the proof of death, because its predecessor has only been slow.
#[test]
fn two_producers_at_once_are_noticed() {
    Check::new("returns, a successor of the living", 2).fails("popped is not what was pushed", || {
        let world = World::new(4, 4);
        let produce =
            |world: &Arc<World>, index| spawn(world, move |world| world.complete(&mut world.producer(), index));
        let other = produce(&world, 0);
        race(&world, 0, move |world| {
            world.complete(&mut world.producer(), 1);
            join([other]);
        });
    });
}
