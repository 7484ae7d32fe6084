//! What of a client belongs to one process: its channel and its streams.
//!
//! Behind a channel is a task of a tokio runtime, and a runtime does not survive a fork: its threads are not in the child,
//! and its selector is the parent's too. So each process makes a channel of its own, when it first needs one. What it
//! has of its parent's it does not use, which would wait for ever, and does not drop, which would wake the parent's
//! task, under locks whose owners are not there: it forgets it.

use std::{
    mem,
    pin::Pin,
    process,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
};

use tokio_stream::Stream;
use tonic::{
    Code, Status, Streaming,
    transport::{Channel, Endpoint},
};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::proto::v1::WorkResult;

/// Something that only the process that made it may use and drop.
#[derive(Debug)]
struct Owned<T> {
    pid: u32,
    // Empty while it is dropped.
    value: Option<T>,
}

impl<T> Owned<T> {
    fn new(value: T) -> Self {
        Self { pid: process::id(), value: Some(value) }
    }

    fn is_ours(&self) -> bool {
        self.pid == process::id()
    }
}

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        if !self.is_ours() {
            mem::forget(self.value.take());
        }
    }
}

/// The channel of this process, and those of its ancestors.
#[derive(Debug, Clone)]
pub(super) struct Channels {
    first: Arc<Link>,
    endpoint: Option<Endpoint>,
}

/// The channel of one process, and that of its child. It is only ever added to, with no lock: one that another thread
/// of the parent held at the fork would stay locked in the child.
#[derive(Debug)]
struct Link {
    channel: Owned<Channel>,
    next: OnceLock<Box<Link>>,
}

impl Link {
    fn new(channel: Channel) -> Self {
        Self { channel: Owned::new(channel), next: OnceLock::new() }
    }
}

impl Channels {
    pub(super) fn new(channel: Channel, endpoint: Option<Endpoint>) -> Self {
        Self { first: Arc::new(Link::new(channel)), endpoint }
    }

    /// This process's channel.
    pub(super) fn here(&self) -> Result<Channel, Status> {
        let mut link = &*self.first;
        loop {
            if let (true, Some(channel)) = (link.channel.is_ours(), &link.channel.value) {
                return Ok(channel.clone());
            }
            let endpoint = self.endpoint.as_ref().ok_or_else(|| forked("client", link.channel.pid))?;
            // What loses a race of two threads was never connected.
            link = match link.next.get() {
                Some(next) => next,
                None => {
                    let _ = link.next.set(Box::new(Link::new(endpoint.connect_lazy())));
                    continue;
                }
            };
        }
    }
}

/// A stream of results: `while let Some(result) = results.message().await? { … }`.
///
/// It belongs to the process that opened it; in a forked child it is an error with the reason `FORKED`.
#[derive(Debug)]
pub struct Results(Owned<Streaming<WorkResult>>);

impl Results {
    pub(super) fn new(stream: Streaming<WorkResult>) -> Self {
        Self(Owned::new(stream))
    }

    /// The next result; `None`: the stream has ended.
    pub async fn message(&mut self) -> Result<Option<WorkResult>, Status> {
        self.here()?.message().await
    }

    fn here(&mut self) -> Result<&mut Streaming<WorkResult>, Status> {
        let pid = self.0.pid;
        match (self.0.is_ours(), &mut self.0.value) {
            (true, Some(stream)) => Ok(stream),
            _ => Err(forked("stream", pid)),
        }
    }
}

impl Stream for Results {
    type Item = Result<WorkResult, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match self.here() {
            Ok(stream) => Pin::new(stream).poll_next(cx),
            Err(status) => Poll::Ready(Some(Err(status))),
        }
    }
}

fn forked(what: &str, pid: u32) -> Status {
    let message =
        format!("this {what} belongs to process {pid}; open a new one after fork, this is process {}", process::id());
    Status::with_error_details(
        Code::FailedPrecondition,
        message,
        ErrorDetails::with_error_info("FORKED", "forkring", []),
    )
}
