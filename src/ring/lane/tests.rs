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
    let mut lane = memory.lane();
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
    let mut lane = memory.lane();
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
        let mut lane = memory.lane();
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

/// Also by a view that was here when they lived.
#[test]
fn a_dead_pusher_or_taker_is_helped() {
    for was_here in [false, true] {
        let memory = Memory::new(16);
        let [mut pusher, mut taker] = [memory.lane(); 2];
        let ends = || (memory.head.load(Relaxed), memory.tail.load(Relaxed));
        if was_here {
            (0..3).for_each(|i| pusher.push(hint(i)).unwrap());
            (0..2).for_each(|i| assert_eq!(taker.take(|_| true), Some(hint(i))));
        }
        // A pusher died behind the last cell of a line, before it moved the tail.
        for at in if was_here { 3..8 } else { 0..8 } {
            memory.cells[at as usize].store(pusher.full(at, hint(at as u32)), Relaxed);
        }
        assert_eq!(ends(), (0, 0));
        pusher.push(hint(8)).unwrap();
        assert_eq!(ends(), (0, 8));
        // A taker died there, before it moved the head.
        for at in 0..8 {
            memory.cells[at as usize].store(taker.empty(at + 16), Relaxed);
        }
        assert!(!taker.is_empty());
        assert_eq!(taker.take(|_| true), Some(hint(8)));
        assert_eq!(ends(), (8, 8));
        assert!(taker.is_empty() && taker.is_sound());
    }
}

/// Where a view was last is where it goes on, unless others are elsewhere by now.
#[test]
fn views_of_one_lane_take_turns() {
    let memory = Memory::new(16);
    let mut views = [memory.lane(); 3];
    for i in 0..200u32 {
        let [first, second, third] = &mut views;
        first.push(hint(2 * i)).unwrap();
        if i % 3 == 0 { &mut *first } else { &mut *second }.push(hint(2 * i + 1)).unwrap();
        let by_turns = if i % 11 < 5 { second } else { third };
        assert_eq!(by_turns.take(|_| true), Some(hint(2 * i)), "{i}");
        assert!(!first.is_empty());
        let other = if i % 7 < 3 { first } else { by_turns };
        assert_eq!(other.take(|_| true), Some(hint(2 * i + 1)), "{i}");
        assert!(views.iter().all(Lane::is_empty) && memory.lane().is_sound(), "{i}");
    }
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
        let mut lane = memory.lane();
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
        lane.reset(1);
        assert_eq!(memory.head.load(Relaxed) % lane.line(), 0, "{seed}: a line is passed at its end");
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
    let mut lane = memory.lane();
    for i in 0..20 {
        lane.push(hint(i)).unwrap();
        if i >= 4 {
            lane.take(|_| true);
        }
    }
    assert_eq!((memory.head.load(Relaxed), memory.tail.load(Relaxed)), (16, 16));
    for (at, word) in [&memory.head, &memory.tail].into_iter().chain(&memory.cells).enumerate() {
        for bad in [0, u64::MAX, 0x5555_5555_5555_5555, FULL] {
            let good = word.swap(bad, Relaxed);
            assert!(!lane.is_sound(), "word {at} is {bad:x}");
            word.store(good, Relaxed);
            assert!(lane.is_sound());
        }
    }
}

/// What those leave that die between two steps is no damage; anything else is.
#[test]
fn a_lane_in_which_somebody_died_is_sound() {
    // Miri takes minutes for the last.
    for cells in [1, 4, 8, 32].into_iter().filter(|cells| !cfg!(miri) || *cells <= 8) {
        let line = cells.min(LINE as u64);
        for (used, held) in (0..=line).flat_map(|used| (0..=cells).map(move |held| (used, held))) {
            let head = 5 * cells;
            let memory = Memory::at(cells as usize, head);
            let lane = memory.lane();
            let (first, end) = (head + used, head + used + held);
            for position in first..first + cells {
                let holds = position < end;
                let cell = if holds { lane.full(position, hint(position as u32)) } else { lane.empty(position) };
                lane.cell(position).store(cell, Relaxed);
            }
            for behind in 0..=line + 1 {
                memory.tail.store(end - behind, Relaxed);
                assert_eq!(lane.is_sound(), behind <= line, "{cells} cells, {used} used, {held} held, {behind} behind");
            }
            memory.tail.store(end + 1, Relaxed);
            assert!(!lane.is_sound());
            memory.tail.store(end - line, Relaxed);
            let mut lane = memory.lane();
            for i in held..cells {
                lane.push(hint((first + i) as u32)).unwrap();
            }
            assert_eq!(lane.push(hint(0)), Err(Full));
            for position in first..first + cells {
                assert!(lane.is_sound() && !lane.is_empty());
                assert_eq!(lane.take(|_| true), Some(hint(position as u32)), "{cells} cells, {used} used, {held} held");
            }
            assert!(lane.is_empty());
        }
    }
}

