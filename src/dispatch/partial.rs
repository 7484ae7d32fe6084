//! Partial results: what a handler sends before it is done, of an item whose client reads a stream.
//!
//! # What it promises
//!
//! Each partial result of an attempt is taken once and in order, all before the result. At most [`WINDOW`] of an item's
//! wait to be taken: then its worker waits, so that a client that reads slowly slows its handler down, and memory is
//! bounded. Of an attempt whose worker died nothing is taken any more, and its memory is free again.
//!
//! # Why that holds
//!
//! An item's record has [`WINDOW`] slots. The worker puts its n-th partial result into slot n modulo that, if it is empty, by one
//! store; the front takes them in the same order, and empties each by one CAS. So a slot is the entry, the credit and the
//! proof that the memory is free again, and there is no counter that could disagree with it. Hints in the return ring only say
//! that there is something to look at.
//!
//! An entry has the item's generation, which a requeue changes: entries of an attempt that is over are nothing, and the CAS of a
//! front that is late does not touch those of the next. The front *copies* the bytes and looks at the word after that: if the item
//! is the same worker's still, nobody else can have had the memory meanwhile. If not, the copy is thrown away.
//!
//! | word | writer | pairs |
//! |---|---|---|
//! | slot, to full | the claiming worker | **P0** Release put → **P0'** Acquire look |
//! | slot, to empty | the front | **P1** Release take → **P1'** Acquire, when the worker looks for a free slot |
//!
//! The memory: a granule with the length, and the bytes behind it.

use crate::{
    ring::GENERATION_BITS,
    segment::{GRANULE, WINDOW},
    sync::{AtomicU64, Ordering::*},
};

/// Of a block with a partial result, what comes before its bytes.
pub(super) const LEAD: u64 = GRANULE;

/// A full slot: `generation 28 | 1 | granule 35`. An empty one is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry(u64);

const GRANULE_BITS: u32 = 64 - GENERATION_BITS - 1;
const FULL: u64 = 1 << GRANULE_BITS;

/// The slot of an attempt's n-th partial result.
pub(super) fn slot(slots: &[AtomicU64; WINDOW], number: u32) -> &AtomicU64 {
    &slots[number as usize % WINDOW]
}

impl Entry {
    /// Of this attempt, in the worker's block at this offset.
    pub fn new(generation: u32, offset: u64) -> Self {
        let granule = (offset / GRANULE) & (FULL - 1);
        Entry(u64::from(generation) << (GRANULE_BITS + 1) | FULL | granule)
    }

    /// Where the block is.
    pub fn offset(self) -> u64 {
        (self.0 & (FULL - 1)) * GRANULE
    }

    /// What is in a slot, if it is this attempt's.
    #[inline]
    pub fn look(slot: &AtomicU64, generation: u32) -> Option<Self> {
        // P0', P1'.
        let seen = slot.load(Acquire);
        (seen & FULL != 0 && seen >> (GRANULE_BITS + 1) == u64::from(generation)).then_some(Entry(seen))
    }

    /// The worker's: fills a slot in which nothing of its own is.
    pub fn put(self, slot: &AtomicU64) {
        // P0: whoever sees the entry sees what is in the block.
        slot.store(self.0, Release);
    }

    /// The front's: empties a slot, unless the next attempt has filled it.
    pub fn take(self, slot: &AtomicU64) {
        // P1: the block has been read.
        let _ = slot.compare_exchange(self.0, 0, Release, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_one_attempts_and_is_taken_once() {
        let slots = [const { AtomicU64::new(0) }; WINDOW];
        let most = (1 << GENERATION_BITS) - 1;
        for (generation, offset) in [(0, 0), (7, 64), (most, GRANULE * u64::from(u32::MAX >> 1))] {
            let entry = Entry::new(generation, offset);
            assert_eq!((entry.offset(), Entry::look(slot(&slots, 5), generation)), (offset, None));
            entry.put(slot(&slots, 5));
            assert_eq!(Entry::look(slot(&slots, 1), generation), Some(entry), "slots come round again");
            assert_eq!(Entry::look(slot(&slots, 1), generation ^ 1), None, "another attempt");
            assert_eq!(Entry::look(slot(&slots, 2), generation), None);
            // Too late: the next attempt's is there.
            let next = Entry::new((generation + 1) & most, 128);
            next.put(slot(&slots, 1));
            entry.take(slot(&slots, 1));
            assert_eq!(Entry::look(slot(&slots, 1), (generation + 1) & most), Some(next));
            next.take(slot(&slots, 1));
            assert_eq!(slots[1].load(Relaxed), 0);
        }
    }
}
