//! Where everything is in a segment: offsets that follow from the geometry alone.
//!
//! All of it is computed once, with checked arithmetic, in private memory; a process never reads its geometry from
//! the segment again after it has attached. Fields that different processes write in the course of an item do not share a
//! 128-byte block (two lines: the adjacent-line prefetcher moves them in pairs). What is written when somebody goes to sleep, spins or
//! dies does.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{SegmentError, letters::Entry};
use crate::ring::INDEX_BITS;

/// Priorities, and so lanes, of a pool.
pub const PRIORITIES: u32 = 4;
/// The most pools of a segment: lanes are numbered in 8 bits of an item's word.
pub const MAX_POOLS: u32 = 64;
/// The most workers of a segment, in however many pools. The bitmaps of each pool have a bit for every one of them.
pub const MAX_WORKERS: u32 = 1024;
/// The most fronts of a segment.
pub const MAX_FRONTS: u32 = 64;
/// The most items of a segment: an index is 20 bits of a hint.
pub const MAX_ITEMS: u32 = 1 << INDEX_BITS;
/// Arena blocks are multiples of this many bytes, a cache line.
pub const GRANULE: u64 = 64;

/// The least that dead letters need, if they are kept at all: the head of any letter fits.
pub const MIN_LETTER_BYTES: u64 = 64 << 10;
/// Of the dead letters' memory, one letter for so many bytes is the most.
const BYTES_PER_LETTER: u64 = 1024;

/// What no two processes share for writing.
pub(super) const BLOCK: u64 = 128;
/// Bytes of a bitmap. A pool has two in blocks of their own: sleeping workers, and behind them spinning workers.
pub(super) const BITMAP: u64 = (MAX_WORKERS as u64 / 8).next_multiple_of(BLOCK);
pub(super) const PAGE: u64 = 4096;

/// How many of everything a segment has.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Serialize, Deserialize,
)]
#[serde(deny_unknown_fields)]
#[repr(C)]
pub struct Geometry {
    /// Item records. Each front allocates from an equal share of them.
    pub items: u32,
    /// Front slots.
    pub fronts: u32,
    /// Worker slots, over all pools.
    pub workers: u32,
    /// Pools.
    pub pools: u32,
    /// Bytes of each front's partition of the request arena.
    pub request_bytes: u64,
    /// Bytes of each worker's partition of the result arena.
    pub result_bytes: u64,
    /// Bytes for dead letters; 0: none are kept.
    pub letter_bytes: u64,
}

/// A participant of a segment; each has one line of the registry and one doorbell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Slot {
    /// The parent of all others.
    Supervisor,
    /// Front number n.
    Front(u16),
    /// Worker number n, over all pools.
    Worker(u16),
}

/// Offsets of a segment's parts, in bytes. Control comes first and is what every participant maps for writing; the
/// arenas follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    pub(super) geometry: Geometry,
    pub(super) pools: u64,
    pub(super) registry: u64,
    pub(super) doorbells: u64,
    pub(super) idle: u64,
    pub(super) lanes: u64,
    pub(super) lane_stride: u64,
    pub(super) returns: u64,
    pub(super) return_stride: u64,
    pub(super) items: u64,
    pub(super) control: u64,
    pub(super) letters: u64,
    pub(super) letter_marks: u64,
    pub(super) requests: u64,
    pub(super) results: u64,
    pub(super) total: u64,
}

