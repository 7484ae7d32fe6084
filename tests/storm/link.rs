//! Connections that lose nothing that reached them, and what may excuse a call that fails.
//!
//! Whoever writes to a connection whose peer has died gets an error and, as HTTP/2 clients go, never reads what had come
//! before. These connections swallow such writes and are read to their end. Their windows are so small that whatever the
//! server's HTTP/2 has sent is in the client's kernel at once. Together that means: what the front wrote before it was
//! killed, the client gets. So an update that was accepted and never comes is *lost*, and not perhaps in a broken socket.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
};

use forkring::client::Client;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tonic::transport::Endpoint;

/// HTTP/2's own default, and less than any socket's buffer.
const WINDOW: u32 = 65_535;

/// Where the server is, and how often it was cut off its clients.
#[derive(Debug, Default)]
pub struct Link {
    addr: Mutex<String>,
    begun: AtomicU64,
    over: AtomicU64,
}

impl Link {
    pub fn set_addr(&self, addr: &str) {
        addr.clone_into(&mut self.addr.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn addr(&self) -> String {
        self.addr.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// From now on calls may fail.
    pub fn cut(&self) {
        self.begun.fetch_add(1, Relaxed);
    }

    /// A new connection was served since it was cut so often: from now on they may not.
    pub fn mended(&self, cuts: u64) {
        self.over.store(cuts, Relaxed);
    }

    pub fn cuts(&self) -> u64 {
        self.begun.load(Relaxed)
    }

    pub fn is_cut(&self) -> bool {
        self.over.load(Relaxed) != self.cuts()
    }
}

/// A client with a connection of its own.
#[derive(Clone, Debug)]
pub struct Caller {
    pub client: Client,
    link: Arc<Link>,
    /// The cuts when the connection was made.
    connected: Arc<AtomicU64>,
}

/// What was so when a call began.
#[derive(Clone, Copy, Debug)]
pub struct Ticket {
    cuts: u64,
    in_doubt: bool,
}

impl Caller {
    pub fn new(link: &Arc<Link>) -> Self {
        let connected = Arc::<AtomicU64>::default();
        let connect = {
            let (link, connected) = (link.clone(), connected.clone());
            move |_| {
                let (link, connected) = (link.clone(), connected.clone());
                async move {
                    let cuts = link.cuts();
                    let stream = TcpStream::connect(link.addr()).await?;
                    stream.set_nodelay(true)?;
                    connected.store(cuts, Relaxed);
                    io::Result::Ok(TokioIo::new(Survivor(stream)))
                }
            }
        };
        let endpoint = Endpoint::from_static("http://storm")
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW);
        let channel = endpoint.connect_with_connector_lazy(tower::service_fn(connect));
        Caller { client: Client::from_channel(channel), link: link.clone(), connected }
    }

    /// How often the link had been cut when the connection was made.
    pub fn connected(&self) -> u64 {
        self.connected.load(Relaxed)
    }

    /// How often the link has been cut, and had been when the connection was made.
    pub fn cuts(&self) -> [u64; 2] {
        [self.link.cuts(), self.connected()]
    }

    pub fn ticket(&self) -> Ticket {
        let cuts = self.link.cuts();
        // A connection of before may be broken without anybody having noticed.
        Ticket { cuts, in_doubt: self.link.is_cut() || self.connected() != cuts }
    }

    /// Whether a call that began then may have failed by now.
    pub fn is_excused(&self, ticket: Ticket) -> bool {
        ticket.in_doubt || self.link.cuts() != ticket.cuts
    }
}

/// See the module.
struct Survivor(TcpStream);

impl AsyncRead for Survivor {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        // A reset is an end like any other: everything before it has been read.
        let _ = ready!(Pin::new(&mut self.0).poll_read(cx, buf));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Survivor {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(ready!(Pin::new(&mut self.0).poll_write(cx, bytes)).unwrap_or(bytes.len())))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let _ = ready!(Pin::new(&mut self.0).poll_flush(cx));
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let _ = ready!(Pin::new(&mut self.0).poll_shutdown(cx));
        Poll::Ready(Ok(()))
    }
}
