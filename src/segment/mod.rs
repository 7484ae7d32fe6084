//! The segment: the one POSIX shared-memory object that supervisor, fronts and workers map.
//!
//! # What it promises
//!
//! - A segment that was made has all its memory: it is reserved with `fallocate`, so that a full `/dev/shm` is an error
//!   at the start and never a SIGBUS later.
//! - A process that attached never touches memory outside its views, whatever the segment says: offsets come from a
//!   private copy of the geometry, which was checked against the size of the object.
//! - A name belongs to one live server, and what a dead one left is adopted or refused: see `owner`.
//!
//! # Why the views are sound
//!
//! Everything in the control part is an atomic, so a shared reference to it is valid whatever other processes do.
//! There are no pointers, bools or enums in shared memory. The arenas are only handed out by `arena`.
//!
//! | view | supervisor | front | worker |
//! |---|---|---|---|
//! | control | read, write | read, write | read, write |
//! | dead letters | read, write | read only | – |
//! | their marks | read only | read, write | – |
//! | request arena | read only | read, write | read only |
//! | result arena | – | read only | read, write (its own partition only) |
//!
//! Each process maps the object itself; nothing is inherited over `fork` (`MADV_DONTFORK`), so a grandchild cannot
//! write here after its worker is gone.
#![allow(unsafe_code)]

mod error;
mod identity;
mod inspect;
mod layout;
mod letters;
mod owner;
mod pins;
mod record;
mod registry;
mod view;

use std::{
    io,
    mem::{offset_of, size_of},
    os::fd::AsFd,
    sync::atomic::{
        AtomicBool, AtomicU32, AtomicU64,
        Ordering::{Acquire, Relaxed, Release, SeqCst},
        fence,
    },
    time::Duration,
};

use raw_sync::{
    Timeout,
    events::{BusyEvent, EventImpl, EventInit, EventState},
};
use rustix::fs::fstat;
use zerocopy::FromBytes;

pub use error::SegmentError;
pub use identity::PoolShape;
pub use inspect::{SegmentInfo, inspect};
pub use layout::{
    GRANULE, Geometry, Layout, MAX_FRONTS, MAX_ITEMS, MAX_POOLS, MAX_WORKERS, MIN_LETTER_BYTES, PRIORITIES, Slot,
};
pub use letters::{Letter, LetterKey, LetterLog, Letters};
pub use owner::{SegmentOwner, Terms, shm_size};
pub use pins::Pin;
pub use record::{INLINE, Inline, ItemRecord, WINDOW};
pub use registry::Liveness;

use crate::{
    crash_point::crash_point,
    doorbell::Sleepers,
    ring::{Consumer, Lane, Producer, returns},
};
use layout::{BITMAP, BLOCK, PAGE};
use pins::Pins;
use view::{Access, View};

/// Changes when the meaning of anything in the segment does.
pub const ABI: u32 = 6;
const MAGIC: u64 = u64::from_le_bytes(*b"forkring");
/// In the place of the magic number while the rest of the header is written.
const MAKING: u64 = u64::from_le_bytes(*b"forkr...");
const DIRECTORY: &str = "/dev/shm";

/// What the names of all our objects in `/dev/shm` start with.
pub const PREFIX: &str = "forkring-";

fn os_id(name: &str) -> String {
    format!("/{PREFIX}{name}")
}

/// The first page. Written by the creator before `magic`, and never again but for the creator, whom an adopter replaces,
/// the gate and the last two fields.
#[derive(FromBytes)]
#[repr(C)]
struct Header {
    magic: AtomicU64,
    abi: AtomicU32,
    creator_pid: AtomicU32,
    creator_start: AtomicU64,
    boot_id: [AtomicU64; 2],
    layout_hash: AtomicU64,
    counts: [AtomicU32; 4],
    bytes: [AtomicU64; 3],
    _gap: [AtomicU64; 5],
    /// The start gate, in a block of its own.
    gate: [AtomicU64; 16],
    /// Written by the supervisor, read by all: a [`Stage`].
    stage: AtomicU32,
    /// Counts the changes of the registry.
    epoch: AtomicU32,
}

