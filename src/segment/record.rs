//! The item record: 256 bytes, one half written by the front, the other by the worker.
//!
//! An item with a small payload and a small result travels in four cache lines: the word and the request's head, the
//! payload, the result's head, the result. The two lines of each half are neighbours, which the prefetcher moves
//! together; the halves are apart, because they have different writers.
//!
//! Who may write what is decided by the word ([`crate::dispatch`]): the request half is the front's while the item is
//! FREE; the result half is the worker's while it is CLAIMED, or the supervisor's in a dead worker's stead.

use std::sync::atomic::{
    AtomicU32, AtomicU64,
    Ordering::{Relaxed, Release},
};

/// Payloads and results up to this many bytes travel in the record.
pub const INLINE: usize = 64;

/// A cache line of payload.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Inline([AtomicU64; INLINE / 8]);

impl Inline {
    /// Copies up to [`INLINE`] bytes in; what is beyond is left out.
    #[inline]
    pub fn store(&self, bytes: &[u8]) {
        let mut words = bytes.chunks_exact(8);
        let mut cells = self.0.iter();
        for (word, cell) in (&mut words).zip(&mut cells) {
            cell.store(
                u64::from_le_bytes([word[0], word[1], word[2], word[3], word[4], word[5], word[6], word[7]]),
                Relaxed,
            );
        }
        let rest = words.remainder();
        if let (false, Some(cell)) = (rest.is_empty(), cells.next()) {
            let mut last = [0; 8];
            last[..rest.len()].copy_from_slice(rest);
            cell.store(u64::from_le_bytes(last), Relaxed);
        }
    }

    /// Copies the first bytes out, to the length of `into` or [`INLINE`].
    #[inline]
    pub fn load(&self, into: &mut [u8]) {
        for (chunk, cell) in into.chunks_mut(8).zip(&self.0) {
            chunk.copy_from_slice(&cell.load(Relaxed).to_le_bytes()[..chunk.len()]);
        }
    }
}

/// One item. All offsets are into arenas, all times are CLOCK_MONOTONIC in nanoseconds.
#[derive(Debug)]
#[repr(C, align(128))]
pub struct ItemRecord {
    /// Generation, lane, owner, phase and attempts: the truth about the item.
    pub word: AtomicU64,
    /// The client's own id.
    pub id: AtomicU64,
    /// When the front accepted it.
    pub offered: AtomicU64,
    /// When it expires; 0: never.
    pub deadline: AtomicU64,
    /// Of the request's block, if it is not inline.
    pub request_offset: AtomicU64,
    /// Bytes of payload.
    pub payload_len: AtomicU32,
    /// Bytes of subscription and metadata: inline behind the payload if they fit, else in a block of their own.
    pub extra_len: AtomicU32,
    /// Of those, bytes of subscription; and, above them, the kind of RPC the item came by.
    pub kind: AtomicU32,
    /// The generation that the client has given up, plus one. Written by the front at any time, read by the handler.
    pub cancelled: AtomicU32,
    /// Of the block of subscription and metadata, if they are not inline.
    pub extra_offset: AtomicU64,
    /// The payload, if it fits, and subscription and metadata, if they fit behind it.
    pub request: Inline,

    /// 0, or the google.rpc.Code of the failure; then the result is its reason and message.
    pub code: AtomicU32,
    /// Bytes of result.
    pub result_len: AtomicU32,
    /// Of the result's block in the owner's partition, if it is not inline.
    pub result_offset: AtomicU64,
    /// When the worker claimed it.
    pub claimed: AtomicU64,
    /// When the handler was done.
    pub done: AtomicU64,
    _gap2: [AtomicU64; 4],
    /// The result, if it fits.
    pub result: Inline,
}

const _: () = assert!(size_of::<ItemRecord>() == 256);
const _: () = assert!(std::mem::offset_of!(ItemRecord, code) == 128);

impl ItemRecord {
    /// The front's: tells the handler of this generation that nobody waits for the result any more.
    pub fn cancel(&self, generation: u32) {
        // The flag is all that is published: Release only so that it is not held back behind other stores.
        self.cancelled.store(generation.wrapping_add(1), Release);
    }

    /// The worker's: whether the front has given up this generation.
    pub fn is_cancelled(&self, generation: u32) -> bool {
        self.cancelled.load(Relaxed) == generation.wrapping_add(1)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn inline_bytes_come_out_as_they_went_in(bytes in prop::collection::vec(any::<u8>(), 0..=INLINE)) {
            let inline = Inline(Default::default());
            inline.store(&[0xff; INLINE]);
            inline.store(&bytes);
            let mut out = vec![0; bytes.len()];
            inline.load(&mut out);
            prop_assert_eq!(out, bytes);
        }
    }
}
