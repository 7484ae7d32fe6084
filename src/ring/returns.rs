//! The return ring: SPSC, from one worker to one front, an entry polled in place.
//!
//! # What it promises
//!
//! An index that was pushed is popped once, in order, as long as both sides live. An entry may be lost only when the
//! ring is full, and then the producer is told. After a death either side is taken over by a successor that finds its
//! position in the ring itself; the consumer's successor may see entries again that its predecessor had popped, which
//! is harmless, because an entry is only a hint about the item table.
//!
//! # Why that holds
//!
//! An entry carries its own sequence number, so that the consumer polls the entry itself and there is no tail to read:
//! one Release store publishes, and costs one line transfer. The consumer tells its position only every quarter lap;
//! the producer reads that line only when its private copy says full.
//!
//! # When somebody scribbles over it
//!
//! What an entry was before its position came is known: that of a lap ago, or what [`prepare`] wrote. Anything else is damage,
//! and where the producer is by now, the consumer cannot know. It remembers what is in the ring, says that entries may be
//! lost ([`Consumer::take_lost`]: then a look at the items finds them), and goes on behind the next entry that comes. Whoever
//! takes over does not believe a head that does not fit its entry. So nothing that the memory may hold ends in more than
//! a look at all entries.
//!
//! | word | writer | pairs |
//! |---|---|---|
//! | entry | producer | **R0** Release push → **R0'** Acquire pop |
//! | head | consumer | **R1** Release, every quarter lap → **R1'** Acquire when the producer finds the ring full |

use super::INDEX_BITS;
use crate::{
    crash_point::crash_point,
    sync::{AtomicU64, Ordering::*},
};

const INDEX_MASK: u64 = (1 << INDEX_BITS) - 1;
const SEQUENCE_MASK: u64 = u64::MAX >> INDEX_BITS;

/// Of position `p` the entry's sequence is `p + 1`, so that a zeroed ring is empty.
fn entry(position: u64, index: u32) -> u64 {
    (position.wrapping_add(1) & SEQUENCE_MASK) << INDEX_BITS | u64::from(index) & INDEX_MASK
}

fn is_at(entry: u64, position: u64) -> bool {
    entry >> INDEX_BITS == position.wrapping_add(1) & SEQUENCE_MASK
}

/// Whether an entry is what is there before a position is used.
fn is_before(entry: u64, position: u64, entries: &[AtomicU64]) -> bool {
    is_at(entry, position.wrapping_sub(entries.len() as u64))
}

/// Makes a ring of zeros one that was never used. Before anybody pushes.
pub fn prepare(head: &AtomicU64, entries: &[AtomicU64]) {
    if head.load(Relaxed) == 0 && entries.iter().all(|entry| entry.load(Relaxed) == 0) {
        for (at, entry) in entries.iter().enumerate() {
            entry.store(unused(at, entries.len()), Relaxed);
        }
    }
}

/// What an entry is that was never used.
pub fn unused(at: usize, entries: usize) -> u64 {
    entry((at as u64).wrapping_sub(entries as u64), INDEX_MASK as u32)
}

/// Whether an entry is not what [`unused`] ones are.
fn was_pushed(entry: u64) -> bool {
    entry & INDEX_MASK != INDEX_MASK
}

/// The position of an entry that was pushed, if it can be in its slot.
fn position_of(entries: &[AtomicU64], at: usize, entry: u64) -> Option<u64> {
    let position = (entry >> INDEX_BITS).checked_sub(1)?;
    (slot(entries, position) == at && was_pushed(entry)).then_some(position)
}

/// Where to go on from a head: there, if that can be; else behind the newest entry. Most of them are taken to be good.
fn start(entries: &[AtomicU64], head: u64) -> u64 {
    let seen = entries[slot(entries, head)].load(Acquire);
    if is_at(seen, head) && was_pushed(seen) || is_before(seen, head, entries) {
        return head;
    }
    let position = |(at, entry): (usize, &AtomicU64)| position_of(entries, at, entry.load(Acquire));
    let mut positions: Vec<_> = entries.iter().enumerate().filter_map(position).collect();
    positions.sort_unstable();
    let Some(&middle) = positions.get(positions.len() / 2) else { return 0 };
    let newest = positions.into_iter().filter(|position| position.wrapping_sub(middle) < entries.len() as u64).max();
    newest.map_or(0, |newest| newest.wrapping_add(1))
}