const _: () = assert!(offset_of!(Header, gate) == BLOCK as usize && offset_of!(Header, stage) == 2 * BLOCK as usize);

impl Header {
    /// Makes the gate anew: closed, whatever it was. Nobody may be waiting there.
    fn close_gate(&self) -> io::Result<()> {
        // SAFETY: the gate's block is 128 bytes of the header, which is mapped for writing; an event needs two of them.
        unsafe { BusyEvent::new(self.gate.as_ptr().cast_mut().cast(), false) }
            .map_err(|error| io::Error::other(error.to_string()))?;
        Ok(())
    }
}

/// How far a server is on its way to the end. It never goes back, but for the next server that adopts the segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Stage {
    /// Work is taken.
    Serving = 0,
    /// Fronts take nothing new, finish what they have, and end.
    Draining = 1,
    /// Workers end when their lanes are empty.
    Stopping = 2,
}

/// What others leave at a participant's door, each line in a block of its own.
#[repr(C)]
struct Door {
    /// Bit 0: the participant sleeps. A front sleeps for results, a worker for room in its result arena.
    sleeping: [AtomicU64; 1],
    /// Nonzero: a return ring was full, so the front must look through its items. Set by workers, cleared by the front.
    rescan: AtomicU64,
}

/// One process's views of the segment.
#[derive(Debug)]
pub struct Segment {
    layout: Layout,
    control: View,
    /// The dead letters and the marks on them, if any are kept and the participant may see them.
    letters: Option<(View, View)>,
    requests: Option<View>,
    results: Option<View>,
    /// Offset of `results` in the object: a worker maps its own partition only.
    results_at: u64,
    /// The records, looked up once.
    items: *const ItemRecord,
    /// Whose view this is, and whether the slot's one user has come.
    slot: Slot,
    occupied: AtomicBool,
    pins: Pins,
}

impl Drop for Segment {
    fn drop(&mut self) {
        self.unmap_second();
    }
}

// SAFETY: the mappings belong to the process, not to a thread; everything reachable through them by shared reference is
// atomic, or guarded by the arena's rules. `items` points into `control`.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

impl Segment {
    /// Maps what a participant in `slot` may see. The object is the creator's or inherited; its header is checked
    /// and its geometry copied, and never looked at again.
    pub fn attach(object: &impl AsFd, name: &str, slot: Slot) -> Result<Self, SegmentError> {
        let io = |what| move |error: io::Error| SegmentError::Io { what, name: name.to_owned(), error };
        let foreign = |why| SegmentError::Foreign { name: name.to_owned(), why };
        let size = fstat(object).map_err(|e| io("look at")(e.into()))?.st_size as u64;
        if size < PAGE {
            return Err(foreign("it is too small"));
        }
        let view = View::map(object, 0, PAGE, Access::Read).map_err(io("map"))?;
        let header: &Header = view.at(0);
        // S0': pairs with S0 in `owner`.
        if header.magic.load(Acquire) != MAGIC {
            return Err(foreign("it has no header"));
        }
        if header.abi.load(Relaxed) != ABI {
            return Err(foreign("it has another ABI version"));
        }
        let layout = Layout::of(header.geometry())?;
        if layout.total != size || layout.hash() != header.layout_hash.load(Relaxed) {
            return Err(foreign("it has another layout"));
        }
        Self::attach_by(layout, object, name, slot)
    }

