//! Mailboxes: where the results of an RPC's items arrive, in the order in which they were completed.

use std::{
    cell::RefCell,
    collections::VecDeque,
    task::{Poll, Waker},
};

use crate::dispatch::{Completion, Failure};

/// What comes of an item of an RPC.
#[derive(Debug)]
pub enum Ending {
    /// There are partial results in shared memory, to be taken from there. No end yet.
    Partial(u32),
    /// Completed; the result is in shared memory until it is released.
    Completed(Completion),
    /// Failed before a worker completed it.
    Failed {
        /// The client's own id.
        id: u64,
        /// Why.
        failure: Failure,
    },
}

/// One RPC's.
#[derive(Debug, Default)]
pub struct Mailbox {
    ready: RefCell<VecDeque<Ending>>,
    waker: RefCell<Option<Waker>>,
}

impl Mailbox {
    /// Whether it woke somebody.
    pub fn deliver(&self, ending: Ending) -> bool {
        self.ready.borrow_mut().push_back(ending);
        self.wake()
    }

    /// Whether somebody waited.
    pub fn wake(&self) -> bool {
        let waker = self.waker.borrow_mut().take();
        waker.map(Waker::wake).is_some()
    }

    /// The next result, or the waker is kept until there is one.
    pub fn poll(&self, waker: &Waker) -> Poll<Ending> {
        match self.take() {
            Some(ending) => Poll::Ready(ending),
            None => {
                self.keep(waker);
                Poll::Pending
            }
        }
    }

    /// The next result, if there is one.
    pub fn take(&self) -> Option<Ending> {
        self.ready.borrow_mut().pop_front()
    }

    /// Puts one back that is not dealt with yet, before all others.
    pub fn put_back(&self, ending: Ending) {
        self.ready.borrow_mut().push_front(ending);
    }

    /// Wakes this task when there is a result.
    pub fn keep(&self, waker: &Waker) {
        let mut kept = self.waker.borrow_mut();
        if !kept.as_ref().is_some_and(|kept| kept.will_wake(waker)) {
            *kept = Some(waker.clone());
        }
    }
}
