//! The listener: accepts connections and serves each until it ends or the server drains.
//!
//! It is our own, over hyper, because the front's state belongs to one thread (tonic's server wants `Send`), and because
//! it must do well when things go badly: without file descriptors it waits instead of spinning, a client that says
//! nothing is shown out, and there is a limit to connections.

use std::{
    future::{poll_fn, ready},
    io::{self, Cursor},
    net::{Shutdown, SocketAddr, TcpListener},
    pin::Pin,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use hyper::{rt::Executor, server::conn::http2, service::service_fn};
use hyper_util::rt::TokioIo;
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncReadExt, join},
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
    task::{JoinSet, spawn_local},
    time::{sleep, timeout},
};
use tonic::service::Routes;

use super::{
    connection::{Connection, MAX_UNSEEN_RESETS, Turns, Written},
    hub::Hub,
    service::answer,
};

/// Unread bytes that a client may have under way, on a stream and on a connection: wide enough that a payload of a megabyte
/// does not wait for window updates. h2 closes a connection on which small frames wait that cost it more than half of its window, at
/// 256 bytes less their length each: so wide that a stream that waits for room may fill its own with the smallest items.
const STREAM_WINDOW: u32 = 2 << 20;
const CONNECTION_WINDOW: u32 = 64 << 20;
/// The largest frame that a client may send. One that fits the core's own cache is still there when it is copied to the arena;
/// and each costs its client a system call.
const MAX_FRAME: u32 = 512 << 10;
/// Bytes of responses that HTTP/2 buffers for a stream whose client reads slowly.
const SEND_BUFFER: usize = 1 << 20;
const MAX_STREAMS: u32 = 2048;
/// The largest headers that HTTP/2 decodes. It resets the stream of a request with larger ones, so this is more than a request may
/// have: those between are refused like any other wrong request.
const MAX_HEADERS: u32 = 32 << 10;
/// How long a new connection may take to send the first words of HTTP/2, and how many bytes these have.
const FIRST_WORDS: Duration = Duration::from_secs(10);
const PREFACE: usize = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".len();
/// A peer that has been silent this long is asked whether it is still there, this often. By the kernel: HTTP/2 pings would
/// wake an idle front for every connection.
const KEEP_ALIVE: Duration = Duration::from_secs(60);
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(20);
/// How long a draining connection may do nothing.
const LINGER: Duration = Duration::from_secs(1);
/// How long to leave the listener alone when accepting fails, as it does without file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Runs hyper's tasks on this thread.
#[derive(Clone, Copy, Debug)]
struct Local;

impl<F: Future<Output: 'static> + 'static> Executor<F> for Local {
    fn execute(&self, future: F) {
        spawn_local(future);
    }
}

/// Accepts until the server drains, then waits for the connections to end.
pub async fn accept(
    listener: TcpListener,
    hub: Rc<Hub>,
    routes: Routes,
    max_connections: u32,
    max_resets: u32,
) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let mut draining = hub.draining.subscribe();
    let room = Arc::new(Semaphore::new(max_connections as usize));
    let mut connections = JoinSet::new();
    // Since when accepting fails. Somebody waits in the kernel's queue then, until it is empty.
    let mut failing: Option<Instant> = None;
    loop {
        let accepted = tokio::select! {
            biased;
            _ = draining.wait_for(|draining| *draining) => break,
            Some(_) = connections.join_next() => continue,
            accepted = accept_one(&listener, &room) => accepted,
            () = ready(()), if failing.is_some() => {
                let lasted = failing.take().map_or(Duration::ZERO, |since| since.elapsed());
                tracing::info!(?lasted, "connections are accepted again");
                continue;
            }
        };
        match accepted {
            Ok((stream, peer, permit)) => {
                let (hub, routes) = (hub.clone(), routes.clone());
                let connection = Connection::new(peer, max_resets);
                connections.spawn_local(async move {
                    serve(stream, connection, hub, routes).await;
                    drop(permit);
                });
            }
            Err(error) => {
                if failing.is_none() {
                    tracing::warn!(%error, "cannot accept connections: raise the limit of open files (ulimit -n)?");
                }
                failing.get_or_insert_with(Instant::now);
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    // The supervisor holds the socket, too: this refuses new connections for all of its holders.
    if let Err(error) = SockRef::from(&listener).shutdown(Shutdown::Both) {
        tracing::debug!(%error, "the listener was shut down before");
    }
    while connections.join_next().await.is_some() {}
    Ok(())
}

/// The next connection, once there is room for it; until then it waits in the kernel's queue.
async fn accept_one(
    listener: &tokio::net::TcpListener,
    room: &Arc<Semaphore>,
) -> io::Result<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    // It fails only when the semaphore is closed, which it never is.
    let permit = room.clone().acquire_owned().await.map_err(io::Error::other)?;
    let (stream, peer) = listener.accept().await?;
    stream.set_nodelay(true)?;
    SockRef::from(&stream)
        .set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEP_ALIVE).with_interval(KEEP_ALIVE_INTERVAL))?;
    Ok((stream, peer, permit))
}

