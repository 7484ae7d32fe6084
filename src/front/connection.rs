//! What the requests of one connection share: the turns in which its bytes are read, and its budget of premature resets.
//!
//! # Turns
//!
//! h2 handles every frame that the socket has before hyper accepts the streams that these frames opened. So a turn is one poll
//! of the connection's task, and [`Turns`] gives h2 at most [`TURN`] bytes in each, as if the socket had no more: the
//! streams are accepted, other connections get their turn, and the read goes on. This bounds the streams that a client can
//! open and reset before the server sees them, and it bounds them below h2's own limit for that ([`MAX_UNSEEN_RESETS`]), which
//! would otherwise close the connection of a client that cancels calls while the front is stalled.
//!
//! # Premature resets
//!
//! An [`Exchange`] is one request and its response. If it is dropped before its response was complete, the client has
//! reset its stream. The reset is premature if the client sent it in the turn in which it opened the stream, or before it
//! had sent one whole message. Premature resets use up the connection's [`ResetBudget`], and a connection without any left is
//! closed.

use std::{
    cell::Cell,
    io::{self, IoSlice},
    net::SocketAddr,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf, Take},
    sync::Notify,
};

use super::resets::ResetBudget;
use crate::process::now;

/// Bytes that are read from a connection before the streams that they opened are accepted.
const TURN: u64 = 64 << 10;
/// More streams than can be opened and reset by [`TURN`] bytes: 13 bytes for RST_STREAM, and for HEADERS 9 and one for each of the
/// four fields that a request must have.
pub const MAX_UNSEEN_RESETS: usize = TURN as usize / (13 + 9 + 4) + 1;

/// See the module.
#[derive(Debug)]
pub struct Connection {
    pub peer: SocketAddr,
    turn: Cell<u64>,
    /// Bytes have been written since [`Connection::take_written`].
    has_written: Cell<bool>,
    resets: Cell<ResetBudget>,
    is_flooded: Notify,
}

impl Connection {
    /// Returns a connection that may reset `max_resets` streams a second prematurely.
    pub fn new(peer: SocketAddr, max_resets: u32) -> Rc<Self> {
        Rc::new(Connection {
            peer,
            turn: Cell::new(0),
            has_written: Cell::new(false),
            resets: Cell::new(ResetBudget::new(max_resets)),
            is_flooded: Notify::new(),
        })
    }

    /// Begins a turn. For each poll of the connection's task.
    pub fn begin_turn(&self) {
        self.turn.set(self.turn.get() + 1);
    }

    /// Returns whether anything has been written to the socket since this was asked last.
    pub fn take_written(&self) -> bool {
        self.has_written.take()
    }

    /// Waits until the client has used up its budget of resets.
    pub async fn flooded(&self) {
        self.is_flooded.notified().await;
    }

    fn count_answer(&self) {
        let mut resets = self.resets.get();
        resets.refund();
        self.resets.set(resets);
    }

    fn count_premature_reset(&self) {
        let mut resets = self.resets.get();
        if !resets.spend(now()) {
            self.is_flooded.notify_one();
        }
        self.resets.set(resets);
    }
}

/// The reading half of a connection's socket, which gives [`TURN`] bytes in each turn.
#[derive(Debug)]
pub struct Turns<R> {
    inner: Take<R>,
    connection: Rc<Connection>,
    /// The turn that `inner` has its limit for.
    turn: u64,
}

impl<R: AsyncRead> Turns<R> {
    pub fn new(inner: R, connection: Rc<Connection>) -> Self {
        Turns { inner: inner.take(TURN), turn: connection.turn.get(), connection }
    }
}

impl<R: AsyncRead + Unpin> AsyncRead for Turns<R> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let turn = self.connection.turn.get();
        if turn != self.turn {
            self.turn = turn;
            self.inner.set_limit(TURN);
        }
        if self.inner.limit() == 0 {
            // The turn is over; the next one begins when the connection's task is polled again.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Pin::new(&mut self.inner).poll_read(cx, buffer)
    }
}

