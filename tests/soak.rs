//! A soak by tonic's client on its default settings: every shape and every size of payload, with refusals, failures,
//! deadlines and cancels mixed in, all over one connection. Every call ends as it was meant to, the connection is
//! never replaced, and the server has nothing to warn of. The same runs with grpcio, grpc-js and h2load in `tests/clients`.
//!
//! `FORKRING_TEST_CALLS` is the number of calls and messages of each size; the largest payloads have a fortieth of it.

mod common;

use std::{
    collections::HashSet,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use common::{Server, run_within, soon, variable};
use forkring::proto::v1::{self, GetUpdatesRequest, WorkItem, WorkResult, dispatcher_client::DispatcherClient};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, task::JoinSet};
use tonic::{
    Code, Request, Status,
    transport::{Channel, Endpoint, Uri},
};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tower::service_fn;

/// Payloads and the part of the calls that they have, as a divisor.
const SIZES: [(usize, u64); 6] = [(0, 4), (64, 2), (1 << 10, 4), (4 << 10, 1), (64 << 10, 10), (1 << 20, 40)];
const IN_FLIGHT: u64 = 16;

/// Calls and messages of the size that has most of them.
fn count() -> u64 {
    variable("FORKRING_TEST_CALLS").unwrap_or(20_000)
}

/// Runs a test of so many calls, which takes some ten seconds for each 20,000.
fn run<T>(test: impl Future<Output = T>) -> T {
    run_within(Duration::from_secs(180 + count() / 20), test)
}

async fn server() -> Server {
    Server::serve(&[
        "--pool=echo:2=echo",
        "--pool=late=sleep:1ms",
        // No call to it is answered before the client has given it up. An answer that crosses a cancel counts against the
        // client's own limit in h2, whatever the server does.
        "--pool=stuck=sleep:200ms",
        "--pool=parts=echo:3000",
        "--pool=fail=exec:false",
        "--capacity=4096",
        "--arena=32MiB",
        "--max-message=2MiB",
    ])
    .await
}

/// A channel with tonic's defaults that counts how often it connects.
async fn channel(server: &Server) -> (Channel, Arc<AtomicU64>) {
    let connections = Arc::new(AtomicU64::new(0));
    let (addr, count) = (server.addr.clone(), connections.clone());
    let connector = service_fn(move |_: Uri| {
        count.fetch_add(1, Relaxed);
        let addr = addr.clone();
        async move {
            let stream = TcpStream::connect(addr).await?;
            // As tonic's own connector does.
            stream.set_nodelay(true)?;
            Ok::<_, io::Error>(TokioIo::new(stream))
        }
    });
    let endpoint = Endpoint::from_shared(format!("http://{}", server.addr)).expect("an address");
    (endpoint.connect_with_connector(connector).await.expect("a connection"), connections)
}

/// Ends the server and asserts that the connection was never replaced and that nothing was logged above INFO.
async fn assert_calm(server: Server, connections: &AtomicU64) {
    assert_eq!(connections.load(Relaxed), 1, "the connection was replaced");
    let loud = loud(&server.drain().await);
    assert!(loud.is_empty(), "{} lines, the first of them {:#?}", loud.len(), &loud[..loud.len().min(5)]);
}

/// The lines of a log above INFO.
fn loud(log: &str) -> Vec<String> {
    log.lines().filter(|line| line.contains(" WARN ") || line.contains("ERROR ")).map(str::to_owned).collect()
}

/// What a call of the soak is meant to come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meant {
    Echo,
    /// The pool does not exist.
    Refused,
    /// The handler fails.
    Failed,
    /// The payload is larger than the server takes.
    TooLarge,
    /// The deadline passes.
    Expired,
    /// The client drops the call.
    Cancelled,
}

/// Spreads the kinds over the calls: one in four is not an echo.
fn meant(n: u64) -> Meant {
    match n % 64 {
        1 | 21 | 41 => Meant::Refused,
        2 => Meant::Failed,
        5 | 15 | 25 | 35 | 45 | 55 => Meant::Expired,
        8 | 18 | 28 | 38 | 48 | 58 => Meant::Cancelled,
        9 if n % 1024 == 9 => Meant::TooLarge,
        _ => Meant::Echo,
    }
}

