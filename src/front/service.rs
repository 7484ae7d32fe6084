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
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use prost::Message;
use tonic::{Status, service::Routes};
use tonic_health::server::HealthReporter;
use tower::Service;

use super::{
    admin,
    hub::{Hub, deadline_after, until},
    input::discard,
    process::ProcessBody,
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

/// The body of any response of a front. Those of our own hold their connection open while it drains.
pub struct FrontBody {
    kind: Kind,
    _open: Option<Rc<()>>,
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
    open: Rc<()>,
) -> Result<Response<FrontBody>, Infallible> {
    hub.activity.set(hub.activity.get() + 1);
    let path = request.uri().path().strip_prefix("/forkring.v1.").and_then(|path| path.split_once('/'));
    let Some((service @ ("Dispatcher" | "Admin"), method)) = path else {
        // A stream of somebody who watches ends when the connection does.
        drop(open);
        return routes.call(request).await.map(|response| response.map(tonic_body));
    };
    let is_grpc = |value: &HeaderValue| value.as_bytes().starts_with(b"application/grpc");
    if !request.headers().get(CONTENT_TYPE).is_some_and(is_grpc) {
        let mut response = Response::new(tonic_body(tonic::body::Body::empty()));
        *response.status_mut() = StatusCode::UNSUPPORTED_MEDIA_TYPE;
        return Ok(response);
    }
    let deadline = match check_headers(request.headers()) {
        Ok(deadline) => deadline,
        Err(refusal) => {
            discard(&hub, request.into_body());
            return Ok(failed(&refusal.status()));
        }
    };
    // The connection is about to be told; what is offered now might not be waited for.
    if hub.is_draining() && method != "GetUpdates" {
        discard(&hub, request.into_body());
        return Ok(failed(&Refusal::draining().status()));
    }
    let answer = match (service, method) {
        ("Dispatcher", "Call") => call(hub, request.into_body(), deadline).await.map(Kind::Unary),
        ("Dispatcher", "Submit") => submit(hub, request.into_body(), deadline).await.map(Kind::Unary),
        ("Dispatcher", "Process") => Ok(Kind::Process(Box::new(ProcessBody::new(hub, request.into_body(), deadline)))),
        ("Dispatcher", "GetUpdates") => updates(hub, request.into_body(), deadline).await.map(Kind::Updates),
        _ => match admin::Method::named(method).filter(|_| service == "Admin") {
            Some(method) => administer(&hub, method, request.into_body(), deadline).await.map(Kind::Unary),
            None => {
                let status = Status::unimplemented(format!("forkring.v1.{service} has no method {method}"));
                discard(&hub, request.into_body());
                Err(status)
            }
        },
    };
    Ok(match answer {
        Ok(body) => {
            let mut response = Response::new(FrontBody { kind: body, _open: Some(open) });
            response.headers_mut().insert(CONTENT_TYPE, GRPC);
            response
        }
        Err(status) => failed(&status),
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

fn tonic_body(body: tonic::body::Body) -> FrontBody {
    FrontBody { kind: Kind::Tonic(body), _open: None }
}

/// A response that is all trailers. It says what compression is understood, in case that was the reason: none.
fn failed(status: &Status) -> Response<FrontBody> {
    let mut response = status.clone().into_http().map(tonic_body);
    response.headers_mut().insert("grpc-accept-encoding", HeaderValue::from_static("identity"));
    response
}

async fn updates(hub: Rc<Hub>, body: Incoming, deadline: u64) -> Result<UpdatesBody, Status> {
    let message = small_message(&hub, body, deadline).await.map_err(|refusal| refusal.status())?;
    let malformed = WireError::Malformed("expected a GetUpdatesRequest");
    let request = GetUpdatesRequest::decode(message).map_err(|_| Refusal::from(malformed).status())?;
    Ok(UpdatesBody::new(hub, request, deadline))
}

async fn administer(hub: &Hub, method: admin::Method, body: Incoming, deadline: u64) -> Result<UnaryBody, Status> {
    let answered = small_message(hub, body, deadline).await.and_then(|message| admin::answer(hub, method, message));
    answered.map_err(|refusal| refusal.status())
}

/// The bytes of a request that has no large messages. One that is larger is known by its prefix, if there is one.
async fn collect(hub: &Hub, mut body: Incoming) -> Result<Bytes, Refusal> {
    let mut bytes = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Refusal::broken(&error))?;
        // Trailers of a request mean nothing in gRPC.
        bytes.extend_from_slice(&frame.into_data().unwrap_or_default());
        let Some(([_, len @ ..], message)) = bytes.split_first_chunk::<PREFIX>() else { continue };
        let len = message.len().max(u32::from_be_bytes(*len) as usize);
        if len > SMALL_MESSAGE {
            discard(hub, body);
            return Err(Refusal::large_request(len, SMALL_MESSAGE));
        }
    }
    Ok(bytes.freeze())
}

/// The one message of a request that has no large ones.
async fn small_message(hub: &Hub, body: Incoming, deadline: u64) -> Result<Bytes, Refusal> {
    let timeout = hub.body_timeout;
    let mut draining = hub.draining.subscribe();
    let collected = tokio::select! {
        biased;
        collected = tokio::time::timeout(timeout, collect(hub, body)) => collected,
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