impl Layout {
    /// The layout of a geometry, or why there can be none.
    pub fn of(geometry: Geometry) -> Result<Self, SegmentError> {
        let Geometry { items, fronts, workers, pools, request_bytes, result_bytes, letter_bytes } = geometry;
        let bounded = |what, n: u32, most: u32| {
            if n == 0 || n > most {
                Err(SegmentError::Geometry { what, n: n.into(), most: most.into() })
            } else {
                Ok(())
            }
        };
        bounded("items", items, MAX_ITEMS)?;
        bounded("fronts", fronts, MAX_FRONTS.min(items))?;
        bounded("workers", workers, MAX_WORKERS)?;
        bounded("pools", pools, MAX_POOLS)?;
        // The arena allocator counts granules in 32 bits.
        let most = GRANULE * u64::from(u32::MAX >> 1);
        for (what, bytes) in [("request arena bytes", request_bytes), ("result arena bytes", result_bytes)] {
            if bytes < PAGE || bytes > most {
                return Err(SegmentError::Geometry { what, n: bytes, most });
            }
        }
        if letter_bytes != 0 && !(MIN_LETTER_BYTES..=most).contains(&letter_bytes) {
            return Err(SegmentError::Geometry { what: "bytes of dead letters", n: letter_bytes, most });
        }

        let [items, fronts, workers, pools] = [items, fronts, workers, pools].map(u64::from);
        let mut end = PAGE; // the header has the first page
        let mut place = |bytes: u64, align: u64| {
            let start = end.next_multiple_of(align);
            end = start + bytes;
            start
        };
        let participants = 1 + fronts + workers;
        let lane_stride = 2 * BLOCK + Self::lane_cells_of(items) * 8;
        let return_stride = BLOCK + Self::return_entries_of(items) * 8;
        let request_bytes = request_bytes.next_multiple_of(PAGE);
        let result_bytes = result_bytes.next_multiple_of(PAGE);
        let letter_bytes = letter_bytes.next_multiple_of(PAGE);
        let slots = Self::letter_slots_of(letter_bytes);
        let pool_lines = place(pools * BLOCK, BLOCK);
        let registry = place(participants * BLOCK, BLOCK);
        let doorbells = place(participants * BLOCK, BLOCK);
        let idle = place(pools * 2 * BITMAP, BLOCK);
        let lanes = place(pools * u64::from(PRIORITIES) * lane_stride.next_multiple_of(BLOCK), BLOCK);
        let returns = place(workers * fronts * return_stride.next_multiple_of(BLOCK), BLOCK);
        let items = place(items * 2 * BLOCK, 2 * BLOCK);
        let control = place(0, PAGE);
        let letters = place(if slots == 0 { 0 } else { Self::letter_data_of(slots) + letter_bytes }, PAGE);
        let letter_marks = place(slots * 8, PAGE);
        let requests = place(fronts * request_bytes, PAGE);
        let results = place(workers * result_bytes, PAGE);
        let total = place(0, PAGE);
        Ok(Layout {
            geometry: Geometry { request_bytes, result_bytes, letter_bytes, ..geometry },
            pools: pool_lines,
            registry,
            doorbells,
            idle,
            lanes,
            lane_stride: lane_stride.next_multiple_of(BLOCK),
            returns,
            return_stride: return_stride.next_multiple_of(BLOCK),
            items,
            control,
            letters,
            letter_marks,
            requests,
            results,
            total,
        })
    }

    /// The geometry, with arena sizes rounded up to whole pages.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Bytes of the whole segment.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// A number that differs when the offsets do: two programs that agree on it agree on where things are.
    pub fn hash(&self) -> u64 {
        let parts = [
            self.pools,
            self.registry,
            self.doorbells,
            self.idle,
            self.lanes,
            self.lane_stride,
            self.returns,
            self.return_stride,
            self.items,
            self.control,
            self.letters,
            self.letter_marks,
            self.requests,
            self.results,
            self.total,
        ];
        // FNV-1a.
        parts
            .iter()
            .flat_map(|part| part.to_le_bytes())
            .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
    }

    /// At least twice the items that can be in a lane.
    pub(super) fn lane_cells(&self) -> usize {
        Self::lane_cells_of(self.geometry.items.into()) as usize
    }

    fn lane_cells_of(items: u64) -> u64 {
        (items * 2).next_power_of_two()
    }

    pub(super) fn return_entries(&self) -> usize {
        Self::return_entries_of(self.geometry.items.into()) as usize
    }

    /// Bounded, because there is one ring for each worker and front; when it is full the front scans its items.
    fn return_entries_of(items: u64) -> u64 {
        items.next_power_of_two().min(4096)
    }

    /// The line of a pool.
    pub(super) fn pool(&self, pool: u64) -> u64 {
        self.pools + pool * BLOCK
    }

    /// What is about processes that live: registry, doorbells, bitmaps; and hints: lanes and returns. All of it starts
    /// as zeros.
    pub(super) fn processes(&self) -> Range<u64> {
        self.registry..self.items
    }

    /// How many dead letters there may be, however small they are.
    pub(super) fn letter_slots(&self) -> usize {
        Self::letter_slots_of(self.geometry.letter_bytes) as usize
    }

    fn letter_slots_of(letter_bytes: u64) -> u64 {
        letter_bytes / BYTES_PER_LETTER
    }

    /// Where the letters' bytes are, from the start of their area: behind the counts and the index.
    pub(super) fn letter_data(&self) -> u64 {
        Self::letter_data_of(Self::letter_slots_of(self.geometry.letter_bytes))
    }