/// The writing half of a connection's socket, which notes that the client reads.
#[derive(Debug)]
pub struct Written<W> {
    inner: W,
    connection: Rc<Connection>,
}

impl<W> Written<W> {
    pub fn new(inner: W, connection: Rc<Connection>) -> Self {
        Written { inner, connection }
    }

    fn note(&self, written: &Poll<io::Result<usize>>) {
        if matches!(written, Poll::Ready(Ok(1..))) {
            self.connection.has_written.set(true);
        }
    }
}

impl<W: AsyncWrite + Unpin> AsyncWrite for Written<W> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write(cx, bytes);
        self.note(&written);
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write_vectored(cx, slices);
        self.note(&written);
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// How far a request has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// No whole message has arrived.
    Begun,
    /// A whole message has arrived, and the server works for it.
    InWork,
    /// The response is complete.
    Answered,
}

/// One request and its response. See the module.
#[derive(Debug)]
pub struct Exchange {
    connection: Rc<Connection>,
    /// The turn in which the server began with it.
    turn: u64,
    progress: Cell<Progress>,
    /// The client has broken it off, so that what is answered does not reach it.
    is_lost: Cell<bool>,
}

impl Exchange {
    pub fn new(connection: Rc<Connection>) -> Self {
        Exchange {
            turn: connection.turn.get(),
            connection,
            progress: Cell::new(Progress::Begun),
            is_lost: Cell::new(false),
        }
    }

    /// Notes that a whole message has arrived.
    pub fn begin_work(&self) {
        if !self.is_lost.get() {
            self.progress.set(Progress::InWork);
        }
    }

    /// Notes that the response is complete.
    pub fn finish(&self) {
        if !self.is_lost.get() {
            self.progress.set(Progress::Answered);
        }
    }

    /// Notes that the client has broken the request off. What becomes of it afterwards does not count.
    pub fn lose(&self) {
        self.is_lost.set(true);
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        match self.progress.get() {
            Progress::Answered => self.connection.count_answer(),
            progress if is_premature(progress, self.turn, self.connection.turn.get()) => {
                self.connection.count_premature_reset();
            }
            _ => {}
        }
    }
}

/// Whether the reset of an unanswered request is premature, by its progress and the turns of its beginning and of its reset.
fn is_premature(progress: Progress, begun: u64, reset: u64) -> bool {
    begun == reset || progress == Progress::Begun
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reset_is_premature_in_the_first_turn_or_before_a_message() {
        use Progress::{Begun, InWork};
        let table = [(Begun, 3, 3, true), (Begun, 3, 4, true), (InWork, 3, 3, true), (InWork, 3, 4, false)];
        for (progress, begun, reset, premature) in table {
            assert_eq!(is_premature(progress, begun, reset), premature, "{progress:?} {begun} {reset}");
        }
    }

    #[test]
    fn a_turn_has_its_bytes_and_no_more() {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let connection = Connection::new(([127, 0, 0, 1], 1).into(), 1);
        let bytes = vec![0; 2 * TURN as usize + 10];
        let mut turns = Turns::new(&bytes[..], connection.clone());
        let mut space = vec![0; bytes.len()];
        let mut read = |len: usize| {
            let mut buffer = ReadBuf::new(&mut space[..len]);
            let poll = Pin::new(&mut turns).poll_read(&mut cx, &mut buffer);
            poll.is_ready().then_some(buffer.filled().len() as u64)
        };
        assert_eq!(read(10), Some(10));
        assert_eq!(read(bytes.len()), Some(TURN - 10), "no more than the turn has, whatever the buffer takes");
        assert_eq!((read(10), read(10)), (None, None), "the turn is over");
        connection.begin_turn();
        assert_eq!(read(bytes.len()), Some(TURN));
        assert_eq!(read(10), None);
        connection.begin_turn();
        assert_eq!((read(100), read(100)), (Some(10), Some(0)), "the end is no end of a turn");
    }
}
