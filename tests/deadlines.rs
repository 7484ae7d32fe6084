//! Deadlines and cancels: what is over before a worker takes it never runs, and what runs can find out.

mod common;

use std::time::Duration;

use common::{
    Files, Server, assert_refused, assert_serves, failure, in_time,
    processes::signal,
    raw::{Raw, framed},
    refusal, run, soon,
};
use forkring::{
    client::Client,
    proto::v1::{GetUpdatesRequest, WorkItem, WorkResult},
};
use nix::sys::signal::Signal;
use prost::Message as _;
use tokio::task::JoinHandle;
use tonic::{Code, Status};

const EXPIRED: (Code, &str) = (Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
const SHORT: Duration = Duration::from_millis(20);

fn spawn_call(client: &Client, item: WorkItem) -> JoinHandle<Result<WorkResult, Status>> {
    let client = client.clone();
    tokio::spawn(async move { client.call(item).await })
}

/// A server whose one worker is busy until there is a file `go`.
async fn busy(files: &Files, settings: &str) -> (Server, Client, JoinHandle<Result<WorkResult, Status>>) {
    let server = Server::handlers(&["hold", "count"], settings).await;
    let client = server.client().await;
    let held = spawn_call(&client, files.holding(1, "go"));
    files.began(1).await;
    (server, client, held)
}

/// Lets the worker go on, and asserts that it got the first item and this one and no other.
async fn assert_ran_none(files: &Files, client: &Client, held: JoinHandle<Result<WorkResult, Status>>) {
    files.make("go");
    soon("an answer", held).await.expect("a task").expect("a result");
    soon("an answer", client.call(files.holding(99, "go"))).await.expect("a result");
    let ran = files.lines("journal");
    assert!(ran.len() == 2 && ran[1].starts_with("99 began"), "{ran:?}");
}

#[test]
fn an_item_that_expires_before_it_is_claimed_never_runs() {
    run(async {
        let files = Files::new();
        let (server, client, held) = busy(&files, "").await;
        // By its own timeout, on all the ways that it can come.
        let item = |id| files.holding(id, "go").with_timeout(SHORT);
        let refused = refusal(soon("an answer", client.call(item(2))).await);
        assert_refused(refused, EXPIRED, "the item's deadline has passed");
        let mut results = client.process(tokio_stream::iter([item(3)])).await.expect("a stream");
        let result = soon("a result", results.message()).await.expect("a stream").expect("a result");
        assert_eq!((result.id, result.attempts), (3, 0));
        assert_refused(failure(result), EXPIRED, "the item's deadline has passed");
        assert_eq!(soon("the end", results.message()).await.expect("a good end"), None);
        let submitted = [item(4).with_subscription("s")];
        let receipt = soon("a receipt", client.submit(tokio_stream::iter(submitted))).await.expect("a receipt");
        assert_eq!(receipt.accepted, 1);

        // By the call's, whichever comes first.
        let mut raw = Raw::connect(&server).await;
        for (header, timeout) in [("20m", None), ("20m", Some(3600)), ("1H", Some(0))] {
            let mut item = files.holding(5, "go");
            if let Some(seconds) = timeout {
                item = item.with_timeout(Duration::from_secs(seconds));
            }
            let answer = raw.ask("Call", &[("grpc-timeout", header)], framed(&item)).await;
            assert_refused(answer.refusal(), EXPIRED, "the item's deadline has passed");
        }
        // A stream's is that of each of its items.
        let items = [framed(&files.holding(6, "go")), framed(&files.holding(7, "go"))].concat();
        let answer = raw.ask("Process", &[("grpc-timeout", "20m")], items.into()).await;
        assert_eq!((answer.code, answer.messages.len()), (Code::Ok, 2));

        assert_ran_none(&files, &client, held).await;
        // The submitted one has its end, too, once.
        let mut updates = soon("a stream", client.updates("s", 1)).await.expect("a stream");
        let result = soon("an update", updates.message()).await.expect("a stream").expect("an update");
        assert_eq!((result.id, result.attempts), (4, 0));
        assert_refused(failure(result), EXPIRED, "the item's deadline has passed");
        assert_eq!(files.lines("journal").len(), 2);
        server.drain().await;
    });
}

#[test]
fn an_item_whose_caller_goes_away_before_it_is_claimed_never_runs() {
    run(async {
        let files = Files::new();
        // Two items fit: the one at work, and one that waits.
        let (server, client, held) = busy(&files, "capacity = 2").await;
        let full = async || {
            let answer = soon("an answer", client.call(files.holding(50, "go").with_timeout(SHORT))).await;
            refusal(answer).1 == "QUEUE_FULL"
        };
        for (id, cut) in [(2, false), (3, true)] {
            let mut raw = Raw::connect(&server).await;
            let mut waiting = raw.begin("Call", &[]).await;
            waiting.body.send_data(framed(&files.holding(id, "go")), true).expect("an open stream");
            raw.settled().await;
            assert!(full().await, "what came before has been read before it is answered");
            if cut {
                raw.cut();
            } else {
                waiting.body.send_reset(h2::Reason::CANCEL);
            }
            // It is known to be taken back when there is room.
            while full().await {}
        }
        assert_ran_none(&files, &client, held).await;
        server.drain().await;
    });
}

#[test]
fn an_item_whose_stream_is_dropped_before_it_is_claimed_never_runs() {
    run(async {
        let files = Files::new();
        let (server, client, held) = busy(&files, "").await;
        let mut raw = Raw::connect(&server).await;
        let mut stream = raw.begin("Process", &[]).await;
        let items = [framed(&files.holding(2, "go")), framed(&WorkItem::new("count", ""))].concat();
        stream.body.send_data(items.into(), false).expect("an open stream");
        // There is a result of the second, so the first has been accepted.
        let response = soon("a response", &mut stream.response).await.expect("a response");
        soon("a result", response.into_body().data()).await.expect("an open stream").expect("a result");
        stream.body.send_reset(h2::Reason::CANCEL);
        raw.settled().await;
        assert_ran_none(&files, &client, held).await;
        server.drain().await;
    });
}

#[test]
fn a_handler_at_work_finds_out_that_nobody_waits() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["cancel"], "").await;
        let client = server.client().await;
        let item = |name| WorkItem::new("cancel", "").with_metadata("journal", files.name(name));
        let ended = async |name| assert_eq!(files.lines_of(name, 2).await, ["began", "cancelled"], "{name}");

        // Long enough that it begins, and no longer.
        in_time(SHORT, async |time| {
            let refused = refusal(soon("an answer", client.call(item("timeout").with_timeout(time))).await);
            assert_refused(refused, EXPIRED, "the item's deadline has passed");
            (!files.lines("timeout").is_empty()).then_some(())
        })
        .await;
        ended("timeout").await;

        let call = spawn_call(&client, item("dropped"));
        files.lines_of("dropped", 1).await;
        call.abort();
        ended("dropped").await;

        let mut raw = Raw::connect(&server).await;
        let mut call = raw.begin("Call", &[]).await;
        call.body.send_data(framed(&item("cut")), true).expect("an open stream");
        files.lines_of("cut", 1).await;
        raw.cut();
        ended("cut").await;

        in_time(SHORT, async |time| {
            let late = [item("stream timeout").with_timeout(time)];
            let mut results = client.process(tokio_stream::iter(late)).await.expect("a stream");
            let result = soon("a result", results.message()).await.expect("a stream").expect("a result");
            assert_refused(failure(result), EXPIRED, "the item's deadline has passed");
            (!files.lines("stream timeout").is_empty()).then_some(())
        })
        .await;
        ended("stream timeout").await;

        let results = client.process(tokio_stream::iter([item("stream dropped")])).await.expect("a stream");
        files.lines_of("stream dropped", 1).await;
        drop(results);
        ended("stream dropped").await;

        // A submitted item has nobody who could go away, but it has a deadline.
        in_time(SHORT, async |time| {
            let submitted = [item("submitted").with_timeout(time)];
            assert_eq!(client.submit(tokio_stream::iter(submitted)).await.expect("a receipt").accepted, 1);
            let mut updates = soon("a stream", client.updates("", 1)).await.expect("a stream");
            let result = soon("an update", updates.message()).await.expect("a stream").expect("an update");
            assert_eq!(result.attempts, 1);
            assert_refused(failure(result), EXPIRED, "the item's deadline has passed");
            (!files.lines("submitted").is_empty()).then_some(())
        })
        .await;
        ended("submitted").await;
        server.drain().await;
    });
}

