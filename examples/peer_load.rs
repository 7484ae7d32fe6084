//! The load of `forkring bench` for the peers in `scripts/compare` that do not speak `forkring.v1.Dispatcher`.
//!
//!     cargo run --release --example peer_load -- http 127.0.0.1:8000/inference --in-flight 64
//!     cargo run --release --example peer_load -- triton 127.0.0.1:8001/echo --in-flight 64 --payload 4194304
//!
//! The shape is that of `bench --mode call --in-flight N`: a closed loop on one thread, the same payload, the same times
//! and counts, as JSON with the same names. Over HTTP/1.1, which answers in turn, N in flight are N connections that are
//! kept open; over gRPC they are N calls on one connection, whose windows are as wide as bench's. Nor is a payload copied
//! for each request.

use std::{
    cell::RefCell,
    convert::Infallible,
    future::Future,
    io,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use bytes::{BufMut as _, Bytes};
use clap::{Parser, ValueEnum};
use hdrhistogram::Histogram;
use http::{Request, Response, Uri, uri::PathAndQuery};
use http_body_util::StreamBody;
use hyper::{
    body::{Frame, Incoming},
    client::conn::http2,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::{
    Message as _,
    encoding::{WireType, encode_key, encode_varint},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::{JoinSet, LocalSet},
};
use tonic::body::Body;

#[derive(Clone, Copy, ValueEnum)]
enum Protocol {
    /// POST over HTTP/1.1; the body is the payload, and so is the answer's
    Http,
    /// ModelInfer of the Open Inference Protocol; one tensor of bytes, INPUT, and one, OUTPUT
    Triton,
}

/// Puts a peer under load and prints what bench would.
#[derive(Parser)]
struct Options {
    protocol: Protocol,

    /// HOST:PORT/PATH; for Triton the path is the model
    target: String,

    #[arg(long, default_value_t = 1)]
    in_flight: u32,

    /// Bytes in each item
    #[arg(long, default_value_t = 64)]
    payload: usize,

    /// Seconds of load before measuring
    #[arg(long, default_value_t = 1.0)]
    warmup: f64,

    /// Seconds of measuring
    #[arg(long, default_value_t = 3.0)]
    duration: f64,
}

struct Tally {
    from: Instant,
    until: Instant,
    latency: Histogram<u64>,
    in_time: u64,
    failed: u64,
    failed_in_warmup: u64,
    reason: String,
}

impl Tally {
    fn settle(&mut self, begun: Instant, outcome: &anyhow::Result<()>) {
        let now = Instant::now();
        let measured = begun >= self.from && begun < self.until;
        match outcome {
            Ok(()) => {
                self.in_time += u64::from(now >= self.from && now < self.until);
                if measured {
                    self.latency.saturating_record(u64::try_from((now - begun).as_nanos()).unwrap_or(u64::MAX));
                }
            }
            Err(error) => {
                *(if measured { &mut self.failed } else { &mut self.failed_in_warmup }) += 1;
                self.reason = format!("{error:#}");
            }
        }
    }

    fn report(&self) -> serde_json::Value {
        let seconds = (self.until - self.from).as_secs_f64();
        let at = |q| self.latency.value_at_quantile(q).min(self.latency.max());
        let latency = serde_json::json!({ "p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "p99.9": at(0.999) });
        let failures = self.failed + self.failed_in_warmup;
        let errors = (failures > 0).then(
            || serde_json::json!({ "code": "failed, of these the last", "reason": self.reason, "count": failures }),
        );
        serde_json::json!({
            "items": self.latency.len(),
            "items_per_s": self.in_time as f64 / seconds,
            "latency_ns": if self.latency.is_empty() { serde_json::Value::Null } else { latency },
            "failed": self.failed,
            "failed_in_warmup": self.failed_in_warmup,
            // Every caller ends with an answer.
            "unanswered": 0,
            "unsent": 0,
            "stray": 0,
            "errors": errors.into_iter().collect::<Vec<_>>(),
        })
    }
}

/// One of those that have an item in flight.
trait Caller {
    async fn call(&mut self) -> anyhow::Result<()>;
}

async fn in_turn(mut caller: impl Caller, tally: Rc<RefCell<Tally>>) {
    let until = tally.borrow().until;
    loop {
        let begun = Instant::now();
        if begun >= until {
            return;
        }
        let outcome = caller.call().await;
        tally.borrow_mut().settle(begun, &outcome);
        if outcome.is_err() {
            // Of a connection that is broken there is no more to learn, and a refusal must not become a busy loop.
            return;
        }
    }
}

/// A connection that is kept open.
struct Http {
    stream: TcpStream,
    request: Bytes,
    answer: Vec<u8>,
    payload: usize,
}

impl Http {
    async fn open(authority: &str, path: &str, payload: &[u8]) -> io::Result<Self> {
        let stream = TcpStream::connect(authority).await?;
        stream.set_nodelay(true)?;
        let head = format!("POST {path} HTTP/1.1\r\nhost: {authority}\r\ncontent-length: {}\r\n\r\n", payload.len());
        let request = [head.as_bytes(), payload].concat().into();
        Ok(Http { stream, request, answer: Vec::new(), payload: payload.len() })
    }

    async fn more(&mut self) -> anyhow::Result<()> {
        ensure!(self.stream.read_buf(&mut self.answer).await? > 0, "the server closed the connection");
        Ok(())
    }
}

impl Caller for Http {
    async fn call(&mut self) -> anyhow::Result<()> {
        self.stream.write_all(&self.request).await?;
        self.answer.clear();
        let head = loop {
            match self.answer.windows(4).position(|end| end == b"\r\n\r\n") {
                Some(at) => break at + 4,
                None => self.more().await?,
            }
        };
        let text = String::from_utf8_lossy(&self.answer[..head]).to_ascii_lowercase();
        let length = text.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse::<usize>().ok());
        let length = length.context("an answer with no content-length")?;
        ensure!(text.starts_with("http/1.1 200 "), "the server answers {}", text.lines().next().unwrap_or_default());
        ensure!(length == self.payload, "an answer of {length} bytes");
        while self.answer.len() < head + length {
            self.more().await?;
        }
        Ok(())
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct InferRequest {
    #[prost(string, tag = "1")]
    model: String,
    #[prost(message, repeated, tag = "5")]
    inputs: Vec<Tensor>,
}

impl InferRequest {
    /// The gRPC message with a tensor's bytes at its end, in the two pieces that each request sends.
    fn with(&self, raw: &Bytes) -> Result<Pieces, std::num::TryFromIntError> {
        const RAW: u32 = 7;
        let mut fields = self.encode_to_vec();
        encode_key(RAW, WireType::LengthDelimited, &mut fields);
        encode_varint(raw.len() as u64, &mut fields);
        let mut head = vec![0];
        head.put_u32(u32::try_from(fields.len() + raw.len())?);
        head.extend(fields);
        Ok(Pieces([head.into(), raw.clone()]))
    }
}

/// The body of a request, for a [`Connection`].
#[derive(Clone)]
struct Pieces([Bytes; 2]);

#[derive(Clone, PartialEq, prost::Message)]
struct InferResponse {
    #[prost(bytes = "bytes", repeated, tag = "6")]
    raw: Vec<Bytes>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Tensor {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    datatype: String,
    #[prost(int64, repeated, tag = "3")]
    shape: Vec<i64>,
}

/// A call on the connection that all share.
struct Triton {
    client: tonic::client::Grpc<Connection>,
    pieces: Pieces,
}

impl Caller for Triton {
    async fn call(&mut self) -> anyhow::Result<()> {
        self.client.ready().await?;
        let path = PathAndQuery::from_static("/inference.GRPCInferenceService/ModelInfer");
        let codec = tonic_prost::ProstCodec::<InferRequest, InferResponse>::default();
        let mut request = tonic::Request::new(InferRequest::default());
        request.extensions_mut().insert(self.pieces.clone());
        let answer = self.client.unary(request, path, codec).await?.into_inner();
        let lengths: Vec<_> = answer.raw.iter().map(Bytes::len).collect();
        ensure!(lengths == [self.pieces.0[1].len()], "an answer of {lengths:?} bytes");
        Ok(())
    }
}

#[derive(Clone)]
struct Connection(http2::SendRequest<Body>);

impl Connection {
    async fn open(authority: &str) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(authority).await?;
        stream.set_nodelay(true)?;
        let (requests, driver) = http2::Builder::new(TokioExecutor::new())
            .initial_stream_window_size(16 << 20)
            .initial_connection_window_size(64 << 20)
            .max_frame_size(1 << 20)
            .handshake(TokioIo::new(stream))
            .await?;
        // A failure of the driver reaches every request that is on the connection.
        tokio::spawn(driver);
        Ok(Connection(requests))
    }
}

impl tower::Service<Request<Body>> for Connection {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        if let Some(Pieces(pieces)) = request.extensions_mut().remove() {
            let frames = pieces.map(|piece| Ok::<_, Infallible>(Frame::data(piece)));
            *request.body_mut() = Body::new(StreamBody::new(tokio_stream::iter(frames)));
        }
        Box::pin(self.0.send_request(request))
    }
}

async fn load(options: &Options) -> anyhow::Result<serde_json::Value> {
    let (authority, path) = options.target.split_once('/').context("the target is HOST:PORT/PATH")?;
    // Bench's payload.
    let payload: Bytes = (0..options.payload).map(|n| (n % 251) as u8).collect();
    let connection = match options.protocol {
        Protocol::Triton => Some(Connection::open(authority).await?),
        Protocol::Http => None,
    };
    let from = Instant::now() + Duration::try_from_secs_f64(options.warmup)?;
    let until = from + Duration::try_from_secs_f64(options.duration)?;
    let latency = Histogram::new_with_bounds(1, 3_600_000_000_000, 3)?;
    let reason = String::new();
    let tally = Tally { from, until, latency, in_time: 0, failed: 0, failed_in_warmup: 0, reason };
    let tally = Rc::new(RefCell::new(tally));
    let mut callers = JoinSet::new();
    for _ in 0..options.in_flight {
        let tally = tally.clone();
        match &connection {
            None => {
                let caller = Http::open(authority, &format!("/{path}"), &payload).await?;
                callers.spawn_local(in_turn(caller, tally));
            }
            Some(connection) => {
                let origin: Uri = format!("http://{authority}").parse()?;
                let input = Tensor {
                    name: "INPUT".to_owned(),
                    datatype: "UINT8".to_owned(),
                    shape: vec![i64::try_from(payload.len())?],
                };
                let pieces = InferRequest { model: path.to_owned(), inputs: vec![input] }.with(&payload)?;
                let client = tonic::client::Grpc::with_origin(connection.clone(), origin)
                    .max_decoding_message_size(usize::MAX)
                    .max_encoding_message_size(usize::MAX);
                callers.spawn_local(in_turn(Triton { client, pieces }, tally));
            }
        }
    }
    while callers.join_next().await.is_some() {}
    let report = tally.borrow().report();
    Ok(report)
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    if options.in_flight == 0 {
        bail!("--in-flight is 0");
    }
    // As bench does, so that both are as quick.
    forkring::process::keep_freed_memory(64);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let report = LocalSet::new().block_on(&runtime, load(&options))?;
    println!("{report}");
    Ok(())
}
