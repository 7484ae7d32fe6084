//! Open items: any number of them in one worker, for a handler that has many in hand at once and finishes them in any order.
//!
//! An open item owns what it consists of, and shares with the others of its worker only the place where results go. There is no
//! lock on that, so all of them stay in one thread. To everybody else each is CLAIMED like any other: if the process dies, the
//! sweep gives all of them back, and as nobody knows which one it died of, each has had an attempt.

use std::{borrow::Cow, cell::RefCell, fmt, rc::Rc, sync::atomic::Ordering::Relaxed};

use tonic::Code;

use super::{Claimed, Failure, Item, Reply, output::Output, reply::Draft, request, worker::Lines};
use crate::{
    process::now,
    segment::{INLINE, Segment},
};

/// A claimed item, its result, and the duty to complete it: one that is dropped fails with `INTERNAL`, reason
/// `ITEM_DROPPED`.
pub struct Open<'s> {
    claimed: Claimed<'s>,
    began: u64,
    payload_len: usize,
    /// The payload; none, if it is in its line.
    payload: Option<&'s [u8]>,
    metadata: Vec<u8>,
    lines: Lines,
    most: usize,
    /// None while there is a reply.
    draft: Option<Draft<'s>>,
    output: Rc<RefCell<Output<'s>>>,
    is_completed: bool,
}

impl<'s> Open<'s> {
    /// An item that was claimed at `began`. None if the front wrote something impossible.
    pub(super) fn new(
        segment: &'s Segment,
        output: Rc<RefCell<Output<'s>>>,
        claimed: &Claimed<'s>,
        most: usize,
        began: u64,
    ) -> Option<Self> {
        let record = claimed.record;
        let mut lines = Lines::default();
        let payload_len = record.payload_len.load(Relaxed) as usize;
        let payload = if payload_len <= INLINE {
            record.request.load(&mut lines.request.0);
            None
        } else {
            Some(segment.read_request(claimed.front, record.request_offset.load(Relaxed), payload_len as u64)?)
        };
        let metadata = request::metadata(segment, claimed.front, record);
        let draft = None;
        let claimed = claimed.duplicate();
        Some(Open { claimed, began, payload_len, payload, metadata, lines, most, draft, output, is_completed: false })
    }

    /// The item.
    pub fn item(&self) -> Item<'_> {
        let payload = self.payload.unwrap_or(&self.lines.request.0[..self.payload_len.min(INLINE)]);
        Item { claimed: &self.claimed, payload, metadata: Cow::Borrowed(&self.metadata) }
    }

    /// Its result, to be written.
    pub fn reply(&mut self) -> Reply<'_, 's> {
        let draft = self.draft.take().unwrap_or_else(|| Draft::of(&self.claimed, self.most));
        Reply::new(&self.output, &mut self.lines.result, draft, Some(&mut self.draft))
    }

    /// Completes it with what its reply has.
    pub fn complete(mut self) {
        self.is_completed = true;
        let (claimed, began) = (self.claimed.duplicate(), self.began);
        self.reply().complete(claimed, 0, began, now());
        self.output.borrow_mut().ring();
    }

    /// Completes it with a failure.
    pub fn fail(mut self, failure: &Failure) {
        self.end(failure);
    }

    fn end(&mut self, failure: &Failure) {
        self.is_completed = true;
        let (claimed, began) = (self.claimed.duplicate(), self.began);
        self.reply().fail(claimed, failure, began, now());
        self.output.borrow_mut().ring();
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        if !self.is_completed {
            let message = "the handler gave the item up: it neither returned a result nor failed";
            self.end(&Failure::new(Code::Internal, "ITEM_DROPPED", message));
        }
    }
}

impl fmt::Debug for Open<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Open").field("id", &self.claimed.id()).field("attempt", &self.claimed.attempt()).finish()
    }
}
