//! The lane: an MPMC ring of hints with no reserve step.
//!
//! # What it promises
//!
//! A pushed hint is seen by takers until one of them has *claimed* its item, whoever is killed at whatever
//! instruction; no process, dead or stopped, keeps another from pushing or taking.
//!
//! # Why that holds
//!
//! - **Publication is one CAS** of the cell from *empty at this lap* to *full at this lap, hint*. Before it nothing has
//!   happened; after it the hint is there. The tail is only an accelerator: whoever finds it behind a full cell moves
//!   it on (helping), so a pusher that dies between the two CASes is finished by its successor.
//! - **Claim precedes removal.** A taker claims the item first (a CAS on the item's own word), then empties the cell,
//!   then moves the head. Killed after the claim, it has the item, which the sweep gives back; the cell still holds
//!   a hint, which the next taker finds stale and removes. Killed before the claim, it has done nothing.
//! - **A cell never goes back.** The lap in each cell makes a CAS by a process that slept through a whole lap fail,
//!   until the lap counter itself wraps (2^15 laps), and then a claim still has the item's word to pass.
//!
//! The two usual designs have a step after which a death hurts: pop-then-claim loses the hint of an item nobody has
//! claimed, and reserve-then-publish (Vyukov's queue, DPDK's `rte_ring`) leaves a reserved cell that everybody waits for.
//!
//! # When somebody scribbles over it
//!
//! Whatever the words of a lane say, `push` and `take` end: each look at a cell either ends them or moves a counter, and after
//! two laps of that they give up, as if the lane were full or empty. A cell that is older than any that can be here by the
//! rules is as good as an empty one. Hints may be lost then, and a lane that is out of joint stays so; [`Lane::is_sound`] tells,
//! and [`Lane::reset`] empties it, whoever uses it meanwhile: the caller then sees to the hints of all that is READY.
//!
//! # Who writes what
//!
//! | word | writers | pairs |
//! |---|---|---|
//! | cell | pushers (empty → full), takers (full → empty at the next lap) | **L0** Release push → **L0'** Acquire take; **L1** Release empty → **L1'** Acquire push |
//! | tail | pushers, each to t+1 | Relaxed: a hint about the cells, checked against them |
//! | head | takers, each to h+1 | Relaxed: the same |

use super::{GENERATION_BITS, Hint, INDEX_BITS};
use crate::{
    crash_point::crash_point,
    sync::{AtomicU64, Ordering::*, fence, retry},
};

const INDEX_MASK: u64 = (1 << INDEX_BITS) - 1;
const GENERATION_MASK: u64 = (1 << GENERATION_BITS) - 1;
const FULL: u64 = 1 << (INDEX_BITS + GENERATION_BITS);
const LAP_SHIFT: u32 = INDEX_BITS + GENERATION_BITS + 1;
const LAP_MASK: u64 = u64::MAX >> LAP_SHIFT;
const LAP_HALF: u64 = LAP_MASK / 2;
/// A lost race is tried again so often, beside once for each cell of two laps.
const TRIES: usize = 1000;

/// The lane has no empty cell. It has twice as many as there are items, so this means that more than half of them
/// hold stale hints that no worker came to remove.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// One lane: two counters and the cells, all starting as zero.
#[derive(Clone, Copy, Debug)]
pub struct Lane<'a> {
    head: &'a AtomicU64,
    tail: &'a AtomicU64,
    cells: &'a [AtomicU64],
    lap_bits: u32,
}

/// How a cell stands to a position of the ring.
enum Cell {
    /// Empty and waiting for this very position.
    Empty,
    /// Holds the hint that was pushed at this position.
    Full(Hint),
    /// The position has been used and emptied: the counter that led here is behind.
    Newer,
    /// Still holds the hint of a lap before.
    OlderFull,
    /// Older than it can be. Either it is newer by so many laps that it looks so, and the counter has moved since; or
    /// somebody scribbled over it or the counter, and there is nothing in it.
    Older,
}

