//! `WorkResult`s for the stream, with the payload last so that it can follow as a frame of its own.

use bytes::BytesMut;
use prost::Message;

use super::PREFIX;

/// A result but for its payload.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ResultHead<'a> {
    /// The client's own.
    pub id: u64,
    /// Absent when the handler succeeded.
    pub status: Option<ResultStatus<'a>>,
    /// From acceptance until a worker took the item.
    pub queued_ns: u64,
    /// From then until the handler was done.
    pub worked_ns: u64,
    /// From then until the front began to send the result.
    pub returned_ns: u64,
    /// How many times the item was given to a worker.
    pub attempts: u32,
    /// Who completed it.
    pub worker: u32,
    /// There is more to come: then nothing is said of time.
    pub partial: bool,
    /// How many partial results came before.
    pub sequence: u32,
}

/// Why an item failed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ResultStatus<'a> {
    /// A google.rpc.Code.
    pub code: i32,
    /// For people.
    pub message: &'a str,
    /// For programs.
    pub reason: &'a str,
    /// Where in the handler.
    pub traceback: &'a str,
}

/// Appends a whole result. For payloads so small that a copy is cheaper than a frame.
#[inline]
pub fn encode_result(out: &mut BytesMut, head: &ResultHead<'_>, payload: &[u8]) {
    encode_head(out, head, payload.len(), payload.len());
    out.extend_from_slice(payload);
}

/// Appends a result up to its payload, of which `payload_len` bytes must follow on the stream, and nothing before them.
///
/// `payload_len` is at most [`MAX_PAYLOAD`](super::MAX_PAYLOAD).
#[inline]
pub fn encode_result_prefix(out: &mut BytesMut, head: &ResultHead<'_>, payload_len: usize) {
    encode_head(out, head, payload_len, 0);
}

/// Appends any message with its gRPC prefix: for those that are not hot.
pub fn encode_message(out: &mut BytesMut, message: &impl Message) {
    let body = message.encode_to_vec();
    out.reserve(PREFIX + body.len());
    out.extend_from_slice(&prefix(body.len()));
    out.extend_from_slice(&body);
}

fn prefix(len: usize) -> [u8; PREFIX] {
    debug_assert!(u32::try_from(len).is_ok(), "MAX_PAYLOAD was not kept");
    let [a, b, c, d] = (len as u32).to_be_bytes();
    [0, a, b, c, d]
}

/// Writes all but the payload's bytes and makes room for `copied` of them.
#[inline]
fn encode_head(out: &mut BytesMut, head: &ResultHead<'_>, payload_len: usize, copied: usize) {
    let attempts = u64::from(head.attempts);
    let worker = u64::from(head.worker);
    let timing_len = uint_len(head.queued_ns) + uint_len(head.worked_ns) + uint_len(head.returned_ns);
    let status_len = head.status.as_ref().map(status_len);
    let payload_head = if payload_len > 0 { len_len(payload_len) } else { 0 };
    let sequence = u64::from(head.sequence);
    let len = uint_len(head.id)
        + if head.partial { 2 } else { len_len(timing_len) + timing_len }
        + uint_len(attempts)
        + uint_len(worker)
        + uint_len(sequence)
        + status_len.map_or(0, |len| len_len(len) + len)
        + payload_head;
    out.reserve(PREFIX + len + copied);

    let mut small = Small::default();
    small.put(&prefix(len + payload_len));
    small.uint(1, head.id);
    if head.partial {
        small.uint(7, 1);
    } else {
        small.len(4, timing_len);
        small.uint(1, head.queued_ns);
        small.uint(2, head.worked_ns);
        small.uint(3, head.returned_ns);
    }
    small.uint(5, attempts);
    small.uint(6, worker);
    small.uint(8, sequence);
    if let (Some(status), Some(len)) = (&head.status, status_len) {
        small.len(3, len);
        small.uint(1, code(status));
        small.text(2, status.message, out);
        small.text(3, status.reason, out);
        small.text(4, status.traceback, out);
    }
    if payload_len > 0 {
        small.len(2, payload_len);
    }
    small.flush(out);
}

fn status_len(status: &ResultStatus<'_>) -> usize {
    uint_len(code(status)) + text_len(status.message) + text_len(status.reason) + text_len(status.traceback)
}

/// An int32 travels as the 64 bits of its two's complement.
fn code(status: &ResultStatus<'_>) -> u64 {
    i64::from(status.code) as u64
}

/// A number with its key; 0 is the default and not sent.
#[inline]
fn uint_len(value: u64) -> usize {
    if value == 0 { 0 } else { 1 + varint_len(value) }
}

/// The key and the length of a field of `len` bytes.
#[inline]
fn len_len(len: usize) -> usize {
    1 + varint_len(len as u64)
}

fn text_len(text: &str) -> usize {
    if text.is_empty() { 0 } else { len_len(text.len()) + text.len() }
}

#[inline]
fn varint_len(value: u64) -> usize {
    (64 - (value | 1).leading_zeros() as usize).div_ceil(7)
}

/// Small fields on their way into a `BytesMut`, which is slow to append to byte by byte.
///
/// The most that comes between two flushes is prefix 5, id 11, timing 35, attempts 6, worker 6, sequence 6, status 11, code
/// 11 and a text's key and length 11: 102 bytes.
struct Small {
    bytes: [u8; 104],
    len: usize,
}

impl Default for Small {
    #[inline]
    fn default() -> Self {
        Self { bytes: [0; 104], len: 0 }
    }
}

impl Small {
    #[inline]
    fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.len..][..bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }

    #[inline]
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.put(&[value as u8 | 0x80]);
            value >>= 7;
        }
        self.put(&[value as u8]);
    }

    #[inline]
    fn uint(&mut self, field: u8, value: u64) {
        if value != 0 {
            self.put(&[field << 3]);
            self.varint(value);
        }
    }

    #[inline]
    fn len(&mut self, field: u8, len: usize) {
        self.put(&[field << 3 | 2]);
        self.varint(len as u64);
    }

    fn text(&mut self, field: u8, text: &str, out: &mut BytesMut) {
        if !text.is_empty() {
            self.len(field, text.len());
            self.flush(out);
            out.extend_from_slice(text.as_bytes());
        }
    }

    #[inline]
    fn flush(&mut self, out: &mut BytesMut) {
        out.extend_from_slice(&self.bytes[..self.len]);
        self.len = 0;
    }
}
