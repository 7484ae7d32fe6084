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
                // So a cell in use looks to whoever slept for half of all laps since it loaded the tail. Whoever wrote it had seen
                // a later tail, so after the Acquire above it is seen here.
                Cell::Older | Cell::OlderFull if self.tail.load(Relaxed) != tail => {}
                Cell::OlderFull if self.is_full(tail) => return Err(Full),
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
        let cells = self.cells.len() as i64;
        let held = tail.wrapping_sub(head) as i64;
        let fits = |ahead: i64, seen| match self.read(head.wrapping_add_signed(ahead), seen) {
            // Its pusher had seen that tail or moves it; and it has not come round, for the cell was not emptied.
            Cell::Full(_) => (ahead..=ahead + cells).contains(&held),
            Cell::Empty => held <= ahead,
            Cell::Newer | Cell::OlderFull | Cell::Older => false,
        };
        // The tail is behind the head if the last hint was taken and its pusher has not moved the tail, or no longer can.
        held >= -1
            && (0..cells).all(|ahead| {
                let seen = self.cell(head.wrapping_add_signed(ahead)).load(Acquire);
                // Who emptied the first has not moved the head, or no longer can; and it may be in use again.
                fits(ahead, seen) || ahead == 0 && fits(cells, seen)
            })
    }

    /// Empties it, whatever it says and whoever uses it meanwhile: what they push may be lost.
    pub fn reset(&self) {
        let cells = self.cells.len() as u64;
        // Counters that somebody has in hand right now must not fit again.
        let start = self.tail.load(Relaxed).wrapping_add(8 * cells);
        for position in (0..cells).map(|ahead| start.wrapping_add(ahead)) {
            self.cell(position).store(self.empty(position), Release);
        }
        self.tail.store(start, Release);
        self.head.store(start, Release);
    }
}

#[cfg(test)]
mod tests;
