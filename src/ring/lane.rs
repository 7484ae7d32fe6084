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
//!   happened; after it the hint is there.
//! - **Claim precedes removal.** A taker claims the item first (a CAS on the item's own word), then empties the cell.
//!   Killed after the claim, it has the item, which the sweep gives back; the cell still holds a hint, which the next
//!   taker finds stale and removes. Killed before the claim, it has done nothing.
//! - **Cells are used in order**, and say themselves where the lane begins and ends. Head and tail only save looking for that:
//!   they go from line to line, a CAS for all cells of a cache line, and never ahead of the cells. Whoever finds one behind a
//!   line that is used moves it on (helping), so a process that dies before it does so is finished by its successor.
//! - **A cell never goes back.** The lap in each cell makes a CAS by a process that slept through a whole lap fail,
//!   until the lap counter itself wraps (2^15 laps), and then a claim still has the item's word to pass.
//!
//! The two usual designs have a step after which a death hurts: pop-then-claim loses the hint of an item nobody has
//! claimed, and reserve-then-publish (Vyukov's queue, DPDK's `rte_ring`) leaves a reserved cell that everybody waits for.
//!
//! # When somebody scribbles over it
//!
//! Whatever the words of a lane say, `push` and `take` end: each look at a cell either ends them or goes to the next, and after
//! two laps of that they give up, as if the lane were full or empty. A cell that is older than any that can be here by the
//! rules is as good as an empty one. Hints may be lost then, and a lane that is out of joint stays so; [`Lane::is_sound`] tells,
//! and [`Lane::reset`] empties it, whoever uses it meanwhile: the caller then sees to the hints of all that is READY.
//!
//! # Who writes what
//!
//! | word | writers | pairs |
//! |---|---|---|
//! | cell | pushers (empty → full), takers (full → empty at the next lap) | **L0** Release push → **L0'** Acquire take; **L1** Release empty → **L1'** Acquire push |
//! | tail | pushers, each to the next line | Relaxed: a hint about the cells |
//! | head | takers, each to the next line | Relaxed: the same |

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
/// Whether a lane is in good order is looked for so often.
const LOOKS: usize = 32;
/// Cells in a cache line, of which a small lane may have less.
const LINE: usize = 8;

/// The lane has no empty cell. It has twice as many as there are items, so this means that more than half of them
/// hold stale hints that no worker came to remove.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// One process's view of a lane: two counters and the cells, all starting as zero.
#[derive(Clone, Copy, Debug)]
pub struct Lane<'a> {
    head: &'a AtomicU64,
    tail: &'a AtomicU64,
    cells: &'a [AtomicU64],
    lap_bits: u32,
    taken: Last,
    pushed: Last,
}

/// Where a view was last, and what the counter was then: as long as it is that, nobody looks through the line for the first cell
/// that was not used. A counter is not the same again, not even when the lane was reset (but for the chance that two resets are a
/// multiple of the time apart that is left of it above the laps, to the nanosecond).
#[derive(Clone, Copy, Debug, Default)]
struct Last {
    counter: u64,
    at: u64,
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
        Lane {
            head,
            tail,
            cells,
            lap_bits: cells.len().trailing_zeros(),
            taken: Last::default(),
            pushed: Last::default(),
        }
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

    /// How many cells the counters pass at a time.
    fn line(&self) -> u64 {
        self.cells.len().min(LINE) as u64
    }

    /// Where to begin: where this view was last, if that is in the counter's line.
    #[inline]
    fn begin(counter: u64, last: Last) -> u64 {
        if last.counter == counter { last.at } else { counter }
    }

    /// The same for a taker, if the cell before it shows that it still holds: a look at the line in which it takes costs nothing.
    #[inline]
    fn begin_taking(&self, head: u64) -> u64 {
        let at = Self::begin(head, self.taken);
        let before = at.wrapping_sub(1);
        let holds = || matches!(self.read(before, self.cell(before).load(Relaxed)), Cell::Newer);
        if at == head || holds() { at } else { head }
    }

