//! Input: items from the body of a request, as the frames come.
//!
//! The payload is copied once, from the frame to its place in shared memory, which is reserved when its length is
//! known. So a client must get on with a message that it has begun: within each `body_timeout` there must come its end, or
//! [so many bytes](PROGRESS) of it. The time that we keep the client waiting ourselves does not count.

use std::{
    future::poll_fn,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use http_body::Body;
use tokio::time::{Sleep, sleep};

use super::{
    hub::Hub,
    request_body::RequestBody,
    status::Refusal,
    wire::{Event, ItemDecoder, ItemHead},
};
use crate::dispatch::Request;

/// What a client has to send of a message in the time that it has: a byte now and then is not enough.
pub const PROGRESS: usize = 64 << 10;

/// The items of one request.
pub struct Input {
    hub: Rc<Hub>,
    body: Option<RequestBody>,
    chunk: Bytes,
    decoder: ItemDecoder,
    request: Request,
    /// The next message is complete and has not been taken.
    complete: bool,
    /// Memory for a payload of so many bytes is waited for.
    wanted: Option<usize>,
    timeout: Option<Pin<Box<Sleep>>>,
    /// Bytes that have come since the timeout began.
    progress: usize,
    /// Whether it may wait for room: then it leaves some to those who may not.
    is_stream: bool,
}

impl Input {
    pub fn new(hub: Rc<Hub>, body: RequestBody, is_stream: bool) -> Self {
        let decoder = ItemDecoder::new(hub.max_message);
        Input {
            hub,
            body: Some(body),
            chunk: Bytes::new(),
            decoder,
            request: Request::default(),
            complete: false,
            wanted: None,
            timeout: None,
            progress: 0,
            is_stream,
        }
    }

    /// Reads up to the end of the next item; false at the end of the stream. If there is no memory for a payload, a stream
    /// waits for it and a call is refused.
    pub fn poll_item(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, Refusal>> {
        loop {
            if self.complete {
                return Poll::Ready(Ok(true));
            }
            if let Some(len) = self.wanted {
                match self.hub.request(len, self.is_stream) {
                    Ok(request) => {
                        self.replace(request);
                        self.wanted = None;
                    }
                    Err(error) if !self.is_stream => return Poll::Ready(Err(error.into())),
                    Err(_) => {
                        self.timeout = None;
                        self.hub.wait_for_room(cx.waker());
                        return Poll::Pending;
                    }
                }
            }
            if !self.chunk.is_empty() {
                self.decode()?;
                continue;
            }
            let Some(body) = &mut self.body else { return Poll::Ready(Ok(false)) };
            match Pin::new(body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    // Trailers of a request mean nothing in gRPC.
                    self.chunk = frame.into_data().unwrap_or_default();
                    self.progress += self.chunk.len();
                    if self.progress >= PROGRESS {
                        self.timeout = None;
                    }
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(Refusal::broken(&error))),
                Poll::Ready(None) => {
                    self.body = None;
                    self.timeout = None;
                    self.decoder.finish()?;
                }
                Poll::Pending => {
                    if self.decoder.in_message() {
                        ready!(self.poll_timeout(cx));
                        return Poll::Ready(Err(Refusal::body_timeout(self.hub.body_timeout)));
                    }
                    return Poll::Pending;
                }
            }
        }
    }

    /// The same for a call, which is told when the server drains before it is complete.
    pub async fn item_of_call(&mut self) -> Result<bool, Refusal> {
        // As a rule it is there already.
        match poll_fn(|cx| Poll::Ready(self.poll_item(cx))).await {
            Poll::Ready(found) => found,
            Poll::Pending => {
                let mut draining = self.hub.draining.subscribe();
                tokio::select! {
                    biased;
                    found = poll_fn(|cx| self.poll_item(cx)) => found,
                    _ = draining.wait_for(|draining| *draining) => Err(Refusal::draining()),
                }
            }
        }
    }

    /// Decodes the chunk up to the next thing to do.
    fn decode(&mut self) -> Result<(), Refusal> {
        let mut rest = &self.chunk[..];
        let before = rest.len();
        loop {
            match self.decoder.next(&mut rest)? {
                Some(Event::Payload { len }) => match self.hub.request(len, self.is_stream) {
                    Ok(request) => {
                        let old = std::mem::replace(&mut self.request, request);
                        self.hub.discard(old);
                    }
                    Err(_) => {
                        self.wanted = Some(len);
                        break;
                    }
                },
                Some(Event::Bytes(bytes)) => self.hub.write(&mut self.request, bytes),
                Some(Event::Item) => {
                    self.complete = true;
                    self.timeout = None;
                    break;
                }
                None => break,
            }
        }
        let used = before - rest.len();
        self.chunk.advance(used);
        Ok(())
    }

    fn replace(&mut self, request: Request) {
        let old = std::mem::replace(&mut self.request, request);
        self.hub.discard(old);
    }

    fn poll_timeout(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let timeout = self.timeout.get_or_insert_with(|| {
            self.progress = 0;
            Box::pin(sleep(self.hub.body_timeout))
        });
        timeout.as_mut().poll(cx)
    }

    /// The item that [`Input::poll_item`] found, until [`Input::next`].
    pub fn item(&mut self) -> (&ItemHead, &mut Request) {
        (self.decoder.head(), &mut self.request)
    }

    /// Done with this item, whether its request was taken or not.
    pub fn next(&mut self) {
        self.complete = false;
        self.replace(Request::default());
    }

    /// Whether bytes follow the item that were sent with it.
    pub fn has_more(&self) -> bool {
        !self.chunk.is_empty()
    }

    /// Takes the body, whose end may still have to come.
    pub fn take_body(&mut self) -> Option<RequestBody> {
        self.body.take()
    }

    /// Reads nothing more.
    pub fn close(&mut self) {
        self.body = None;
        self.chunk = Bytes::new();
        self.timeout = None;
        // Half a message keeps no memory.
        self.wanted = None;
        self.complete = false;
        self.replace(Request::default());
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        self.replace(Request::default());
        // Its own waker may be among those who wait for room: it is not kept longer than it must.
        self.hub.wake_room();
    }
}