    /// The same by a layout that is known, as to a child of the creator: whatever was made of the header since.
    pub fn attach_by(layout: Layout, object: &impl AsFd, name: &str, slot: Slot) -> Result<Self, SegmentError> {
        let io = |what| move |error: io::Error| SegmentError::Io { what, name: name.to_owned(), error };
        if layout.participant(slot).is_none() {
            return Err(SegmentError::Foreign { name: name.to_owned(), why: "it has no such slot" });
        }
        let map = |offset, len, access| View::map(object, offset, len, access).map_err(io("map"));
        let control = map(0, layout.control, Access::Write)?;
        let requests_len = layout.results - layout.requests;
        let letters = |of_letters, of_marks| {
            if layout.letter_slots() == 0 {
                return Ok(None);
            }
            let letters = map(layout.letters, layout.letter_marks - layout.letters, of_letters)?;
            Ok(Some((letters, map(layout.letter_marks, layout.requests - layout.letter_marks, of_marks)?)))
        };
        let letters = match slot {
            Slot::Supervisor => letters(Access::Write, Access::Read)?,
            Slot::Front(_) => letters(Access::Read, Access::Write)?,
            Slot::Worker(_) => None,
        };
        let (requests, results, results_at) = match slot {
            Slot::Supervisor => (Some(map(layout.requests, requests_len, Access::Read)?), None, layout.results),
            Slot::Front(_) => (
                Some(map(layout.requests, requests_len, Access::Write)?),
                Some(map(layout.results, layout.total - layout.results, Access::Read)?),
                layout.results,
            ),
            Slot::Worker(n) => {
                let at = layout.results + u64::from(n) * layout.geometry.result_bytes;
                (
                    Some(map(layout.requests, requests_len, Access::Read)?),
                    Some(map(at, layout.geometry.result_bytes, Access::Write)?),
                    at,
                )
            }
        };
        let items = control.slice::<ItemRecord>(layout.items, layout.geometry.items as usize).as_ptr();
        let (occupied, pins) = (AtomicBool::new(false), Pins::default());
        Ok(Segment { layout, control, letters, requests, results, results_at, items, slot, occupied, pins })
    }

    /// Whether the caller is the first to use this view's slot: there is one allocating process for a partition, and one
    /// allocator in it.
    pub(crate) fn occupy(&self, slot: Slot) -> bool {
        // Relaxed: private memory of one process, and nothing is published by it.
        slot == self.slot && !self.occupied.swap(true, Relaxed)
    }

    fn header(&self) -> &Header {
        self.control.at(0)
    }

    /// Where everything is.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The geometry, as it was at attach.
    pub fn geometry(&self) -> &Geometry {
        &self.layout.geometry
    }

    /// The record of an item.
    ///
    /// # Panics
    ///
    /// If the index is out of range: whoever reads an index from shared memory checks it first.
    #[inline]
    pub fn item(&self, index: u32) -> &ItemRecord {
        assert!(index < self.layout.geometry.items, "no such item");
        // SAFETY: `items` is the start of a slice of that many records inside `control`, which lives as long as `self`.
        unsafe { &*self.items.add(index as usize) }
    }

    /// Asks the processor for an item's four cache lines, for writing. Their way from another core is what an item
    /// costs, and so they come together instead of one by one. Does nothing for an index that is none.
    #[inline]
    pub(crate) fn fetch(&self, index: u32) {
        #[cfg(target_arch = "x86_64")]
        if index < self.layout.geometry.items {
            let record: *const ItemRecord = self.item(index);
            // SAFETY: a hint to the cache, which changes no memory and cannot fault.
            unsafe {
                std::arch::asm!(
                    "prefetchw [{0}]",
                    "prefetchw [{0} + 64]",
                    "prefetchw [{0} + 128]",
                    "prefetchw [{0} + 192]",
                    in(reg) record,
                    options(nostack, preserves_flags, readonly)
                );
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = index;
    }

    /// The lane of a pool and priority.
    pub fn lane(&self, lane: u32) -> Lane<'_> {
        assert!(lane < self.layout.geometry.pools * PRIORITIES, "no such lane");
        let at = self.layout.lanes + u64::from(lane) * self.layout.lane_stride;
        let cells = self.control.slice(at + 2 * BLOCK, self.layout.lane_cells());
        Lane::new(self.control.at(at), self.control.at(at + BLOCK), cells)
    }

    fn return_ring(&self, worker: u16, front: u16) -> (&AtomicU64, &[AtomicU64]) {
        let Geometry { workers, fronts, .. } = self.layout.geometry;
        assert!(u32::from(worker) < workers && u32::from(front) < fronts, "no such return ring");
        let ring = u64::from(worker) * u64::from(fronts) + u64::from(front);
        let at = self.layout.returns + ring * self.layout.return_stride;
        (self.control.at(at), self.control.slice(at + BLOCK, self.layout.return_entries()))
    }

    /// The worker's end of the return ring between the two. There must be one at a time.
    pub fn producer(&self, worker: u16, front: u16) -> Producer<'_> {
        let (head, entries) = self.return_ring(worker, front);
        Producer::resume(head, entries)
    }

