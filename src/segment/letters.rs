//! Dead letters: a bounded log of items that killed their workers, whole. When it is full, the oldest make room.
//!
//! # What it promises
//!
//! - A letter is there once `filed` counts it, which is one store, and not before: a write that is cut short leaves
//!   nothing, whoever died in it. Filing the same letter again, as a sweep does that is run again, gives the letter that is
//!   there.
//! - A reader gets a letter whole or not at all, also while it is evicted.
//! - Every letter that was evicted is counted once, unless it was marked before.
//! - No number, position or length that is read from shared memory leads out of the area.
//!
//! # Why that holds
//!
//! The supervisor is the one writer of counts, index and bytes; fronts map them read-only and workers not at all. Letters
//! are numbered from 1; number n has place n modulo the places in the index, and its bytes follow those of n-1, around the
//! end. Room is made by one store to `evicted` before the first byte is overwritten, and a reader looks at `evicted` again
//! after it has copied: the seqlock's argument, with L1 for its fences. What was dropped is counted in the entry of the
//! letter that took the room, from the entry before: an eviction without a letter, its writer having died, is counted by
//! the next.
//!
//! Marks say which letters are gone. They are the fronts', in pages of their own, so that a front that stands still
//! between looking at a letter and marking it can do no harm: marks only grow, and one for an evicted letter means nothing.

use std::sync::atomic::{
    AtomicU32, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
    fence,
};

use super::{Segment, Slot};
use crate::crash_point::crash_point;

/// How far the log has come. Written by the supervisor.
#[derive(Debug, Default)]
#[repr(C)]
pub(super) struct Counts {
    /// Letters that there have ever been: the number of the newest.
    filed: AtomicU64,
    /// Of those, how many have made room: letters after this number are there.
    evicted: AtomicU64,
    /// For readers; the writer counts by the entries.
    dropped: AtomicU64,
}

/// Where a letter is. Written by the supervisor while nobody looks at it.
#[derive(Debug, Default)]
#[repr(C)]
pub(super) struct Entry {
    index: AtomicU32,
    generation: AtomicU32,
    offered: AtomicU64,
    /// Of its first word, counted from the beginning of time.
    position: AtomicU64,
    head_len: AtomicU32,
    body_len: AtomicU32,
    /// Letters that were evicted, and those that were lost by it, when this one was filed.
    evicted: AtomicU64,
    dropped: AtomicU64,
}

/// What tells a letter's item from all others: no two are offered in the same record, generation and nanosecond.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LetterKey {
    /// The item's index.
    pub index: u32,
    /// Its generation when it was in work for the last time.
    pub generation: u32,
    /// When it was offered.
    pub offered: u64,
}

/// A letter, copied out: bytes that mean something in [`crate::dispatch`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Letter {
    /// What is known of the item.
    pub head: Vec<u8>,
    /// Its payload, if it was asked for.
    pub body: Vec<u8>,
}

/// An entry in private memory.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    key: LetterKey,
    position: u64,
    head_len: u32,
    body_len: u32,
    evicted: u64,
    dropped: u64,
}

impl Place {
    fn body(&self) -> u64 {
        self.position.wrapping_add(words(self.head_len as usize))
    }

    fn end(&self) -> u64 {
        self.body().wrapping_add(words(self.body_len as usize))
    }
}

/// Words that so many bytes take.
fn words(len: usize) -> u64 {
    len.div_ceil(8) as u64
}

/// All of it, as reader and writer see it.
#[derive(Clone, Copy, Debug)]
struct Area<'s> {
    counts: &'s Counts,
    entries: &'s [Entry],
    bytes: &'s [AtomicU64],
    marks: &'s [AtomicU64],
}

