//! What a lane promises, by what its words say afterwards. Races are in `tests/lockfree`.

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
            let position = position.wrapping_add(ahead);
            lane.cell(position).store(lane.empty(position), Relaxed);
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

/// What those leave that die between two steps is no damage.
#[test]
fn a_lane_in_which_somebody_died_is_sound() {
    for cells in [1, 4] {
        let at = 5 * cells as u64;
        let memory = Memory::at(cells, at);
        let lane = memory.lane();
        // A pusher died before it moved the tail.
        memory.cells[0].store(lane.full(at, hint(0)), Relaxed);
        assert!(lane.is_sound());
        // Its hint was taken.
        memory.cells[0].store(lane.empty(at + cells as u64), Relaxed);
        memory.head.store(at + 1, Relaxed);
        assert!(lane.is_sound());
        // Nobody died, or a taker did before it moved the head; and others push until there is no room.
        memory.tail.store(at + 1, Relaxed);
        for head in [at + 1, at] {
            memory.head.store(head, Relaxed);
            let mut pushed = 0;
            while lane.push(hint(pushed)).is_ok() {
                pushed += 1;
                assert!(lane.is_sound(), "{cells} cells, {pushed} in use");
            }
            memory.tail.fetch_sub(1, Relaxed);
            assert!(lane.is_sound(), "and the last pusher died before it moved the tail");
            memory.tail.fetch_add(1, Relaxed);
            assert!(lane.is_sound());
        }
        for i in 0..cells as u32 {
            assert_eq!(lane.take(|_| true), Some(hint(i)));
        }
    }
}

/// So a lane that is left as it is after a death has lost nothing but what was written over, by another hint or by what a
/// taker of it would have left.
#[test]
fn a_lane_that_is_sound_leads_to_every_hint() {
    let mut sound = 0;
    for seed in 0..if cfg!(miri) { 50 } else { 50_000 } {
        let mut random = garbage(seed);
        let mut below = |n: u64| random() % n;
        let cells = 1 << below(4);
        let start = [0, cells * 5, LAP_MASK * cells, u64::MAX - 20 * cells + 1][below(4) as usize];
        let memory = Memory::at(cells as usize, start);
        let lane = memory.lane();
        for i in 0..below(30) as u32 {
            lane.push(hint(i)).unwrap();
            lane.take(|_| true);
        }
        let held = below(cells + 1) as u32;
        (0..held).for_each(|i| lane.push(hint(i)).unwrap());

        let words: Vec<_> = memory.cells.iter().chain([&memory.head, &memory.tail]).collect();
        let word = words[below(words.len() as u64) as usize];
        let good = word.load(Relaxed);
        let bad = match below(4) {
            0 => random(),
            1 => good ^ 1 << below(64),
            2 => good.wrapping_add(below(5)).wrapping_sub(2),
            _ => good.wrapping_add(below(4) << LAP_SHIFT).wrapping_add(below(3) * FULL),
        };
        word.store(bad, Relaxed);
        let head = memory.head.load(Relaxed);
        let emptied = lane.read(head.wrapping_add(cells), bad);
        let is_as_if_taken = std::ptr::eq(word, lane.cell(head)) && matches!(emptied, Cell::Empty);
        if !lane.is_sound() || is_as_if_taken {
            continue;
        }
        sound += 1;
        let what = format!("seed {seed}, {cells} cells, {held} in use, {good:x} became {bad:x}");
        let drain = || std::iter::from_fn(|| lane.take(|_| true)).collect::<Vec<_>>();
        let taken = drain();
        let missing = (0..held).filter(|i| !taken.contains(&hint(*i))).count();
        assert!(taken.len() >= held as usize && missing <= 1, "{what}: {taken:?}");
        for i in 0..3 * cells as u32 {
            lane.push(hint(i)).unwrap();
            assert!(drain().contains(&hint(i)), "{what}, and then");
        }
    }
    assert!(sound > 0, "all of it showed");
}

/// The cells say where the lane is. Counters that are behind them are helped on, over two laps in one call.
#[test]
fn counters_that_were_set_back_are_helped_on() {
    const CELLS: u64 = if cfg!(miri) { 64 } else { 4096 };
    let memory = Memory::at(CELLS as usize, 8 * CELLS);
    let lane = memory.lane();
    (0..2).for_each(|i| lane.push(hint(i)).unwrap());
    memory.tail.store(6 * CELLS, Relaxed);
    memory.head.store(6 * CELLS, Relaxed);
    lane.push(hint(2)).unwrap();
    for i in 0..3 {
        assert_eq!(lane.take(|_| true), Some(hint(i)));
    }
    assert!(lane.is_empty() && lane.is_sound());
}

/// It is the cells that say whether there is room.
#[test]
fn counters_that_say_full_do_not_close_an_empty_lane() {
    let memory = Memory::at(4, 8);
    let lane = memory.lane();
    memory.tail.store(12, Relaxed);
    assert!(!lane.is_sound());
    for i in 0..4 {
        lane.push(hint(i)).unwrap();
    }
    for i in 0..4 {
        assert_eq!(lane.take(|_| true), Some(hint(i)));
    }
}

/// Whoever is in the middle of a push or a take has a counter of before, and the cell that it leads to.
#[test]
fn what_was_begun_before_a_reset_fails_after_it() {
    for (cells, start) in [(4, 0), (4, 1003), (16, 4711), (16, u64::MAX - 40)] {
        let memory = Memory::at(cells, start);
        let lane = memory.lane();
        for i in 0..7 {
            lane.push(hint(i)).unwrap();
            lane.take(|_| i < 5);
        }
        lane.reset();
        let near = 2 * cells as u64;
        for counter in (0..2 * near + 7).map(|n| start.wrapping_sub(near).wrapping_add(n)) {
            let cell = lane.cell(counter).load(Relaxed);
            assert!(matches!(lane.read(counter, cell), Cell::Newer), "{cells} cells from {start}: {counter}");
            for word in [&memory.head, &memory.tail] {
                assert_ne!(word.load(Relaxed), counter);
            }
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
