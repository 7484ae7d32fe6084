//! A client that speaks HTTP/2 and leaves gRPC to the test, which may get it wrong.

use bytes::{Bytes, BytesMut};
use forkring::proto::v1;
use h2::{
    SendStream,
    client::{Builder, ResponseFuture, SendRequest},
};
use http::Request;
use prost::Message;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinHandle,
};
use tonic::Code;

use super::{Server, soon};

/// One connection.
#[derive(Debug)]
pub struct Raw {
    requests: SendRequest<Bytes>,
    driver: JoinHandle<()>,
}

/// A request that is under way.
#[derive(Debug)]
pub struct Exchange {
    pub response: ResponseFuture,
    pub body: SendStream<Bytes>,
}

/// What came back.
#[derive(Debug)]
pub struct Answer {
    /// Whole messages, without their prefixes.
    pub messages: Vec<Bytes>,
    pub code: Code,
    pub reason: String,
    pub message: String,
}

impl Raw {
    pub async fn connect(server: &Server) -> Self {
        Self::connect_as(server, &Builder::new()).await
    }

    /// With HTTP/2 settings of the test's own.
    pub async fn connect_as(server: &Server, builder: &Builder) -> Self {
        let stream = TcpStream::connect(&server.addr).await.expect("a connection");
        let (requests, connection) = soon("a handshake", builder.handshake(stream)).await.expect("a handshake");
        // How it ends shows in the streams.
        let driver = tokio::spawn(async move { drop(connection.await) });
        Raw { requests, driver }
    }

    /// Begins a request for a method of the Dispatcher.
    pub async fn begin(&mut self, method: &str, headers: &[(&str, &str)]) -> Exchange {
        let mut request = Request::post(format!("http://localhost/forkring.v1.Dispatcher/{method}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.send(request.body(()).expect("a request")).await
    }

    pub async fn send(&mut self, request: Request<()>) -> Exchange {
        let mut ready = soon("room for a stream", self.requests.clone().ready()).await.expect("a connection");
        let (response, body) = ready.send_request(request, false).expect("a stream");
        Exchange { response, body }
    }

    /// The whole of a request in one frame.
    pub async fn ask(&mut self, method: &str, headers: &[(&str, &str)], body: Bytes) -> Answer {
        let mut exchange = self.begin(method, headers).await;
        exchange.body.send_data(body, true).expect("an open stream");
        exchange.answer().await
    }

    /// Waits until the server has seen to all that was said on this connection so far.
    pub async fn settled(&mut self) {
        // First the driver gets its turn: HTTP/2 may otherwise interleave what was said before with what is said now.
        for _ in 0..3 {
            tokio::task::yield_now().await;
        }
        // Requests get their turns in the order that they came in.
        assert_eq!(self.ask("Shout", &[], Bytes::new()).await.code, Code::Unimplemented);
    }

    /// Closes the connection with no word.
    pub fn cut(self) {
        self.driver.abort();
    }
}

impl Exchange {
    /// Reads up to the trailers.
    pub async fn answer(self) -> Answer {
        // The request must not be reset while it is answered.
        let Exchange { response, body } = self;
        let answer = Answer::of(response).await;
        drop(body);
        answer
    }
}

impl Answer {
    /// Reads a response up to its trailers.
    pub async fn of(response: ResponseFuture) -> Self {
        let response = soon("a response", response).await.expect("a response");
        assert_eq!(response.status(), 200);
        let (head, mut frames) = response.into_parts();
        let mut data = BytesMut::new();
        while let Some(frame) = soon("a frame", frames.data()).await {
            let frame = frame.expect("a frame");
            frames.flow_control().release_capacity(frame.len()).expect("our own frame");
            data.extend_from_slice(&frame);
        }
        let trailers = soon("trailers", frames.trailers()).await.expect("trailers");
        let status = tonic::Status::from_header_map(trailers.as_ref().unwrap_or(&head.headers));
        let status = status.expect("a gRPC status");
        let v1::Status { reason, message, .. } = v1::Status::from(&status);
        Answer { messages: messages(data.freeze()), code: status.code(), reason, message }
    }

    pub fn refusal(self) -> (Code, String, String) {
        assert!(self.messages.is_empty(), "a refusal with {} messages", self.messages.len());
        (self.code, self.reason, self.message)
    }
}

fn messages(mut data: Bytes) -> Vec<Bytes> {
    let mut messages = Vec::new();
    while !data.is_empty() {
        let prefix = data.split_to(5);
        let len = u32::from_be_bytes(prefix[1..].try_into().expect("four bytes"));
        messages.push(data.split_to(len as usize));
    }
    messages
}

/// A message behind its prefix.
pub fn framed(message: &impl Message) -> Bytes {
    framed_bytes(0, &message.encode_to_vec())
}

/// The same for what need not be a message.
pub fn framed_bytes(flag: u8, message: &[u8]) -> Bytes {
    let mut bytes = vec![flag];
    bytes.extend_from_slice(&(message.len() as u32).to_be_bytes());
    bytes.extend_from_slice(message);
    bytes.into()
}

/// A client that writes HTTP/2 frames by hand, in the order that the test wants.
#[derive(Debug)]
pub struct Frames {
    stream: TcpStream,
}

/// Types and flags of frames.
pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
pub const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

impl Frames {
    pub async fn connect(server: &Server) -> Self {
        let stream = TcpStream::connect(&server.addr).await.expect("a connection");
        stream.set_nodelay(true).expect("a socket");
        let mut frames = Frames { stream };
        frames.stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.expect("an open connection");
        frames.write(SETTINGS, 0, 0, &[]).await;
        frames.write(SETTINGS, 1, 0, &[]).await;
        frames
    }

    pub async fn write(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        self.stream.write_all(&frame).await.expect("an open connection");
    }

    /// Begins a call on a stream: 1, 3, 5 and so on.
    pub async fn call(&mut self, stream: u32) {
        let mut block = Vec::new();
        for (name, value) in [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", "/forkring.v1.Dispatcher/Call"),
            (":authority", "localhost"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ] {
            // Literal, not indexed, not compressed.
            block.push(0);
            for text in [name, value] {
                block.push(text.len() as u8);
                block.extend(text.as_bytes());
            }
        }
        self.write(HEADERS, END_HEADERS, stream, &block).await;
    }

    /// Reads up to a frame that ends this stream.
    pub async fn end_of(&mut self, stream: u32) {
        loop {
            let mut head = [0; 9];
            soon("a frame", self.stream.read_exact(&mut head)).await.expect("an open connection");
            let len = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let mut payload = vec![0; len as usize];
            soon("a frame", self.stream.read_exact(&mut payload)).await.expect("an open connection");
            let of = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
            assert_ne!(head[3], GOAWAY, "the server ends the connection: {payload:?}");
            if of == stream && [DATA, HEADERS].contains(&head[3]) && head[4] & END_STREAM != 0 {
                return;
            }
        }
    }
}