/// One call, and what it must come to.
async fn call(mut client: DispatcherClient<Channel>, n: u64, payload: Bytes) {
    let meant = meant(n);
    let pool = match meant {
        Meant::Echo | Meant::TooLarge => "echo",
        Meant::Refused => "none",
        Meant::Failed => "fail",
        Meant::Expired | Meant::Cancelled => "stuck",
    };
    let sent = if meant == Meant::TooLarge { Bytes::from(vec![7; 3 << 20]) } else { payload.clone() };
    let mut request = Request::new(WorkItem::new(pool, sent).with_id(n));
    if meant == Meant::Expired {
        request.set_timeout(Duration::from_millis(1));
    }
    let answer = async {
        match meant {
            Meant::Cancelled => tokio::select! {
                biased;
                answer = client.call(request) => Some(answer),
                // Enough turns for the request to go out, mostly.
                () = turns(n % 7) => None,
            },
            _ => Some(client.call(request).await),
        }
    };
    let Some(answer) = soon("an answer", answer).await else { return };
    match (meant, answer) {
        (Meant::Echo, Ok(answer)) => {
            let answer = answer.into_inner();
            assert_eq!((answer.id, answer.payload.len()), (n, payload.len()));
            assert!(answer.payload == payload, "call {n} got other bytes");
        }
        (Meant::Refused, Err(status)) => assert_status(n, &status, Code::NotFound, "UNKNOWN_POOL"),
        (Meant::Failed, Err(status)) => assert_status(n, &status, Code::Internal, "EXEC_FAILED"),
        (Meant::TooLarge, Err(status)) => assert_status(n, &status, Code::ResourceExhausted, "MESSAGE_TOO_LARGE"),
        // tonic's own timer and the server's may both be first.
        (Meant::Expired, Err(status)) => {
            assert!([Code::DeadlineExceeded, Code::Cancelled].contains(&status.code()), "call {n}: {status:?}");
        }
        (meant, answer) => panic!("call {n} was meant to be {meant:?}: {answer:?}"),
    }
}

fn assert_status(n: u64, status: &Status, code: Code, reason: &str) {
    let found = v1::Status::from(status);
    assert_eq!((status.code(), found.reason.as_str()), (code, reason), "call {n}: {status:?}");
}

async fn turns(count: u64) {
    for _ in 0..count {
        tokio::task::yield_now().await;
    }
}

fn payload(len: usize) -> Bytes {
    (0..len).map(|n| n as u8).collect()
}

#[test]
fn calls() {
    run(async {
        let server = server().await;
        let (channel, connections) = channel(&server).await;
        for (len, part) in SIZES {
            let payload = payload(len);
            let mut running = JoinSet::new();
            for n in 0..count() / part {
                if running.len() as u64 >= IN_FLIGHT {
                    running.join_next().await.expect("a call").expect("no panic");
                }
                let client = DispatcherClient::new(channel.clone());
                running.spawn(call(client, n, payload.clone()));
            }
            while let Some(ended) = running.join_next().await {
                ended.expect("no panic");
            }
        }
        // tonic's services, whose requests are as late as others'.
        let mut health = HealthClient::new(channel.clone());
        for n in 0..count() / 10 {
            let service = if n % 4 == 0 { "none" } else { "echo" };
            let answer = health.check(HealthCheckRequest { service: service.to_owned() }).await;
            assert_eq!(answer.is_ok(), n % 4 != 0, "{answer:?}");
        }
        assert_calm(server, &connections).await;
    });
}

#[test]
fn every_call_is_cancelled_by_its_deadline() {
    run(async {
        let server = server().await;
        let (channel, connections) = channel(&server).await;
        let mut running = JoinSet::new();
        for n in 0..count() {
            if running.len() as u64 >= IN_FLIGHT {
                running.join_next().await.expect("a call").expect("no panic");
            }
            let mut client = DispatcherClient::new(channel.clone());
            running.spawn(async move {
                let mut request = Request::new(WorkItem::new("stuck", payload(4 << 10)).with_id(n));
                request.set_timeout(Duration::from_millis(1));
                let status = soon("an answer", client.call(request)).await.expect_err("no answer in time");
                assert!([Code::DeadlineExceeded, Code::Cancelled].contains(&status.code()), "call {n}: {status:?}");
            });
        }
        while let Some(ended) = running.join_next().await {
            ended.expect("no panic");
        }
        assert_calm(server, &connections).await;
    });
}

/// An item of a stream; those that are refused, and those that expire, are among them.
fn item(n: u64, payload: Bytes) -> WorkItem {
    let pool = match meant(n) {
        Meant::Refused => "none",
        Meant::Expired | Meant::Failed => "late",
        Meant::Cancelled => "parts",
        Meant::TooLarge | Meant::Echo => "echo",
    };
    let item = WorkItem::new(pool, payload).with_id(n);
    if meant(n) == Meant::Expired { item.with_timeout(Duration::from_millis(1)) } else { item }
}