    /// The position behind `at`, once a counter that is at `from` has passed the line if that is its end. `from` becomes what the
    /// counter is by then.
    #[inline]
    fn pass(&self, counter: &AtomicU64, from: &mut u64, at: u64) -> u64 {
        let next = at.wrapping_add(1);
        if next & (self.line() - 1) != 0 {
            return next;
        }
        *from = counter.compare_exchange(*from, next, Relaxed, Relaxed).map_or_else(|now| now, |_| next);
        *from
    }

    /// Publishes a hint. The item it points at must already be READY.
    #[inline]
    pub fn push(&mut self, hint: Hint) -> Result<(), Full> {
        let mut tail = self.tail.load(Relaxed);
        let mut at = Self::begin(tail, self.pushed);
        // What it most likely is, without looking first: so the line moves here once, for writing. L0 and L1' as below.
        if self.cell(at).compare_exchange(self.empty(at), self.full(at, hint), AcqRel, Relaxed).is_ok() {
            self.move_on(tail, at);
            return Ok(());
        }
        for _ in 0..self.tries() {
            let cell = self.cell(at);
            // L1': an emptied cell's taker is done with it.
            let seen = cell.load(Acquire);
            match self.read(at, seen) {
                // So a cell in use looks to whoever slept for half of all laps since it loaded the tail. Whoever wrote it had seen
                // a later tail, so after the Acquire above it is seen here.
                Cell::Older | Cell::OlderFull if self.tail.load(Relaxed) != tail => {
                    tail = self.tail.load(Relaxed);
                    at = tail;
                }
                Cell::OlderFull if self.is_full(at) => return Err(Full),
                Cell::Empty | Cell::Older | Cell::OlderFull => {
                    // L0: whoever sees the hint sees the READY item behind it.
                    if cell.compare_exchange(seen, self.full(at, hint), Release, Relaxed).is_ok() {
                        self.move_on(tail, at);
                        return Ok(());
                    }
                }
                Cell::Full(_) | Cell::Newer => at = self.pass(self.tail, &mut tail, at),
            }
            retry();
        }
        Err(Full)
    }

    /// The next push looks through its line again. Somebody may have written over it in a way that [`Lane::is_sound`] does not see: then
    /// there is a gap, and no taker looks behind it until it is filled.
    pub fn forget(&mut self) {
        self.pushed = Last::default();
    }

    /// What follows a push.
    #[inline]
    fn move_on(&mut self, mut tail: u64, at: u64) {
        crash_point!("lane.pushed");
        let at = self.pass(self.tail, &mut tail, at);
        self.pushed = Last { counter: tail, at };
        crash_point!("lane.told");
    }

    /// How often `push` and `take` look.
    fn tries(&self) -> usize {
        2 * self.cells.len() + TRIES
    }

    /// Whether the cell of this position may still be full: not if takers have passed it, for they empty what they pass.
    #[cold]
    fn is_full(&self, position: u64) -> bool {
        position.wrapping_sub(self.head.load(Relaxed)) >= self.cells.len() as u64
    }

    /// Takes the oldest hint whose item `claim` claims. Hints that it refuses are stale and are removed.
    ///
    /// `claim` must be the one step that makes the item the caller's: it may be called for the same hint by several
    /// takers, and must say yes to at most one of them.
    #[inline]
    pub fn take(&mut self, claim: impl FnMut(Hint) -> bool) -> Option<Hint> {
        self.take_ahead(claim, |_| ())
    }

    /// The same, and `ahead` is given the hint behind it if there is one already, to fetch what it points at.
    #[inline]
    pub fn take_ahead(&mut self, mut claim: impl FnMut(Hint) -> bool, mut ahead: impl FnMut(Hint)) -> Option<Hint> {
        let mut head = self.head.load(Relaxed);
        let mut at = self.begin_taking(head);
        for _ in 0..self.tries() {
            let cell = self.cell(at);
            // L0': the item behind the hint is READY or newer.
            let seen = cell.load(Acquire);
            match self.read(at, seen) {
                Cell::Empty | Cell::Older | Cell::OlderFull => {
                    self.taken = Last { counter: head, at };
                    return None;
                }
                Cell::Full(hint) => {
                    let behind = at.wrapping_add(1);
                    // Relaxed: good for fetching ahead and no more.
                    let next = self.cell(behind).load(Relaxed);
                    let claimed = claim(hint);
                    crash_point!("lane.claimed");
                    if let Cell::Full(hint) = self.read(behind, next) {
                        ahead(hint);
                    }
                    // L1: the claim is over before the cell can be used again.
                    let next = self.empty(at.wrapping_add(self.cells.len() as u64));
                    let _ = cell.compare_exchange(seen, next, Release, Relaxed);
                    crash_point!("lane.emptied");
                    at = self.pass(self.head, &mut head, at);
                    crash_point!("lane.taken");
                    if claimed {
                        self.taken = Last { counter: head, at };
                        return Some(hint);
                    }
                }
                Cell::Newer => at = self.pass(self.head, &mut head, at),
            }
            retry();
        }
        None
    }

