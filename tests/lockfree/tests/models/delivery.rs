//! Delivery: a result is released after it was sent and not before, so that a front that dies in between costs nothing
//! but a repetition, and nobody else's bytes are sent.

use std::sync::Arc;

use forkring_lockfree::{
    check::{Check, Mortal},
    sync::{AtomicU64, Ordering::*},
    word::{Phase, Word},
};

use super::world::{OTHER, join, spawn};

/// What a result says. Sent so often, the socket holds a multiple of it.
const RESULT: u64 = 1000;
/// Of the worker's next item.
const ANOTHER: u64 = 1;

struct House {
    word: AtomicU64,
    /// Of the worker's arena.
    block: AtomicU64,
    socket: AtomicU64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    SendThenRelease,
    ReleaseThenSend,
}

impl House {
    /// With an item that a worker has claimed.
    fn new() -> Arc<Self> {
        let house = House { word: AtomicU64::new(0), block: AtomicU64::new(0), socket: AtomicU64::new(0) };
        Word::new(1, 0, OTHER, Phase::Claimed, 0).store(&house.word, Word::load(&house.word));
        Arc::new(house)
    }

    /// As a worker does, which uses its block again when the item is no longer DONE by it.
    fn work(&self) {
        let claimed = Word::load(&self.word);
        let done = claimed.with(Phase::Done, OTHER);
        self.block.store(RESULT, Relaxed);
        done.store(&self.word, claimed);
        for _ in 0..2 {
            // It only looks, but to loom a load is nothing that another thread's store, right after a load of its own,
            // could have come before.
            if done.exchange(&self.word, done).is_err() {
                self.block.store(ANOTHER, Relaxed);
                return;
            }
        }
    }

    /// As a front does with what it finds.
    fn deliver(&self, order: Order) {
        let word = Word::load(&self.word);
        if word.phase() != Phase::Done {
            return;
        }
        let send = || _ = self.socket.fetch_add(self.block.load(Relaxed), Relaxed);
        let release = || word.with(Phase::Free, 0).store(&self.word, word);
        match order {
            Order::SendThenRelease => {
                send();
                release();
            }
            Order::ReleaseThenSend => {
                release();
                send();
            }
        }
    }

    fn assert_delivered(&self) {
        let sent = self.socket.load(Relaxed);
        assert_eq!(sent % RESULT, 0, "the bytes of another result were sent");
        assert!(sent > 0, "lost: the item was completed, and its result never sent");
    }
}

/// A front dies and its successor goes on, while the worker completes and goes on too.
fn a_front_dies(mortal: Mortal, order: Order) {
    let house = House::new();
    let worker = spawn(&house, |house| house.work());
    join([spawn(&house, move |house| {
        mortal.live(|| house.deliver(order));
        house.deliver(order);
        join([worker]);
        house.deliver(order);
    })]);
    house.assert_delivered();
}

fn nobody_dies(order: Order) {
    let house = House::new();
    let worker = spawn(&house, |house| house.work());
    join([spawn(&house, move |house| {
        house.deliver(order);
        join([worker]);
        house.deliver(order);
    })]);
    house.assert_delivered();
}

#[test]
fn what_was_completed_is_sent() {
    Check::new("delivery", 5).holds(|| nobody_dies(Order::SendThenRelease));
    Check::new("delivery, a front dies", 5)
        .holds_after_every_death(|mortal| a_front_dies(mortal, Order::SendThenRelease));
}

#[test]
fn a_release_before_the_delivery_is_noticed() {
    Check::new("delivery after release", 5)
        .fails("the bytes of another result", || nobody_dies(Order::ReleaseThenSend));
    Check::new("delivery after release, a front dies", 0)
        .fails_after_some_death("lost", |mortal| a_front_dies(mortal, Order::ReleaseThenSend));
}
