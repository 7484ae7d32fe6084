//! The four shapes of the service, and what stands beside them: health and reflection.

mod common;

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use common::{Files, Server, assert_refused, assert_serves, failure, refusal, run, soon, until};
use forkring::proto::v1::{WorkItem, WorkResult};
use nix::sys::signal::Signal;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

/// Payloads of all the ways that one can travel: none, in the item's record, in the arena and copied out, in the arena
/// and sent in place, and the largest of the test servers' 512 KiB with the message's other fields.
const SIZES: [usize; 8] = [0, 1, 64, 65, 16 << 10, (16 << 10) + 1, 100_000, (512 << 10) - 32];

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 31 % 251) as u8).collect()
}

/// A stream of items that the test feeds as it goes.
fn feed() -> (mpsc::Sender<WorkItem>, ReceiverStream<WorkItem>) {
    let (sender, receiver) = mpsc::channel(64);
    (sender, ReceiverStream::new(receiver))
}

async fn next(results: &mut forkring::client::Results) -> Option<WorkResult> {
    soon("a result", results.message()).await.expect("an open stream")
}

#[test]
fn a_call_is_one_item_in_and_its_result_out() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo"]).await;
        let client = server.client().await;
        for (id, size) in (1..).zip(SIZES) {
            let begin = Instant::now();
            let item = WorkItem::new("echo", pattern(size)).with_id(id);
            let result = soon("a result", client.call(item)).await.expect("a result");
            let elapsed = begin.elapsed();
            assert_eq!((result.id, result.attempts, result.worker, &result.status), (id, 1, 0, &None));
            assert!(result.payload == pattern(size), "{size} bytes did not come back as they went");
            let timing = result.timing.expect("timing");
            let total = Duration::from_nanos(timing.queued_ns + timing.worked_ns + timing.returned_ns);
            // A worker that comes from another item takes the next at no time at all.
            assert!(timing.worked_ns > 0 && timing.returned_ns > 0, "{timing:?}");
            assert!(total <= elapsed, "{total:?} of {elapsed:?} are accounted for");
        }
        server.drain().await;
    });
}

#[test]
fn the_pool_may_be_empty_when_there_is_one() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo"]).await;
        assert_serves(&server.client().await, "").await;
        server.drain().await;
    });
}

#[test]
fn results_come_while_items_go() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo"]).await;
        let (items, stream) = feed();
        let mut results = server.client().await.process(stream).await.expect("a stream");
        for (id, size) in (1..).zip(SIZES) {
            items.send(WorkItem::new("echo", pattern(size)).with_id(id)).await.expect("an open stream");
            let result = next(&mut results).await.expect("a result before the stream is closed");
            assert_eq!((result.id, result.attempts), (id, 1));
            assert!(result.payload == pattern(size), "{size} bytes did not come back as they went");
        }
        drop(items);
        assert_eq!(next(&mut results).await, None, "the stream ends with OK");
        server.drain().await;
    });
}

#[test]
fn a_stream_carries_many_more_items_than_fit_at_a_time() {
    run(async {
        let server = Server::serve(&["--pool", "hash:2=sha256", "--capacity", "16"]).await;
        let items = (1..=2000_u64).map(|id| WorkItem::new("hash", id.to_string()).with_id(id));
        let mut results = server.client().await.process(tokio_stream::iter(items)).await.expect("a stream");
        let mut ids = BTreeSet::new();
        while let Some(result) = next(&mut results).await {
            assert!(ids.insert(result.id), "{} came twice", result.id);
            assert_eq!(result.outcome().expect("a digest").len(), 32);
        }
        assert!(ids.into_iter().eq(1..=2000));
        server.drain().await;
    });
}