/// The worker's end.
#[derive(Debug)]
pub struct Producer<'a> {
    head: &'a AtomicU64,
    entries: &'a [AtomicU64],
    position: u64,
    known_head: u64,
}

impl<'a> Producer<'a> {
    /// Takes over from whoever produced before: goes on behind the newest entry of the ring.
    pub fn resume(head: &'a AtomicU64, entries: &'a [AtomicU64]) -> Self {
        assert!(entries.len().is_power_of_two(), "a return ring has a power of two of entries");
        let known_head = start(entries, head.load(Acquire));
        // At most a ring of entries can follow the head. The newest, not the first that is missing: there may be holes.
        let follows = |ahead: &u64| {
            let position = known_head.wrapping_add(*ahead);
            is_at(entries[slot(entries, position)].load(Acquire), position)
        };
        let newest = (0..entries.len() as u64).rev().find(follows);
        let position = newest.map_or(known_head, |ahead| known_head.wrapping_add(ahead + 1));
        Producer { head, entries, position, known_head }
    }

    /// How many entries there have been.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Publishes an index; false if the ring is full.
    #[inline]
    pub fn push(&mut self, index: u32) -> bool {
        let capacity = self.entries.len() as u64;
        if self.position.wrapping_sub(self.known_head) >= capacity {
            // R1': the entries before the head have been read.
            self.known_head = self.head.load(Acquire);
            // One that is farther away is no head of this ring's: the consumer will tell another.
            if self.position.wrapping_sub(self.known_head) == capacity {
                return false;
            }
        }
        // R0: whoever sees the entry sees the DONE item behind it.
        self.entries[slot(self.entries, self.position)].store(entry(self.position, index), Release);
        crash_point!("returns.pushed");
        self.position = self.position.wrapping_add(1);
        true
    }
}

/// A head that is this far ahead is none.
const NO_HEAD: u64 = 1 << 43;

/// The front's end.
#[derive(Debug)]
pub struct Consumer<'a> {
    head: &'a AtomicU64,
    entries: &'a [AtomicU64],
    position: u64,
    /// What the head was set to last.
    told: u64,
    /// What was in the ring at the last look, if it is damaged; the next entry that changes tells the position.
    damaged: Option<Vec<u64>>,
    lost: bool,
}

impl<'a> Consumer<'a> {
    /// Takes over from whoever consumed before: goes on from the last position that was told.
    pub fn resume(head: &'a AtomicU64, entries: &'a [AtomicU64]) -> Self {
        assert!(entries.len().is_power_of_two(), "a return ring has a power of two of entries");
        let told = head.load(Relaxed);
        let mut consumer = Consumer { head, entries, position: start(entries, told), told, damaged: None, lost: false };
        if consumer.position != told {
            consumer.tell(consumer.position);
        }
        consumer
    }

    /// The index that `pop` will give after `skipped` others, if it is there already.
    #[inline]
    pub fn peek(&self, skipped: u64) -> Option<u32> {
        let position = self.position.wrapping_add(skipped);
        // Relaxed: good for fetching ahead what it is about, and no more.
        let seen = self.entries[slot(self.entries, position)].load(Relaxed);
        is_at(seen, position).then_some((seen & INDEX_MASK) as u32)
    }

    /// The next index, if there is one.
    #[inline]
    pub fn pop(&mut self) -> Option<u32> {
        // R0': the item behind the entry is DONE or newer.
        let seen = self.entries[slot(self.entries, self.position)].load(Acquire);
        if !is_at(seen, self.position) {
            if self.damaged.is_some() || !is_before(seen, self.position, self.entries) {
                self.find();
            }
            return None;
        }
        self.position = self.position.wrapping_add(1);
        if self.position & (self.entries.len() as u64 / 4).saturating_sub(1) == 0 {
            self.tell(self.position);
        }
        Some((seen & INDEX_MASK) as u32)
    }

