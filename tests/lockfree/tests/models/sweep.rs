//! The sweep among live peers: whoever dies, the swept or the sweeper, each item completes once.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering::Relaxed as Unmodelled},
};

use forkring_lockfree::{
    check::{Check, Mortal},
    ring::Hint,
    sync::{AtomicU64, Ordering::*},
    word::{Phase, Word},
};

use super::world::{LAST, MORTAL, OTHER, Ring, Shipped, World, join, spawn};

struct House {
    world: Arc<World<Shipped>>,
    /// As the front's note to look through its items.
    rescan: AtomicU64,
    completions: [AtomicU32; 2],
}

impl House {
    fn new() -> Arc<Self> {
        Arc::new(House { world: World::new(4, 2), rescan: AtomicU64::new(0), completions: Default::default() })
    }

    /// As a worker does, once.
    fn work(&self, owner: u16) {
        if let Some(Hint { index, generation }) = self.world.take(owner) {
            // It remembers its claim. Here each attempt has a generation.
            let claimed = Word::new(generation, 0, owner, Phase::Claimed, generation as u8 - 1);
            self.completions[index as usize].fetch_add(1, Unmodelled);
            claimed.with(Phase::Done, owner).store(&self.world.items[index as usize].word, claimed);
        }
    }

    /// As the supervisor does, after the proof of death.
    fn sweep(&self) {
        for (index, item) in self.world.items.iter().enumerate() {
            let word = Word::load(&item.word);
            if word.phase() == Phase::Claimed && word.owner() == MORTAL {
                // It claimed and did not complete, whatever it counted.
                self.completions[index].store(0, Unmodelled);
                let ready = word.requeued();
                ready.store(&item.word, word);
                self.world.push(index as u32, ready.generation());
            }
        }
        self.rescan.fetch_or(1, Release);
    }

    /// As the front does with the note: what a sweep gave back may have no hint.
    fn look_through(&self) {
        if self.rescan.load(Relaxed) != 0 {
            self.rescan.swap(0, AcqRel);
            for (index, item) in self.world.items.iter().enumerate() {
                let word = Word::load(&item.word);
                if word.phase() == Phase::Ready && word.attempts() > 0 {
                    self.world.push(index as u32, word.generation());
                }
            }
        }
    }

    /// When all threads are over: those who live see to the rest, and each item has completed once.
    fn settle(&self) {
        for _ in 0..4 {
            self.work(LAST);
        }
        assert!(!self.world.ring.holds_hints(), "hidden: the ring holds hints, and nobody finds them");
        for (item, completions) in self.world.items.iter().zip(&self.completions) {
            let word = Word::load(&item.word);
            assert!(word.phase() == Phase::Done, "stuck: {word:?}");
            assert_eq!(completions.load(Unmodelled), 1, "completed twice");
        }
    }
}

/// A worker dies anywhere from its take to its DONE, and its sweep meets a front and a worker.
fn a_worker_dies(mortal: Mortal) {
    let house = House::new();
    house.world.offer(0);
    join([
        spawn(&house, move |house| {
            mortal.live(|| house.work(MORTAL));
            house.sweep();
        }),
        spawn(&house, |house| house.world.offer(1)),
        spawn(&house, |house| house.work(OTHER)),
    ]);
    house.look_through();
    house.settle();
}

/// The sweeper dies anywhere, and its successor sweeps again.
fn a_sweeper_dies(mortal: Mortal, looks_through: bool) {
    let house = House::new();
    for index in [0, 1] {
        house.world.offer(index);
        house.world.take(MORTAL);
    }
    join([
        spawn(&house, move |house| {
            mortal.live(|| house.sweep());
            house.sweep();
        }),
        spawn(&house, move |house| {
            if looks_through {
                house.look_through();
            }
        }),
        spawn(&house, |house| {
            house.work(OTHER);
            house.work(OTHER);
        }),
    ]);
    if looks_through {
        house.look_through();
    }
    house.settle();
}

#[test]
fn live_peers_are_not_disturbed() {
    Check::new("sweep, a worker dies", 2).holds_after_every_death(a_worker_dies);
}

#[test]
fn it_may_be_interrupted_and_made_again() {
    Check::new("sweep, the sweeper dies", 2).holds_after_every_death(|mortal| a_sweeper_dies(mortal, true));
}

/// Killed between READY and the hint: the second sweep finds nothing to give back.
#[test]
fn a_hint_that_nobody_looks_for_is_noticed() {
    Check::new("sweep, the sweeper dies, nobody looks", 2)
        .fails_after_some_death("stuck", |mortal| a_sweeper_dies(mortal, false));
}

/// Reclaimed from a worker that is only slow.
#[test]
fn a_sweep_without_proof_of_death_is_noticed() {
    Check::new("sweep, of the living", 3).fails("completed twice", || {
        let house = House::new();
        house.world.offer(0);
        house.world.offer(1);
        join([
            spawn(&house, |house| house.work(MORTAL)),
            spawn(&house, |house| {
                for (index, item) in house.world.items.iter().enumerate() {
                    let word = Word::load(&item.word);
                    if word.phase() == Phase::Claimed && word.owner() == MORTAL {
                        let ready = word.requeued();
                        ready.store(&item.word, word);
                        house.world.push(index as u32, ready.generation());
                    }
                }
            }),
            spawn(&house, |house| house.work(OTHER)),
        ]);
        house.settle();
    });
}
