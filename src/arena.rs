//! Arenas: the payload memory of a segment, in partitions with exactly one allocating process each.
//!
//! # What it promises
//!
//! - A partition's allocator is private memory of the process that allocates from it. There is no shared allocator
//!   state, so a death cannot corrupt any: the successor builds a new allocator around the blocks that the item table
//!   says are in use.
//! - Blocks do not overlap, and every access is inside its partition, whatever offset the segment names.
//!
//! # Why a slice over shared memory may be handed out
//!
//! A block has one owner at a time, and the item's word says who: the front writes a request block only while the
//! item is FREE, and everybody else only reads it after the word's Release/Acquire; a worker writes a result block
//! only between its claim and its DONE. So a slice that is borrowed by the rules of [`crate::dispatch`] is not
//! written under its reader. Requests are mapped read-only in workers, and a worker maps no partition but its own,
//! so a worker that breaks the rules can at worst change the bytes of its own results while they are sent: the reader
//! copies them to a socket and decides nothing by them. There is one exception within the rules, of the same kind: of
//! a stream that was reset, HTTP/2 may still be writing the rest of a frame whose result went to another subscriber
//! and was freed; its client ignores it.
#![allow(unsafe_code)]

use std::{
    slice,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use offset_allocator::{Allocation, Allocator};

use crate::segment::{GRANULE, Segment};

/// A block of a partition. Not `Clone`: whoever has it must give it back.
#[derive(Debug)]
#[allow(clippy::len_without_is_empty)] // it never is
pub struct Block {
    offset: u64,
    len: u64,
    gap: usize,
    allocation: Allocated,
}

struct Allocated(Allocation);

impl std::fmt::Debug for Allocated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Allocation")
    }
}

impl Block {
    /// Offset in the partition, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Usable bytes: what was asked for, rounded up to whole granules.
    pub fn len(&self) -> u64 {
        self.len
    }
}

/// Bytes of a partition that are in use and not this allocator's to give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Offset in the partition.
    pub offset: u64,
    /// Length, more than zero.
    pub len: u64,
}

/// A part of a partition that an item has.
#[derive(Debug)]
pub enum Memory {
    /// Allocated by this process.
    Own(Block),
    /// In use since before this process took over.
    Inherited(Span),
}

/// The allocator of one partition. Best fit in constant time (Aaltonen's offset allocator, after TLSF).
pub struct Partition {
    bytes: u64,
    max_blocks: u32,
    /// The free ranges around what was in use at the start, each with an allocator; one, if nothing was.
    gaps: Vec<(u64, Allocator)>,
    blocks: usize,
    /// What was in use at the start and still is.
    inherited: Vec<Span>,
    /// Granules that are free, in however many pieces.
    free: u64,
}

impl Partition {
    /// An allocator of `bytes` of which `used` are taken, for at most `blocks` blocks at a time.
    pub fn around(bytes: u64, blocks: u32, mut used: Vec<Span>) -> Self {
        used.sort_unstable_by_key(|span| span.offset);
        let mut partition =
            Partition { bytes, max_blocks: blocks, gaps: Vec::new(), blocks: 0, inherited: used, free: 0 };
        let mut start = 0;
        for at in 0..=partition.inherited.len() {
            let span = partition.inherited.get(at).copied().unwrap_or(Span { offset: bytes, len: 0 });
            partition.add_gap(start, span.offset.min(bytes) / GRANULE);
            start = start.max(span.offset.saturating_add(span.len).div_ceil(GRANULE));
        }
        partition
    }

    /// Granules from `start` to `end` are free.
    fn add_gap(&mut self, start: u64, end: u64) {
        if let Ok(granules @ 1..) = u32::try_from(end.saturating_sub(start)) {
            // Each block needs a node, and so does each range between blocks.
            let nodes = granules.min(self.max_blocks).saturating_mul(2).saturating_add(4);
            self.gaps.push((start, Allocator::with_max_allocs(granules, nodes)));
            self.free += u64::from(granules);
        }
    }

    /// Gives back what an item had.
    pub fn give_back(&mut self, memory: Memory) {
        match memory {
            Memory::Own(block) => self.free(block),
            Memory::Inherited(span) => self.free_inherited(span),
        }
    }

    /// Bytes that are free, in however many pieces.
    pub fn free_bytes(&self) -> u64 {
        self.free * GRANULE
    }

