//! The item's word: who owns an item, in what phase, in one atomic.
//!
//! ```text
//!     generation 28 | lane 8 | owner 12 | phase 8 | attempts 8
//!
//!     FREE → READY(front) → CLAIMED(worker) → DONE(worker) → FREE
//!              ^               |
//!              └──── sweep ────┘   generation+1, attempts+1
//! ```
//!
//! READY → CLAIMED is a CAS, because workers compete for it, and with them a cancel (READY → FREE) and the end of a submitted
//! item that has expired (READY → DONE, owner [`FRONT`]). Each of the other transitions has exactly one process that may make it, so a Release store does: front FREE → READY and
//! DONE → FREE, worker CLAIMED → DONE, and the supervisor in a dead process's stead after the proof of death. Debug
//! builds make them by CAS and check. A mismatch is a mistake of the program, or of a worker that scribbles: unit tests
//! panic, a server says so and goes on as by a store.
//!
//! The lane is part of the word so that a hint whose generation has come round again (2^28 uses later) still claims
//! nothing but an item that is READY in the very lane the hint was found in.

use std::fmt;

use crate::{
    ring::GENERATION_BITS,
    sync::{
        AtomicU64,
        Ordering::{AcqRel, Acquire, Relaxed, Release},
    },
};

/// Where an item is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    /// The front's, to fill or to leave.
    Free = 0,
    /// Accepted; whoever claims it first has it.
    Ready = 1,
    /// A worker's.
    Claimed = 2,
    /// The result is there, and is the front's.
    Done = 3,
}

/// A value of an item's word.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Word(u64);

/// The owner of an item that the supervisor completed.
pub const SUPERVISOR: u16 = 0xfff;
/// The owner of an item that its front ended: it had expired. Its record has no result, the word says it all.
pub const FRONT: u16 = 0xffe;

const GENERATION_MASK: u32 = (1 << GENERATION_BITS) - 1;

impl Word {
    /// Of these fields; the owner is 12 bits.
    pub const fn new(generation: u32, lane: u8, owner: u16, phase: Phase, attempts: u8) -> Self {
        Word(
            ((generation & GENERATION_MASK) as u64) << 36
                | (lane as u64) << 28
                | ((owner & 0xfff) as u64) << 16
                | (phase as u64) << 8
                | attempts as u64,
        )
    }

    /// Counts the uses and retries of the record.
    pub const fn generation(self) -> u32 {
        (self.0 >> 36) as u32
    }

    /// The lane the item was offered in: pool × priorities + priority.
    pub const fn lane(self) -> u8 {
        (self.0 >> 28) as u8
    }

    /// The worker that claimed it, or [`SUPERVISOR`], or [`FRONT`].
    pub const fn owner(self) -> u16 {
        (self.0 >> 16) as u16 & 0xfff
    }

    /// The phase. A value that no process of ours writes counts as FREE.
    pub const fn phase(self) -> Phase {
        match (self.0 >> 8) as u8 {
            1 => Phase::Ready,
            2 => Phase::Claimed,
            3 => Phase::Done,
            _ => Phase::Free,
        }
    }

    /// How many workers have claimed it and died.
    pub const fn attempts(self) -> u8 {
        self.0 as u8
    }

    /// The same item in another phase and with another owner.
    pub const fn with(self, phase: Phase, owner: u16) -> Self {
        Word::new(self.generation(), self.lane(), owner, phase, self.attempts())
    }

    /// FREE → READY: a new use of the record.
    pub const fn offered(self, lane: u8) -> Self {
        Word::new(self.generation() + 1, lane, 0, Phase::Ready, 0)
    }

    /// CLAIMED → READY after a death: no hint, cancel or hand of before matches it.
    pub const fn requeued(self) -> Self {
        Word::new(self.generation() + 1, self.lane(), 0, Phase::Ready, self.attempts().saturating_add(1))
    }

    /// Whether an item that was offered as `offered`, and not freed since, may have this word by now, however often it was
    /// given back. If not, somebody scribbled.
    pub const fn follows(self, offered: Word, workers: u32) -> bool {
        let times = self.generation().wrapping_sub(offered.generation()) & GENERATION_MASK;
        self.may_end(workers) && self.lane() == offered.lane() && times <= u8::MAX as u32
    }

    /// Whether an item in use may have this word: one that has no such owner is claimed by nobody, and swept by nobody.
    pub const fn may_end(self, workers: u32) -> bool {
        let owner = self.owner();
        match self.phase() {
            Phase::Free => false,
            Phase::Ready => owner == 0,
            Phase::Claimed => (owner as u32) < workers,
            Phase::Done => (owner as u32) < workers || owner == SUPERVISOR || owner == FRONT,
        }
    }

    /// FREE after somebody scribbled: no word that may have been meant for the item follows the next use.
    pub const fn discarded(self) -> Self {
        Word::new(self.generation().wrapping_add(1 << 10), 0, 0, Phase::Free, 0)
    }

    /// Reads a word. **I0'** Acquire: whatever was written before the word was is visible.
    #[inline]
    pub fn load(word: &AtomicU64) -> Self {
        Word(word.load(Acquire))
    }

    /// Makes a transition that only this process may make. **I0** Release: pairs with the load and the claim.
    #[inline]
    pub fn store(self, word: &AtomicU64, from: Word) {
        if cfg!(debug_assertions) {
            let Err(seen) = word.compare_exchange(from.0, self.0, Release, Relaxed).map_err(Word) else { return };
            let what = format!("a word was changed by somebody else: {from:?} → {self:?}, but it is {seen:?}");
            if cfg!(test) {
                panic!("{what}");
            }
            eprintln!("forkring: {what}");
        }
        word.store(self.0, Release);
    }