#[test]
fn the_answer_to_a_deadline_does_not_wait_for_the_handler() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["hold"], "").await;
        let client = server.client().await;
        // This handler never asks whether anybody waits.
        let refused = refusal(soon("an answer", client.call(files.holding(1, "go").with_timeout(SHORT))).await);
        assert_refused(refused, EXPIRED, "the item's deadline has passed");
        // Its late result is nobody's, least of all that of the next.
        let next = spawn_call(&client, WorkItem::new("hold", "mine").with_id(2));
        files.make("go");
        let result = soon("an answer", next).await.expect("a task").expect("a result");
        assert_eq!((result.id, &result.payload[..]), (2, &b"mine"[..]));
        server.drain().await;
    });
}

/// A server with a submitted item that was in work when its deadline passed, and still is.
async fn late() -> (Files, Server, Updates) {
    // Long enough that it begins, and no longer.
    let mut timeout = SHORT;
    loop {
        timeout *= 2;
        let files = Files::new();
        let server = Server::handlers(&["hold"], "").await;
        let client = server.client().await;
        let mut updates = Updates(soon("a stream", client.updates("", 0)).await.expect("a stream"));
        let items = [1, 2].map(|id| files.holding(id, "go").with_timeout(timeout));
        let receipt = soon("a receipt", client.submit(tokio_stream::iter(items))).await.expect("a receipt");
        assert_eq!(receipt.accepted, 2);
        // The second has the later deadline, and waits behind the first, unless that had its end before it began.
        let result = updates.next().await;
        if result.id == 2 {
            assert_eq!(result.attempts, 0);
            assert_refused(failure(result), EXPIRED, "the item's deadline has passed");
            tokio::select! {
                _ = files.began(1) => return (files, server, updates),
                _ = updates.next() => {}
            }
        }
        files.make("go");
        server.drain().await;
    }
}

