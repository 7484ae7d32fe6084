//! Output: results as gRPC messages.
//!
//! A small result is copied next to its message's other fields, many to a frame. A large one is sent in place: its
//! frame is a view of the arena, and the item is freed when HTTP/2 has let go of it.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use tonic::{Code, Status};

use super::{
    hub::{Hub, Released},
    mailbox::Ending,
    status::Refusal,
    wire::{ResultHead, ResultStatus, encode_result, encode_result_prefix},
};
use crate::{
    dispatch::{Broken, Completion, Failure, Outcome},
    process::now,
    segment::INLINE,
};

/// Results up to this many bytes are copied: an HTTP/2 frame of its own costs more.
const COPIED: usize = 16 << 10;
/// A frame is full with so many bytes.
pub const FRAME: usize = 32 << 10;

/// A result in the arena. Dropping it frees the item.
struct InPlace {
    bytes: &'static [u8],
    index: u32,
    released: Arc<Released>,
}

impl AsRef<[u8]> for InPlace {
    fn as_ref(&self) -> &[u8] {
        self.bytes
    }
}

impl Drop for InPlace {
    fn drop(&mut self) {
        self.released.push(self.index);
    }
}

/// Appends the message of an item's end to `out` and frees the item; a large result comes back as what must follow.
pub fn encode(hub: &Hub, ending: Ending, out: &mut BytesMut) -> Option<Bytes> {
    let completion = match ending {
        Ending::Completed(completion) => completion,
        Ending::Failed { id, failure } => {
            let refusal = failure.into();
            encode_refusal(out, id, &refusal);
            return None;
        }
        // No end: `encode_partials` is for these.
        Ending::Partial(_) => return None,
    };
    let in_place = encode_kept(hub, &completion, out);
    match in_place {
        None => {
            hub.release(completion.index);
            None
        }
        Some(bytes) => {
            Some(Bytes::from_owner(InPlace { bytes, index: completion.index, released: hub.released.clone() }))
        }
    }
}

/// Whether all partial results of an item have been taken that there were.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// For now.
    All,
    /// The frame is full.
    Some,
    /// What its worker wrote is impossible.
    Broken,
}

/// Appends the partial results of an item that have come, until there is enough for a frame. Being copied they are taken,
/// and the worker may send more: so it is the stream's reader who sets the pace.
pub fn encode_partials(hub: &Hub, index: u32, out: &mut BytesMut) -> Drained {
    while out.len() < FRAME {
        let partial = match hub.with_front(|front| front.partial(index)) {
            Some(Ok(partial)) => partial,
            Some(Err(Broken)) => return Drained::Broken,
            None => return Drained::All,
        };
        let head = ResultHead {
            id: partial.id,
            attempts: partial.attempts,
            worker: partial.worker.into(),
            partial: true,
            sequence: partial.sequence,
            ..Default::default()
        };
        let before = out.len();
        encode_result_prefix(out, &head, partial.len);
        out.reserve(partial.len);
        if !hub.with_front(|front| front.take_partial(&partial, |piece| out.extend_from_slice(piece))) {
            out.truncate(before);
        }
    }
    Drained::Some
}

/// The same, but the item is kept, and what must follow is a view of its arena.
pub fn encode_kept(hub: &Hub, completion: &Completion, out: &mut BytesMut) -> Option<&'static [u8]> {
    let mut line = [0; INLINE];
    let result = result(hub, completion, &mut line);
    let failure = failure(completion, result);
    let head = head(hub, completion, failure.as_ref());
    let payload = if failure.is_some() { &[] } else { result };
    if payload.len() <= COPIED {
        encode_result(out, &head, payload);
        return None;
    }
    encode_result_prefix(out, &head, payload.len());
    hub.with_front(|front| front.lasting_result(completion))
}

fn result<'a>(hub: &Hub, completion: &Completion, line: &'a mut [u8; INLINE]) -> &'a [u8] {
    hub.with_front(|front| match front.inline_result(completion, line) {
        Some(bytes) => bytes,
        None => front.lasting_result(completion).unwrap_or_default(),
    })
}

/// Why a completed item failed, if it did.
pub fn failure(completion: &Completion, result: &[u8]) -> Option<Refusal> {
    match completion.outcome {
        Outcome::Success => None,
        Outcome::Invalid => Some(Refusal::invalid_result()),
        Outcome::Expired => Some(Failure::deadline().into()),
        Outcome::Damaged => Some(Refusal::damaged()),
        Outcome::Failure(code) => Some(Failure::from_result(code, result).into()),
    }
}

fn head<'a>(hub: &Hub, completion: &Completion, failure: Option<&'a Refusal>) -> ResultHead<'a> {
    let [offered, claimed, done] = completion.times;
    ResultHead {
        id: completion.id,
        status: failure.map(result_status),
        queued_ns: claimed.saturating_sub(offered),
        worked_ns: done.saturating_sub(claimed),
        returned_ns: now().saturating_sub(done),
        attempts: completion.attempts,
        worker: completion.worker.into(),
        partial: false,
        sequence: hub.with_front(|front| front.taken(completion.index)),
    }
}

fn result_status(refusal: &Refusal) -> ResultStatus<'_> {
    ResultStatus {
        code: refusal.code as i32,
        message: &refusal.message,
        reason: &refusal.reason,
        traceback: &refusal.traceback,
    }
}

/// Appends the result of an item that never ran.
pub fn encode_refusal(out: &mut BytesMut, id: u64, refusal: &Refusal) {
    let head = ResultHead { id, status: Some(result_status(refusal)), ..Default::default() };
    encode_result(out, &head, &[]);
}

/// The end of a call: its result, or why it failed.
pub fn encode_call(hub: &Hub, ending: Ending, out: &mut BytesMut) -> Result<Option<Bytes>, Refusal> {
    let failed = match &ending {
        Ending::Failed { failure, .. } => Some(failure.clone().into()),
        Ending::Partial(_) => None,
        Ending::Completed(completion) => match completion.outcome {
            Outcome::Success => None,
            _ => {
                let mut line = [0; INLINE];
                failure(completion, result(hub, completion, &mut line))
            }
        },
    };
    match failed {
        None => Ok(encode(hub, ending, out)),
        Some(refusal) => {
            if let Ending::Completed(completion) = ending {
                hub.release(completion.index);
            }
            Err(refusal)
        }
    }
}

/// The trailers of a stream or call that ended with this status.
pub fn trailers(status: Result<(), Status>) -> HeaderMap {
    let mut trailers = HeaderMap::with_capacity(4);
    let status = status.err().unwrap_or_else(|| Status::new(Code::Ok, ""));
    if status.add_header(&mut trailers).is_err() {
        // A message that is no header value: the code must get through.
        trailers.insert(Status::GRPC_STATUS, (status.code() as i32).into());
    }
    trailers
}
