//! One HTTP/2 connection as a gRPC channel: the generated client straight on hyper's connection.
//!
//! Leaner than tonic's `Channel`, which puts a queue, a task and a reconnecting layer between a call and its
//! connection. Settings are the same for every server and wide enough never to be what limits it.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{BufMut, Bytes, BytesMut};
use http::{Request, Response, Uri};
use http_body_util::StreamBody;
use hyper::{
    body::{Frame, Incoming},
    client::conn::http2,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::{
    Message,
    encoding::{WireType, encode_key, encode_varint},
};
use tokio::net::TcpStream;
use tonic::body::Body;

use crate::{
    client::ConnectError,
    proto::v1::{WorkItem, dispatcher_client::DispatcherClient},
};

const STREAM_WINDOW: u32 = 16 << 20;
const CONNECTION_WINDOW: u32 = 64 << 20;
const MAX_FRAME: u32 = 1 << 20;

/// A generated client on a connection of its own.
pub type Client = DispatcherClient<Connection>;

/// Where the server is.
#[derive(Clone, Debug)]
pub struct Target {
    origin: Uri,
    authority: String,
}

impl Target {
    /// Reads `http://HOST:PORT` or `HOST:PORT`.
    pub fn parse(addr: &str) -> Result<Self, ConnectError> {
        let bad = || ConnectError::Address(addr.to_owned());
        let with_scheme = if addr.contains("://") { addr.to_owned() } else { format!("http://{addr}") };
        let origin: Uri = with_scheme.parse().map_err(|_| bad())?;
        match (origin.scheme_str(), origin.host(), origin.port_u16()) {
            (Some("http"), Some(host), Some(port)) if !host.is_empty() => {
                let authority = format!("{host}:{port}");
                Ok(Self { origin, authority })
            }
            _ => Err(bad()),
        }
    }

    /// Opens a connection; its driver is a task of the current runtime and ends with the connection.
    pub async fn connect(&self) -> Result<Connection, ConnectError> {
        self.handshake()
            .await
            .map_err(|error| ConnectError::Unreachable { addr: self.authority.clone(), cause: error.to_string() })
    }

    async fn handshake(&self) -> anyhow::Result<Connection> {
        let stream = TcpStream::connect(&self.authority).await?;
        stream.set_nodelay(true)?;
        let (requests, driver) = http2::Builder::new(TokioExecutor::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(MAX_FRAME)
            .handshake(TokioIo::new(stream))
            .await?;
        // A failure of the driver reaches every request that is on the connection.
        tokio::spawn(driver);
        Ok(Connection { requests })
    }

    /// The generated client on `connection`, without limits of its own on message sizes.
    pub fn client(&self, connection: Connection) -> Client {
        DispatcherClient::with_origin(connection, self.origin.clone())
            .max_decoding_message_size(usize::MAX)
            .max_encoding_message_size(usize::MAX)
    }
}

/// A message whose payload is not copied for each request: tonic's encoder would, and for large ones that would be a good part of
/// what is measured.
#[derive(Clone, Debug)]
struct Ready([Bytes; 2]);

/// A request of an item. From here on it is for a [`Connection`].
pub fn request(mut item: WorkItem) -> tonic::Request<WorkItem> {
    const LARGE: usize = 16 << 10;
    const PAYLOAD: u32 = 2;
    if item.payload.len() < LARGE {
        return tonic::Request::new(item);
    }
    let payload = std::mem::take(&mut item.payload);
    // Fields may come in any order: this one comes last.
    let mut fields = item.encode_to_vec();
    encode_key(PAYLOAD, WireType::LengthDelimited, &mut fields);
    encode_varint(payload.len() as u64, &mut fields);
    let mut head = BytesMut::with_capacity(5 + fields.len());
    head.put_u8(0);
    head.put_u32((fields.len() + payload.len()) as u32);
    head.put_slice(&fields);
    let mut request = tonic::Request::new(WorkItem::default());
    request.extensions_mut().insert(Ready([head.freeze(), payload]));
    request
}

/// A handle on one connection; clones share it.
#[derive(Clone)]
pub struct Connection {
    requests: http2::SendRequest<Body>,
}

impl Connection {
    /// Whether the connection is over, so that only a new one can go on.
    pub fn is_closed(&self) -> bool {
        self.requests.is_closed()
    }
}

impl tower::Service<Request<Body>> for Connection {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.requests.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        if let Some(Ready(pieces)) = request.extensions_mut().remove() {
            let frames = pieces.map(|piece| Ok::<_, Infallible>(Frame::data(piece)));
            *request.body_mut() = Body::new(StreamBody::new(tokio_stream::iter(frames)));
        }
        Box::pin(self.requests.send_request(request))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_needs_a_host_and_a_port_and_plain_http() {
        assert_eq!(Target::parse("127.0.0.1:50051").unwrap().authority, "127.0.0.1:50051");
        assert_eq!(Target::parse("http://[::1]:7/").unwrap().authority, "[::1]:7");
        for wrong in ["", "localhost", "http://localhost", "https://localhost:1", ":50051", "a b:1", "h:99999"] {
            assert!(matches!(Target::parse(wrong), Err(ConnectError::Address(_))), "{wrong}");
        }
    }
}