    fn letter_data_of(slots: u64) -> u64 {
        BLOCK + (slots * size_of::<Entry>() as u64).next_multiple_of(BLOCK)
    }

    pub(super) fn participant(&self, slot: Slot) -> Option<u64> {
        match slot {
            Slot::Supervisor => Some(0),
            Slot::Front(n) if u32::from(n) < self.geometry.fronts => Some(1 + u64::from(n)),
            Slot::Worker(n) if u32::from(n) < self.geometry.workers => {
                Some(1 + u64::from(self.geometry.fronts) + u64::from(n))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn geometry() -> impl Strategy<Value = Geometry> {
        let letters = prop_oneof![Just(0), MIN_LETTER_BYTES..1 << 30];
        (1..100_000u32, 1..4u32, 1..40u32, 1..8u32, PAGE..1 << 30, PAGE..1 << 30, letters).prop_map(
            |(items, fronts, workers, pools, request_bytes, result_bytes, letter_bytes)| Geometry {
                items: items.max(fronts),
                fronts,
                workers,
                pools,
                request_bytes,
                result_bytes,
                letter_bytes,
            },
        )
    }

    proptest! {
        /// The parts follow each other, none overlaps the next, and each starts on a block of its own.
        #[test]
        fn parts_are_disjoint_and_aligned(geometry in geometry()) {
            let layout = Layout::of(geometry).unwrap();
            let g = layout.geometry();
            let [fronts, workers, pools, items] = [g.fronts, g.workers, g.pools, g.items].map(u64::from);
            let participants = 1 + fronts + workers;
            let parts = [
                (0, PAGE),
                (layout.pools, pools * BLOCK),
                (layout.registry, participants * BLOCK),
                (layout.doorbells, participants * BLOCK),
                (layout.idle, pools * 2 * BITMAP),
                (layout.lanes, pools * u64::from(PRIORITIES) * layout.lane_stride),
                (layout.returns, workers * fronts * layout.return_stride),
                (layout.items, items * 2 * BLOCK),
                (layout.control, 0),
                (layout.letters, if g.letter_bytes == 0 { 0 } else { layout.letter_data() + g.letter_bytes }),
                (layout.letter_marks, 8 * layout.letter_slots() as u64),
                (layout.requests, fronts * g.request_bytes),
                (layout.results, workers * g.result_bytes),
                (layout.total, 0),
            ];
            for pair in parts.windows(2) {
                prop_assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:?}");
                prop_assert_eq!(pair[1].0 % BLOCK, 0);
            }
            for view in [layout.control, layout.letters, layout.letter_marks, layout.requests] {
                prop_assert_eq!(view % PAGE, 0);
            }
            prop_assert_eq!(layout.results % PAGE, 0);
            prop_assert!(layout.lane_cells() as u64 >= 2 * items);
            prop_assert!(layout.lane_stride >= 2 * BLOCK + 8 * layout.lane_cells() as u64);
            prop_assert!(layout.return_stride >= BLOCK + 8 * layout.return_entries() as u64);
            // A layout is a function of the geometry that is stored in the header.
            prop_assert_eq!(Layout::of(*g).unwrap(), layout);
        }

        /// Whatever a header may say, the answer is a layout or an error.
        #[test]
        fn garbage_never_panics(items: u32, fronts: u32, workers: u32, pools: u32, bytes: [u64; 3]) {
            let [request_bytes, result_bytes, letter_bytes] = bytes;
            let _ = Layout::of(Geometry { items, fronts, workers, pools, request_bytes, result_bytes, letter_bytes });
        }
    }

    #[test]
    fn nothing_may_be_zero_or_too_many() {
        let good = Geometry {
            items: 16,
            fronts: 1,
            workers: 1,
            pools: 1,
            request_bytes: 4096,
            result_bytes: 4096,
            letter_bytes: 0,
        };
        assert!(Layout::of(good).is_ok());
        for bad in [
            Geometry { items: 0, ..good },
            Geometry { items: MAX_ITEMS + 1, ..good },
            Geometry { fronts: 17, ..good },
            Geometry { workers: MAX_WORKERS + 1, ..good },
            Geometry { pools: 0, ..good },
            Geometry { result_bytes: 0, ..good },
            Geometry { request_bytes: u64::MAX, ..good },
            Geometry { letter_bytes: 1, ..good },
            Geometry { letter_bytes: u64::MAX, ..good },
        ] {
            assert!(matches!(Layout::of(bad), Err(SegmentError::Geometry { .. })), "{bad:?}");
        }
    }
}