/// Updates, each of which comes.
struct Updates(forkring::client::Results);

impl Updates {
    async fn next(&mut self) -> WorkResult {
        soon("an update", self.0.message()).await.expect("a stream").expect("an update")
    }
}

#[test]
fn a_submitted_item_that_is_in_work_when_it_expires_has_one_end() {
    run(async {
        // Its handler's, however late.
        let (files, server, mut updates) = late().await;
        files.make("go");
        let result = updates.next().await;
        assert_eq!((result.id, result.attempts, &result.payload[..]), (1, 1, &b"item 1"[..]));
        submit_another(&server, &files).await;
        assert_eq!(updates.next().await.id, 3, "and no other");
        server.drain().await;

        // Or, if its worker dies and nobody else has begun it, the deadline's.
        let (files, server, mut updates) = late().await;
        signal(files.began(1).await[0], Signal::SIGKILL);
        let result = updates.next().await;
        assert_eq!((result.id, result.payload.len()), (1, 0));
        assert_refused(failure(result), EXPIRED, "the item's deadline has passed");
        files.make("go");
        submit_another(&server, &files).await;
        assert_eq!(updates.next().await.id, 3, "and no other");
        assert_eq!(files.lines("journal").len(), 2, "it was not begun again");
        server.drain().await;
    });
}

async fn submit_another(server: &Server, files: &Files) {
    let another = server.client().await.submit(tokio_stream::iter([files.holding(3, "go")])).await;
    assert_eq!(another.expect("a receipt").accepted, 1);
}

#[test]
fn a_submits_own_deadline_ends_it_and_none_of_its_items() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["hold"], "outbox = 2").await;
        let client = server.client().await;
        let mut raw = Raw::connect(&server).await;
        // The stream stays open, or there is no room for the third.
        for (items, is_open) in [(2, true), (3, false), (3, true)] {
            let mut timeout = 10;
            loop {
                let mut submit = raw.begin("Submit", &[("grpc-timeout", &format!("{timeout}m"))]).await;
                let items: Vec<_> = (1..=items).map(|id| framed(&files.holding(id, "go"))).collect();
                submit.body.send_data(items.concat().into(), !is_open).expect("an open stream");
                let (code, reason, message) = submit.answer().await.refusal();
                assert_eq!((code, reason.as_str()), EXPIRED);
                let accepted = message
                    .split_once("(items accepted before: ")
                    .map_or(0, |(_, count)| count.trim_end_matches(')').parse().expect("a number"));
                assert!(message.starts_with("the deadline of the RPC has passed"), "{message}");
                files.make("go");
                let mut updates = soon("a stream", client.updates("", accepted.max(1))).await.expect("a stream");
                for _ in 0..accepted {
                    let result = soon("an update", updates.message()).await.expect("a stream").expect("an update");
                    assert!(result.outcome().is_ok(), "what was accepted is done");
                }
                std::fs::remove_file(files.path("go")).expect("a file");
                if accepted == 2 {
                    break;
                }
                // It took longer to come here.
                timeout *= 2;
            }
        }
        server.drain().await;
    });
}