    fn tell(&mut self, head: u64) {
        self.told = head;
        // R1: the entries before it have been read and may be overwritten.
        self.head.store(head, Release);
        crash_point!("returns.told");
    }

    /// Waits for an entry to tell the position.
    #[cold]
    fn find(&mut self) {
        let Some(before) = &mut self.damaged else {
            self.damaged = Some(self.entries.iter().map(|entry| entry.load(Acquire)).collect());
            self.lost = true;
            // One that is none, so that a full ring does not wait for us.
            return self.tell(self.position.wrapping_add(NO_HEAD));
        };
        let mut newest = None;
        for (at, (entry, before)) in self.entries.iter().zip(before).enumerate() {
            let now = entry.load(Acquire);
            if now != *before {
                *before = now;
                newest = newest.max(position_of(self.entries, at, now));
            }
        }
        if let Some(newest) = newest {
            self.position = newest.wrapping_add(1);
            self.damaged = None;
            self.lost = true;
            self.tell(self.position);
        }
    }

    /// Looks whether head and last entry are what they were left as. After a death: a successor of the producer goes by
    /// them, and may write over what would have shown.
    pub fn check(&mut self) {
        let last = self.position.wrapping_sub(1);
        let seen = self.entries[slot(self.entries, last)].load(Acquire);
        // In a full ring the newest entry is there already.
        let is_there = is_at(seen, last) || is_at(seen, last.wrapping_add(self.entries.len() as u64));
        if self.damaged.is_none() && !(is_there && self.head.load(Relaxed) == self.told) {
            self.find();
        }
    }

    /// Whether entries may have been lost since this was asked last. Their items are DONE: look at all.
    #[inline]
    pub fn take_lost(&mut self) -> bool {
        std::mem::take(&mut self.lost)
    }
}

