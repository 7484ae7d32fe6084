//! A client that speaks HTTP/2 and leaves gRPC to the test, which may get it wrong.

use bytes::{Bytes, BytesMut};
use forkring::proto::v1;
use h2::{
    SendStream,
    client::{Builder, ResponseFuture, SendRequest},
};
use http::Request;
use prost::Message;
use tokio::{net::TcpStream, task::JoinHandle};
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
