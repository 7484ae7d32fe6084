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
//! copies them to a socket, and decides nothing by them before it has made a copy (`Failure::from_result`). There is one
//! exception within the rules, of the same kind: of a stream that was reset, HTTP/2 may still be writing the rest of a
//! frame whose result went to another subscriber and was freed; its client ignores it.
#![allow(unsafe_code)]

use std::{
    slice,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use crate::segment::Segment;

mod partition;

pub use partition::{Block, Memory, Partition, Span, largest_block};

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
        let at = if len <= block.len() { self.result(worker, block.offset(), len)? } else { return None };
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