#[test]
fn a_failed_item_is_a_result_and_the_stream_goes_on() {
    run(async {
        let server = Server::handlers(&["fail", "count"], "").await;
        let (items, stream) = feed();
        let mut results = server.client().await.process(stream).await.expect("a stream");
        let wanted = (Code::NotFound, "NO_SUCH_ROW");
        items.send(WorkItem::new("fail", "seven").with_id(1)).await.expect("an open stream");
        assert_refused(failure(next(&mut results).await.expect("a result")), wanted, "no row `seven`");
        items.send(WorkItem::new("nowhere", "").with_id(2)).await.expect("an open stream");
        let refused = next(&mut results).await.expect("a result");
        assert_eq!((refused.id, refused.attempts), (2, 0));
        assert_refused(failure(refused), (Code::NotFound, "UNKNOWN_POOL"), "this server has fail, count");
        items.send(WorkItem::new("count", "").with_priority(4)).await.expect("an open stream");
        assert_refused(
            failure(next(&mut results).await.expect("a result")),
            (Code::InvalidArgument, "BAD_PRIORITY"),
            "0 to 3",
        );
        items.send(WorkItem::new("count", "").with_id(3)).await.expect("an open stream");
        let counted = next(&mut results).await.expect("a result");
        assert_eq!((counted.id, &counted.payload[..]), (3, &b"1"[..]));
        drop(items);
        assert_eq!(next(&mut results).await, None);
        server.drain().await;
    });
}

#[test]
fn submitted_items_become_updates() {
    run(async {
        let server = Server::serve(&["--pool", "hash=sha256", "--pool", "echo=echo"]).await;
        let client = server.client().await;
        let mut updates = soon("a stream", client.updates("mine", 8)).await.expect("a stream");
        let items = (1..)
            .zip(SIZES)
            .map(|(id, size)| WorkItem::new("echo", pattern(size)).with_id(id).with_subscription("mine"));
        let receipt = soon("a receipt", client.submit(tokio_stream::iter(items))).await.expect("a receipt");
        assert_eq!((receipt.accepted, receipt.rejected, receipt.rejections.len()), (8, 0, 0));
        let mut sizes = BTreeSet::new();
        while let Some(result) = next(&mut updates).await {
            assert_eq!(result.payload.len(), SIZES[result.id as usize - 1]);
            assert!(result.payload == pattern(result.payload.len()));
            sizes.insert(result.payload.len());
        }
        assert!(sizes.into_iter().eq(SIZES));
        server.drain().await;
    });
}

#[test]
fn a_receipt_tells_of_what_was_refused() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo"]).await;
        let client = server.client().await;
        let items = (1..=40).map(|id| WorkItem::new("nowhere", "").with_id(id)).chain([WorkItem::new("echo", "x")]);
        let receipt = soon("a receipt", client.submit(tokio_stream::iter(items))).await.expect("a receipt");
        assert_eq!((receipt.accepted, receipt.rejected), (1, 40));
        assert!(receipt.rejections.iter().map(|rejection| rejection.id).eq(1..=32), "the first are told of");
        let status = receipt.rejections[0].status.clone().expect("a status");
        assert_eq!((status.code, status.reason.as_str()), (Code::NotFound as i32, "UNKNOWN_POOL"));
        server.drain().await;
    });
}

#[test]
fn a_higher_priority_is_taken_first() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["hold"], "").await;
        let client = server.client().await;
        let mut updates = soon("a stream", client.updates("", 5)).await.expect("a stream");
        let submit = |items: Vec<WorkItem>| client.submit(tokio_stream::iter(items));
        submit(vec![files.holding(1, "go")]).await.expect("a receipt");
        files.began(1).await;
        // The one worker is busy, and these are all in shared memory before it takes the next.
        let waiting =
            [(2, 0), (3, 0), (4, 1), (5, 3)].map(|(id, priority)| files.holding(id, "go").with_priority(priority));
        assert_eq!(submit(waiting.into()).await.expect("a receipt").accepted, 4);
        files.make("go");
        let mut order = Vec::new();
        while let Some(result) = next(&mut updates).await {
            order.push(result.id);
        }
        assert_eq!(order, [1, 5, 4, 2, 3]);
        server.drain().await;
    });
}