/// Asserts that the end of a stream's item is as it was meant.
fn assert_end(result: &WorkResult) {
    let code = result.status.as_ref().map_or(0, |status| status.code);
    let code = Code::from_i32(code);
    let fits = match meant(result.id) {
        Meant::Refused => code == Code::NotFound,
        Meant::Expired => [Code::Ok, Code::DeadlineExceeded].contains(&code),
        _ => code == Code::Ok,
    };
    assert!(fits, "item {}: {:?}", result.id, result.status);
}

#[test]
fn streams() {
    run(async {
        let server = server().await;
        let (channel, connections) = channel(&server).await;
        let mut client = DispatcherClient::new(channel);
        for (len, part) in SIZES {
            let (payload, count) = (payload(len), count() / part);
            let bytes = payload.clone();
            let items = tokio_stream::iter((0..count).map(move |n| item(n, bytes.clone())));
            let mut results = client.process(items).await.expect("a stream").into_inner();
            let mut ended = HashSet::new();
            while let Some(result) = soon("a result", results.message()).await.expect("a stream") {
                if !result.partial {
                    assert_end(&result);
                    assert!(ended.insert(result.id), "item {} ended twice", result.id);
                }
            }
            assert_eq!(ended.len() as u64, count, "results of {len} bytes");
        }
        // Streams that are left in the middle, and such as end by their deadline.
        for n in 0..count() / 20 {
            let items = tokio_stream::iter((0..40).map(|n| WorkItem::new("echo", payload(4 << 10)).with_id(n)));
            let mut request = Request::new(items);
            if n % 2 == 0 {
                request.set_timeout(Duration::from_millis(1));
            }
            match soon("a stream", client.process(request)).await {
                Ok(results) => drop(soon("a result", results.into_inner().message()).await),
                Err(status) => {
                    assert!([Code::DeadlineExceeded, Code::Cancelled].contains(&status.code()), "{status:?}")
                }
            }
        }
        assert_calm(server, &connections).await;
    });
}

#[test]
fn updates() {
    run(async {
        let server = server().await;
        let (channel, connections) = channel(&server).await;
        let mut client = DispatcherClient::new(channel);
        for (len, part) in SIZES {
            let (payload, count) = (payload(len), count() / part);
            let name = format!("updates-{len}");
            let subscription = name.clone();
            let items = (0..count)
                .map(move |n| WorkItem::new("echo", payload.clone()).with_id(n).with_subscription(&subscription));
            let mut submitter = client.clone();
            let receipt = tokio::spawn(async move { submitter.submit(tokio_stream::iter(items)).await });
            let mut seen = HashSet::new();
            // One subscriber after the other, each with a limit.
            while (seen.len() as u64) < count {
                let limit = (count / 20).max(1).min(count - seen.len() as u64);
                let request = GetUpdatesRequest { subscription: name.clone(), limit };
                let mut results = client.get_updates(request).await.expect("a stream").into_inner();
                while let Some(result) = soon("a result", results.message()).await.expect("a stream") {
                    assert_eq!((result.status, result.payload.len()), (None, len));
                    assert!(seen.insert(result.id), "result {} came twice", result.id);
                }
            }
            let receipt = receipt.await.expect("no panic").expect("a receipt").into_inner();
            assert_eq!((receipt.accepted, receipt.rejected), (count, 0));
        }
        assert_calm(server, &connections).await;
    });
}

#[test]
fn subscribers_that_leave() {
    run(async {
        let server = server().await;
        let (channel, connections) = channel(&server).await;
        let mut client = DispatcherClient::new(channel);
        // Subscribers that leave while results are under way, or whose deadline passes.
        // What they leave fills the outbox, so they are few.
        for n in 0..60 {
            let subscription = format!("left-{n}");
            let items: Vec<_> = (0..20)
                .map(|id| WorkItem::new("echo", payload(4 << 10)).with_id(id).with_subscription(&subscription))
                .collect();
            client.submit(tokio_stream::iter(items)).await.expect("a receipt");
            let mut request = Request::new(GetUpdatesRequest { subscription, limit: 0 });
            if n % 2 == 0 {
                request.set_timeout(Duration::from_millis(1));
            }
            match soon("a stream", client.get_updates(request)).await {
                Ok(results) => drop(soon("a result", results.into_inner().message()).await),
                Err(status) => {
                    assert!([Code::DeadlineExceeded, Code::Cancelled].contains(&status.code()), "{status:?}")
                }
            }
        }
        assert_eq!(connections.load(Relaxed), 1, "the connection was replaced");
        let loud = loud(&server.drain().await);
        assert!(loud.iter().all(|line| line.contains("results that no subscriber fetched")), "{loud:#?}");
    });
}