impl<'a> Lane<'a> {
    /// A lane over `cells`, whose number must be a power of two.
    ///
    /// # Panics
    ///
    /// If it is not: the geometry is checked when the segment is made, so this is a mistake in the program.
    pub fn new(head: &'a AtomicU64, tail: &'a AtomicU64, cells: &'a [AtomicU64]) -> Self {
        assert!(cells.len().is_power_of_two(), "a lane has a power of two of cells");
        Lane { head, tail, cells, lap_bits: cells.len().trailing_zeros() }
    }

    fn lap(&self, position: u64) -> u64 {
        (position >> self.lap_bits) & LAP_MASK
    }

    fn cell(&self, position: u64) -> &'a AtomicU64 {
        &self.cells[(position as usize) & (self.cells.len() - 1)]
    }

    fn full(&self, position: u64, hint: Hint) -> u64 {
        self.lap(position) << LAP_SHIFT
            | FULL
            | (u64::from(hint.generation) & GENERATION_MASK) << INDEX_BITS
            | (u64::from(hint.index) & INDEX_MASK)
    }

    fn empty(&self, position: u64) -> u64 {
        self.lap(position) << LAP_SHIFT
    }

    fn read(&self, position: u64, cell: u64) -> Cell {
        let ahead = (cell >> LAP_SHIFT).wrapping_sub(self.lap(position)) & LAP_MASK;
        let full = cell & FULL != 0;
        match ahead {
            0 if full => Cell::Full(Hint {
                index: (cell & INDEX_MASK) as u32,
                generation: (cell >> INDEX_BITS & GENERATION_MASK) as u32,
            }),
            0 => Cell::Empty,
            LAP_MASK if full => Cell::OlderFull,
            1..=LAP_HALF => Cell::Newer,
            _ => Cell::Older,
        }
    }

    /// Publishes a hint. The item it points at must already be READY.
    #[inline]
    pub fn push(&self, hint: Hint) -> Result<(), Full> {
        for _ in 0..self.tries() {
            let tail = self.tail.load(Relaxed);
            let cell = self.cell(tail);
            // L1': an emptied cell's taker is done with it.
            let seen = cell.load(Acquire);
            match self.read(tail, seen) {
                Cell::OlderFull if self.is_full(tail) => {
                    if self.tail.load(Relaxed) == tail {
                        return Err(Full);
                    }
                }
                // So it also looks to whoever slept for half of all laps since it loaded the tail, and the cell is in use. Whoever
                // wrote it had seen a later tail, so after the Acquire above it is seen here.
                Cell::Older | Cell::OlderFull if self.tail.load(Relaxed) != tail => {}
                Cell::Empty | Cell::Older | Cell::OlderFull => {
                    // L0: whoever sees the hint sees the READY item behind it.
                    if cell.compare_exchange(seen, self.full(tail, hint), Release, Relaxed).is_ok() {
                        crash_point!("lane.pushed");
                        let _ = self.tail.compare_exchange(tail, tail.wrapping_add(1), Relaxed, Relaxed);
                        crash_point!("lane.told");
                        return Ok(());
                    }
                }
                // Somebody published here and has not moved the tail, or no longer can: help.
                Cell::Full(_) | Cell::Newer => {
                    let _ = self.tail.compare_exchange(tail, tail.wrapping_add(1), Relaxed, Relaxed);
                }
            }
            retry();
        }
        Err(Full)
    }

    /// How often `push` and `take` look.
    fn tries(&self) -> usize {
        2 * self.cells.len() + TRIES
    }

    /// Whether the cell of this tail may still be full: not if takers have passed it, for they empty what they pass.
    #[cold]
    fn is_full(&self, tail: u64) -> bool {
        tail.wrapping_sub(self.head.load(Relaxed)) >= self.cells.len() as u64
    }

    /// Takes the oldest hint whose item `claim` claims. Hints that it refuses are stale and are removed.
    ///
    /// `claim` must be the one step that makes the item the caller's: it may be called for the same hint by several
    /// takers, and must say yes to at most one of them.
    #[inline]
    pub fn take(&self, claim: impl FnMut(Hint) -> bool) -> Option<Hint> {
        self.take_ahead(claim, |_| ())
    }

    /// The same, and `ahead` is given the hint behind it if there is one already, to fetch what it points at.
    #[inline]
    pub fn take_ahead(&self, mut claim: impl FnMut(Hint) -> bool, mut ahead: impl FnMut(Hint)) -> Option<Hint> {
        for _ in 0..self.tries() {
            let head = self.head.load(Relaxed);
            let cell = self.cell(head);
            // L0': the item behind the hint is READY or newer.
            let seen = cell.load(Acquire);
            match self.read(head, seen) {
                Cell::Empty | Cell::Older | Cell::OlderFull => return None,
                Cell::Full(hint) => {
                    let behind = head.wrapping_add(1);
                    // Relaxed: good for fetching ahead and no more.
                    let next = self.cell(behind).load(Relaxed);
                    let claimed = claim(hint);
                    crash_point!("lane.claimed");
                    if let Cell::Full(hint) = self.read(behind, next) {
                        ahead(hint);
                    }
                    // L1: the claim is over before the cell can be used again.
                    let next = self.empty(head.wrapping_add(self.cells.len() as u64));
                    let _ = cell.compare_exchange(seen, next, Release, Relaxed);
                    crash_point!("lane.emptied");
                    let _ = self.head.compare_exchange(head, head.wrapping_add(1), Relaxed, Relaxed);
                    crash_point!("lane.taken");
                    if claimed {
                        return Some(hint);
                    }
                }
                // Somebody emptied this cell and has not moved the head, or no longer can: help.
                Cell::Newer => {
                    let _ = self.head.compare_exchange(head, head.wrapping_add(1), Relaxed, Relaxed);
                }
            }
            retry();
        }
        None
    }

    /// Whether a taker would find nothing, stale hints aside.
    pub fn is_empty(&self) -> bool {
        let head = self.head.load(Relaxed);
        // Acquire as in `take`; the caller of a look before sleeping has the doorbell's fence before it.
        matches!(self.read(head, self.cell(head).load(Acquire)), Cell::Empty | Cell::Older | Cell::OlderFull)
    }

    /// Whether its words fit together, as they do whatever died or is going on here, unless somebody scribbled over them:
    /// what lies between head and tail was pushed, and what lies behind is not left over.
    pub fn is_sound(&self) -> bool {
        let counters = || (self.head.load(Relaxed), self.tail.load(Relaxed));
        // Who is kept from its core for laps while it looks, sees what does not fit together: it looks again. What changes all
        // the time is in use.
        for _ in 0..4 {
            let before = counters();
            if self.fits(before) {
                return true;
            }
            if counters() == before {
                return false;
            }
        }
        true
    }

    fn fits(&self, (head, tail): (u64, u64)) -> bool {
        // On processors that reorder loads a cell may still look older than the counters: then a lane in good order is emptied,
        // and the fronts push their hints again.
        fence(SeqCst);
        let cells = self.cells.len() as u64;
        let held = tail.wrapping_sub(head);
        // The tail may be behind the head: both only follow the cells.
        if held > cells && head.wrapping_sub(tail) > cells {
            return false;
        }
        (0..cells).all(|ahead| {
            let position = head.wrapping_add(ahead);
            let seen = self.cell(position).load(Acquire);
            let laps_ahead = (seen >> LAP_SHIFT).wrapping_sub(self.lap(position)) & LAP_MASK;
            match self.read(position, seen) {
                Cell::Full(_) => true,
                Cell::Newer => laps_ahead <= 2,
                Cell::Empty => held > cells || ahead >= held,
                Cell::OlderFull | Cell::Older => false,
            }
        })
    }

    /// Empties it, whatever it says and whoever uses it meanwhile: what they push may be lost.
    pub fn reset(&self) {
        let cells = self.cells.len() as u64;
        // Counters that somebody has in hand right now must not fit again.
        let start = (self.tail.load(Relaxed) | (cells - 1)).wrapping_add(1 + 8 * cells);
        for position in (0..cells).map(|ahead| start.wrapping_add(ahead)) {
            self.cell(position).store(self.empty(position), Release);
        }
        self.tail.store(start, Release);
        self.head.store(start, Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        collections::VecDeque,
        sync::atomic::{AtomicBool, AtomicU32},
        thread,
    };

    struct Memory {
        head: AtomicU64,
        tail: AtomicU64,
        cells: Vec<AtomicU64>,
    }

    impl Memory {
        fn new(cells: usize) -> Self {
            Self::at(cells, 0)
        }

        /// An empty lane that has been through `position` pushes and takes.
        fn at(cells: usize, position: u64) -> Self {
            let memory = Memory {
                head: AtomicU64::new(position),
                tail: AtomicU64::new(position),
                cells: (0..cells).map(|_| AtomicU64::new(0)).collect(),
            };
            let lane = memory.lane();
            for ahead in 0..cells as u64 {
                lane.cell(position + ahead).store(lane.empty(position + ahead), Relaxed);
            }
            memory
        }

        fn lane(&self) -> Lane<'_> {
            Lane::new(&self.head, &self.tail, &self.cells)
        }
    }

    fn hint(index: u32) -> Hint {
        Hint { index, generation: index.wrapping_mul(7) & GENERATION_MASK as u32 }
    }

    #[test]
    fn first_in_first_out_and_full_at_capacity() {
        let memory = Memory::new(4);
        let lane = memory.lane();
        for round in 0..100 {
            for i in 0..4 {
                lane.push(hint(round * 4 + i)).unwrap();
            }
            assert_eq!(lane.push(hint(9)), Err(Full));
            assert!(!lane.is_empty());
            for i in 0..4 {
                assert_eq!(lane.take(|_| true), Some(hint(round * 4 + i)));
            }
            assert_eq!(lane.take(|_| true), None);
            assert!(lane.is_empty());
        }
    }

    #[test]
    fn refused_hints_are_removed() {
        let memory = Memory::new(4);
        let lane = memory.lane();
        for i in 0..4 {
            lane.push(hint(i)).unwrap();
        }
        assert_eq!(lane.take(|h| h.index == 2), Some(hint(2)));
        assert_eq!(lane.take(|h| h.index == 2), None);
        assert!(lane.is_empty());
    }

    #[test]
    fn the_lap_counter_and_the_positions_wrap() {
        for start in [u64::MAX - 5, (LAP_MASK << 2) - 6] {
            let memory = Memory::at(4, start & !3);
            let lane = memory.lane();
            let mut model = VecDeque::new();
            for i in 0..64 {
                lane.push(hint(i)).unwrap();
                model.push_back(hint(i));
                if i % 3 == 0 || model.len() == 4 {
                    assert_eq!(lane.take(|_| true), model.pop_front());
                }
            }
        }
    }

    #[test]
    fn a_dead_pusher_or_taker_is_helped() {
        let memory = Memory::new(4);
        let lane = memory.lane();
        // A pusher died between the cell and the tail.
        memory.cells[0].store(lane.full(0, hint(1)), Relaxed);
        lane.push(hint(2)).unwrap();
        assert_eq!(memory.tail.load(Relaxed), 2);
        // A taker died between the cell and the head.
        memory.cells[0].store(lane.empty(4), Relaxed);
        assert_eq!(lane.take(|_| true), Some(hint(2)));
        assert_eq!(memory.head.load(Relaxed), 2);
    }

    /// Numbers of a kind that scribbling leaves: any at all, and some that look like something.
    fn garbage(seed: u64) -> impl FnMut() -> u64 {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            match state % 4 {
                0 => 0,
                1 => u64::MAX,
                2 => state >> 58,
                _ => state,
            }
        }
    }

    /// Whatever somebody wrote over it, each call ends; and once it is reset, it is a lane like any other.
    #[test]
    fn garbage_is_survived_and_mended() {
        for seed in 0..if cfg!(miri) { 5 } else { 2000 } {
            let mut random = garbage(seed);
            let cells = 2 << (seed % 4);
            let memory = Memory::new(cells);
            let lane = memory.lane();
            for i in 0..seed as u32 % 100 {
                let _ = lane.push(hint(i));
                if i % 3 > 0 {
                    lane.take(|_| true);
                }
                assert!(lane.is_sound(), "{seed}");
            }
            for word in [&memory.head, &memory.tail].into_iter().chain(&memory.cells) {
                if !random().is_multiple_of(3) {
                    word.store(random(), Relaxed);
                }
            }
            for i in 0..3 {
                let _ = (lane.push(hint(i)), lane.take(|_| false), lane.take(|_| true), lane.is_empty());
            }
            let _ = lane.is_sound();
            lane.reset();
            for round in 0..3 {
                assert!(lane.is_sound() && lane.is_empty(), "{seed} {round}");
                for i in 0..cells as u32 {
                    lane.push(hint(i)).unwrap();
                }
                assert!(lane.is_sound(), "{seed} {round}");
                assert_eq!(lane.push(hint(0)), Err(Full));
                for i in 0..cells as u32 {
                    assert_eq!(lane.take(|_| true), Some(hint(i)));
                }
            }
        }
    }

    #[test]
    fn what_was_scribbled_over_shows() {
        let memory = Memory::new(8);
        let lane = memory.lane();
        for i in 0..20 {
            lane.push(hint(i)).unwrap();
            if i >= 4 {
                lane.take(|_| true);
            }
        }
        assert_eq!((memory.head.load(Relaxed), memory.tail.load(Relaxed)), (16, 20));
        for (at, word) in [&memory.head, &memory.tail].into_iter().chain(&memory.cells).enumerate() {
            for bad in [0, u64::MAX, 0x5555_5555_5555_5555, FULL] {
                let good = word.swap(bad, Relaxed);
                assert!(!lane.is_sound(), "word {at} is {bad:x}");
                word.store(good, Relaxed);
                assert!(lane.is_sound());
            }
        }
    }

    /// A cell that no taker will come to is used again.
    #[test]
    fn a_left_over_cell_does_not_close_the_lane() {
        let memory = Memory::at(4, 8);
        let lane = memory.lane();
        memory.cells[2].store(lane.full(6, hint(7)), Relaxed);
        memory.cells[3].store(lane.empty(3), Relaxed);
        for i in 0..4 {
            lane.push(hint(i)).unwrap();
        }
        for i in 0..4 {
            assert_eq!(lane.take(|_| true), Some(hint(i)));
        }
    }

    /// Every item is claimed once, by many pushers and takers at once, though each hint is offered twice.
    #[test]
    fn claimed_exactly_once_under_contention() {
        const PUSHERS: u32 = 2;
        const EACH: u32 = if cfg!(miri) { 60 } else { 20_000 };
        let memory = Memory::new(if cfg!(miri) { 16 } else { 256 });
        let items: Vec<_> = (0..PUSHERS * EACH).map(|_| AtomicU32::new(0)).collect();
        let pushing = AtomicBool::new(true);
        let taken = AtomicU32::new(0);
        thread::scope(|scope| {
            let pushers: Vec<_> = (0..PUSHERS)
                .map(|p| {
                    let (memory, items) = (&memory, &items);
                    scope.spawn(move || {
                        for i in p * EACH..(p + 1) * EACH {
                            items[i as usize].store(1, Release);
                            for _ in 0..2 {
                                while memory.lane().push(hint(i)).is_err() {
                                    thread::yield_now();
                                }
                            }
                        }
                    })
                })
                .collect();
            for _ in 0..2 {
                scope.spawn(|| {
                    let claim = |h: Hint| items[h.index as usize].compare_exchange(1, 2, Acquire, Relaxed).is_ok();
                    loop {
                        let last = !pushing.load(Acquire);
                        match memory.lane().take(claim) {
                            Some(h) => {
                                assert_eq!(h, hint(h.index));
                                taken.fetch_add(1, Relaxed);
                            }
                            None if last => break,
                            None => thread::yield_now(),
                        }
                    }
                });
            }
            for pusher in pushers {
                pusher.join().unwrap();
            }
            pushing.store(false, Release);
        });
        assert_eq!(taken.load(Relaxed), PUSHERS * EACH);
        assert!(items.iter().all(|item| item.load(Relaxed) == 2));
    }
}
