//! What the models race over: items, and a ring that leads to them.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering::Relaxed as Unmodelled},
};

use forkring_lockfree::{
    ring::{GENERATION_BITS, Hint, INDEX_BITS, Lane},
    sync::{AtomicU64, Ordering::*},
    word::{Phase, Word},
};
use loom::thread;

/// Owners. The sweep is made for the mortal.
pub const MORTAL: u16 = 1;
pub const OTHER: u16 = 2;
pub const LAST: u16 = 3;

const FILLED: u64 = 100;

/// The lane that ships, or a mutant.
pub trait Ring: Send + Sync + 'static {
    fn new(cells: usize) -> Self;
    fn push(&self, hint: Hint) -> bool;
    fn take(&self, claim: impl FnMut(Hint) -> bool) -> Option<Hint>;
    /// Whether hints are in it, where takers see them or where they do not.
    fn holds_hints(&self) -> bool;
}

pub struct Shipped {
    head: AtomicU64,
    tail: AtomicU64,
    cells: Vec<AtomicU64>,
}

impl Shipped {
    pub fn lane(&self) -> Lane<'_> {
        Lane::new(&self.head, &self.tail, &self.cells)
    }
}

impl Ring for Shipped {
    fn new(cells: usize) -> Self {
        Shipped {
            head: AtomicU64::new(0),
            tail: AtomicU64::new(0),
            cells: (0..cells).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    fn push(&self, hint: Hint) -> bool {
        self.lane().push(hint).is_ok()
    }

    fn take(&self, claim: impl FnMut(Hint) -> bool) -> Option<Hint> {
        self.lane().take(claim)
    }

    fn holds_hints(&self) -> bool {
        self.cells.iter().any(|cell| cell.load(Relaxed) >> (INDEX_BITS + GENERATION_BITS) & 1 != 0)
    }
}

/// An item as the rings need it: the word, and something that was written before it was READY.
pub struct Item {
    pub word: AtomicU64,
    payload: AtomicU64,
    /// A push of its hint has returned.
    pushed: AtomicU32,
    /// Claims, of each generation.
    claims: [AtomicU32; 4],
}

impl Item {
    fn new() -> Self {
        Item {
            word: AtomicU64::new(0),
            payload: AtomicU64::new(0),
            pushed: AtomicU32::new(0),
            claims: Default::default(),
        }
    }

    /// As a worker does, after a look: to loom a compare-exchange that fails has always seen the newest value, to a processor
    /// it is a load like any other, and may fail for an older one.
    pub fn claim(&self, hint: Hint, owner: u16) -> bool {
        let seen = Word::load(&self.word);
        if seen != Word::new(hint.generation, 0, 0, Phase::Ready, seen.attempts()) {
            return false;
        }
        let claimed = Word::claim(&self.word, hint.generation, 0, owner).is_some();
        if claimed {
            self.was_claimed(hint);
            assert_eq!(self.payload.load(Relaxed), FILLED, "claimed before it was filled");
        }
        claimed
    }

    pub fn was_claimed(&self, hint: Hint) {
        let before = self.claims[hint.generation as usize].fetch_add(1, Unmodelled);
        assert_eq!(before, 0, "claimed twice");
    }
}

pub struct World<R> {
    pub ring: R,
    pub items: Vec<Item>,
}

impl<R: Ring> World<R> {
    pub fn new(cells: usize, items: usize) -> Arc<Self> {
        Arc::new(World { ring: R::new(cells), items: (0..items).map(|_| Item::new()).collect() })
    }

    /// As a front does: fill, READY; the generation.
    pub fn fill(&self, index: u32) -> u32 {
        let item = &self.items[index as usize];
        let free = Word::load(&item.word);
        let ready = free.offered(0);
        item.payload.store(FILLED, Relaxed);
        ready.store(&item.word, free);
        ready.generation()
    }

    /// And then the hint.
    pub fn offer(&self, index: u32) {
        let generation = self.fill(index);
        self.push(index, generation);
    }

    pub fn push(&self, index: u32, generation: u32) {
        if self.ring.push(Hint { index, generation }) {
            self.items[index as usize].pushed.store(generation, Unmodelled);
        }
    }

    /// As a worker does.
    pub fn take(&self, owner: u16) -> Option<Hint> {
        self.ring.take(|hint| self.items[hint.index as usize].claim(hint, owner))
    }

    fn drain(&self) {
        while self.take(LAST).is_some() {}
    }

    /// When all racing threads are over: everything that was pushed is found, nothing is hidden in the ring, and the
    /// ring still works. Then what a supervisor and a front's successor do makes every item somebody's who lives.
    pub fn settle(&self) {
        self.drain();
        for (index, item) in self.items.iter().enumerate() {
            let word = Word::load(&item.word);
            if item.pushed.load(Unmodelled) == word.generation() {
                assert_ne!(word.phase(), Phase::Ready, "lost: item {index} was pushed, and nobody finds it");
            }
        }
        assert!(!self.ring.holds_hints(), "hidden: the ring holds hints, and nobody finds them");

        for (index, item) in self.items.iter().enumerate() {
            let word = Word::load(&item.word);
            match word.phase() {
                Phase::Claimed if word.owner() == MORTAL => word.requeued().store(&item.word, word),
                Phase::Free => _ = self.fill(index as u32),
                _ => {}
            }
            let word = Word::load(&item.word);
            if word.phase() == Phase::Ready {
                let hint = Hint { index: index as u32, generation: word.generation() };
                assert!(self.ring.push(hint), "stuck: the ring is empty and full at once");
                self.drain();
            }
        }
        for item in &self.items {
            let word = Word::load(&item.word);
            assert!(word.phase() == Phase::Claimed && word.owner() != MORTAL, "stuck: {word:?}");
        }
    }
}

/// A thread of the model.
pub fn spawn<S: Send + Sync + 'static, T>(
    world: &Arc<S>,
    body: impl FnOnce(&Arc<S>) -> T + 'static,
) -> thread::JoinHandle<()> {
    let world = Arc::clone(world);
    thread::spawn(move || {
        body(&world);
    })
}

/// Waits for the threads of the model.
pub fn join(threads: impl IntoIterator<Item = thread::JoinHandle<()>>) {
    for thread in threads {
        thread.join().expect("a thread of the model failed");
    }
}
