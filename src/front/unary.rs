//! `Call`: one item in, its result out.

use std::{future::poll_fn, rc::Rc};

use bytes::{Bytes, BytesMut};
use http_body::Frame;

use super::{
    connection::Exchange,
    hub::{Hub, NotOffered},
    input::Input,
    mailbox::Mailbox,
    output,
    request_body::RequestBody,
    status::Refusal,
};
use crate::crash_point::crash_point;

/// The item of a call. If the call goes away, the item is cancelled.
struct Waiting {
    hub: Rc<Hub>,
    mailbox: Rc<Mailbox>,
    index: u32,
    input: Input,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.hub.abandon(&self.mailbox, Some(self.index));
    }
}

/// Runs a call up to its answer.
pub async fn call(hub: Rc<Hub>, body: RequestBody, deadline: u64, exchange: &Exchange) -> Result<UnaryBody, Refusal> {
    let mut waiting = offer(&hub, body, deadline).await?;
    exchange.begin_work();
    let ending = poll_fn(|cx| waiting.mailbox.poll(cx.waker())).await;
    let mut message = BytesMut::new();
    let rest = output::encode_call(&hub, ending, &mut message)?;
    crash_point!("call.encoded");
    let request = waiting.input.take_body();
    Ok(UnaryBody { message: Some(message.freeze()), rest, ended: false, _request: request })
}

async fn offer(hub: &Rc<Hub>, body: RequestBody, deadline: u64) -> Result<Waiting, Refusal> {
    let mut input = Input::new(hub.clone(), body, false);
    let offered = match input.item_of_call().await {
        Ok(true) => accept(hub, &mut input, deadline),
        Ok(false) => Err(Refusal::empty()),
        Err(refusal) => Err(refusal),
    };
    match offered {
        Ok((mailbox, index)) => Ok(Waiting { hub: hub.clone(), mailbox, index, input }),
        Err(refusal) => Err(refusal),
    }
}

fn accept(hub: &Hub, input: &mut Input, deadline: u64) -> Result<(Rc<Mailbox>, u32), Refusal> {
    if input.has_more() {
        return Err(Refusal::two_messages());
    }
    let mailbox = Rc::<Mailbox>::default();
    let (head, request) = input.item();
    let index = hub.offer_call(head, request, deadline, &mailbox, false).map_err(|error| match error {
        NotOffered::Later(error) => error.into(),
        NotOffered::Never(refusal) => refusal,
    })?;
    input.next();
    Ok((mailbox, index))
}

/// One message and the trailers.
#[derive(Debug)]
pub struct UnaryBody {
    message: Option<Bytes>,
    rest: Option<Bytes>,
    ended: bool,
    /// The client's END_STREAM has mostly come when the response is sent: then nothing has to be discarded.
    _request: Option<RequestBody>,
}

impl UnaryBody {
    pub fn new(message: Bytes) -> Self {
        UnaryBody { message: Some(message), rest: None, ended: false, _request: None }
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
