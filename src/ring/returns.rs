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
        let known_head = head.load(Acquire);
        let mut position = known_head;
        // At most a ring of entries can follow the head; whatever else the memory may hold, this ends.
        while position.wrapping_sub(known_head) < entries.len() as u64
            && is_at(entries[slot(entries, position)].load(Acquire), position)
        {
            position = position.wrapping_add(1);
        }
        Producer { head, entries, position, known_head }
    }

    /// Publishes an index; false if the ring is full.
    #[inline]
    pub fn push(&mut self, index: u32) -> bool {
        let capacity = self.entries.len() as u64;
        if self.position.wrapping_sub(self.known_head) >= capacity {
            // R1': the entries before the head have been read.
            self.known_head = self.head.load(Acquire);
            if self.position.wrapping_sub(self.known_head) >= capacity {
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

/// The front's end.
#[derive(Debug)]
pub struct Consumer<'a> {
    head: &'a AtomicU64,
    entries: &'a [AtomicU64],
    position: u64,
}

impl<'a> Consumer<'a> {
    /// Takes over from whoever consumed before: goes on from the last position that was told.
    pub fn resume(head: &'a AtomicU64, entries: &'a [AtomicU64]) -> Self {
        assert!(entries.len().is_power_of_two(), "a return ring has a power of two of entries");
        Consumer { head, entries, position: head.load(Relaxed) }
    }

    /// The index that `pop` will give next, if it is there already.
    #[inline]
    pub fn peek(&self) -> Option<u32> {
        // Relaxed: good for fetching ahead what it is about, and no more.
        let seen = self.entries[slot(self.entries, self.position)].load(Relaxed);
        is_at(seen, self.position).then_some((seen & INDEX_MASK) as u32)
    }

    /// The next index, if there is one.
    #[inline]
    pub fn pop(&mut self) -> Option<u32> {
        // R0': the item behind the entry is DONE or newer.
        let seen = self.entries[slot(self.entries, self.position)].load(Acquire);
        if !is_at(seen, self.position) {
            return None;
        }
        self.position = self.position.wrapping_add(1);
        if self.position & (self.entries.len() as u64 / 4).saturating_sub(1) == 0 {
            // R1: the entries before it have been read and may be overwritten.
            self.head.store(self.position, Release);
            crash_point!("returns.told");
        }
        Some((seen & INDEX_MASK) as u32)
    }
}

fn slot(entries: &[AtomicU64], position: u64) -> usize {
    position as usize & (entries.len() - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    fn memory(entries: usize) -> (AtomicU64, Vec<AtomicU64>) {
        (AtomicU64::new(0), (0..entries).map(|_| AtomicU64::new(0)).collect())
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

    #[test]
    fn a_successor_of_a_full_ring_knows_that_it_is_full() {
        let (head, entries) = memory(4);
        let mut producer = Producer::resume(&head, &entries);
        for i in 0..4 {
            assert!(producer.push(i));
        }
        assert!(!Producer::resume(&head, &entries).push(9));
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
