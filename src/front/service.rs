//! The service: which RPC a request is for.
//!
//! The methods of `forkring.v1.Dispatcher` and `forkring.v1.Admin` are answered here, without tonic's codec: the former for
//! speed, the latter because what they need is this thread's. All else (health, reflection, whatever is unknown) goes to
//! tonic's router.

use std::{
    convert::Infallible,
    io,
    pin::Pin,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use prost::Message;
use tokio::task::yield_now;
use tonic::{Status, service::Routes};
use tonic_health::server::HealthReporter;
use tower::Service;

use super::{
    admin,
    connection::{Connection, Exchange},
    grace::left_to_client,
    hub::{Hub, deadline_after, until},
    process::ProcessBody,
    request_body::RequestBody,
    status::Refusal,
    submit::submit,
    unary::{UnaryBody, call},
    updates::UpdatesBody,
    wire::{PREFIX, WireError, parse_grpc_timeout},
};
use crate::{
    process::now,
    proto::{DESCRIPTORS, v1::GetUpdatesRequest},
};

const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");
/// A `GetUpdatesRequest` is small, and so are those of `Admin`.
const SMALL_MESSAGE: usize = 4096;
/// The largest metadata of a request, by [`metadata_size`].
const MAX_METADATA: usize = 16 << 10;

/// The body of any response of a front. Those of our own hold their connection open while it drains.
pub struct FrontBody {
    kind: Kind,
    exchange: Exchange,
    _open: Option<Rc<()>>,
}

impl Drop for FrontBody {
    fn drop(&mut self) {
        let (has_received, is_broken) = match &self.kind {
            Kind::Process(body) => (body.has_received, body.is_broken),
            _ => (true, false),
        };
        if has_received {
            self.exchange.begin_work();
        }
        if self.is_end_stream() && !is_broken {
            self.exchange.finish();
        }
    }
}

enum Kind {
    Unary(UnaryBody),
    Process(Box<ProcessBody>),
    Updates(UpdatesBody),
    Tonic(tonic::body::Body),
}

impl Body for FrontBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match &mut self.get_mut().kind {
            Kind::Unary(body) => Poll::Ready(body.poll().map(Ok)),
            Kind::Process(body) => body.poll(cx).map(|frame| frame.map(Ok)),
            Kind::Updates(body) => body.poll(cx).map(|frame| frame.map(Ok)),
            Kind::Tonic(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            Kind::Unary(body) => body.is_ended(),
            Kind::Process(body) => body.is_ended(),
            Kind::Updates(body) => body.is_ended(),
            Kind::Tonic(body) => body.is_end_stream(),
        }
    }
}

/// Health and reflection, and the handle by which health is told.
pub fn routes() -> io::Result<(HealthReporter, Routes)> {
    let (reporter, health) = tonic_health::server::health_reporter();
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET)
            // Both of them, not only the one that is asked.
            .include_reflection_service(false)
    };
    let routes = Routes::new(health)
        .add_service(reflection().build_v1().map_err(io::Error::other)?)
        .add_service(reflection().build_v1alpha().map_err(io::Error::other)?)
        .prepare();
    Ok((reporter, routes))
}

/// Answers one request. `open` is held for as long as that takes.
pub async fn answer(
    hub: Rc<Hub>,
    mut routes: Routes,
    request: Request<Incoming>,
    connection: Rc<Connection>,
    open: Rc<()>,
) -> Result<Response<FrontBody>, Infallible> {
    let exchange = Exchange::new(connection);
    hub.activity.set(hub.activity.get() + 1);
    let request = request.map(RequestBody::new);
    let size = metadata_size(request.headers());
    if size > MAX_METADATA {
        return Ok(failed(&Refusal::large_metadata(size, MAX_METADATA), exchange).await);
    }
    let path = request.uri().path().strip_prefix("/forkring.v1.").and_then(|path| path.split_once('/'));
    let Some((service @ ("Dispatcher" | "Admin"), method)) = path else {
        // A stream of somebody who watches ends when the connection does.
        drop(open);
        let is_broken = Arc::new(AtomicBool::new(false));
        let request = request.map(|body| Watched { body, is_broken: is_broken.clone() });
        let response = routes.call(request).await?;
        // See `failed`.
        yield_now().await;
        if is_broken.load(Relaxed) {
            exchange.lose();
        }
        return Ok(response.map(|body| tonic_body(body, exchange)));
    };
    let is_grpc = |value: &HeaderValue| value.as_bytes().starts_with(b"application/grpc");
    if !request.headers().get(CONTENT_TYPE).is_some_and(is_grpc) {
        let mut response = Response::new(tonic_body(tonic::body::Body::empty(), exchange));
        *response.status_mut() = StatusCode::UNSUPPORTED_MEDIA_TYPE;
        yield_now().await;
        return Ok(response);
    }
    let deadline = match check_headers(request.headers()) {
        Ok(deadline) => deadline,
        Err(refusal) => return Ok(failed(&refusal, exchange).await),
    };
    // The connection is about to be told; what is offered now might not be waited for.
    if hub.is_draining() && method != "GetUpdates" {
        return Ok(failed(&Refusal::draining(), exchange).await);
    }
    let answer = match (service, method) {
        ("Dispatcher", "Call") => call(hub, request.into_body(), deadline, &exchange).await.map(Kind::Unary),
        ("Dispatcher", "Submit") => submit(hub, request.into_body(), deadline, &exchange).await.map(Kind::Unary),
        ("Dispatcher", "Process") => Ok(Kind::Process(Box::new(ProcessBody::new(hub, request.into_body(), deadline)))),
        ("Dispatcher", "GetUpdates") => updates(hub, request.into_body(), deadline).await.map(Kind::Updates),
        _ => match admin::Method::named(method).filter(|_| service == "Admin") {
            Some(method) => administer(&hub, method, request.into_body(), deadline).await.map(Kind::Unary),
            None => Err(Refusal::unknown_method(service, method)),
        },
    };
    Ok(match answer {
        Ok(body) => {
            let mut response = Response::new(FrontBody { kind: body, exchange, _open: Some(open) });
            response.headers_mut().insert(CONTENT_TYPE, GRPC);
            response
        }
        Err(refusal) => {
            if refusal.is_late() {
                left_to_client(deadline).await;
            }
            failed(&refusal, exchange).await
        }
    })
}