impl Area<'_> {
    /// The numbers before the first letter that is there, and of the last.
    fn range(&self) -> (u64, u64) {
        let evicted = self.counts.evicted.load(Acquire);
        // L0': pairs with L0.
        let filed = self.counts.filed.load(Acquire);
        // It may have been filed and evicted between the two loads; and they may be garbage.
        (evicted.max(filed.saturating_sub(self.entries.len() as u64)).min(filed), filed)
    }

    fn slot<'a, T>(&self, of: &'a [T], number: u64) -> &'a T {
        &of[(number % of.len() as u64) as usize]
    }

    fn place(&self, number: u64) -> Place {
        let entry = self.slot(self.entries, number);
        Place {
            key: LetterKey {
                index: entry.index.load(Relaxed),
                generation: entry.generation.load(Relaxed),
                offered: entry.offered.load(Relaxed),
            },
            position: entry.position.load(Relaxed),
            head_len: entry.head_len.load(Relaxed),
            body_len: entry.body_len.load(Relaxed),
            evicted: entry.evicted.load(Relaxed),
            dropped: entry.dropped.load(Relaxed),
        }
    }

    /// The words from a position on, around the end.
    fn words_from(&self, position: u64) -> impl Iterator<Item = &AtomicU64> {
        let (before, from) = self.bytes.split_at((position % self.bytes.len() as u64) as usize);
        from.iter().chain(before)
    }

    fn copy(&self, position: u64, len: u32) -> Vec<u8> {
        let len = len as usize;
        let mut bytes = Vec::with_capacity(len.next_multiple_of(8));
        for word in self.words_from(position).take(words(len) as usize) {
            bytes.extend_from_slice(&word.load(Relaxed).to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }

    fn write(&self, position: u64, bytes: &[u8]) {
        for (chunk, word) in bytes.chunks(8).zip(self.words_from(position)) {
            let mut value = [0; 8];
            value[..chunk.len()].copy_from_slice(chunk);
            word.store(u64::from_le_bytes(value), Relaxed);
        }
    }

    fn is_gone(&self, number: u64) -> bool {
        self.slot(self.marks, number).load(Relaxed) == number
    }
}

/// The supervisor's end. There is one at a time.
#[derive(Debug)]
pub struct LetterLog<'s>(Area<'s>);

impl LetterLog<'_> {
    /// The most bytes of a letter, head and body.
    pub fn largest(&self) -> usize {
        // Each of the two is rounded up to whole words.
        self.0.bytes.len() * 8 - 16
    }

    /// Letters that are there and not gone.
    pub fn count(&self) -> u64 {
        let (evicted, filed) = self.0.range();
        (evicted + 1..=filed).filter(|&number| !self.0.is_gone(number)).count() as u64
    }

    /// The number of the letter of this item, if there is one, gone or not.
    pub fn find(&self, key: LetterKey) -> Option<u64> {
        let (evicted, filed) = self.0.range();
        // The newest first: it is the one if a sweep was cut short.
        (evicted + 1..=filed).rev().find(|&number| self.0.place(number).key == key)
    }

    /// Files a letter unless it is there already; its number. None if it is larger than [`LetterLog::largest`].
    pub fn file(&self, key: LetterKey, head: &[u8], body: &[u8]) -> Option<u64> {
        if let Some(number) = self.find(key) {
            return Some(number);
        }
        let number = self.0.range().1.checked_add(1)?;
        let dropped = self.write(number, key, head, body)?;
        crash_point!("dead.written");
        self.0.counts.dropped.store(dropped, Relaxed);
        // L0: pairs with L0'.
        self.0.counts.filed.store(number, Release);
        crash_point!("dead.filed");
        Some(number)
    }

    /// Makes room and writes all that `filed` does not count yet; how many letters were dropped so far.
    fn write(&self, number: u64, key: LetterKey, head: &[u8], body: &[u8]) -> Option<u64> {
        let Area { counts, entries, bytes, .. } = self.0;
        let head_len = u32::try_from(head.len()).ok()?;
        let body_len = u32::try_from(body.len()).ok()?;
        let need = words(head.len()) + words(body.len());
        let (places, room) = (entries.len() as u64, (bytes.len() as u64).checked_sub(need)?);

        let (mut evicted, filed) = self.0.range();
        let last = if filed == 0 { Place::default() } else { self.0.place(filed) };
        let position = last.end();
        while evicted < filed {
            let used = position.wrapping_sub(self.0.place(evicted + 1).position);
            if filed - evicted < places && used <= room {
                break;
            }
            evicted += 1;
        }
        counts.evicted.store(evicted, Relaxed);
        // L1: whoever sees any of what follows sees the eviction. Pairs with L1' in `Letters::read`.
        fence(Release);
        crash_point!("dead.evicted");

        let lost = (last.evicted.max(filed.saturating_sub(places)) + 1..=evicted).filter(|&n| !self.0.is_gone(n));
        let dropped = last.dropped.saturating_add(lost.count() as u64);
        let place = Place { key, position, head_len, body_len, evicted, dropped };
        self.0.write(place.position, head);
        self.0.write(place.body(), body);
        let entry = self.0.slot(entries, number);
        entry.index.store(key.index, Relaxed);
        entry.generation.store(key.generation, Relaxed);
        entry.offered.store(key.offered, Relaxed);
        entry.position.store(position, Relaxed);
        entry.head_len.store(head_len, Relaxed);
        entry.body_len.store(body_len, Relaxed);
        entry.evicted.store(evicted, Relaxed);
        entry.dropped.store(dropped, Relaxed);
        Some(dropped)
    }
}