    /// Whether a taker would find nothing, stale hints aside.
    pub fn is_empty(&self) -> bool {
        let head = self.head.load(Relaxed);
        let mut at = self.begin_taking(head);
        // At most a line is used before the head is moved on. If it is more, others are taking: then there was something.
        for _ in 0..=self.line() {
            // Acquire as in `take`; the caller of a look before sleeping has the doorbell's fence before it.
            match self.read(at, self.cell(at).load(Acquire)) {
                Cell::Empty | Cell::Older | Cell::OlderFull => return true,
                Cell::Full(_) => return false,
                Cell::Newer => at = at.wrapping_add(1),
            }
        }
        false
    }

    /// Whether its words fit together, as they do whatever died or is going on here, unless somebody scribbled over them:
    /// what was pushed and not emptied lies together, and head and tail are not more than a line behind where it begins and ends.
    pub fn is_sound(&self) -> bool {
        // What others push and take in the very moment that a look comes by may not fit together: look again. That is so for
        // nanoseconds, and damage stays.
        (0..LOOKS).any(|_| self.fits())
    }

    /// Whether the words fit together as they are read, one after the other.
    fn fits(&self) -> bool {
        let (head, tail) = (self.head.load(Relaxed), self.tail.load(Relaxed));
        // On processors that reorder loads a cell may still look older than the counters: then a lane in good order is emptied,
        // and the fronts push their hints again.
        fence(SeqCst);
        let read = |position| {
            let word = self.cell(position).load(Acquire);
            // What nobody writes is nothing that anybody left.
            if word & FULL == 0 && word & (FULL - 1) != 0 { Cell::Older } else { self.read(position, word) }
        };
        let is_used = |position: &u64| matches!(read(*position), Cell::Newer);
        let first = (0..self.line()).map(|ahead| head.wrapping_add(ahead)).take_while(is_used).count() as u64;
        let first = head.wrapping_add(first);
        let mut held = 0;
        for ahead in 0..self.cells.len() as u64 {
            match read(first.wrapping_add(ahead)) {
                Cell::Full(_) if held == ahead => held += 1,
                Cell::Empty => {}
                _ => return false,
            }
        }
        first.wrapping_add(held).wrapping_sub(tail) <= self.line()
    }

    /// What a process that runs wild may do to its cells.
    #[cfg(test)]
    pub fn zero(&self) {
        self.cells.iter().for_each(|cell| cell.store(0, Relaxed));
    }

    /// Empties it, whatever it says and whoever uses it meanwhile: what they push may be lost. `mark` is one that no reset had
    /// before, as the time is.
    pub fn reset(&self, mark: u64) {
        let cells = self.cells.len() as u64;
        // Cells that somebody has in hand right now must not fit again,
        let newest = self.tail.load(Relaxed).max(self.head.load(Relaxed));
        let ahead = newest.wrapping_add(8 * cells) & !(self.line() - 1);
        // nor counters that a view remembers: these are of no lap, so the bits above laps tell them from each other.
        let bits = self.lap_bits + LAP_MASK.count_ones();
        let start = mark << bits | ahead & !(u64::MAX << bits);
        for position in (0..cells).map(|ahead| start.wrapping_add(ahead)) {
            self.cell(position).store(self.empty(position), Release);
        }
        // Behind the cells, for who follows a counter to them: what loads it is Relaxed, but where to look depends on it.
        self.tail.store(start, Release);
        self.head.store(start, Release);
    }
}

#[cfg(test)]
mod tests;