async fn serve(mut stream: TcpStream, shared: Rc<Connection>, hub: Rc<Hub>, routes: Routes) {
    // What is silent after this is the kernel's keep-alive to find out about.
    let mut draining = hub.draining.subscribe();
    // hyper waits for it without end.
    let mut preface = [0; PREFACE];
    let spoke = tokio::select! {
        spoke = timeout(FIRST_WORDS, stream.read_exact(&mut preface)) => matches!(spoke, Ok(Ok(_))),
        _ = draining.wait_for(|draining| *draining) => false,
    };
    if !spoke {
        tracing::debug!("a client connected and did not say that it speaks HTTP/2");
        return;
    }
    let (read, write) = stream.into_split();
    let read = Turns::new(Cursor::new(preface).chain(read), shared.clone());
    let stream = join(read, Written::new(write, shared.clone()));
    // A clone is in each request that is answered and each response that is sent.
    let open = Rc::new(());
    let service = {
        let (open, shared) = (open.clone(), shared.clone());
        service_fn(move |request| answer(hub.clone(), routes.clone(), request, shared.clone(), open.clone()))
    };
    let idle = Rc::strong_count(&open);
    let mut connection = http2::Builder::new(Local);
    connection
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_send_buf_size(SEND_BUFFER)
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEADERS)
        .max_pending_accept_reset_streams(MAX_UNSEEN_RESETS)
        // gRPC has no use for it.
        .auto_date_header(false);
    let mut connection = std::pin::pin!(connection.serve_connection(TokioIo::new(stream), service));
    let ended = tokio::select! {
        ended = in_turns(&shared, connection.as_mut()) => ended,
        () = shared.flooded() => {
            let peer = shared.peer;
            tracing::warn!(%peer, "closed a connection whose client resets streams as soon as it opens them (--max-resets)");
            return;
        }
        _ = draining.wait_for(|draining| *draining) => {
            // GOAWAY: no new streams; those that are open end by themselves.
            connection.as_mut().graceful_shutdown();
            loop {
                tokio::select! {
                    ended = in_turns(&shared, connection.as_mut()) => break ended,
                    // The GOAWAY waits for the client, which may be stopped: not for ever if nothing is under way. A client that
                    // reads slowly gets what HTTP/2 still holds of its answers.
                    () = sleep(LINGER) => if Rc::strong_count(&open) <= idle && !shared.take_written() { break Ok(()) },
                }
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection broke");
    }
}

/// Polls the connection's task, a turn each time.
fn in_turns<F: Future>(shared: &Connection, mut connection: Pin<&mut F>) -> impl Future<Output = F::Output> {
    poll_fn(move |cx| {
        shared.begin_turn();
        connection.as_mut().poll(cx)
    })
}
