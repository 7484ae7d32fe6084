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

/// A cache line of payload. It is copied as a whole and not word by word: what is read in other pieces than it was
/// written in has to wait for its way through the cache.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Inline([AtomicU64; INLINE / 8]);

impl Inline {
    /// Copies up to [`INLINE`] bytes in; what is beyond is left out.
    #[inline]
    pub fn store(&self, bytes: &[u8]) {
        let len = bytes.len().min(INLINE);
        let line = self.0.as_ptr().cast::<u8>().cast_mut();
        // SAFETY: `len` bytes are inside both; the atomics may be written through a shared reference, and by the rules
        // above nobody else looks at the line or writes it now.
        unsafe { line.copy_from_nonoverlapping(bytes.as_ptr(), len) }
    }

    /// Copies the first bytes out, to the length of `into` or [`INLINE`].
    #[inline]
    pub fn load(&self, into: &mut [u8]) {
        let len = into.len().min(INLINE);
        // SAFETY: `len` bytes are inside both, and by the rules above nobody writes the line now. If a process breaks
        // them the copy has any bytes, and bytes are all that is made of them.
        unsafe { self.0.as_ptr().cast::<u8>().copy_to_nonoverlapping(into.as_mut_ptr(), len) }
    }
}

/// How many partial results of an item may wait to be taken.
pub const WINDOW: usize = 4;

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
    /// Of those, bytes of subscription; and, above them, the kind of RPC that the item came by.
    pub kind: AtomicU32,
    /// The generation that the client has given up, plus one. Written by the front at any time, or for a dead one by its sweep;
    /// read by the handler.
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
    /// The partial results that wait to be taken, see `dispatch::partial`. The worker fills them, the front empties
    /// them: of all fields the only ones that both write, and only while a stream is under way.
    pub partials: [AtomicU64; WINDOW],
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