/// A front's end: it reads, and marks letters as gone.
#[derive(Clone, Copy, Debug)]
pub struct Letters<'s>(Area<'s>);

impl Letters<'_> {
    /// The number before the oldest letter that is there, and that of the newest; some between may be gone.
    pub fn range(&self) -> (u64, u64) {
        self.0.range()
    }

    /// Letters that made room for others and were not marked as gone before.
    pub fn dropped(&self) -> u64 {
        self.0.counts.dropped.load(Relaxed)
    }

    /// A letter's head, and its body if asked for. None if there is no such letter, or no more.
    pub fn read(&self, number: u64, with_body: bool) -> Option<Letter> {
        let (evicted, filed) = self.0.range();
        if number <= evicted || number > filed || self.0.is_gone(number) {
            return None;
        }
        let place = self.0.place(number);
        if words(place.head_len as usize) + words(place.body_len as usize) > self.0.bytes.len() as u64 {
            return None;
        }
        let head = self.0.copy(place.position, place.head_len);
        let body = if with_body { self.0.copy(place.body(), place.body_len) } else { Vec::new() };
        // L1': pairs with L1 in `LetterLog::write`.
        fence(Acquire);
        (self.0.counts.evicted.load(Relaxed) < number).then_some(Letter { head, body })
    }

    /// Marks a letter as gone: requeued, or dropped by hand.
    pub fn mark_gone(&self, number: u64) {
        // Nothing is published by it. It never goes back: a letter that was evicted meanwhile must not unmark its successor.
        self.0.slot(self.0.marks, number).fetch_max(number, Relaxed);
        crash_point!("dead.gone");
    }
}