#[test]
fn a_handler_sees_what_came_beside_the_payload() {
    run(async {
        let server = Server::handlers(&["metadata", "remaining"], "").await;
        let client = server.client().await;
        let long = "v".repeat(10_000);
        // Without a payload and with one that leaves the record no room, short and long.
        for (payload, value) in [(0, "b"), (64, "b"), (0, &long), (70_000, &long)] {
            let item = WorkItem::new("metadata", pattern(payload)).with_metadata("a", value).with_metadata("ä", "");
            let result = soon("a result", client.call(item)).await.expect("a result");
            assert_eq!(str::from_utf8(&result.payload), Ok(&*format!("a={value}\nä=\n")), "{payload}");
        }
        let result = soon("a result", client.call(WorkItem::new("remaining", ""))).await.expect("a result");
        assert_eq!(&result.payload[..], b"as long as it takes");
        let item = WorkItem::new("remaining", "").with_timeout(Duration::from_secs(3600));
        let result = soon("a result", client.call(item)).await.expect("a result");
        let left: u64 = str::from_utf8(&result.payload).expect("text").parse().expect("milliseconds");
        assert!((3_500_000..3_600_000).contains(&left), "{left}");
        server.drain().await;
    });
}

#[test]
fn what_goes_wrong_in_a_handler_is_its_items_failure() {
    run(async {
        let server = Server::handlers(&["fail", "panic", "big", "buffer"], "").await;
        let client = server.client().await;
        let family = server.family(4).await;
        let call = async |pool, payload: String| soon("an answer", client.call(WorkItem::new(pool, payload))).await;

        assert_refused(refusal(call("fail", "x".into()).await), (Code::NotFound, "NO_SUCH_ROW"), "no row `x`");
        let wanted = (Code::Internal, "HANDLER_FAILED");
        assert_refused(refusal(call("fail", String::new()).await), wanted, "an item without a name");
        let wanted = (Code::Internal, "HANDLER_PANICKED");
        assert_refused(refusal(call("panic", "what now".into()).await), wanted, "the handler panicked: what now");
        let most = 512 << 10;
        let wanted = (Code::ResourceExhausted, "RESULT_TOO_LARGE");
        for pool in ["big", "buffer"] {
            assert_refused(refusal(call(pool, (most + 1).to_string()).await), wanted, "--max-message");
            // The memory that it had is there for the next, which needs all of it.
            for size in [most, most, 0, 64, 65] {
                let result = call(pool, size.to_string()).await.expect("a result");
                assert_eq!(result.payload.len(), size, "{pool}");
            }
        }
        let result = call("buffer", "70000".into()).await.expect("a result");
        assert!(result.payload.iter().enumerate().all(|(at, byte)| *byte == at as u8));
        // A failure may be long; the client gets as much of it as headers can carry.
        let (code, reason, message) = refusal(call("panic", "x".repeat(100_000)).await);
        assert_eq!((code, reason.as_str()), (Code::Internal, "HANDLER_PANICKED"));
        assert!((1000..3000).contains(&message.len()), "{}", message.len());

        assert_eq!(server.children(), family, "nobody died of it");
        server.drain().await;
    });
}

#[test]
fn each_worker_has_a_handler_of_its_own_that_lives_as_long() {
    run(async {
        let server = Server::handlers(&["count"], "workers = 2").await;
        let client = server.client().await;
        let mut counts = [0; 2];
        for _ in 0..20 {
            let result = soon("a result", client.call(WorkItem::new("count", ""))).await.expect("a result");
            let count = &mut counts[result.worker as usize];
            *count += 1;
            assert_eq!(result.payload, count.to_string());
        }
        server.drain().await;
    });
}

#[test]
fn many_clients_at_once_get_each_their_own() {
    run(async {
        let server = Server::serve(&["--pool", "echo:2=echo"]).await;
        let mut calls = tokio::task::JoinSet::new();
        for client_number in 0..8 {
            let client = server.client().await;
            for call in 0..25_u64 {
                let client = client.clone();
                let text = format!("{client_number} {call}");
                calls.spawn(async move {
                    let result = client.call(WorkItem::new("echo", text.clone()).with_id(call)).await;
                    result.is_ok_and(|result| result.id == call && result.payload == text)
                });
            }
        }
        let good = soon("all answers", calls.join_all()).await;
        assert_eq!(good.iter().filter(|good| **good).count(), 200);
        server.drain().await;
    });
}

