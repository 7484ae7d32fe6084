//! Handlers: what a user writes.
//!
//! A handler is a closure from an [`Item`] to a result. It sees the payload in place, in shared memory, and writes its
//! result in place into a [`Reply`]. It runs in a worker process, one item at a time, so it may use the CPU for as
//! long as it likes and may crash: an error or a panic becomes that item's failure, and the death of the process is
//! that of one worker, whose item is given to another.

pub use crate::dispatch::{Failure, Item, Reply, ReplyError};

/// A gRPC status code: what kind of failure it was.
pub use tonic::Code;

/// What runs in a worker. Implemented for closures, and by the handlers that come along.
pub trait Handler {
    /// Handles one item.
    fn handle(&mut self, item: &Item<'_>, reply: &mut Reply<'_, '_>) -> Result<(), Failure>;
}

impl<F> Handler for F
where
    F: FnMut(&Item<'_>, &mut Reply<'_, '_>) -> Result<(), Failure>,
{
    fn handle(&mut self, item: &Item<'_>, reply: &mut Reply<'_, '_>) -> Result<(), Failure> {
        self(item, reply)
    }
}