impl Segment {
    fn letter_area(&self) -> Option<Area<'_>> {
        let (letters, marks) = self.letters.as_ref()?;
        let slots = self.layout.letter_slots();
        Some(Area {
            counts: letters.at(0),
            entries: letters.slice(super::layout::BLOCK, slots),
            bytes: letters.slice(self.layout.letter_data(), (self.layout.geometry.letter_bytes / 8) as usize),
            marks: marks.slice(0, slots),
        })
    }

    /// The dead letters, for the supervisor; none if none are kept.
    pub fn letter_log(&self) -> Option<LetterLog<'_>> {
        self.letter_area().filter(|_| self.slot == Slot::Supervisor).map(LetterLog)
    }

    /// The dead letters, for a front; none if none are kept.
    pub fn letters(&self) -> Option<Letters<'_>> {
        self.letter_area().filter(|_| matches!(self.slot, Slot::Front(_))).map(Letters)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    /// An area in private memory.
    struct Owned {
        counts: Counts,
        entries: Vec<Entry>,
        bytes: Vec<AtomicU64>,
        marks: Vec<AtomicU64>,
    }

    impl Owned {
        fn new(places: usize, words: usize) -> Self {
            Owned {
                counts: Counts::default(),
                entries: (0..places).map(|_| Entry::default()).collect(),
                bytes: (0..words).map(|_| AtomicU64::new(0)).collect(),
                marks: (0..places).map(|_| AtomicU64::new(0)).collect(),
            }
        }

        fn area(&self) -> Area<'_> {
            Area { counts: &self.counts, entries: &self.entries, bytes: &self.bytes, marks: &self.marks }
        }

        fn log(&self) -> LetterLog<'_> {
            LetterLog(self.area())
        }

        fn letters(&self) -> Letters<'_> {
            Letters(self.area())
        }
    }

    fn key(n: u64) -> LetterKey {
        LetterKey { index: n as u32 % 7, generation: n as u32, offered: n }
    }

    fn letter(seed: u64, head: usize, body: usize) -> Letter {
        let bytes = |len, salt| (0..len as u64).map(|at| (seed * 31 + at * 7 + salt) as u8).collect();
        Letter { head: bytes(head, 0), body: bytes(body, 101) }
    }

    #[derive(Clone, Debug)]
    enum Step {
        File {
            head: usize,
            body: usize,
        },
        /// The writer dies before the letter is counted.
        Torn {
            head: usize,
            body: usize,
        },
        /// The newest but so many.
        Mark(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..60usize, 0..200usize).prop_map(|(head, body)| Step::File { head, body }),
            1 => (0..60usize, 0..200usize).prop_map(|(head, body)| Step::Torn { head, body }),
            2 => (0..12u64).prop_map(Step::Mark),
        ]
    }

    const PLACES: usize = 8;
    const WORDS: usize = 61;

    proptest! {
        /// Beside a queue that does the same with no limits of its own.
        #[test]
        fn letters_are_whole_and_the_oldest_make_room(steps in prop::collection::vec(step(), 1..120)) {
            let owned = Owned::new(PLACES, WORDS);
            let mut kept: VecDeque<(u64, Letter, bool)> = VecDeque::new();
            let (mut filed, mut dropped) = (0, 0);
            let size = |letter: &Letter| words(letter.head.len()) + words(letter.body.len());
            for step in steps {
                match step {
                    Step::File { head, body } => {
                        let new = letter(filed, head, body);
                        let number = owned.log().file(key(filed), &new.head, &new.body);
                        filed += 1;
                        prop_assert_eq!(number, Some(filed));
                        prop_assert_eq!(owned.log().file(key(filed - 1), b"another", b""), number, "there already");
                        kept.push_back((filed, new, false));
                        let (evicted, _) = owned.letters().range();
                        while kept[0].0 <= evicted {
                            dropped += u64::from(!kept.pop_front().unwrap().2);
                        }
                    }
                    Step::Torn { head, body } => {
                        let new = letter(1000 + filed, head, body);
                        prop_assert!(owned.log().write(filed + 1, key(1000 + filed), &new.head, &new.body).is_some());
                    }
                    Step::Mark(back) => {
                        let number = filed.saturating_sub(back);
                        owned.letters().mark_gone(number);
                        // Also if the room of one that was requeued is taken, but not counted yet.
                        if let Some(one) = kept.iter_mut().find(|one| one.0 == number) {
                            one.2 = true;
                        }
                    }
                }
                let (evicted, last) = owned.letters().range();
                prop_assert_eq!((last, owned.letters().dropped()), (filed, dropped));
                let there: Vec<_> = kept.iter().filter(|one| one.0 > evicted).collect();
                prop_assert!(there.len() <= PLACES);
                prop_assert!(there.iter().map(|one| size(&one.1)).sum::<u64>() <= WORDS as u64);
                for (number, letter, gone) in there {
                    prop_assert_eq!(owned.letters().read(*number, true), (!gone).then(|| letter.clone()));
                }
                prop_assert_eq!(owned.letters().read(evicted, true), None);
                prop_assert_eq!(owned.letters().read(filed + 1, true), None);
            }
        }

        /// Whatever the area says, nobody panics, hangs or gets more than there is.
        #[test]
        fn garbage_is_harmless(
            counts: [u64; 3], entries in prop::collection::vec(any::<[u64; 5]>(), PLACES), number: u64, small in 0..20u64,
        ) {
            let owned = Owned::new(PLACES, WORDS);
            owned.counts.filed.store(counts[0], Relaxed);
            owned.counts.evicted.store(counts[1], Relaxed);
            owned.counts.dropped.store(counts[2], Relaxed);
            for (entry, [position, lens, evicted, dropped, index]) in owned.entries.iter().zip(entries) {
                entry.position.store(position, Relaxed);
                entry.head_len.store(lens as u32, Relaxed);
                entry.body_len.store((lens >> 32) as u32, Relaxed);
                entry.evicted.store(evicted, Relaxed);
                entry.dropped.store(dropped, Relaxed);
                entry.index.store(index as u32, Relaxed);
            }
            for number in [number, small, counts[0], counts[1]] {
                if let Some(letter) = owned.letters().read(number, true) {
                    prop_assert!(letter.head.len() + letter.body.len() <= WORDS * 8);
                }
            }
            let new = letter(1, 30, 100);
            if let Some(number) = owned.log().file(key(1), &new.head, &new.body) {
                prop_assert_eq!(owned.letters().read(number, true), Some(new));
            }
        }
    }

    #[test]
    fn what_makes_room_is_counted_once() {
        let owned = Owned::new(4, 1000);
        let file = |n| owned.log().file(key(n), b"head", b"body").unwrap();
        (1..=4).for_each(|n| assert_eq!(file(n), n));
        assert_eq!(owned.letters().dropped(), 0);
        owned.letters().mark_gone(2);
        // Takes the place of 1, and dies; comes again, and takes the same place.
        for _ in 0..3 {
            owned.log().write(5, key(5), b"head", b"body").unwrap();
        }
        assert_eq!((owned.letters().range(), owned.letters().dropped()), ((1, 4), 0), "nothing is there yet");
        assert_eq!(file(5), 5);
        assert_eq!((owned.letters().range(), owned.letters().dropped()), ((1, 5), 1));
        assert_eq!(file(6), 6);
        assert_eq!(owned.letters().dropped(), 1, "2 was gone before");
        assert_eq!(file(7), 7);
        assert_eq!((owned.letters().range(), owned.letters().dropped()), ((3, 7), 2));
        // A front that woke up late.
        owned.letters().mark_gone(3);
        assert!(owned.letters().read(7, false).is_some());
    }

    #[test]
    fn a_letter_is_as_large_as_the_area_and_no_larger() {
        let owned = Owned::new(4, 16);
        let log = owned.log();
        assert_eq!(log.largest(), 112);
        for (n, head) in [0, 1, 55, 111, 112].into_iter().enumerate() {
            let all = letter(n as u64, head, 112 - head);
            let number = log.file(key(n as u64), &all.head, &all.body).unwrap();
            assert_eq!(owned.letters().read(number, true), Some(all));
        }
        assert_eq!(log.file(key(9), &[0; 65], &[0; 64]), None);
        assert_eq!(owned.letters().range(), (4, 5), "and nothing made room for it");
    }

    #[test]
    fn readers_get_whole_letters_while_others_are_written() {
        let owned = Owned::new(4, 64);
        let size = |n: u64| (n as usize % 5 * 8, n as usize * 13 % 150);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let (mut whole, mut last) = (0, 0);
                while last < 20_000 || whole == 0 {
                    let (evicted, filed) = owned.letters().range();
                    last = filed;
                    for number in evicted + 1..=filed {
                        if let Some(found) = owned.letters().read(number, true) {
                            let (head, body) = size(number);
                            assert_eq!(found, letter(number, head, body));
                            whole += 1;
                        }
                    }
                }
            });
            for n in 1..=20_000 {
                let (head, body) = size(n);
                let new = letter(n, head, body);
                assert_eq!(owned.log().file(key(n), &new.head, &new.body), Some(n));
            }
            reader.join().unwrap();
        });
    }
}
