//! Requests: what is offered, and the half of an item's record that says it.
//!
//! A front writes that half while the item is FREE. Whoever reads it later finds it as it was, but for a worker that
//! scribbles: so what it says is checked by whoever uses it.

use std::sync::atomic::Ordering::Relaxed;

use super::ReplyError;
use crate::{
    arena::{Block, Span},
    segment::{INLINE, ItemRecord, Segment},
};

/// By which RPC an item came: what becomes of it if its front dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Somebody waits on a connection of this front: without it the item is nobody's.
    Call,
    /// The same, and partial results are sent as they are made.
    Stream,
    /// Accepted for a subscription: a front's successor inherits it.
    Submit,
}

/// Why nobody waits for an item any more, if nobody does. What has expired and was given up for that has expired.
pub(super) fn end(record: &ItemRecord, generation: u32, now: impl FnOnce() -> u64) -> Option<ReplyError> {
    // Before the clock: if it were looked at after it, the deadline could have passed between, and the front have seen that.
    let is_cancelled = record.is_cancelled(generation);
    let deadline = record.deadline.load(Relaxed);
    if deadline != 0 && deadline <= now() {
        return Some(ReplyError::Expired);
    }
    is_cancelled.then_some(ReplyError::Cancelled)
}

const SUBMIT: u32 = 1 << 31;
const STREAM: u32 = 1 << 30;

/// What is offered, beside its payload.
#[derive(Clone, Copy, Debug)]
pub struct Offer<'a> {
    /// The pool, below the number of pools.
    pub pool: u16,
    /// 0 to 3; higher is taken first.
    pub priority: u32,
    /// The client's own id.
    pub id: u64,
    /// Now, in nanoseconds of CLOCK_MONOTONIC.
    pub offered: u64,
    /// When the item expires; 0: never.
    pub deadline: u64,
    /// By which RPC it came.
    pub kind: Kind,
    /// Whose update the result becomes, for `Kind::Submit`.
    pub subscription: &'a [u8],
    /// Encoded metadata, opaque here.
    pub metadata: &'a [u8],
}

/// Payload of an item to be: small ones in private memory, large ones already in the arena.
#[derive(Debug, Default)]
pub struct Request {
    pub(super) line: Line,
    pub(super) block: Option<Block>,
    /// Bytes so far, and how many were announced.
    pub(super) len: usize,
    pub(super) most: usize,
}

/// A small payload or result, in private memory. It stays in one place, and is written and read as a whole: a load of what
/// several stores wrote must wait until all stores before it have reached the cache, and those to another process's lines are
/// slow.
#[derive(Debug)]
#[repr(align(64))]
pub(super) struct Line(pub [u8; INLINE]);

impl Default for Line {
    fn default() -> Self {
        Line([0; INLINE])
    }
}

impl Request {
    /// Bytes of payload so far.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// Why an item was not accepted. All of these pass: the first two when other items complete, the last when a worker comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OfferError {
    /// The item table is full.
    #[error("the queue is full")]
    Items,
    /// The request arena is full.
    #[error("the request arena is full")]
    Arena,
    /// The lane is full of hints that no worker came to remove.
    #[error("the pool's lane is full")]
    Lane,
}

/// The items of a front: its first, and how many.
pub(super) fn share(segment: &Segment, front: u16) -> (u32, u32) {
    let geometry = segment.geometry();
    let each = geometry.items / geometry.fronts;
    let first = each * u32::from(front);
    (first, if u32::from(front) + 1 == geometry.fronts { geometry.items - first } else { each })
}

/// The front whose item this is.
pub(super) fn front_of(segment: &Segment, index: u32) -> u16 {
    let geometry = segment.geometry();
    (index / (geometry.items / geometry.fronts)).min(geometry.fronts - 1) as u16
}

/// What a record says of an item's kind, and how many bytes its subscription has.
pub(super) fn kind_word(kind: Kind, subscription: usize) -> u32 {
    let bit = match kind {
        Kind::Call => 0,
        Kind::Stream => STREAM,
        Kind::Submit => SUBMIT,
    };
    bit | subscription as u32
}

/// By which RPC an item came, as its record says.
#[inline]
pub(super) fn kind_of(record: &ItemRecord) -> Kind {
    let word = record.kind.load(Relaxed);
    match (word & SUBMIT != 0, word & STREAM != 0) {
        (true, _) => Kind::Submit,
        (false, true) => Kind::Stream,
        (false, false) => Kind::Call,
    }
}

/// Bytes of an item's subscription, as its record says.
pub(super) fn subscription_len(record: &ItemRecord) -> usize {
    (record.kind.load(Relaxed) & !(SUBMIT | STREAM)) as usize
}

/// Whether an item outlives its front.
pub(super) fn is_submitted(record: &ItemRecord) -> bool {
    kind_of(record) == Kind::Submit
}

/// The arena blocks that a record says its request has.
pub(super) fn request_spans(record: &ItemRecord) -> (Option<Span>, Option<Span>) {
    let payload = u64::from(record.payload_len.load(Relaxed));
    let extra = u64::from(record.extra_len.load(Relaxed));
    let span = |offset, len| Span { offset, len };
    let in_arena = payload > INLINE as u64;
    let inline = if in_arena { 0 } else { payload };
    (
        in_arena.then(|| span(record.request_offset.load(Relaxed), payload)),
        (inline + extra > INLINE as u64).then(|| span(record.extra_offset.load(Relaxed), extra)),
    )
}

/// Subscription and metadata of an item, copied out.
pub(super) fn extra_bytes(segment: &Segment, front: u16, record: &ItemRecord) -> Option<Vec<u8>> {
    let extra = record.extra_len.load(Relaxed) as usize;
    match request_spans(record) {
        (_, Some(span)) => segment.read_request(front, span.offset, span.len).map(<[u8]>::to_vec),
        (payload, None) => {
            let inline = if payload.is_some() { 0 } else { record.payload_len.load(Relaxed) as usize };
            let mut line = [0; INLINE];
            record.request.load(&mut line);
            line.get(inline..inline + extra).map(<[u8]>::to_vec)
        }
    }
}

/// The metadata of an item, without the subscription.
pub(super) fn metadata(segment: &Segment, front: u16, record: &ItemRecord) -> Vec<u8> {
    let subscription = subscription_len(record);
    let mut bytes = extra_bytes(segment, front, record).unwrap_or_default();
    bytes.drain(..subscription.min(bytes.len()));
    bytes
}