    /// Something that was in use at the start no longer is. What lies in something else that is, by somebody's mistake, stays.
    fn free_inherited(&mut self, span: Span) {
        let Some(at) = self.inherited.iter().position(|one| *one == span) else { return };
        self.inherited.swap_remove(at);
        let (mut start, end) = self.granules(span);
        let mut others: Vec<_> = self.inherited.iter().map(|other| self.granules(*other)).collect();
        others.sort_unstable();
        for (other, other_end) in others {
            self.add_gap(start, other.min(end));
            start = start.max(other_end);
        }
        self.add_gap(start, end);
        self.mend();
    }

    /// The granules in which a part lies.
    fn granules(&self, span: Span) -> (u64, u64) {
        (span.offset / GRANULE, span.offset.saturating_add(span.len).min(self.bytes).div_ceil(GRANULE))
    }

    /// Makes one range of many as soon as nothing is in the way.
    fn mend(&mut self) {
        if self.blocks == 0 && self.inherited.is_empty() && self.gaps.len() > 1 {
            *self = Partition::around(self.bytes, self.max_blocks, Vec::new());
        }
    }

    /// A block of at least `len` bytes, or none if there is no room.
    pub fn allocate(&mut self, len: u64) -> Option<Block> {
        let granules = u32::try_from(len.div_ceil(GRANULE).max(1)).ok()?;
        self.gaps.iter_mut().enumerate().find_map(|(gap, (start, allocator))| {
            let allocation = allocator.allocate(granules)?;
            self.blocks += 1;
            self.free -= u64::from(granules);
            let offset = (*start + u64::from(allocation.offset)) * GRANULE;
            let len = u64::from(granules) * GRANULE;
            Some(Block { offset, len, gap, allocation: Allocated(allocation) })
        })
    }

    /// Gives a block back.
    pub fn free(&mut self, block: Block) {
        self.blocks -= 1;
        self.free += block.len / GRANULE;
        self.gaps[block.gap].1.free(block.allocation.0);
        self.mend();
    }

    /// Blocks that were allocated and not given back.
    #[cfg(test)]
    pub fn blocks(&self) -> usize {
        self.blocks
    }
}

/// The largest partition's block that always fits an empty partition of so many bytes: the allocator rounds a request
/// up to the next of eight sizes per power of two, and the free range down.
pub fn largest_block(partition: u64) -> u64 {
    let granules = partition / GRANULE;
    if granules < 16 {
        return granules * GRANULE;
    }
    let step = 1 << (granules.ilog2() - 3);
    granules / step * step * GRANULE
}

