//! `Call`: one item in, its result out.

use std::{future::poll_fn, rc::Rc};

use bytes::{Bytes, BytesMut};
use http_body::Frame;
use hyper::body::Incoming;
use tonic::Status;

use super::{
    hub::{Hub, Mailbox, NotOffered},
    input::Input,
    output,
    status::Refusal,
};

/// The item of a call. If the call goes away, the item is cancelled.
struct Waiting {
    hub: Rc<Hub>,
    mailbox: Rc<Mailbox>,
    index: u32,
    /// A client that has not half-closed yet must not be reset for that.
    input: Input,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.hub.abandon(&self.mailbox, Some(self.index));
    }
}

/// Runs a call up to its answer.
pub async fn call(hub: Rc<Hub>, body: Incoming, deadline: u64) -> Result<UnaryBody, Status> {
    let waiting = offer(&hub, body, deadline).await.map_err(|refusal| refusal.status())?;
    let ending = poll_fn(|cx| waiting.mailbox.poll(cx.waker())).await;
    let mut message = BytesMut::new();
    let rest = output::encode_call(&hub, ending, &mut message)?;
    Ok(UnaryBody { message: Some(message.freeze()), rest, ended: false })
}

async fn offer(hub: &Rc<Hub>, body: Incoming, deadline: u64) -> Result<Waiting, Refusal> {
    let mut input = Input::new(hub.clone(), body, false);
    if !input.item_of_call().await? {
        return Err(Refusal::empty());
    }
    let mailbox = Rc::<Mailbox>::default();
    let (head, request) = input.item();
    let index = hub.offer_call(head, request, deadline, &mailbox, false).map_err(|error| match error {
        NotOffered::Later(error) => error.into(),
        NotOffered::Never(refusal) => refusal,
    })?;
    input.next();
    let waiting = Waiting { hub: hub.clone(), mailbox, index, input };
    if waiting.input.has_more() {
        return Err(Refusal::two_messages());
    }
    Ok(waiting)
}

/// One message and the trailers.
#[derive(Debug)]
pub struct UnaryBody {
    message: Option<Bytes>,
    rest: Option<Bytes>,
    ended: bool,
}

impl UnaryBody {
    pub fn new(message: Bytes) -> Self {
        UnaryBody { message: Some(message), rest: None, ended: false }
    }

    pub fn poll(&mut self) -> Option<Frame<Bytes>> {
        if let Some(bytes) = self.message.take().or_else(|| self.rest.take()) {
            return Some(Frame::data(bytes));
        }
        if self.ended {
            return None;
        }
        self.ended = true;
        Some(Frame::trailers(output::trailers(Ok(()))))
    }

    pub fn is_ended(&self) -> bool {
        self.ended
    }
}
