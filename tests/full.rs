//! A full server: calls are refused and may come again, streams wait, and room that comes is found by those who wait.

mod common;

use std::{collections::BTreeSet, time::Duration};

use common::{
    Files, Server, assert_refused, assert_serves, processes,
    raw::{Raw, framed},
    refusal, run,
    server::{forkring, unique_name},
    skip, soon,
};
use forkring::{client::Results, proto::v1::WorkItem};
use h2::client::Builder;
use nix::sys::signal::Signal;
use prost::Message as _;
use tokio::{sync::mpsc, task::JoinSet};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use tonic_types::StatusExt as _;

async fn next_id(results: &mut Results) -> u64 {
    let result = soon("a result", results.message()).await.expect("an open stream").expect("a result");
    let id = result.id;
    result.outcome().expect("a success");
    id
}

#[test]
fn a_call_to_a_full_server_is_refused_and_told_when_to_come_again() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["hold"], "capacity = 4").await;
        let client = server.client().await;
        let mut calls = JoinSet::new();
        for id in 1..=5 {
            let (client, item) = (client.clone(), files.holding(id, "go"));
            calls.spawn(async move { client.call(item).await });
        }
        // Nobody is answered but who is refused.
        let answer = soon("a refusal", calls.join_next()).await.expect("a call").expect("a task");
        let refused = answer.expect_err("four fit");
        let delay = refused.get_details_retry_info().and_then(|info| info.retry_delay).expect("a retry delay");
        assert!(delay > Duration::ZERO);
        assert_refused(refusal::<()>(Err(refused)), (Code::ResourceExhausted, "QUEUE_FULL"), "the queue is full");
        files.make("go");
        while let Some(answer) = soon("the answers", calls.join_next()).await {
            answer.expect("a task").expect("a result");
        }
        assert_serves(&client, "hold").await;
        server.drain().await;
    });
}

#[test]
fn of_a_thousand_calls_as_many_are_taken_as_fit_and_the_rest_refused() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["hold"], "capacity = 100").await;
        let client = server.client().await;
        let mut calls = JoinSet::new();
        for id in 0..1000 {
            let (client, item) = (client.clone(), files.holding(id, "go"));
            calls.spawn(async move { client.call(item).await });
        }
        // Nobody is answered but those who are refused, so 900 of them there are.
        for _ in 0..900 {
            let refused = refusal(soon("a refusal", calls.join_next()).await.expect("a call").expect("a task"));
            assert_refused(refused, (Code::ResourceExhausted, "QUEUE_FULL"), "try again");
        }
        files.make("go");
        while let Some(answer) = soon("the answers", calls.join_next()).await {
            answer.expect("a task").expect("a result");
        }
        server.drain().await;
    });
}

#[test]
fn streams_wait_for_room_and_leave_some_to_calls() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["hold", "count"], "capacity = 32").await;
        let client = server.client().await;
        let items: Vec<_> = (1..=100).map(|id| files.holding(id, "go")).collect();
        let mut results = client.process(tokio_stream::iter(items)).await.expect("a stream");
        files.began(1).await;
        // However much of the stream has been read: never is the table full for a call.
        for _ in 0..50 {
            soon("an answer", client.call(WorkItem::new("count", ""))).await.expect("room for a call");
        }
        files.make("go");
        let mut ids = BTreeSet::new();
        for _ in 0..100 {
            ids.insert(next_id(&mut results).await);
        }
        assert!(ids.into_iter().eq(1..=100));
        assert!(soon("the end", results.message()).await.expect("a good end").is_none());
        server.drain().await;
    });
}

#[test]
fn streams_leave_some_of_the_arena_to_calls_too() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["hold", "count"], "arena = '256KiB'\nmax_message = '48KiB'").await;
        let client = server.client().await;
        let large = |id| WorkItem { payload: vec![1; 8000].into(), ..files.holding(id, "go") };
        let items: Vec<_> = (1..=60).map(large).collect();
        let mut results = client.process(tokio_stream::iter(items)).await.expect("a stream");
        files.began(1).await;
        // However much of the stream has been read, a call of as much finds room.
        for _ in 0..50 {
            let answer = soon("an answer", client.call(WorkItem::new("count", vec![1; 8000]))).await;
            answer.expect("room for a call");
        }
        files.make("go");
        for _ in 0..60 {
            next_id(&mut results).await;
        }
        server.drain().await;
    });
}

/// Each item in a frame of its own, as some clients send them.
#[test]
fn a_stream_of_tiny_frames_waits_like_any_other() {
    const ITEMS: usize = 60_000;
    run(async {
        let server = Server::serve(&["--pool", "echo=echo"]).await;
        let worker = server.child("w0").await;
        // The answers, too, may come in frames that are small.
        let mut raw = Raw::connect_as(&server, Builder::new().data_frame_budget(usize::MAX)).await;
        processes::signal(worker, Signal::SIGSTOP);
        let mut exchange = raw.begin("Process", &[]).await;
        let item = framed(&WorkItem::new("echo", "x"));
        for at in 1..=ITEMS {
            exchange.body.send_data(item.clone(), at == ITEMS).expect("an open stream");
        }
        raw.settled().await;
        processes::signal(worker, Signal::SIGCONT);
        let answer = exchange.answer().await;
        assert_eq!((answer.code, answer.messages.len()), (Code::Ok, ITEMS), "{}", answer.message);
        server.drain().await;
    });
}