#[test]
fn an_rpc_for_updates_ends_at_its_deadline_and_loses_none() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo"]).await;
        let client = server.client().await;
        let mut raw = Raw::connect(&server).await;
        let request = framed(&GetUpdatesRequest { subscription: "s".to_owned(), limit: 0 });
        let timeout = [("grpc-timeout", "20m")];
        let late = "the deadline of the RPC has passed";
        assert_refused(raw.ask("GetUpdates", &timeout, request.clone()).await.refusal(), EXPIRED, late);
        // Nor does it wait for the rest of a request.
        let mut half = raw.begin("GetUpdates", &timeout).await;
        half.body.send_data(request.slice(..6), false).expect("an open stream");
        assert_refused(half.answer().await.refusal(), EXPIRED, late);

        // A subscriber that reads nothing until it is over gets what was under way, and the next one the rest.
        let items = (1..=40).map(|id| WorkItem::new("echo", vec![7; 10_000]).with_id(id).with_subscription("s"));
        let receipt = soon("a receipt", client.submit(tokio_stream::iter(items))).await.expect("a receipt");
        assert_eq!(receipt.accepted, 40);
        let mut slow = raw.begin("GetUpdates", &[("grpc-timeout", "300m")]).await;
        slow.body.send_data(request.clone(), true).expect("an open stream");
        raw.settled().await;
        let other = framed(&GetUpdatesRequest { subscription: "other".to_owned(), limit: 0 });
        let answer = raw.ask("GetUpdates", &[("grpc-timeout", "300m")], other).await;
        assert_eq!(answer.reason, "DEADLINE_EXCEEDED");
        let answer = slow.answer().await;
        assert_eq!((answer.code, answer.reason.as_str()), EXPIRED);
        let mut ids: Vec<_> =
            answer.messages.iter().map(|result| WorkResult::decode(&result[..]).expect("a result").id).collect();
        assert!(ids.len() < 40, "there was a window");
        let mut updates = soon("a stream", client.updates("s", 40 - ids.len() as u64)).await.expect("a stream");
        while let Some(result) = soon("an update", updates.message()).await.expect("a stream") {
            ids.push(result.id);
        }
        assert!(ids.iter().copied().eq(1..=40), "{ids:?}");
        // One that comes to its limit before ends well.
        let submitted = [WorkItem::new("echo", "x").with_subscription("s")];
        soon("a receipt", client.submit(tokio_stream::iter(submitted))).await.expect("a receipt");
        let request = framed(&GetUpdatesRequest { subscription: "s".to_owned(), limit: 1 });
        let answer = raw.ask("GetUpdates", &[("grpc-timeout", "1H")], request).await;
        assert_eq!((answer.code, answer.messages.len()), (Code::Ok, 1));
        server.drain().await;
    });
}

#[test]
fn deadlines_that_do_not_pass_do_nothing() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo", "--capacity", "16"]).await;
        let client = server.client().await;
        // Many times as many as there are items, so that what is kept of them is kept in bounds.
        let items =
            (0..2000).map(|id| WorkItem::new("echo", "x").with_id(id).with_timeout(Duration::from_secs(3600 + id % 7)));
        let mut results = client.process(tokio_stream::iter(items)).await.expect("a stream");
        let mut count = 0;
        while let Some(result) = soon("a result", results.message()).await.expect("a stream") {
            assert!(result.outcome().is_ok());
            count += 1;
        }
        assert_eq!(count, 2000);
        assert_serves(&client, "echo").await;
        server.drain().await;
    });
}