    /// How much has come back from a worker's slot. Only while nobody is in it.
    pub fn returned(&self, worker: u16) -> u64 {
        let fronts = 0..self.geometry().fronts as u16;
        fronts.fold(0, |sum, front| sum.wrapping_add(self.producer(worker, front).position()))
    }

    /// The front's end of the return ring between the two. There must be one at a time.
    pub fn consumer(&self, worker: u16, front: u16) -> Consumer<'_> {
        let (head, entries) = self.return_ring(worker, front);
        returns::prepare(head, entries);
        Consumer::resume(head, entries)
    }

    /// The idle bitmap of a pool: a bit for each of its workers, from its first.
    pub fn idle(&self, pool: u16) -> Sleepers<'_> {
        Sleepers::new(self.bitmap(pool, 0))
    }

    /// The workers of a pool that spin, a bit each as in its idle bitmap. Only a matter of speed.
    pub fn spinning(&self, pool: u16) -> &[AtomicU64] {
        self.bitmap(pool, 1)
    }

    /// Returns one of a pool's two bitmaps, with as many words as the workers of the whole segment need.
    fn bitmap(&self, pool: u16, number: u64) -> &[AtomicU64] {
        assert!(u32::from(pool) < self.layout.geometry.pools, "no such pool");
        let words = self.layout.geometry.workers.div_ceil(64) as usize;
        self.control.slice(self.layout.idle + (2 * u64::from(pool) + number) * BITMAP, words)
    }

    fn door(&self, slot: Slot) -> &Door {
        let Some(n) = self.layout.participant(slot) else { panic!("no such participant") };
        self.control.at(self.layout.doorbells + n * BLOCK)
    }

    /// Whether a participant sleeps for something that is not in a lane: bit 0.
    pub fn sleeping(&self, slot: Slot) -> Sleepers<'_> {
        Sleepers::new(&self.door(slot).sleeping)
    }

    /// A front's note that a return ring was full.
    pub fn rescan(&self, front: u16) -> &AtomicU64 {
        &self.door(Slot::Front(front)).rescan
    }

    /// Counts the changes of the registry and of the draining flag.
    pub fn epoch(&self) -> u32 {
        self.header().epoch.load(Acquire)
    }

    /// How far the server is on its way to the end.
    pub fn stage(&self) -> Stage {
        match self.header().stage.load(Acquire) {
            0 => Stage::Serving,
            1 => Stage::Draining,
            _ => Stage::Stopping,
        }
    }

    /// The supervisor's: from now on the server is in this stage. Ring everybody after it.
    pub fn set_stage(&self, stage: Stage) {
        self.header().stage.store(stage as u32, Release);
        crash_point!("segment.staged");
        self.header().epoch.fetch_add(1, Release);
    }

    /// The adopter's, before it forks anybody: all that is about processes, who are dead, and all hints are forgotten, and
    /// the server is at its beginning. The items stay.
    pub(crate) fn reset(&self) -> io::Result<()> {
        let part = self.layout.processes();
        let words = (part.end - part.start) as usize / size_of::<AtomicU64>();
        for word in self.control.slice::<AtomicU64>(part.start, words) {
            word.store(0, Relaxed);
        }
        crash_point!("adopt.reset");
        self.header().close_gate()?;
        crash_point!("adopt.closed");
        self.set_stage(Stage::Serving);
        crash_point!("adopt.staged");
        Ok(())
    }

    /// What a process that runs wild may do to all but the items.
    #[cfg(test)]
    pub(crate) fn scribble(&self) {
        let part = self.layout.processes();
        let words = (part.end - part.start) as usize / size_of::<AtomicU64>();
        for (at, word) in (0..).zip(self.control.slice::<AtomicU64>(part.start, words)) {
            word.store(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(at), Relaxed);
        }
        self.header().stage.store(u32::MAX, Relaxed);
        self.header().gate[0].store(u64::MAX, Relaxed);
    }

    fn gate(&self) -> Box<dyn EventImpl> {
        let gate = self.header().gate.as_ptr().cast_mut().cast();
        // SAFETY: `close_gate` made an event here. It consists of an atomic byte and one that never changes, so that any
        // number of processes may look at it at once; nobody can die holding it, unlike a pthread condition.
        match unsafe { BusyEvent::from_existing(gate) } {
            Ok((event, _)) => event,
            // It refuses bytes above 1, which only a scribbling process can have put there; nobody else needs the gate.
            Err(_) => std::process::abort(),
        }
    }

    /// The supervisor's, once: everybody is forked and registered, begin.
    pub fn open_gate(&self) {
        // G0: the event itself is relaxed. Pairs with G0'.
        fence(SeqCst);
        let _ = self.gate().set(EventState::Signaled);
    }

    /// The supervisor's: what nobody changes any more once the gate is open, header, gate and pools.
    pub(crate) fn constants(&self) -> Vec<u64> {
        self.constant_words().map(|word| word.load(Relaxed)).collect()
    }

    /// The supervisor's: writes them again, where they are not what they were.
    pub(crate) fn restore(&self, constants: &[u64]) {
        for (word, value) in self.constant_words().zip(constants) {
            if word.load(Relaxed) != *value {
                word.store(*value, Relaxed);
            }
        }
    }

    fn constant_words(&self) -> impl Iterator<Item = &AtomicU64> {
        let words = |at, bytes: u64| self.control.slice::<AtomicU64>(at, bytes as usize / size_of::<AtomicU64>());
        let stage = offset_of!(Header, stage) as u64;
        words(0, stage).iter().chain(words(self.layout.pool(0), u64::from(self.layout.geometry.pools) * BLOCK))
    }

    /// A child's, once, before anything else: waits until the supervisor has opened the gate.
    pub fn pass_gate(&self) {
        let gate = self.gate();
        // The event busy-waits: short turns, so that the supervisor gets the core if there is only one.
        while gate.wait(Timeout::Val(Duration::from_micros(20))).is_err() {
            std::thread::yield_now();
        }
        // G0'.
        fence(SeqCst);
    }

    /// Where `len` bytes at `offset` of a front's request partition are, if they are in it.
    pub(crate) fn request(&self, front: u16, offset: u64, len: u64) -> Option<*mut u8> {
        let bytes = self.layout.geometry.request_bytes;
        let view = self.requests.as_ref()?;
        if u32::from(front) >= self.layout.geometry.fronts || offset.checked_add(len)? > bytes {
            return None;
        }
        let at = (u64::from(front) * bytes + offset) as usize;
        // The partition is inside the view, and offset + len is inside the partition.
        Some(self.pins.address(view.map.as_mut_ptr(), at, len as usize))
    }

    /// Where `len` bytes at `offset` of a worker's result partition are, if they are in it and it is mapped here.
    pub(crate) fn result(&self, worker: u16, offset: u64, len: u64) -> Option<*mut u8> {
        let bytes = self.layout.geometry.result_bytes;
        let view = self.results.as_ref()?;
        if u32::from(worker) >= self.layout.geometry.workers || offset.checked_add(len)? > bytes {
            return None;
        }
        let at = (self.layout.results + u64::from(worker) * bytes + offset).checked_sub(self.results_at)? as usize;
        if at + len as usize > view.map.len() {
            return None;
        }
        // SAFETY: at + len is inside the view, as just checked.
        Some(unsafe { view.map.as_mut_ptr().add(at) })
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;

    fn geometry() -> Geometry {
        Geometry {
            items: 64,
            fronts: 1,
            workers: 2,
            pools: 1,
            request_bytes: 1 << 16,
            result_bytes: 1 << 16,
            letter_bytes: 1 << 16,
        }
    }

    fn name(test: &str) -> String {
        format!("unit-{test}-{}", std::process::id())
    }

    #[test]
    fn attaches_and_is_removed_with_its_owner() {
        let name = name("attach");
        let owner = SegmentOwner::create(&name, geometry()).unwrap();
        let front = Segment::attach(owner.object(), &name, Slot::Front(0)).unwrap();
        let worker = Segment::attach(owner.object(), &name, Slot::Worker(1)).unwrap();
        assert_eq!(front.geometry(), worker.geometry());
        front.set_liveness(Slot::Worker(1), Liveness::Live(7));
        assert_eq!(worker.liveness(Slot::Worker(1)), Liveness::Live(7));
        front.set_stage(Stage::Stopping);
        front.reset().unwrap();
        assert_eq!((worker.liveness(Slot::Worker(1)), worker.stage()), (Liveness::Free, Stage::Serving));
        assert!(worker.result(1, 0, 1 << 16).is_some());
        assert!(worker.result(0, 0, 1).is_none(), "another worker's partition is not even mapped");
        assert!(worker.result(1, 1, 1 << 16).is_none());
        assert!(worker.request(0, u64::MAX, 2).is_none());
        let info = inspect(&name).unwrap();
        assert!(info.alive);
        assert_eq!(info.creator.map(NonZeroU32::get), Some(std::process::id()));
        drop(owner);
        assert!(inspect(&name).is_err());
    }

    #[test]
    fn a_pool_may_have_all_workers_of_a_segment() {
        let name = name("bitmaps");
        let workers = MAX_WORKERS as usize;
        let geometry = Geometry { workers: MAX_WORKERS, pools: 2, result_bytes: PAGE, ..geometry() };
        let owner = SegmentOwner::create(&name, geometry).unwrap();
        let segment = Segment::attach(owner.object(), &name, Slot::Front(0)).unwrap();
        // The bits of one bitmap are in no other's way.
        for pool in 0..2 {
            segment.idle(pool).enter(workers - 1);
            segment.spinning(pool)[workers / 64 - 1].store(u64::MAX, Relaxed);
        }
        for pool in 0..2 {
            assert_eq!(segment.idle(pool).wake_one(), Some(workers - 1));
            assert_eq!(segment.idle(pool).wake_one(), None);
            assert_eq!(segment.spinning(pool).iter().filter(|word| word.load(Relaxed) != 0).count(), 1);
        }
    }

    #[test]
    fn garbage_is_refused() {
        let name = name("garbage");
        let owner = SegmentOwner::create(&name, geometry()).unwrap();
        let attach = || Segment::attach(owner.object(), &name, Slot::Worker(0)).err().map(|e| e.to_string());
        assert_eq!(attach(), None);
        let view = View::map(owner.object(), 0, PAGE, Access::Write).unwrap();
        let header: &Header = view.at(0);
        for (word, bad) in [(&header.abi, ABI + 1), (&header.counts[2], 3), (&header.counts[0], 0)] {
            let good = word.swap(bad, Relaxed);
            assert!(attach().is_some());
            word.store(good, Relaxed);
        }
        header.magic.store(1, Relaxed);
        assert!(attach().is_some());
    }
}