#[test]
fn a_call_that_the_arena_has_no_room_for_is_refused() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["hold"], "arena = '64KiB'\nmax_message = '48KiB'").await;
        let client = server.client().await;
        let large = |id| WorkItem { payload: vec![1; 40_000].into(), ..files.holding(id, "go") };
        let held = tokio::spawn({
            let (client, item) = (client.clone(), large(1));
            async move { client.call(item).await }
        });
        files.began(1).await;
        let refused = soon("an answer", client.call(large(2))).await.expect_err("there is no room");
        assert!(refused.get_details_retry_info().is_some());
        assert_refused(refusal::<()>(Err(refused)), (Code::ResourceExhausted, "ARENA_FULL"), "try again");
        // A stream waits instead.
        let mut results = client.process(tokio_stream::iter([large(3)])).await.expect("a stream");
        files.make("go");
        assert_eq!(next_id(&mut results).await, 3);
        soon("an answer", held).await.expect("a task").expect("a result");
        soon("an answer", client.call(large(4))).await.expect("room again");
        server.drain().await;
    });
}

#[test]
fn a_message_may_be_as_large_as_it_is_said_and_no_larger() {
    run(async {
        // The default settings, as they are.
        const MAX: usize = 64 << 20;
        let (name, parent) = (unique_name(), std::process::id().to_string());
        let mut command = forkring();
        command.args([
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--name",
            &name,
            "--parent",
            &parent,
            "--pool",
            "echo:1=echo",
        ]);
        for (pool, bytes) in [("most", MAX), ("more", MAX + 1)] {
            command.args(["--pool", &format!("{pool}:1=exec:head -c {bytes} /dev/zero")]);
        }
        let server = match Server::try_start(name, command, Files::new()).await {
            Ok(server) => server,
            Err(ended) => {
                assert!(ended.log().contains("/dev/shm is too small"), "{}", ended.log());
                return skip("no room in /dev/shm for a server with the default settings");
            }
        };
        let client = server.client().await;
        let mut item = WorkItem::new("echo", vec![7; MAX]).with_id(1);
        item.payload = item.payload.slice(item.encoded_len() - MAX..);
        assert_eq!(item.encoded_len(), MAX);
        let result = soon("an answer", client.call(item.clone())).await.expect("a result");
        assert!(result.payload == item.payload);
        item.payload = vec![7; item.payload.len() + 1].into();
        let refused = refusal(soon("an answer", client.call(item)).await);
        assert_refused(refused, (Code::ResourceExhausted, "MESSAGE_TOO_LARGE"), "--max-message");

        // Of a result it is the payload that counts.
        let result = soon("an answer", client.call(WorkItem::new("most", ""))).await.expect("a result");
        assert!(result.payload == vec![0; MAX]);
        let refused = refusal(soon("an answer", client.call(WorkItem::new("more", ""))).await);
        assert_refused(refused, (Code::ResourceExhausted, "RESULT_TOO_LARGE"), "--max-message");
        server.drain().await;
    });
}

#[test]
fn room_in_the_table_that_abandoned_items_leave_is_found() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["hold"], "capacity = 2\nworkers = 2").await;
        let client = server.client().await;
        let mut calls = JoinSet::new();
        for id in 1..=2 {
            let (client, item) = (client.clone(), files.holding(id, "go"));
            calls.spawn(async move { client.call(item).await });
        }
        files.began(2).await;
        let item = WorkItem::new("hold", "x").with_id(3);
        let mut results = client.process(tokio_stream::iter([item])).await.expect("a stream");
        // Both callers go away while their items are in work, and so nobody gets those results.
        soon("their end", calls.shutdown()).await;
        files.make("go");
        assert_eq!(next_id(&mut results).await, 3);
        server.drain().await;
    });
}

#[test]
fn room_in_the_arena_that_abandoned_items_leave_is_found() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["hold"], "arena = '64KiB'\nmax_message = '48KiB'").await;
        let client = server.client().await;
        let mut calls = JoinSet::new();
        let item = WorkItem { payload: vec![1; 40_000].into(), ..files.holding(1, "go") };
        calls.spawn({
            let client = client.clone();
            async move { client.call(item).await }
        });
        files.began(1).await;
        let item = WorkItem::new("hold", vec![1; 40_000]).with_id(2);
        let mut results = client.process(tokio_stream::iter([item])).await.expect("a stream");
        soon("their end", calls.shutdown()).await;
        files.make("go");
        assert_eq!(next_id(&mut results).await, 2);
        server.drain().await;
    });
}

#[test]
fn a_lane_full_of_what_was_cancelled_is_full_until_a_worker_comes() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo", "--capacity", "4"]).await;
        let client = server.client().await;
        assert_serves(&client, "echo").await;
        let worker = server.child("w0").await;
        processes::signal(worker, Signal::SIGSTOP);
        // Each leaves a hint in the lane, which only a worker removes.
        let refused = loop {
            let item = WorkItem::new("echo", "x").with_timeout(Duration::from_millis(1));
            let answer = soon("an answer", client.call(item)).await;
            match refusal(answer) {
                (Code::DeadlineExceeded, ..) => {}
                refused => break refused,
            }
        };
        assert_refused(refused, (Code::ResourceExhausted, "LANE_FULL"), "try again");
        // A stream waits, and is not forgotten.
        let (items, stream) = mpsc::channel(1);
        let mut results = client.process(ReceiverStream::new(stream)).await.expect("a stream");
        items.send(WorkItem::new("echo", "x").with_id(9)).await.expect("an open stream");
        // What was sent before this call has been read before it is answered.
        assert_eq!(refusal(soon("an answer", client.call(WorkItem::new("echo", "x"))).await).1, "LANE_FULL");
        processes::signal(worker, Signal::SIGCONT);
        assert_eq!(next_id(&mut results).await, 9);
        drop(items);
        assert_serves(&client, "echo").await;
        server.drain().await;
    });
}
