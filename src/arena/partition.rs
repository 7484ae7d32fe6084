//! The allocator of a partition: which bytes are whose.
//!
//! It is private memory and knows only numbers, so no bytes that somebody scribbled over can mislead it; and what it is built
//! around may be any spans at all, also some that overlap or lie outside.

use offset_allocator::{Allocation, Allocator};

use crate::segment::GRANULE;

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
    /// The ranges around what was in use at the start, at places that blocks know; one, if nothing was.
    gaps: Vec<Option<Gap>>,
    /// What was in use at the start and still is.
    inherited: Vec<Span>,
    /// Granules that are free, in however many pieces.
    free: u64,
}

/// Granules from `start` to `end`, in which blocks are allocated.
struct Gap {
    start: u64,
    end: u64,
    blocks: usize,
    allocator: Allocator,
}

impl Partition {
    /// An allocator of `bytes` of which `used` are taken, for at most `blocks` blocks at a time.
    pub fn around(bytes: u64, blocks: u32, mut used: Vec<Span>) -> Self {
        used.sort_unstable_by_key(|span| span.offset);
        let mut partition = Partition { bytes, max_blocks: blocks, gaps: Vec::new(), inherited: used, free: 0 };
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
        let Some(gap) = self.gap(start, end) else { return };
        self.free += end - start;
        let at = self.gaps.iter().position(Option::is_none).unwrap_or(self.gaps.len());
        if at == self.gaps.len() {
            self.gaps.push(None);
        }
        self.gaps[at] = Some(gap);
        self.merge(at);
    }

    fn gap(&self, start: u64, end: u64) -> Option<Gap> {
        let granules = u32::try_from(end.saturating_sub(start)).ok().filter(|granules| *granules > 0)?;
        // Each block needs a node, and so does each range between blocks.
        let nodes = granules.min(self.max_blocks).saturating_mul(2).saturating_add(4);
        Some(Gap { start, end, blocks: 0, allocator: Allocator::with_max_allocs(granules, nodes) })
    }