impl Segment {
    /// Copies bytes into a front's request partition: only by that front, into a block it has not offered yet.
    pub(crate) fn write_request(&self, front: u16, offset: u64, bytes: &[u8]) -> bool {
        let Some(at) = self.request(front, offset, bytes.len() as u64) else { return false };
        // SAFETY: `at` is good for so many bytes in this process's writable view; they are shared memory, so they do
        // not overlap `bytes`; the block is the caller's, so nobody reads them yet.
        unsafe { at.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        true
    }

    /// Looks at a request's bytes: by the front while it owns the item, by a worker that has claimed it, by the supervisor
    /// after that worker's death.
    pub(crate) fn read_request(&self, front: u16, offset: u64, len: u64) -> Option<&[u8]> {
        let at = self.request(front, offset, len)?;
        // SAFETY: in bounds and mapped as long as `self`. Not written while the item is claimed: see the module's head.
        Some(unsafe { slice::from_raw_parts(at, len as usize) })
    }

    /// A worker's own result block, for writing between claim and DONE.
    ///
    /// The caller has the block's only owner borrowed mutably: `block` is that proof.
    pub(crate) fn write_result<'a>(&'a self, worker: u16, block: &'a mut Block, len: u64) -> Option<&'a mut [u8]> {
        let at = if len <= block.len { self.result(worker, block.offset, len)? } else { return None };
        // SAFETY: in bounds, in the writable view of this process, which is the partition's only writer; blocks do not
        // overlap and this one is borrowed mutably, so there is no other reference.
        Some(unsafe { slice::from_raw_parts_mut(at, len as usize) })
    }

    /// Copies bytes of a result that may not be one any more: if its worker has died and a successor has come, the copy is of
    /// whatever there is, and for the caller to throw away. They begin at a multiple of 8.
    pub(crate) fn copy_result(&self, worker: u16, offset: u64, into: &mut [u8]) -> bool {
        // Partitions are whole pages, so that the word of the last byte is inside if the byte is.
        let Some(at) = self.result(worker, offset, into.len() as u64) else { return false };
        if !offset.is_multiple_of(8) {
            return false;
        }
        for (n, piece) in into.chunks_mut(8).enumerate() {
            // SAFETY: the word is inside the view and aligned, as just checked, and lives as long as `self`. Whoever may write
            // it meanwhile is another process, and all that is done with it here is an atomic load, which read-only
            // memory allows.
            let word = unsafe { AtomicU64::from_ptr(at.cast::<u64>().add(n)) };
            piece.copy_from_slice(&word.load(Relaxed).to_ne_bytes()[..piece.len()]);
        }
        true
    }

    /// Looks at a result's bytes: by the front between DONE and FREE.
    pub(crate) fn read_result(&self, worker: u16, offset: u64, len: u64) -> Option<&[u8]> {
        let at = self.result(worker, offset, len)?;
        // SAFETY: in bounds and mapped as long as `self`. The worker does not write it while the item is DONE by it:
        // see the module's head.
        Some(unsafe { slice::from_raw_parts(at, len as usize) })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever is allocated and freed, in whatever order, around whatever was in use: nothing overlaps.
        #[test]
        fn blocks_never_overlap(
            used in prop::collection::vec((0..200u64, 1..20_000u64), 0..6),
            steps in prop::collection::vec((any::<bool>(), 0..20_000u64, any::<prop::sample::Index>()), 1..200),
        ) {
            const BYTES: u64 = 1 << 18;
            let mut used: Vec<_> = used.into_iter().map(|(at, len)| Span { offset: at * 1024, len }).collect();
            let mut partition = Partition::around(BYTES, 64, used.clone());
            let mut held: Vec<(Block, u64)> = Vec::new();
            for (allocate, len, which) in steps {
                if allocate {
                    if let Some(block) = partition.allocate(len) {
                        prop_assert!(block.offset() % GRANULE == 0);
                        prop_assert!(block.offset() + len <= BYTES);
                        let overlaps = |offset: u64, n: u64| block.offset() < offset + n && offset < block.offset() + len.max(1);
                        prop_assert!(!used.iter().any(|s| overlaps(s.offset, s.len)));
                        prop_assert!(!held.iter().any(|(b, n)| overlaps(b.offset(), (*n).max(1))));
                        held.push((block, len));
                    }
                } else if len % 3 == 0 && !used.is_empty() {
                    partition.free_inherited(used.swap_remove(which.index(used.len())));
                } else if !held.is_empty() {
                    let (block, _) = held.swap_remove(which.index(held.len()));
                    partition.free(block);
                }
                prop_assert_eq!(partition.blocks(), held.len());
            }
        }

        #[test]
        fn the_largest_block_fits(pages in 1..100_000u64) {
            let bytes = pages * 4096;
            let largest = largest_block(bytes);
            prop_assert!(largest * 9 >= bytes * 8 - 8 * GRANULE);
            let mut partition = Partition::around(bytes, 4, vec![]);
            let block = partition.allocate(largest);
            prop_assert!(block.is_some());
            partition.free(block.unwrap());
            prop_assert!(partition.allocate(largest).is_some(), "and again after it was freed");
        }
    }

    #[test]
    fn what_was_inherited_becomes_one_range_again() {
        let spans = [Span { offset: 0, len: 100 }, Span { offset: 8192, len: 4096 }];
        let mut partition = Partition::around(16384, 8, spans.to_vec());
        let block = partition.allocate(64).unwrap();
        assert!(partition.allocate(8192).is_none());
        partition.free_inherited(spans[1]);
        let other = partition.allocate(4096).unwrap();
        partition.free_inherited(spans[0]);
        partition.free(block);
        assert!(partition.allocate(16384).is_none());
        partition.free(other);
        assert!(partition.allocate(16384).is_some());
    }

    #[test]
    fn a_partition_in_full_use_has_nothing_to_give() {
        let mut partition = Partition::around(4096, 4, vec![Span { offset: 0, len: 4096 }]);
        assert!(partition.allocate(1).is_none());
        // What a scribbled table may claim to be in use.
        let mut partition = Partition::around(4096, 4, vec![Span { offset: u64::MAX - 1, len: u64::MAX }]);
        assert!(partition.allocate(4096).is_some());
    }
}
