//! The item's word: claims, cancels and sweeps compete for an item, and its generation tells its uses apart.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering::Relaxed as Unmodelled},
};

use forkring_lockfree::{
    check::{Check, Mortal},
    sync::{AtomicU64, Fault, Ordering::*},
    word::{Phase, Word},
};

use super::world::{MORTAL, OTHER, join, spawn};

struct Item {
    word: AtomicU64,
    /// Of each use another one: the number of the use.
    payload: AtomicU64,
    /// Who wrote it.
    result: AtomicU64,
    /// As `ItemRecord::cancelled`.
    cancelled: AtomicU64,
    completions: AtomicU32,
    /// Whether a claim looks at the generation.
    by_generation: bool,
}

impl Item {
    /// Offered, its first generation.
    fn ready(by_generation: bool) -> Arc<Self> {
        let item = Item {
            word: AtomicU64::new(0),
            payload: AtomicU64::new(0),
            result: AtomicU64::new(0),
            cancelled: AtomicU64::new(0),
            completions: AtomicU32::new(0),
            by_generation,
        };
        item.offer();
        Arc::new(item)
    }

    fn word(&self) -> Word {
        Word::load(&self.word)
    }

    fn offer(&self) {
        let free = self.word();
        let ready = free.offered(0);
        self.payload.store(ready.generation().into(), Relaxed);
        ready.store(&self.word, free);
    }

    /// As a worker does, with a hint of this generation; or as it must not.
    fn claim(&self, generation: u32, owner: u16) -> Option<Word> {
        if self.by_generation {
            return Word::claim(&self.word, generation, 0, owner);
        }
        let mut ready = Word::new(generation, 0, 0, Phase::Ready, 0);
        loop {
            let claimed = ready.with(Phase::Claimed, owner);
            match claimed.exchange(&self.word, ready) {
                Ok(()) => return Some(claimed),
                Err(seen) if seen == ready || seen.phase() != Phase::Ready => return None,
                Err(seen) => ready = seen,
            }
        }
    }

    fn complete(&self, claimed: Word) {
        self.result.store(claimed.owner().into(), Relaxed);
        claimed.with(Phase::Done, claimed.owner()).store(&self.word, claimed);
        self.completions.fetch_add(1, Unmodelled);
    }

    /// As a front does: true if it has the item back.
    fn cancel(&self) -> bool {
        loop {
            let word = self.word();
            match word.phase() {
                Phase::Ready => {
                    if word.with(Phase::Free, 0).exchange(&self.word, word).is_ok() {
                        return true;
                    }
                }
                Phase::Claimed => {
                    self.cancelled.store(u64::from(word.generation()) + 1, Release);
                    if self.word().generation() == word.generation() {
                        return false;
                    }
                }
                Phase::Done | Phase::Free => return false,
            }
            loom::thread::yield_now();
        }
    }

    /// As the supervisor does, after the proof of death.
    fn sweep(&self) {
        let word = self.word();
        if word.phase() == Phase::Claimed && word.owner() == MORTAL {
            word.requeued().store(&self.word, word);
        }
    }
}

/// The hint of the first use is doubled, and that of the second is guessed before it can be there.
fn claim_and_cancel(by_generation: bool) {
    let item = Item::ready(by_generation);
    let work = |item: &Item, generation, owner| {
        if item.claim(generation, owner).is_some() {
            let payload = item.payload.load(Relaxed);
            assert!(payload >= generation.into(), "claimed before it was filled");
            assert!(payload <= generation.into(), "claimed by a hint of an earlier use");
            item.completions.fetch_add(1, Unmodelled);
        }
    };
    join([
        spawn(&item, move |item| work(item, 1, MORTAL)),
        spawn(&item, move |item| {
            work(item, 1, OTHER);
            work(item, 2, OTHER);
        }),
        spawn(&item, |item| {
            if item.cancel() {
                let runs = item.completions.load(Unmodelled);
                assert_eq!(runs, 0, "the front has it back, and it ran");
                item.offer();
            }
        }),
    ]);
    let runs = if item.word().phase() == Phase::Claimed { 1 } else { 0 };
    assert_eq!(item.completions.load(Unmodelled), runs, "claimed twice");
}

/// Who claims it dies, a sweep gives it back, and meanwhile the front cancels it and another worker has old hints.
fn sweep(mortal: Mortal) {
    let item = Item::ready(true);
    join([
        spawn(&item, move |item| {
            mortal.live(|| item.claim(1, MORTAL).map(|claimed| item.complete(claimed)));
            item.sweep();
        }),
        spawn(&item, |item| {
            for generation in [1, 2, 1] {
                if let Some(claimed) = item.claim(generation, OTHER) {
                    assert_eq!(claimed.generation(), generation);
                    item.complete(claimed);
                }
            }
        }),
        spawn(&item, |item| item.cancel()),
    ]);
    assert_one_completion(&item);
}

fn assert_one_completion(item: &Item) {
    let word = item.word();
    assert!(item.completions.load(Unmodelled) <= 1, "completed twice");
    assert!(word.phase() != Phase::Claimed, "stuck: {word:?}");
    if word.phase() == Phase::Done {
        assert_eq!(item.result.load(Relaxed), u64::from(word.owner()), "the result is another's");
    }
}

/// The sweep of a worker that was only slow, and a successor in its seat.
fn sweep_of_the_living() {
    let item = Item::ready(true);
    join([
        spawn(&item, |item| item.claim(1, MORTAL).map(|claimed| item.complete(claimed))),
        spawn(&item, |item| {
            item.sweep();
            item.claim(2, MORTAL).map(|claimed| item.complete(claimed))
        }),
    ]);
    assert_one_completion(&item);
}

#[test]
fn claimed_or_cancelled_and_only_by_its_own_hint() {
    Check::new("word, claim and cancel", 4).holds(|| claim_and_cancel(true));
    Check::new("word, claim without generation", 4)
        .fails("claimed by a hint of an earlier use", || claim_and_cancel(false));
}

#[test]
fn given_back_after_a_death_and_completed_once() {
    Check::new("word, sweep, claim and cancel", 3).holds_after_every_death(sweep);
}

/// Plain stores are right because a sweep waits for the proof of death.
#[test]
fn a_sweep_without_a_death_is_noticed() {
    Check::new("word, sweep of the living", 4).fails("completed twice", sweep_of_the_living);
}

/// I0 and I1: a claim sees what the front wrote.
#[test]
fn the_orderings_are_needed() {
    Check::new("word without orderings", 4)
        .without(Fault::Ordering)
        .fails("claimed before it was filled", || claim_and_cancel(true));
}