fn slot(entries: &[AtomicU64], position: u64) -> usize {
    position as usize & (entries.len() - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    fn memory(len: usize) -> (AtomicU64, Vec<AtomicU64>) {
        let (head, entries) = (AtomicU64::new(0), (0..len).map(|_| AtomicU64::new(0)).collect::<Vec<_>>());
        prepare(&head, &entries);
        (head, entries)
    }

    #[test]
    fn in_order_and_full_at_capacity() {
        let (head, entries) = memory(8);
        let mut producer = Producer::resume(&head, &entries);
        let mut consumer = Consumer::resume(&head, &entries);
        for round in 0..50 {
            assert_eq!(consumer.pop(), None);
            for i in 0..8 {
                assert!(producer.push(round * 8 + i));
            }
            assert!(!producer.push(0));
            for i in 0..8 {
                assert_eq!(consumer.pop(), Some(round * 8 + i));
            }
        }
    }

    #[test]
    fn successors_find_their_place() {
        let (head, entries) = memory(8);
        let mut producer = Producer::resume(&head, &entries);
        let mut consumer = Consumer::resume(&head, &entries);
        for i in 0..5 {
            assert!(producer.push(i));
        }
        for i in 0..3 {
            assert_eq!(consumer.pop(), Some(i));
        }
        let mut producer = Producer::resume(&head, &entries);
        assert!(producer.push(5));
        // The head was told at 2: entry 2 is seen again, nothing is skipped.
        let mut consumer = Consumer::resume(&head, &entries);
        for i in 2..6 {
            assert_eq!(consumer.pop(), Some(i));
        }
        assert_eq!(consumer.pop(), None);
    }

    /// A ring whose sides live and die as they come: indices are popped in the order that they were pushed in, a successor
    /// sees some again and skips none, nothing is written over that was not read, and nobody says that it may be lost.
    #[test]
    fn whoever_dies_nothing_is_skipped() {
        for seed in 1..if cfg!(miri) { 10 } else { 2000u64 } {
            let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let mut below = |n: u64| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state % n
            };
            let len = 1 << below(5);
            let quarter = (len / 4).max(1);
            let (head, entries) = memory(len as usize);
            let (mut producer, mut consumer) = (Producer::resume(&head, &entries), Consumer::resume(&head, &entries));
            let (mut pushed, mut popped) = (0, 0);
            for _ in 0..200 {
                match below(8) {
                    0..=2 if producer.push(pushed as u32) => {
                        assert!(pushed - popped < len, "{seed}: what was not read is written over");
                        pushed += 1;
                    }
                    0..=2 => assert!(pushed - popped > len - quarter, "{seed}: there is room"),
                    3..=5 => {
                        let next = (popped < pushed).then_some(popped as u32);
                        assert_eq!((consumer.peek(0), consumer.pop()), (next, next), "{seed}");
                        popped += u64::from(next.is_some());
                    }
                    6 => {
                        consumer.check();
                        producer = Producer::resume(&head, &entries);
                        assert_eq!(producer.position(), pushed, "{seed}");
                    }
                    _ => {
                        // As a front does, for it may be the first.
                        prepare(&head, &entries);
                        consumer = Consumer::resume(&head, &entries);
                        let again = consumer.peek(0).map_or(0, |next| popped - u64::from(next));
                        assert!(again < quarter, "{seed}: {again} again");
                        popped -= again;
                    }
                }
                assert!(!consumer.take_lost(), "{seed}");
            }
        }
    }

    /// The other entries say where they are, also if one of them is as wrong as the head.
    #[test]
    fn successors_do_not_believe_a_head_that_is_none() {
        for used in [3, 8, 19, 20, 27] {
            let second = used - 2;
            // What a lap or two before left there, or some other position of the slot.
            let positions = [-8, -16, 800].map(|laps| second + laps).into_iter().filter(|position| *position >= 0);
            let wrong = positions.map(|position| entry(position as u64, 9)).chain([0, u64::MAX]).map(Some);
            for wrong in wrong.chain([None]) {
                for none in [u64::MAX, u64::MAX - 1, 1 << 40, 0x5555_5555_5555_5555] {
                    let what = format!("{used} used, head {none:x}, an entry {wrong:x?}");
                    let (head, entries) = memory(8);
                    let mut producer = Producer::resume(&head, &entries);
                    let mut consumer = Consumer::resume(&head, &entries);
                    for i in 0..used as u32 {
                        assert!(producer.push(i) && consumer.pop() == Some(i));
                    }
                    if let Some(wrong) = wrong {
                        entries[slot(&entries, second as u64)].store(wrong, Relaxed);
                    }
                    head.store(none, Relaxed);
                    assert_eq!(Producer::resume(&head, &entries).position(), used as u64, "{what}");

                    let mut consumer = Consumer::resume(&head, &entries);
                    assert_eq!(consumer.pop(), None, "{what}");
                    for i in 0..8 {
                        assert!(producer.push(i), "{what}");
                    }
                    assert!(!producer.push(8), "{what}: the old producer has not seen the new head");
                    for i in 0..8 {
                        assert_eq!(consumer.pop(), Some(i), "{what}");
                    }
                }
            }
        }
    }

    /// Before a successor of the producer writes over what shows it.
    #[test]
    fn a_check_shows_what_was_scribbled_over_and_says_so_once() {
        let bad = [u64::MAX, 0x5555_5555_5555_5555];
        let each = (0..12).flat_map(|used| [true, false].map(|is_head| (used, is_head)));
        for ((used, is_head), bad) in each.flat_map(|one| bad.map(|bad| (one, bad))) {
            let (head, entries) = memory(8);
            let mut producer = Producer::resume(&head, &entries);
            let mut consumer = Consumer::resume(&head, &entries);
            for i in 0..used {
                assert!(producer.push(i) && consumer.pop() == Some(i));
            }
            consumer.check();
            assert!(!consumer.take_lost(), "{used} used: nothing is wrong");
            let last = &entries[slot(&entries, u64::from(used).wrapping_sub(1))];
            let word = if is_head { &head } else { last };
            let good = word.swap(bad, Relaxed);
            consumer.check();
            assert!(consumer.take_lost(), "{used} used: {bad:x} for {good:x}");
            assert!(!consumer.take_lost(), "it was said");
            assert!(producer.push(7));
            assert_eq!(consumer.pop(), Some(7), "and it goes on");
        }
    }

    #[test]
    fn a_successor_of_a_full_ring_knows_that_it_is_full() {
        let (head, entries) = memory(4);
        let mut producer = Producer::resume(&head, &entries);
        for i in 0..4 {
            assert!(producer.push(i));
        }
        assert!(!Producer::resume(&head, &entries).push(9));
    }

    /// All that is pushed after the damage is popped, or told to be lost.
    #[test]
    fn a_ring_that_was_scribbled_over_mends_itself() {
        let garbage = [0, u64::MAX, 0x5555_5555_5555_5555, entry(1 << 40, 9)];
        for (used, held, width) in [(0, 0, 1), (3, 2, 1), (3, 2, 4), (11, 5, 3), (30, 8, 1), (30, 4, 8)] {
            let places = (0..9).step_by(if cfg!(miri) { 4 } else { 1 });
            for (at, bad) in places.flat_map(|at| garbage.map(|bad| (at, bad))) {
                let what = format!("{used} used, {held} held, {width} words from {at} are {bad:x}");
                let (head, entries) = memory(8);
                let mut producer = Producer::resume(&head, &entries);
                let mut consumer = Consumer::resume(&head, &entries);
                for i in 0..used {
                    assert!(producer.push(i));
                    assert_eq!(consumer.pop(), Some(i));
                }
                for i in 0..held {
                    assert!(producer.push(i));
                }
                // The head comes first.
                let words = || [&head].into_iter().chain(&entries).cycle().skip(at).take(width);
                words().for_each(|word| word.store(bad, Relaxed));
                // Whatever is left of before.
                while consumer.pop().is_some() {}
                consumer.take_lost();
                for i in 100..140 {
                    let mut told = !producer.push(i);
                    told |= std::iter::from_fn(|| consumer.pop()).last() == Some(i);
                    assert!(told | consumer.take_lost(), "{what}: {i} is lost");
                }
                assert!(producer.push(7) && consumer.pop() == Some(7), "{what}");

                // The same to successors of each, and then they know nothing but what is there.
                words().for_each(|word| word.store(bad, Relaxed));
                let mut producer = Producer::resume(&head, &entries);
                consumer.check();
                for i in 200..240 {
                    let mut told = !producer.push(i);
                    told |= std::iter::from_fn(|| consumer.pop()).last() == Some(i);
                    // Its predecessor's death is a reason to look, at first.
                    assert!(told | consumer.take_lost() || i == 200, "{what}: {i} is lost after a death");
                }
                words().for_each(|word| word.store(bad, Relaxed));
                let mut consumer = Consumer::resume(&head, &entries);
                for i in 300..340 {
                    let mut told = !producer.push(i);
                    told |= std::iter::from_fn(|| consumer.pop()).last() == Some(i);
                    assert!(told | consumer.take_lost() || i == 300, "{what}: {i} is lost after the front's death");
                }
                assert!(producer.push(7) && consumer.pop() == Some(7), "{what}");
            }
        }
    }

    #[test]
    fn across_threads_nothing_is_lost_or_reordered() {
        const COUNT: u32 = if cfg!(miri) { 200 } else { 200_000 };
        let (head, entries) = memory(64);
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut producer = Producer::resume(&head, &entries);
                for i in 0..COUNT {
                    while !producer.push(i) {
                        thread::yield_now();
                    }
                }
            });
            let mut consumer = Consumer::resume(&head, &entries);
            for i in 0..COUNT {
                loop {
                    match consumer.pop() {
                        Some(index) => break assert_eq!(index, i),
                        None => thread::yield_now(),
                    }
                }
            }
        });
    }
}