/// So a lane that is left as it is after a death has lost nothing but what was written over, by another hint or by what would
/// be there if it had been taken, or never pushed.
#[test]
fn a_lane_that_is_sound_leads_to_every_hint() {
    let mut sound = 0;
    for seed in 0..if cfg!(miri) { 50 } else { 50_000 } {
        let mut random = garbage(seed);
        let mut below = |n: u64| random() % n;
        let cells = 1 << below(6);
        let start = [cells * 8, cells * 5, LAP_MASK * cells, u64::MAX - 20 * cells + 1][below(4) as usize];
        let memory = Memory::at(cells as usize, start);
        let mut lane = memory.lane();
        let used = below(30);
        for i in 0..used as u32 {
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
        let first = start.wrapping_add(used);
        let last = first.wrapping_add(u64::from(held)).wrapping_sub(1);
        let is = |position: u64, cell: u64| std::ptr::eq(word, lane.cell(position)) && bad == cell;
        let is_as_if_taken = is(first, lane.empty(first.wrapping_add(cells)));
        let is_as_if_not_pushed = is(last, lane.empty(last));
        if !lane.is_sound() || is_as_if_taken || is_as_if_not_pushed {
            continue;
        }
        sound += 1;
        let what = format!("seed {seed}, {cells} cells, {held} in use, {good:x} became {bad:x}");
        // Whoever was here, or comes.
        if seed % 2 == 0 {
            lane = memory.lane();
        }
        let drain = |lane: &mut Lane<'_>| std::iter::from_fn(|| lane.take(|_| true)).collect::<Vec<_>>();
        let taken = drain(&mut lane);
        let missing = (0..held).filter(|i| !taken.contains(&hint(*i))).count();
        assert!(taken.len() >= held as usize && missing <= 1, "{what}: {taken:?}");
        for i in 0..3 * cells as u32 {
            lane.push(hint(i)).unwrap();
            assert!(drain(&mut lane).contains(&hint(i)), "{what}, and then");
        }
    }
    assert!(sound > 0, "all of it showed");
}

/// The cells say where the lane is. Counters that are behind them are helped on, over two laps in one call.
#[test]
fn counters_that_were_set_back_are_helped_on() {
    const CELLS: u64 = if cfg!(miri) { 64 } else { 4096 };
    let memory = Memory::at(CELLS as usize, 8 * CELLS);
    let mut lane = memory.lane();
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
    let mut lane = memory.lane();
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
    for (cells, start) in [(4, 0), (4, 1003), (16, 4711), (64, 9), (16, u64::MAX - 40)] {
        let memory = Memory::at(cells, start);
        let mut lane = memory.lane();
        for i in 0..7 {
            lane.push(hint(i)).unwrap();
            lane.take(|_| i < 5);
        }
        lane.reset(1);
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

/// The same garbage each time leads to the same counters each time.
#[test]
fn a_view_of_before_a_reset_is_as_good_as_any_after_it() {
    let memory = Memory::new(16);
    let (mut pusher, mut taker) = (memory.lane(), memory.lane());
    for round in 0..5 {
        memory.head.store(0x5555, Relaxed);
        memory.tail.store(0x5555, Relaxed);
        memory.lane().reset(round);
        for i in 0..3 {
            pusher.push(hint(i)).unwrap();
        }
        for i in 0..2 {
            assert_eq!(taker.take(|_| true), Some(hint(i)), "{round}");
        }
    }
}

/// What is written over as if it had never been pushed does not show, and is filled once somebody may have done that.
#[test]
fn a_gap_is_filled_by_who_forgets_where_it_was() {
    let memory = Memory::new(16);
    let (mut pusher, mut taker) = (memory.lane(), memory.lane());
    for i in 0..5 {
        pusher.push(hint(i)).unwrap();
        assert_eq!(taker.take(|_| true), Some(hint(i)));
    }
    pusher.cell(4).store(pusher.empty(4), Relaxed);
    assert!(pusher.is_sound());
    pusher.forget();
    for i in 5..8 {
        pusher.push(hint(i)).unwrap();
        assert_eq!(taker.take(|_| true), Some(hint(i)));
    }
}

/// A cell that no taker will come to is used again.
#[test]
fn a_left_over_cell_does_not_close_the_lane() {
    let memory = Memory::at(4, 8);
    let mut lane = memory.lane();
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
