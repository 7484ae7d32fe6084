//! `Process`: items in, results out, both at once.
//!
//! The response body is the whole machine: each time HTTP/2 asks for a frame it reads the items that have come, offers
//! them, and sends the results that are ready. If the client does not read its results, HTTP/2 does not ask, so its items are
//! not read either: that is all the flow control there is.

use std::{
    collections::VecDeque,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::{Bytes, BytesMut};
use http_body::Frame;
use tonic::Status;

use super::{
    grace::Grace,
    hub::{Hub, NotOffered},
    input::Input,
    mailbox::{Ending, Mailbox},
    output::{self, Drained},
    request_body::RequestBody,
    status::Refusal,
};
use crate::crash_point::crash_point;

/// Items that one poll reads before it looks at the results.
const BURST: usize = 256;

/// The body of a `Process` response.
pub struct ProcessBody {
    hub: Rc<Hub>,
    input: Input,
    mailbox: Rc<Mailbox>,
    /// The RPC's own deadline; 0: none.
    deadline: u64,
    grace: Grace,
    /// Whether a whole item has arrived.
    pub has_received: bool,
    /// The client has broken the stream off.
    pub is_broken: bool,
    /// Items that are in work.
    in_flight: usize,
    /// What is encoded and not sent.
    out: BytesMut,
    frames: VecDeque<Bytes>,
    /// No more items will be read.
    closed: bool,
    /// How the stream will end when the last result is out.
    end: Result<(), Status>,
    ended: bool,
}

impl ProcessBody {
    pub fn new(hub: Rc<Hub>, body: RequestBody, deadline: u64) -> Self {
        ProcessBody {
            input: Input::new(hub.clone(), body, true),
            mailbox: hub.open_stream(),
            hub,
            deadline,
            grace: Grace::new(deadline),
            has_received: false,
            is_broken: false,
            in_flight: 0,
            out: BytesMut::new(),
            frames: VecDeque::new(),
            closed: false,
            end: Ok(()),
            ended: false,
        }
    }

    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Frame<Bytes>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        ready!(self.grace.poll(cx));
        if let Some(bytes) = self.frames.pop_front() {
            crash_point!("process.sent");
            return Poll::Ready(Some(Frame::data(bytes)));
        }
        if self.hub.is_draining() && !self.closed {
            self.close(Err(Refusal::draining()));
        }
        // Read first: what is offered together is rung for together.
        let reading = !self.closed && self.read(cx);
        self.write();
        if let Some(bytes) = self.frames.pop_front() {
            crash_point!("process.sent");
            return Poll::Ready(Some(Frame::data(bytes)));
        }
        if self.closed && self.in_flight == 0 {
            self.ended = true;
            let end = std::mem::replace(&mut self.end, Ok(()));
            return Poll::Ready(Some(Frame::trailers(output::trailers(end))));
        }
        self.mailbox.keep(cx.waker());
        if reading {
            // There is more to read, and others want their turn.
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }

    /// Reads and offers items; whether there may be more at once.
    fn read(&mut self, cx: &mut Context<'_>) -> bool {
        for _ in 0..BURST {
            if self.in_flight >= self.hub.stream_items {
                return false;
            }
            match self.input.poll_item(cx) {
                Poll::Ready(Ok(true)) => {}
                Poll::Ready(Ok(false)) => {
                    self.close(Ok(()));
                    return false;
                }
                Poll::Ready(Err(refusal)) => {
                    self.is_broken = refusal.is_broken();
                    self.close(Err(refusal));
                    return false;
                }
                Poll::Pending => return false,
            }
            self.has_received = true;
            let (head, request) = self.input.item();
            match self.hub.offer_call(head, request, self.deadline, &self.mailbox, true) {
                Ok(_) => self.in_flight += 1,
                Err(NotOffered::Never(refusal)) => output::encode_refusal(&mut self.out, head.id, &refusal),
                Err(NotOffered::Later(_)) => {
                    // The item stays where it is until there is room.
                    self.hub.wait_for_room(cx.waker());
                    return false;
                }
            }
            self.input.next();
        }
        true
    }

    /// Encodes the results that are ready.
    fn write(&mut self) {
        while self.out.len() < output::FRAME {
            let Some(ending) = self.mailbox.take() else { break };
            let index = match &ending {
                Ending::Partial(index) if !self.hub.is_in_work(*index, &self.mailbox) => continue,
                Ending::Partial(index) => Some(*index),
                Ending::Completed(completion) => Some(completion.index),
                Ending::Failed { .. } => None,
            };
            let drained = index.map_or(Drained::All, |index| output::encode_partials(&self.hub, index, &mut self.out));
            match (drained, &ending) {
                (Drained::Some, _) => {
                    self.mailbox.put_back(ending);
                    break;
                }
                (Drained::Broken, _) => {
                    self.refuse(&ending);
                    continue;
                }
                (Drained::All, Ending::Partial(_)) => continue,
                (Drained::All, _) => {}
            }
            self.in_flight -= 1;
            if let Some(payload) = output::encode(&self.hub, ending, &mut self.out) {
                self.frames.push_back(self.out.split().freeze());
                self.frames.push_back(payload);
                return;
            }
        }
        if !self.out.is_empty() {
            self.frames.push_back(self.out.split().freeze());
        }
    }

    /// Ends an item with a partial result that is none.
    fn refuse(&mut self, ending: &Ending) {
        let id = match ending {
            Ending::Partial(index) => {
                self.hub.give_up(*index);
                self.hub.with_front(|front| front.id(*index))
            }
            Ending::Completed(completion) => {
                self.hub.release(completion.index);
                completion.id
            }
            Ending::Failed { .. } => return,
        };
        output::encode_refusal(&mut self.out, id, &Refusal::invalid_result());
        self.in_flight -= 1;
    }

    fn close(&mut self, end: Result<(), Refusal>) {
        self.closed = true;
        self.input.close();
        self.end = end.map_err(|refusal| refusal.status());
    }

    pub fn is_ended(&self) -> bool {
        self.ended
    }
}

impl Drop for ProcessBody {
    fn drop(&mut self) {
        self.hub.close_stream(&self.mailbox, self.in_flight);
    }
}
