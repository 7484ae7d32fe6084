//! Replies: a result while its handler writes it.

use std::{cell::RefCell, io, sync::atomic::Ordering::Relaxed};

use super::{
    Claimed, Failure, Kind,
    output::{Hold, Output, Target},
    partial::LEAD,
    request::Line,
    waiting::{Credit, Room},
};
use crate::{
    arena::{Block, Memory},
    segment::INLINE,
};

/// Why there is no memory for a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReplyError {
    /// It can never be had.
    #[error("a result of {len} bytes is too large: at most {most} are possible (--max-message)")]
    TooLarge {
        /// Bytes that were asked for.
        len: usize,
        /// Bytes that can be had.
        most: usize,
    },
    /// The worker's earlier results are in the way, and nobody fetches them.
    #[error("there is no room for the result: the worker's earlier results wait for their subscribers (--arena)")]
    NoRoom,
    /// Nobody waits for the item's results any more, so that no partial one is taken.
    #[error("the item was cancelled by its client")]
    Cancelled,
    /// The same, because the item's deadline has passed.
    #[error("the item's deadline has passed")]
    Expired,
}

impl From<ReplyError> for io::Error {
    fn from(error: ReplyError) -> Self {
        let kind = match error {
            ReplyError::Cancelled | ReplyError::Expired => io::ErrorKind::BrokenPipe,
            ReplyError::TooLarge { .. } | ReplyError::NoRoom => io::ErrorKind::StorageFull,
        };
        io::Error::new(kind, error)
    }
}

/// What there is of a result: where it is, if it is not in its line, and what it is for.
pub(super) struct Draft<'s> {
    target: Target<'s>,
    most: usize,
    len: usize,
    block: Option<Block>,
    /// What there is, if it has stepped aside to wait for room. Then it has no block.
    aside: Option<Box<[u8]>>,
    hold: Option<Hold>,
    /// How many partial results were sent.
    sent: u32,
}

impl<'s> Draft<'s> {
    /// An empty result of at most `most` bytes.
    #[inline(always)]
    pub fn of(claimed: &Claimed<'s>, most: usize) -> Self {
        Draft::new(Target::of(claimed), most)
    }

    #[inline(always)]
    fn new(target: Target<'s>, most: usize) -> Self {
        Draft { target, most, len: 0, block: None, aside: None, hold: None, sent: 0 }
    }
}

/// The result of a claimed item, written in place: in the item's record if it is small, in the worker's partition of
/// the result arena if not.
pub struct Reply<'w, 's> {
    output: &'w RefCell<Output<'s>>,
    /// Room for a small result.
    line: &'w mut Line,
    draft: Draft<'s>,
    /// Where it goes on when this is dropped; without that it is thrown away.
    home: Option<&'w mut Option<Draft<'s>>>,
}

impl<'w, 's> Reply<'w, 's> {
    /// `line` has room for a small result.
    #[inline(always)]
    pub(super) fn new(
        output: &'w RefCell<Output<'s>>,
        line: &'w mut Line,
        draft: Draft<'s>,
        home: Option<&'w mut Option<Draft<'s>>>,
    ) -> Self {
        Reply { output, line, draft, home }
    }
}