    /// Makes one gap of this and its neighbours, while there are no blocks in them: a large block may take what were many.
    fn merge(&mut self, at: usize) {
        while let Some(Gap { start, end, blocks: 0, .. }) = self.gaps[at] {
            let is_next = |gap: &Gap| gap.blocks == 0 && (gap.end == start || gap.start == end);
            let Some(next) = self.gaps.iter().position(|gap| gap.as_ref().is_some_and(is_next)) else { return };
            let Some(other) = self.gaps[next].take() else { return };
            self.gaps[at] = self.gap(start.min(other.start), end.max(other.end));
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
    }

    /// The granules in which a part lies.
    fn granules(&self, span: Span) -> (u64, u64) {
        (span.offset / GRANULE, span.offset.saturating_add(span.len).min(self.bytes).div_ceil(GRANULE))
    }

    /// A block of at least `len` bytes, or none if there is no room.
    pub fn allocate(&mut self, len: u64) -> Option<Block> {
        let granules = u32::try_from(len.div_ceil(GRANULE).max(1)).ok()?;
        self.gaps.iter_mut().enumerate().find_map(|(at, gap)| {
            let gap = gap.as_mut()?;
            let allocation = gap.allocator.allocate(granules)?;
            gap.blocks += 1;
            self.free -= u64::from(granules);
            let offset = (gap.start + u64::from(allocation.offset)) * GRANULE;
            let len = u64::from(granules) * GRANULE;
            Some(Block { offset, len, gap: at, allocation: Allocated(allocation) })
        })
    }

    /// Gives a block back.
    pub fn free(&mut self, block: Block) {
        self.free += block.len / GRANULE;
        let Some(gap) = &mut self.gaps[block.gap] else { return };
        gap.allocator.free(block.allocation.0);
        gap.blocks -= 1;
        if gap.blocks == 0 && self.gaps.len() > 1 {
            self.merge(block.gap);
        }
    }

    /// Blocks that were allocated and not given back.
    #[cfg(test)]
    pub fn blocks(&self) -> usize {
        self.gaps.iter().flatten().map(|gap| gap.blocks).sum()
    }
}

/// The largest partition's block that always fits an empty partition of so many bytes: the allocator rounds a request
/// up to the next of eight sizes per power of two, and the free range down.
pub fn largest_block(partition: u64) -> u64 {
    let granules = partition / GRANULE;
    let step = 1 << (granules.max(8).ilog2() - 3);
    granules / step * step * GRANULE
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever is allocated and given back, in whatever order, around whatever was in use: nothing overlaps, and what is
        /// nobody's is free.
        #[test]
        fn every_byte_is_one_owners_or_free(
            used in prop::collection::vec((0..260u64, 1..20_000u64), 0..6),
            steps in prop::collection::vec((any::<bool>(), 0..20_000u64, any::<prop::sample::Index>()), 1..200),
        ) {
            const BYTES: u64 = 1 << 18;
            let mut used: Vec<_> = used.into_iter().map(|(at, len)| Span { offset: at * 1024, len }).collect();
            let mut partition = Partition::around(BYTES, 64, used.clone());
            let mut held: Vec<Block> = Vec::new();
            let free = |used: &[Span], held: &[Block]| {
                let mut is_free = [true; (BYTES / GRANULE) as usize];
                let parts = used.iter().map(|span| (span.offset, span.len));
                for (offset, len) in parts.chain(held.iter().map(|block| (block.offset(), block.len()))) {
                    let granules = offset / GRANULE..(offset + len).min(BYTES).div_ceil(GRANULE);
                    granules.for_each(|granule| is_free[granule as usize] = false);
                }
                is_free.into_iter().filter(|is_free| *is_free).count() as u64 * GRANULE
            };
            prop_assert_eq!(partition.free_bytes(), free(&used, &held));
            for (allocate, len, which) in steps {
                if allocate {
                    if let Some(block) = partition.allocate(len) {
                        prop_assert!(block.offset().is_multiple_of(GRANULE) && block.len().is_multiple_of(GRANULE));
                        prop_assert_eq!(block.len(), len.max(1).next_multiple_of(GRANULE));
                        prop_assert!(block.offset() + block.len() <= BYTES);
                        let overlaps = |offset, n| block.offset() < offset + n && offset < block.offset() + block.len();
                        prop_assert!(!used.iter().any(|span| overlaps(span.offset, span.len)));
                        prop_assert!(!held.iter().any(|other| overlaps(other.offset(), other.len())));
                        held.push(block);
                    }
                } else if len % 3 == 0 && !used.is_empty() {
                    partition.give_back(Memory::Inherited(used.swap_remove(which.index(used.len()))));
                } else if !held.is_empty() {
                    partition.give_back(Memory::Own(held.swap_remove(which.index(held.len()))));
                }
                prop_assert_eq!(partition.blocks(), held.len());
            }
            prop_assert_eq!(partition.free_bytes(), free(&used, &held));
            let held = held.into_iter().map(Memory::Own);
            held.chain(used.into_iter().map(Memory::Inherited)).for_each(|memory| partition.give_back(memory));
            prop_assert_eq!(partition.free_bytes(), BYTES);
            prop_assert!(partition.allocate(BYTES).is_some(), "it is one range again");
        }

        #[test]
        fn the_largest_block_fits(granules in prop_oneof![1..64u64, 1..6_400_000u64]) {
            let bytes = granules * GRANULE;
            let largest = largest_block(bytes);
            prop_assert!(largest <= bytes && largest * 9 >= bytes * 8, "and is not much less");
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

    /// Also while it is never empty, as under constant load.
    #[test]
    fn ranges_become_one_again_beside_a_block_that_stays() {
        let spans: Vec<_> = (1..8).map(|n| Span { offset: n * 2048, len: 64 }).collect();
        let mut partition = Partition::around(16384, 8, spans.clone());
        let mut blocks: Vec<_> = (0..8).map(|_| partition.allocate(1536).unwrap()).collect();
        spans.into_iter().for_each(|span| partition.give_back(Memory::Inherited(span)));
        let stays = blocks.remove(0);
        assert_eq!(stays.offset(), 0);
        blocks.into_iter().for_each(|block| partition.free(block));
        let large = partition.allocate(14336).unwrap();
        assert_eq!(large.offset(), 2048);
        partition.free(stays);
        partition.free(large);
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
