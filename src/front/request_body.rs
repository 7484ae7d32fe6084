//! The body of a request, which is always read to its end.
//!
//! # Guarantee
//!
//! The server resets no stream because its RPC was answered before the client had half-closed it.
//!
//! # Mechanism
//!
//! A client may send END_STREAM in a frame of its own, after the message, and the answer is often ready before that frame
//! arrives. Dropping hyper's [`Incoming`] at that moment makes h2 send RST_STREAM and forget the stream soon afterwards. h2
//! then answers each late frame with another reset, which it counts for the life of the connection; the 1,024th closes the
//! connection. A [`RequestBody`] that is dropped before its end therefore leaves the rest to a task, which reads and discards it.
//!
//! # Bounds
//!
//! The task ends with the request's END_STREAM, with its reset by the client, or with the connection. There is no time limit,
//! because an open stream costs its client one of the streams that it may have, whether its RPC has ended or not. A client
//! that keeps sending is told to stop: after [`DISCARDED`] bytes its stream is reset with NO_ERROR, which is the use of that
//! code that RFC 9113, section 8.1, provides.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::task::spawn_local;

/// Bytes that are read from a request after its RPC has ended. A client that obeys the answer sends at most what is under
/// way, which is one window; a client that sends its whole message anyway has this much room for it.
const DISCARDED: usize = 64 << 20;

/// See the module.
#[derive(Debug)]
pub struct RequestBody {
    /// `None` once the end was read.
    body: Option<Incoming>,
}

impl RequestBody {
    pub fn new(body: Incoming) -> Self {
        RequestBody { body: Some(body) }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<hyper::Result<Frame<Bytes>>>> {
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let frame = ready!(Pin::new(body).poll_frame(cx));
        if !matches!(frame, Some(Ok(_))) {
            self.body = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or(SizeHint::with_exact(0), Body::size_hint)
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        if let Some(body) = self.body.take().filter(|body| !body.is_end_stream()) {
            spawn_local(discard(body));
        }
    }
}

/// Reads a body to its end, or until it has sent more than it may.
async fn discard(mut body: Incoming) {
    let mut left = DISCARDED;
    while let Some(Ok(frame)) = body.frame().await {
        left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
        if left == 0 {
            break;
        }
    }
}