    /// Makes a transition that others compete for; the value found, if it was lost. **I1** AcqRel: a claim sees what
    /// the front wrote, and what follows it is not seen before it.
    #[inline]
    pub fn exchange(self, word: &AtomicU64, from: Word) -> Result<(), Word> {
        word.compare_exchange(from.0, self.0, AcqRel, Acquire).map(|_| ()).map_err(Word)
    }

    /// READY → CLAIMED by this worker, if the item is READY in this generation and lane.
    #[inline]
    pub fn claim(word: &AtomicU64, generation: u32, lane: u8, worker: u16) -> Option<Self> {
        // Try what it most likely is, without looking first: the line moves here once, for writing.
        let mut ready = Word::new(generation, lane, 0, Phase::Ready, 0);
        loop {
            let claimed = ready.with(Phase::Claimed, worker);
            match claimed.exchange(word, ready) {
                Ok(()) => return Some(claimed),
                Err(seen) if seen == Word::new(generation, lane, 0, Phase::Ready, seen.attempts()) && seen != ready => {
                    ready = seen;
                }
                Err(_) => return None,
            }
        }
    }
}

impl fmt::Debug for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} generation {} lane {} owner {} attempts {}",
            self.phase(),
            self.generation(),
            self.lane(),
            self.owner(),
            self.attempts()
        )
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_transition_is_made_from_the_word_that_it_is_made_from() {
        let free = Word::new(7, 0, 0, Phase::Free, 0);
        let memory = AtomicU64::new(free.0);
        let ready = free.offered(3);
        ready.store(&memory, free);
        assert_eq!(Word::load(&memory), ready);
        let [first, second] = [1, 2].map(|worker| ready.with(Phase::Claimed, worker));
        assert_eq!(first.exchange(&memory, ready), Ok(()));
        assert_eq!(second.exchange(&memory, ready), Err(first));
        assert_eq!(Word::load(&memory), first);
    }

    #[test]
    fn a_claim_takes_what_is_ready_in_this_generation_and_lane_and_nothing_else() {
        for attempts in [0, 1, u8::MAX] {
            let ready = Word::new(7, 3, 0, Phase::Ready, attempts);
            let claim = |word: Word, generation, lane| {
                let memory = AtomicU64::new(word.0);
                (Word::claim(&memory, generation, lane, 5), Word::load(&memory))
            };
            let claimed = ready.with(Phase::Claimed, 5);
            assert_eq!(claim(ready, 7, 3), (Some(claimed), claimed));
            for (generation, lane) in [(6, 3), (8, 3), (7, 2)] {
                assert_eq!(claim(ready, generation, lane), (None, ready));
            }
            for other in [(Phase::Free, 0), (Phase::Claimed, 4), (Phase::Done, 4), (Phase::Ready, 4)] {
                let word = ready.with(other.0, other.1);
                assert_eq!(claim(word, 7, 3), (None, word));
            }
        }
    }

    #[test]
    #[should_panic = "a word was changed by somebody else"]
    fn a_store_over_somebody_elses_is_noticed() {
        let memory = AtomicU64::new(1);
        Word(3).store(&memory, Word(2));
    }

    proptest! {
        #[test]
        fn fields_do_not_touch_each_other(
            generation in 0..=GENERATION_MASK, lane: u8, owner in 0..=SUPERVISOR, phase in 0..4u8, attempts: u8,
        ) {
            let phase = [Phase::Free, Phase::Ready, Phase::Claimed, Phase::Done][phase as usize];
            let word = Word::new(generation, lane, owner, phase, attempts);
            prop_assert_eq!(
                (word.generation(), word.lane(), word.owner(), word.phase(), word.attempts()),
                (generation, lane, owner, phase, attempts)
            );
            let again = word.requeued();
            prop_assert_eq!(again.generation(), (generation + 1) & GENERATION_MASK);
            prop_assert_eq!((again.lane(), again.phase()), (lane, Phase::Ready));
            prop_assert_eq!(again.attempts(), attempts.saturating_add(1));
            prop_assert_eq!(Word::new(0, 0, 0, Phase::Free, 0), Word(0));
        }

        #[test]
        fn what_an_item_becomes_follows_and_nothing_of_another_use_does(
            generation in 0..=GENERATION_MASK, lane in 0..4u8, times in 0..=255u32,
        ) {
            let free = Word::new(generation, 0, 0, Phase::Free, 0);
            let offered = free.offered(lane);
            let mut word = offered;
            for _ in 0..times {
                word = word.with(Phase::Claimed, 7).requeued();
            }
            for (phase, owner) in
                [(Phase::Ready, 0), (Phase::Claimed, 7), (Phase::Done, 7), (Phase::Done, SUPERVISOR), (Phase::Done, FRONT)]
            {
                let now = word.with(phase, owner);
                prop_assert!(now.follows(offered, 8));
                prop_assert!(!now.follows(offered.discarded().offered(lane), 8), "the next use after damage");
                prop_assert!(!Word::new(now.generation(), lane + 1, owner, phase, 0).follows(offered, 8));
            }
            for (phase, owner) in
                [(Phase::Ready, 7), (Phase::Ready, SUPERVISOR), (Phase::Claimed, 8), (Phase::Claimed, FRONT), (Phase::Done, 8)]
            {
                prop_assert!(!word.with(phase, owner).follows(offered, 8), "nobody would ever complete it");
            }
            prop_assert!(!word.with(Phase::Free, 0).follows(offered, 8));
            prop_assert!(!offered.follows(offered.with(Phase::Free, 0).offered(lane), 8), "the use before");
        }
    }
}
