//! `GetUpdates`: the results of submitted items, the moment they are done.
//!
//! # What it promises
//!
//! A result leaves the outbox only when it has been written to its subscriber's connection. What a subscriber that went
//! away did not get goes back, before all others and in order.
//!
//! # Why that holds
//!
//! A frame carries a guard that HTTP/2 drops when it has written the frame to the socket, or has thrown it away because the
//! stream ended. Which of the two it was shows at the next poll: a stream that was reset is not polled again, its
//! body is dropped. So a dropped guard only marks its results, the next poll frees them, and dropping the body puts back all
//! that are not freed. A result may come twice if the connection breaks between the write and that poll. What was
//! written and is still in a socket's buffer when the connection breaks is lost with it: gRPC has no receipt for that.
//!
//! When the RPC's deadline has passed nothing more is taken, and the end comes behind what HTTP/2 has of the stream already.

use std::{
    collections::VecDeque,
    pin::Pin,
    rc::Rc,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, Waker, ready},
};

use bytes::{Bytes, BytesMut};
use http_body::Frame;
use tonic::Status;

use super::{
    grace::Grace,
    hub::{Hub, Subscription, until},
    output,
    status::Refusal,
};
use crate::{crash_point::crash_point, dispatch::Completion, proto::v1::GetUpdatesRequest};

/// Batches that HTTP/2 has let go of, by number, and the subscriber to tell.
#[derive(Debug, Default)]
struct Written {
    batches: Mutex<(Vec<u64>, Option<Waker>)>,
}

/// The bytes of a frame, and the batch it ends.
struct Guarded<B> {
    bytes: B,
    batch: u64,
    written: Arc<Written>,
}

impl<B: AsRef<[u8]>> AsRef<[u8]> for Guarded<B> {
    fn as_ref(&self) -> &[u8] {
        self.bytes.as_ref()
    }
}

impl<B> Drop for Guarded<B> {
    fn drop(&mut self) {
        let mut batches = self.written.batches.lock().unwrap_or_else(PoisonError::into_inner);
        batches.0.push(self.batch);
        if let Some(waker) = batches.1.take() {
            waker.wake();
        }
    }
}

/// The body of a `GetUpdates` response.
pub struct UpdatesBody {
    hub: Rc<Hub>,
    name: String,
    subscription: Rc<Subscription>,
    /// Results that may still be sent.
    left: u64,
    frames: VecDeque<Bytes>,
    /// Handed to HTTP/2 and not known to be written, by batch, oldest first.
    unwritten: VecDeque<(u64, Vec<Completion>)>,
    batch: u64,
    written: Arc<Written>,
    /// The RPC's deadline, if it has one.
    over: Option<Pin<Box<dyn Future<Output = ()>>>>,
    grace: Grace,
    /// How the stream will end.
    end: Result<(), Status>,
    ended: bool,
}

impl UpdatesBody {
    pub fn new(hub: Rc<Hub>, request: GetUpdatesRequest, deadline: u64) -> Self {
        UpdatesBody {
            subscription: hub.subscription(&request.subscription),
            hub,
            name: request.subscription,
            left: if request.limit == 0 { u64::MAX } else { request.limit },
            frames: VecDeque::new(),
            unwritten: VecDeque::new(),
            batch: 0,
            written: Arc::default(),
            over: (deadline != 0).then(|| Box::pin(until(deadline)) as _),
            grace: Grace::new(deadline),
            end: Ok(()),
            ended: false,
        }
    }

    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Frame<Bytes>>> {
        self.free_written(cx.waker());
        if self.ended {
            return Poll::Ready(None);
        }
        if self.left > 0 && self.over.as_mut().is_some_and(|over| over.as_mut().poll(cx).is_ready()) {
            self.left = 0;
            self.end = Err(Refusal::late().status());
        }
        ready!(self.grace.poll(cx));
        if self.frames.is_empty() && self.left > 0 {
            self.write();
        }
        if let Some(bytes) = self.frames.pop_front() {
            crash_point!("updates.sent");
            return Poll::Ready(Some(Frame::data(bytes)));
        }
        // The end of the stream must not overtake the proof that the last result was written.
        let over = self.left == 0 || self.hub.is_draining() && self.subscription.is_done();
        if over && self.unwritten.is_empty() {
            self.ended = true;
            crash_point!("updates.ended");
            let end = std::mem::replace(&mut self.end, Ok(()));
            return Poll::Ready(Some(Frame::trailers(output::trailers(end))));
        }
        self.subscription.keep(cx.waker());
        Poll::Pending
    }

    /// Encodes results that are ready as one batch.
    fn write(&mut self) {
        let mut out = BytesMut::new();
        let mut results = Vec::new();
        let mut payload = None;
        while out.len() < output::FRAME && self.left > 0 && payload.is_none() {
            let Some(completion) = self.subscription.take() else { break };
            crash_point!("updates.taken");
            payload = output::encode_kept(&self.hub, &completion, &mut out);
            results.push(completion);
            self.left -= 1;
        }
        if results.is_empty() {
            return;
        }
        self.batch += 1;
        let (batch, written) = (self.batch, self.written.clone());
        match payload {
            None => self.frames.push_back(Bytes::from_owner(Guarded { bytes: out, batch, written })),
            Some(bytes) => {
                self.frames.push_back(out.freeze());
                self.frames.push_back(Bytes::from_owner(Guarded { bytes, batch, written }));
            }
        }
        self.unwritten.push_back((batch, results));
    }

    /// Frees what has been written, now that this stream is known to live.
    fn free_written(&mut self, waker: &Waker) {
        let written = {
            let mut batches = self.written.batches.lock().unwrap_or_else(PoisonError::into_inner);
            batches.1 = Some(waker.clone());
            std::mem::take(&mut batches.0)
        };
        for batch in written {
            crash_point!("updates.written");
            let Some(at) = self.unwritten.iter().position(|(number, _)| *number == batch) else { continue };
            for completion in self.unwritten.remove(at).into_iter().flat_map(|(_, results)| results) {
                self.hub.release_submitted(&completion);
            }
        }
    }

    pub fn is_ended(&self) -> bool {
        self.ended
    }
}

impl Drop for UpdatesBody {
    fn drop(&mut self) {
        let unwritten: Vec<_> = self.unwritten.drain(..).flat_map(|(_, results)| results).collect();
        self.subscription.put_back(unwritten.into_iter());
        self.hub.forget_if_unused(&self.name);
    }
}