#[test]
fn health_is_told_for_each_pool_by_its_live_workers() {
    run(async {
        let server = Server::serve(&["--pool", "a=echo", "--pool", "b=echo"]).await;
        let channel = tonic::transport::Endpoint::from_shared(format!("http://{}", server.addr)).expect("an address");
        let health = HealthClient::new(soon("a connection", channel.connect()).await.expect("a connection"));
        let check = async |service: &str| {
            let request = HealthCheckRequest { service: service.to_owned() };
            let answer = soon("an answer", health.clone().check(request)).await;
            answer.map(|answer| answer.into_inner().status())
        };
        for service in ["", "forkring.v1.Dispatcher", "a", "b"] {
            assert_eq!(check(service).await.expect("a status"), ServingStatus::Serving, "{service}");
        }
        assert_eq!(check("c").await.expect_err("no such pool").code(), Code::NotFound);

        // A worker that keeps dying is replaced ever more slowly, so that sooner or later its absence shows.
        let mut last = 0;
        loop {
            last = server.successor("w0", last).await;
            common::processes::signal(last, Signal::SIGKILL);
            until("its death", || (!common::processes::is_alive(last)).then_some(())).await;
            if check("a").await.expect("a status") == ServingStatus::NotServing {
                break;
            }
        }
        assert_eq!(check("b").await.expect("a status"), ServingStatus::Serving, "the other pool serves");
        assert_eq!(check("").await.expect("a status"), ServingStatus::Serving, "so the server does");
        server.successor("w0", last).await;
        let mut watch = health.clone().watch(HealthCheckRequest { service: "a".to_owned() }).await.expect("a stream");
        loop {
            let told = soon("a change", watch.get_mut().message()).await.expect("an open stream").expect("a status");
            if told.status() == ServingStatus::Serving {
                break;
            }
        }
        drop(watch);
        assert_serves(&server.client().await, "a").await;
        server.drain().await;
    });
}

/// The same test for both versions of the protocol, which have the same messages in packages of their own.
macro_rules! reflection {
    ($name:ident, $version:ident) => {
        #[test]
        fn $name() {
            use prost::Message as _;
            use tonic_reflection::pb::$version::{
                ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
                server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
            };
            run(async {
                let server = Server::serve(&["--pool", "echo=echo"]).await;
                let url = format!("http://{}", server.addr);
                let channel = tonic::transport::Endpoint::from_shared(url).expect("an address").connect().await;
                let mut reflection = ServerReflectionClient::new(channel.expect("a connection"));
                let symbol = "forkring.v1.Dispatcher".to_owned();
                let requests =
                    [MessageRequest::ListServices(String::new()), MessageRequest::FileContainingSymbol(symbol.clone())];
                let requests = requests
                    .map(|request| ServerReflectionRequest { host: String::new(), message_request: Some(request) });
                let answer = soon("a stream", reflection.server_reflection_info(tokio_stream::iter(requests))).await;
                let mut answers = answer.expect("a stream").into_inner();
                let first = soon("an answer", answers.message()).await.expect("a stream").expect("an answer");
                let Some(MessageResponse::ListServicesResponse(list)) = first.message_response else {
                    panic!("{first:?}");
                };
                let services: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
                for wanted in [&symbol, "forkring.v1.Admin", "grpc.health.v1.Health"] {
                    assert!(services.iter().any(|service| service == wanted), "no {wanted} in {services:?}");
                }
                let second = soon("an answer", answers.message()).await.expect("a stream").expect("an answer");
                let Some(MessageResponse::FileDescriptorResponse(files)) = second.message_response else {
                    panic!("{second:?}");
                };
                let files = files.file_descriptor_proto.iter();
                let mut files = files.map(|file| prost_types::FileDescriptorProto::decode(&file[..]).expect("a file"));
                assert!(files.any(|file| file.service.iter().any(|service| service.name() == "Dispatcher")));
                server.drain().await;
            });
        }
    };
}

reflection!(reflection_v1_describes_the_service, v1);
reflection!(reflection_v1alpha_describes_the_service, v1alpha);