/// The RPC's deadline, on the clock of [`now`]; 0: none.
fn check_headers(headers: &HeaderMap) -> Result<u64, Refusal> {
    if let Some(encoding) = headers.get("grpc-encoding").filter(|encoding| *encoding != "identity") {
        return Err(Refusal::compressed(&String::from_utf8_lossy(encoding.as_bytes())));
    }
    match headers.get("grpc-timeout") {
        Some(timeout) => Ok(deadline_after(now(), parse_grpc_timeout(timeout)?)),
        None => Ok(0),
    }
}

/// The request of one of tonic's services, and whether its client broke it off. One thread writes and reads the flag.
struct Watched {
    body: RequestBody,
    is_broken: Arc<AtomicBool>,
}

impl Body for Watched {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<hyper::Result<Frame<Bytes>>>> {
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        if matches!(frame, Poll::Ready(Some(Err(_)))) {
            self.is_broken.store(true, Relaxed);
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

fn tonic_body(body: tonic::body::Body, exchange: Exchange) -> FrontBody {
    FrontBody { kind: Kind::Tonic(body), exchange, _open: None }
}

/// The size of a request's headers as HTTP/2 counts it (RFC 9113, section 6.5.2).
fn metadata_size(headers: &HeaderMap) -> usize {
    headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum()
}

/// A response that is all trailers. It says what compression is understood, in case that was the reason: none.
///
/// hyper looks whether the client has reset the stream only while it waits for the response. A refusal is ready at once, so it
/// lets hyper look before: else refusing a flood of resets would count as answering it.
async fn failed(refusal: &Refusal, exchange: Exchange) -> Response<FrontBody> {
    yield_now().await;
    if refusal.is_broken() {
        exchange.lose();
    }
    let mut response = refusal.status().into_http().map(|body| tonic_body(body, exchange));
    response.headers_mut().insert("grpc-accept-encoding", HeaderValue::from_static("identity"));
    response
}

async fn updates(hub: Rc<Hub>, body: RequestBody, deadline: u64) -> Result<UpdatesBody, Refusal> {
    let message = small_message(&hub, body, deadline).await?;
    let malformed = WireError::Malformed("expected a GetUpdatesRequest");
    let request = GetUpdatesRequest::decode(message).map_err(|_| malformed)?;
    Ok(UpdatesBody::new(hub, request, deadline))
}

async fn administer(hub: &Hub, method: admin::Method, body: RequestBody, deadline: u64) -> Result<UnaryBody, Refusal> {
    let message = small_message(hub, body, deadline).await?;
    admin::answer(hub, method, message)
}

/// The bytes of a request that has no large messages. One that is larger is known by its prefix, if there is one.
async fn collect(mut body: RequestBody) -> Result<Bytes, Refusal> {
    let mut bytes = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Refusal::broken(&error))?;
        // Trailers of a request mean nothing in gRPC.
        bytes.extend_from_slice(&frame.into_data().unwrap_or_default());
        let Some(([_, len @ ..], message)) = bytes.split_first_chunk::<PREFIX>() else { continue };
        let len = message.len().max(u32::from_be_bytes(*len) as usize);
        if len > SMALL_MESSAGE {
            return Err(Refusal::large_request(len, SMALL_MESSAGE));
        }
    }
    Ok(bytes.freeze())
}

/// The one message of a request that has no large ones.
async fn small_message(hub: &Hub, body: RequestBody, deadline: u64) -> Result<Bytes, Refusal> {
    let timeout = hub.body_timeout;
    let mut draining = hub.draining.subscribe();
    let collected = tokio::select! {
        biased;
        collected = tokio::time::timeout(timeout, collect(body)) => collected,
        _ = draining.wait_for(|draining| *draining) => return Err(Refusal::draining()),
        () = until(deadline) => return Err(Refusal::late()),
    };
    let mut message = collected.map_err(|_| Refusal::body_timeout(timeout))??;
    let malformed = |why| WireError::Malformed(why).into();
    if message.is_empty() {
        return Err(Refusal::empty());
    }
    if message.len() < PREFIX {
        return Err(malformed("it is shorter than its prefix"));
    }
    let prefix = message.split_to(PREFIX);
    if prefix[0] != 0 {
        return Err(WireError::Compressed.into());
    }
    if prefix[1..] != (message.len() as u32).to_be_bytes() {
        return Err(malformed("its length is not what its prefix says"));
    }
    Ok(message)
}
