//! The grace period in which the end of an RPC is left to its client, after the RPC's deadline has passed.
//!
//! Every gRPC client watches its deadlines itself and cancels its RPC at the same moment. An answer that crosses this cancel
//! meets a stream that the client has forgotten. A client that is built on h2, such as tonic's, counts such answers for the life of
//! its connection and closes it at the 1,024th. So the items of such an RPC are cancelled at the deadline, but the server's own
//! answer comes only after the grace period, for a client that did not cancel.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use super::hub::until;
use crate::process::now;

/// Long enough that the cancel of a client on a busy machine arrives first.
const GRACE: Duration = Duration::from_millis(100);

/// Waits while the end of an RPC with this deadline is left to its client. Returns at once if it has no deadline (0), or the
/// deadline has not passed.
pub async fn left_to_client(deadline: u64) {
    if deadline != 0 && deadline <= now() {
        until(deadline.saturating_add(GRACE.as_nanos() as u64)).await;
    }
}

/// The grace period of a stream.
pub enum Grace {
    /// The deadline has not passed; 0 if there is none.
    Ahead(u64),
    /// The end is left to the client.
    Running(Pin<Box<dyn Future<Output = ()>>>),
    /// The client did not cancel.
    Over,
}

impl Grace {
    pub fn new(deadline: u64) -> Self {
        Grace::Ahead(deadline)
    }

    /// Pending while the stream's end is left to its client, and then nothing may be sent.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Grace::Ahead(deadline @ 1..) = *self
            && deadline <= now()
        {
            *self = Grace::Running(Box::pin(left_to_client(deadline)));
        }
        if let Grace::Running(left) = self {
            std::task::ready!(left.as_mut().poll(cx));
            *self = Grace::Over;
        }
        Poll::Ready(())
    }
}