impl<'s> Reply<'_, 's> {
    /// Bytes so far.
    pub fn len(&self) -> usize {
        self.draft.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.draft.len == 0
    }

    /// The most bytes that a result may have.
    pub fn max_len(&self) -> usize {
        self.draft.most
    }

    /// Throws away what was written.
    pub fn clear(&mut self) {
        self.draft.len = 0;
        self.draft.aside = None;
    }

    /// The same, and forgets the memory that it was in: what is written next is elsewhere, if it was [held](Reply::hold).
    pub fn discard(&mut self) {
        self.clear();
        self.free_block();
    }

    /// Sees to it that the result can become `len` bytes long without waiting; false, if there is no room for that yet. It is
    /// worth trying again when the worker's bell has rung.
    ///
    /// Until then what there is of the result is in private memory: what waits for room is in nobody's way, nor in its own.
    pub fn try_reserve(&mut self, len: usize) -> Result<bool, ReplyError> {
        let most = self.draft.most;
        if len > most {
            return Err(ReplyError::TooLarge { len, most });
        }
        let len = len.max(self.draft.len);
        if len <= self.room() {
            return Ok(true);
        }
        // Twice what is needed, as in `write`.
        if self.draft.len > 0 && self.grow(len.saturating_mul(2).min(most)).is_some() {
            return Ok(true);
        }
        if self.move_if_there_is_room(len) {
            return Ok(true);
        }
        if self.draft.block.is_none() {
            return Ok(false);
        }
        let kept: Box<[u8]> = self.bytes().into();
        self.free_block();
        match self.line.0.get_mut(..kept.len()) {
            Some(line) => line.copy_from_slice(&kept),
            None => self.draft.aside = Some(kept),
        }
        Ok(self.move_if_there_is_room(len))
    }

    /// What to wait for before [`Reply::try_reserve`] is worth trying again. An error, if that has been waited for long enough.
    pub fn lacks_room(&mut self) -> Result<Room<'s>, ReplyError> {
        self.output.borrow_mut().room(&self.draft.target)
    }

    /// Makes the result `len` bytes long and lends them for writing. New bytes have any value.
    pub fn buffer(&mut self, len: usize) -> Result<&mut [u8], ReplyError> {
        self.reserve(len)?;
        self.draft.len = len;
        Ok(self.bytes())
    }

    /// Keeps the memory that the result has now, if it is in the arena, until the hold is dropped and the result, too, needs
    /// it no more.
    pub fn hold(&mut self) -> Option<Hold> {
        self.draft.block.as_ref()?;
        Some(self.draft.hold.get_or_insert_default().clone())
    }

    /// Appends bytes.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), ReplyError> {
        let start = self.draft.len;
        let end = start.saturating_add(bytes.len());
        let most = self.draft.most;
        if end > most {
            return Err(ReplyError::TooLarge { len: end, most });
        }
        if end > self.room() {
            // Twice what is needed if that is to be had, so that many small writes copy little.
            let roomy = if start == 0 { end } else { end.saturating_mul(2).min(most) };
            if self.grow(roomy).is_none() {
                self.move_to_block(end, roomy)?;
            }
        }
        self.draft.len = end;
        self.bytes()[start..].copy_from_slice(bytes);
        Ok(())
    }

    /// Sends what was written so far as a partial result, if the item's client reads a stream (`Process`), and begins the next
    /// one, which is empty. Waits while [`WINDOW`](crate::segment::WINDOW) of them have not been taken; an error, if
    /// nobody waits for them any more.
    ///
    /// To whom a result comes in one (`Call`, `Submit`) it comes when it is complete: then this does nothing, and all parts
    /// are written one behind the other.
    pub fn send(&mut self) -> Result<(), ReplyError> {
        while !self.try_send()? {
            if let Some(credit) = self.credit() {
                credit.wait().map_err(|_| ReplyError::NoRoom)?;
            }
        }
        Ok(())
    }

    /// The same without waiting: false, if it cannot be sent yet. See [`Reply::credit`].
    pub fn try_send(&mut self) -> Result<bool, ReplyError> {
        let Some(target) = self.streams() else { return Ok(true) };
        if !self.output.borrow().may_send(&target, self.draft.sent)? {
            return Ok(false);
        }
        if self.draft.block.is_none() {
            self.move_to_block(self.draft.len, 0)?;
        }
        let Some(mut block) = self.draft.block.take() else { return Ok(false) };
        let mut output = self.output.borrow_mut();
        let len = self.draft.len as u64;
        if let Some(head) = output.segment.write_result(output.number, &mut block, 8) {
            head.copy_from_slice(&len.to_ne_bytes());
        }
        output.send(&target, self.draft.sent, block, self.draft.hold.take());
        self.draft.sent = self.draft.sent.wrapping_add(1);
        self.draft.len = 0;
        Ok(true)
    }

    /// What to wait for until [`Reply::try_send`] may succeed; none: it always does.
    pub fn credit(&self) -> Option<Credit<'s>> {
        self.streams().map(|target| self.output.borrow().credit(target, self.draft.sent))
    }

    /// Whether the item's client reads partial results as they are made, at its own pace.
    pub fn is_streamed(&self) -> bool {
        self.streams().is_some()
    }

    /// The item, if its client reads partial results.
    fn streams(&self) -> Option<Target<'s>> {
        (self.draft.target.kind == Kind::Stream).then_some(self.draft.target)
    }

    /// Of a block, what comes before the result: a length is written there if it becomes a partial one.
    fn lead(&self) -> usize {
        if self.draft.target.kind == Kind::Stream { LEAD as usize } else { 0 }
    }

    fn room(&self) -> usize {
        match (&self.draft.block, &self.draft.aside) {
            (Some(block), _) => block.len() as usize - self.lead(),
            (None, Some(_)) => 0,
            (None, None) => INLINE,
        }
    }

    fn bytes(&mut self) -> &mut [u8] {
        if self.draft.block.is_none() {
            let place = self.draft.aside.as_deref_mut().unwrap_or(&mut self.line.0);
            return place.get_mut(..self.draft.len).unwrap_or_default();
        }
        let lead = self.lead();
        let Output { segment, number, .. } = *self.output.borrow();
        let Draft { len, block, .. } = &mut self.draft;
        let all = block.as_mut().and_then(|block| segment.write_result(number, block, (lead + *len) as u64));
        all.and_then(|all| all.get_mut(lead..)).unwrap_or_default()
    }

    fn reserve(&mut self, len: usize) -> Result<(), ReplyError> {
        let most = self.draft.most;
        if len > most {
            return Err(ReplyError::TooLarge { len, most });
        }
        let len = len.max(self.draft.len);
        if len <= self.room() || self.grow(len).is_some() {
            return Ok(());
        }
        self.move_to_block(len, 0)
    }

    /// Goes on in a new block with room for so many bytes, waiting for it if need be; or for `roomy` of them, if it need not wait
    /// for that.
    fn move_to_block(&mut self, len: usize, roomy: usize) -> Result<(), ReplyError> {
        // What was written so far may be what is in the way: it steps aside.
        let kept = self.bytes().to_vec();
        self.free_block();
        let written = std::mem::take(&mut self.draft.len);
        let (lead, mut output) = (self.lead(), self.output.borrow_mut());
        let block = if roomy > len { output.try_allocate(lead + roomy, &self.draft.target) } else { None };
        let block = match block {
            Some(block) => block,
            None => output.allocate(lead + len, &self.draft.target)?,
        };
        drop(output);
        self.draft.block = Some(block);
        self.draft.len = written;
        self.bytes().copy_from_slice(&kept);
        Ok(())
    }

    /// Moves to a block with room for so many bytes, if there is one or results that are in its way are not needed any more.
    fn move_if_there_is_room(&mut self, len: usize) -> bool {
        let block = self.output.borrow_mut().try_allocate(self.lead() + len, &self.draft.target);
        block.map(|block| self.move_to(block)).is_some()
    }

    /// Moves to a block with room for so many bytes, if it can be had at once.
    fn grow(&mut self, len: usize) -> Option<()> {
        let block = self.output.borrow_mut().allocate_now(self.lead() + len, &self.draft.target)?;
        self.move_to(block);
        Some(())
    }

    /// Goes on in a block that has room for what there is.
    fn move_to(&mut self, mut block: Block) {
        let lead = self.lead();
        let Output { segment, number, .. } = *self.output.borrow();
        let new = segment.write_result(number, &mut block, (lead + self.draft.len) as u64);
        let new = new.and_then(|new| new.get_mut(lead..)).unwrap_or_default();
        new.copy_from_slice(self.bytes());
        self.free_block();
        self.draft.block = Some(block);
    }

    #[cold]
    fn free_block(&mut self) {
        self.draft.aside = None;
        if let Some(old) = self.draft.block.take() {
            self.output.borrow_mut().give_back(Memory::Own(old), self.draft.hold.take());
        }
    }

    /// Completes the item with these bytes as its result; `code` is 0 or that of the failure they describe. The front is woken by
    /// the worker's next [`take`](super::Worker::take), or [`ring`](super::Worker::ring).
    // Not by value: a move of what was written field by field waits for the stores.
    #[inline(always)]
    pub fn complete(&mut self, claimed: Claimed<'_>, code: u32, claimed_at: u64, done_at: u64) {
        if self.draft.aside.is_some()
            && let Err(error) = self.move_to_block(self.draft.len, 0)
        {
            return self.fail(claimed, &error.into(), claimed_at, done_at);
        }
        if self.draft.block.is_some() {
            self.settle(&claimed);
        } else {
            claimed.record.result.store(&self.line.0[..self.draft.len]);
        }
        claimed.record.result_len.store(self.draft.len as u32, Relaxed);
        self.output.borrow_mut().complete(&claimed, code, [claimed_at, done_at]);
    }

    /// Says where a result is that has a block.
    #[cold]
    fn settle(&mut self, claimed: &Claimed<'_>) {
        if self.draft.len <= INLINE {
            // It turned out small enough.
            claimed.record.result.store(self.bytes());
            return self.free_block();
        }
        let lead = self.lead() as u64;
        let Some(block) = self.draft.block.take() else { return };
        claimed.record.result_offset.store(block.offset() + lead, Relaxed);
        self.output.borrow_mut().keep(&self.draft.target, block, self.draft.hold.take(), self.draft.len);
    }

    /// Completes the item with a failure instead.
    pub(crate) fn fail(&mut self, claimed: Claimed<'_>, failure: &Failure, claimed_at: u64, done_at: u64) {
        self.clear();
        self.free_block();
        self.draft.most = usize::MAX;
        let text = failure.encode();
        if self.write(&text).is_err() {
            // No room for the long version.
            self.clear();
            let _ = self.write(&text[..text.len().min(INLINE)]);
        }
        self.complete(claimed, failure.code.into(), claimed_at, done_at);
    }
}

impl Drop for Reply<'_, '_> {
    #[inline(always)]
    fn drop(&mut self) {
        if let Some(home) = self.home.take() {
            let fresh = Draft::new(self.draft.target, 0);
            *home = Some(std::mem::replace(&mut self.draft, fresh));
        } else if self.draft.block.is_some() {
            self.free_block();
        }
    }
}

impl io::Write for Reply<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Reply::write(self, bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
