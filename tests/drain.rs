//! The end of a server: what was accepted is finished and sent, nothing new is taken, and nobody can hold it up for
//! longer than the grace period.

mod common;

use std::time::{Duration, Instant};
#[cfg(feature = "crash-points")]
use std::{fs::File, os::unix::fs::FileExt as _};

use common::{
    Files, Server, assert_refused, assert_serves,
    frames::{DATA, END_STREAM, Frames},
    processes::{is_stopped, signal},
    raw::{Raw, framed},
    refusal, run,
    server::{serve_command, unique_name},
    soon, until,
};
use forkring::proto::v1::{GetUpdatesRequest, WorkItem};
use h2::client::Builder;
use nix::sys::signal::Signal;
use tokio::{io::AsyncWriteExt as _, net::TcpStream, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

#[test]
fn calls_that_were_accepted_are_answered() {
    run(async {
        for by in [Signal::SIGTERM, Signal::SIGINT] {
            let files = Files::new();
            let mut server = Server::handlers(&["hold"], "").await;
            let client = server.client().await;
            // One at work, and more than one waiting, large and small.
            let calls: Vec<_> = (1..=4)
                .map(|id| {
                    let (client, mut item) = (client.clone(), files.holding(id, "go"));
                    item.payload = vec![id as u8; 100_000 * (id as usize % 2)].into();
                    tokio::spawn(async move { client.call(item).await })
                })
                .collect();
            // One that comes when all of them have been read.
            Raw::connect(&server).await.settled().await;
            files.began(1).await;
            let family = server.family(1).await;
            server.signal(by);
            server.logged("draining").await;
            files.make("go");
            for (id, call) in (1..).zip(calls) {
                match soon("an answer", call).await.expect("a task") {
                    Ok(result) => assert_eq!((result.id, result.payload.len()), (id, 100_000 * (id as usize % 2))),
                    // The first of them at least was accepted.
                    Err(status) => assert!(id > 1 && status.code() == Code::Unavailable, "{status}"),
                }
            }
            let status = server.ended().await;
            server.assert_drained(status, &family);
        }
    });
}

#[test]
fn streams_finish_what_was_accepted_and_then_say_why_they_end() {
    run(async {
        let files = Files::new();
        let mut server = Server::handlers(&["hold"], "").await;
        let client = server.client().await;
        let family = server.family(1).await;
        let (items, stream) = mpsc::channel(4);
        let mut results = client.process(ReceiverStream::new(stream)).await.expect("a stream");
        items.send(files.holding(1, "go")).await.expect("an open stream");
        let (submitted, stream) = mpsc::channel(4);
        let submitting = tokio::spawn({
            let client = client.clone();
            async move { client.submit(ReceiverStream::new(stream)).await }
        });
        let mut updates = soon("a stream", client.updates("mine", 0)).await.expect("a stream");
        files.began(1).await;
        for id in [2, 3] {
            submitted.send(files.holding(id, "go").with_subscription("mine")).await.expect("an open stream");
        }
        // Known to be accepted, because it is the third of them: one worker takes the items in their order.
        let mut raw = Raw::connect(&server).await;
        raw.settled().await;

        server.signal(Signal::SIGTERM);
        server.logged("draining").await;
        let refused = refusal(soon("the receipt", submitting).await.expect("a task"));
        assert_refused(refused, (Code::Unavailable, "DRAINING"), "(items accepted before: 2)");
        files.make("go");
        let result = soon("a result", results.message()).await.expect("a stream").expect("a result");
        assert_eq!(result.id, 1);
        let wanted = (Code::Unavailable, "DRAINING");
        assert_refused(refusal(soon("the end", results.message()).await), wanted, "shutting down");
        for id in [2, 3] {
            let result = soon("an update", updates.message()).await.expect("a stream").expect("an update");
            assert_eq!(result.id, id);
        }
        assert_eq!(soon("the end", updates.message()).await.expect("a good end"), None);
        let status = server.ended().await;
        server.assert_drained(status, &family);
        drop((items, submitted));
    });
}

#[test]
fn a_submission_that_waited_for_room_says_how_much_of_it_was_accepted() {
    run(async {
        let files = Files::new();
        let mut server = Server::handlers(&["hold"], "capacity = 4\noutbox = 4").await;
        let client = server.client().await;
        let mut updates = soon("a stream", client.updates("", 0)).await.expect("a stream");
        let family = server.family(1).await;
        // One item is a call's, so that it is the table that has no room and not the outbox.
        let held = tokio::spawn({
            let (client, item) = (client.clone(), files.holding(0, "go"));
            async move { client.call(item).await }
        });
        files.began(1).await;
        let mut raw = Raw::connect(&server).await;
        let mut submitting = raw.begin("Submit", &[]).await;
        let items: Vec<_> = (1..=10).flat_map(|id| framed(&files.holding(id, "go"))).collect();
        submitting.body.send_data(items.into(), true).expect("an open stream");
        raw.settled().await;
        server.signal(Signal::SIGTERM);
        let refused = submitting.answer().await.refusal();
        assert_refused(refused, (Code::Unavailable, "DRAINING"), "(items accepted before: 3)");
        files.make("go");
        soon("an answer", held).await.expect("a task").expect("a result");
        for id in 1..=3 {
            assert_eq!(soon("a result", updates.message()).await.expect("a stream").expect("a result").id, id);
        }
        assert_eq!(soon("the end", updates.message()).await.expect("a good end"), None);
        let status = server.ended().await;
        server.assert_drained(status, &family);
    });
}

#[test]
fn streams_in_which_nothing_happens_end_too() {
    run(async {
        let mut server = Server::serve(&["--pool", "echo=echo"]).await;
        let client = server.client().await;
        let family = server.family(1).await;
        let (items, stream) = mpsc::channel(4);
        let mut used = client.process(ReceiverStream::new(stream)).await.expect("a stream");
        items.send(WorkItem::new("echo", "x")).await.expect("an open stream");
        soon("a result", used.message()).await.expect("a stream").expect("a result");
        let (unused_items, stream) = mpsc::channel(4);
        let mut unused = client.process(ReceiverStream::new(stream)).await.expect("a stream");
        let mut updates = soon("a stream", client.updates("mine", 0)).await.expect("a stream");
        server.signal(Signal::SIGTERM);
        for results in [&mut used, &mut unused] {
            let wanted = (Code::Unavailable, "DRAINING");
            assert_refused(refusal(soon("the end", results.message()).await), wanted, "shutting down");
        }
        assert_eq!(soon("the end", updates.message()).await.expect("a good end"), None);
        let status = server.ended().await;
        server.assert_drained(status, &family);
        drop((items, unused_items));
    });
}

#[test]
fn submitted_items_are_finished_though_nobody_fetches_them() {
    run(async {
        let files = Files::new();
        let mut server = Server::handlers(&["hold"], "").await;
        let client = server.client().await;
        let family = server.family(1).await;
        let items: Vec<_> = (1..=5).map(|id| files.holding(id, "go")).collect();
        assert_eq!(client.submit(tokio_stream::iter(items)).await.expect("a receipt").accepted, 5);
        files.began(1).await;
        server.signal(Signal::SIGTERM);
        server.logged("draining").await;
        files.make("go");
        let status = server.ended().await;
        server.assert_drained(status, &family);
        assert_eq!(files.lines("journal").len(), 5, "each of them ran");
        server.logged("results=5").await;
    });
}

#[test]
fn nothing_new_is_taken() {
    run(async {
        let files = Files::new();
        let mut server = Server::handlers(&["hold"], "").await;
        let client = server.client().await;
        let family = server.family(1).await;
        let held = tokio::spawn({
            let (client, item) = (client.clone(), files.holding(1, "go"));
            async move { client.call(item).await }
        });
        files.began(1).await;
        // A call of which the server has only a part, and which thereby is not accepted.
        let mut raw = Raw::connect(&server).await;
        let mut half = raw.begin("Call", &[]).await;
        half.body.send_data(framed(&WorkItem::new("hold", vec![0; 1000])).slice(..500), false).expect("an open stream");
        raw.settled().await;

        server.signal(Signal::SIGTERM);
        server.logged("draining").await;
        assert_refused(half.answer().await.refusal(), (Code::Unavailable, "DRAINING"), "shutting down");
        // What clients and balancers wait for: the port does not pretend any more.
        let connect = || std::net::TcpStream::connect(&server.addr).is_err().then_some(());
        until("connections to be refused", connect).await;
        let answer = soon("an answer", client.call(WorkItem::new("hold", "x"))).await;
        answer.expect_err("neither a new connection nor a new stream on the old one");
        files.make("go");
        soon("an answer", held).await.expect("a task").expect("a result");
        let status = server.ended().await;
        server.assert_drained(status, &family);
        assert_eq!(files.lines("journal").len(), 1);
    });
}

#[test]
fn clients_that_say_nothing_cannot_hold_it_up() {
    run(async {
        // Less than any of the patience that the server has with such clients; the grace period is more than that. On a machine
        // that is slow just then it is tried again.
        const BEFORE: Duration = Duration::from_secs(8);
        for _ in 0..5 {
            if drain_with_silent_clients().await < BEFORE {
                return;
            }
        }
        panic!("each time it took longer than {BEFORE:?}");
    });
}

/// How long that takes.
async fn drain_with_silent_clients() -> Duration {
    let mut server = Server::serve(&["--pool", "echo=echo", "--grace", "20s", "--body-timeout", "1h"]).await;
    let silent = TcpStream::connect(&server.addr).await.expect("a connection");
    let mut hesitant = TcpStream::connect(&server.addr).await.expect("a connection");
    hesitant.write_all(b"PRI * HTTP").await.expect("room in the socket");
    let mut idle = TcpStream::connect(&server.addr).await.expect("a connection");
    idle.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.expect("room in the socket");
    let mut raw = Raw::connect(&server).await;
    let mut halves = Vec::new();
    for method in ["Call", "Process", "Submit", "GetUpdates"] {
        let mut half = raw.begin(method, &[]).await;
        half.body.send_data("\0\0\0".into(), false).expect("an open stream");
        halves.push(half);
    }
    assert_serves(&server.client().await, "echo").await;
    let family = server.family(1).await;
    let begin = Instant::now();
    server.signal(Signal::SIGTERM);
    let status = server.ended().await;
    server.assert_drained(status, &family);
    drop((silent, hesitant, idle, halves));
    begin.elapsed()
}

#[test]
fn a_second_signal_ends_it_at_once() {
    run(async {
        for (first, second) in [(Signal::SIGTERM, Signal::SIGTERM), (Signal::SIGINT, Signal::SIGTERM)] {
            let files = Files::new();
            let mut server = Server::handlers(&["hold"], "grace = '1h'").await;
            let family = server.family(1).await;
            let client = server.client().await;
            let call = tokio::spawn({
                let item = files.holding(1, "never");
                async move { client.call(item).await }
            });
            files.began(1).await;
            server.signal(first);
            server.logged("draining").await;
            // What comes at once is the first one again.
            let mut told = Instant::now();
            until("the effect of a second", || {
                if told.elapsed() > Duration::from_millis(500) {
                    server.signal(second);
                    told = Instant::now();
                }
                server.log().contains("a second signal").then_some(())
            })
            .await;
            assert_eq!(server.ended().await.code(), Some(1), "{}", server.log());
            soon("an answer", call).await.expect("a task").expect_err("nobody is there");
            server.assert_gone(&family);
            assert!(!server.segment().exists());
            server.logged("stopped before the drain was over").await;
        }
    });
}

/// As `timeout` sends them, and a terminal together with whoever forwards its signals.
#[test]
fn signals_that_come_at_once_are_one() {
    run(async {
        // Between its looks at the one and at the other the server may be kept waiting, and then they are two.
        for _ in 0..20 {
            let files = Files::new();
            let mut server = Server::handlers(&["hold"], "").await;
            let family = server.family(1).await;
            let client = server.client().await;
            let call = tokio::spawn({
                let item = files.holding(1, "go");
                async move { client.call(item).await }
            });
            files.began(1).await;
            // Both are there when it looks.
            server.signal(Signal::SIGSTOP);
            until("the server to stop", || is_stopped(server.pid()).then_some(())).await;
            for number in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGCONT] {
                server.signal(number);
            }
            server.logged("draining").await;
            files.make("go");
            let answer = soon("an answer", call).await.expect("a task");
            let status = server.ended().await;
            if server.log().contains("a second signal") {
                continue;
            }
            answer.expect("a result");
            server.assert_drained(status, &family);
            return;
        }
        panic!("each time they were two");
    });
}

#[test]
fn the_log_says_what_is_served_and_that_a_drain_is_done() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["hold", "count"], "workers = 2").await;
        let line = server.logged(" INFO serving ").await;
        for says in [&server.addr, &server.name, "hold (2 workers), count (2 workers)"] {
            assert!(line.contains(says), "`{line}` does not say {says}");
        }
        let client = server.client().await;
        soon("an answer", client.call(WorkItem::new("count", ""))).await.expect("a result");
        let calls = [1, 2].map(|id| {
            let (client, item) = (client.clone(), files.holding(id, "go"));
            tokio::spawn(async move { client.call(item).await })
        });
        files.began(2).await;
        let (mut server, family) = (server, Vec::new());
        server.signal(Signal::SIGTERM);
        server.logged("draining").await;
        assert!(!server.log().contains(" INFO drained"), "{}", server.log());
        files.make("go");
        for call in calls {
            soon("an answer", call).await.expect("a task").expect("a result");
        }
        let status = server.ended().await;
        server.assert_drained(status, &family);
        let log = server.log();
        let lines: Vec<_> = log.lines().filter(|line| line.contains(" INFO drained")).collect();
        assert!(lines.len() == 1 && lines[0].contains("items=2") && lines[0].contains("took="), "{log}");
    });
}

#[test]
fn a_worker_that_was_stopped_idle_holds_no_drain_up() {
    run(async {
        let mut server = Server::serve(&["--pool", "echo:2=echo", "--grace", "1h"]).await;
        assert_serves(&server.client().await, "echo").await;
        let family = server.family(2).await;
        let stopped = server.child("w1").await;
        signal(stopped, Signal::SIGSTOP);
        server.signal(Signal::SIGTERM);
        let status = server.ended().await;
        server.assert_drained(status, &family);
        let log = server.log();
        let says = format!("worker 1 (pool \"echo\", pid {stopped}) holds no item and does not end");
        assert!(log.contains(&says), "{log}");
    });
}

#[test]
fn an_item_that_waits_for_a_stopped_worker_is_done_in_a_drain() {
    run(async {
        let mut server = Server::serve(&["--pool", "echo=echo", "--grace", "1h"]).await;
        let client = server.client().await;
        assert_serves(&client, "echo").await;
        let family = server.family(1).await;
        let stopped = server.child("w0").await;
        signal(stopped, Signal::SIGSTOP);
        let call = tokio::spawn(async move { client.call(WorkItem::new("echo", "x")).await });
        // One that comes when it has been read.
        Raw::connect(&server).await.settled().await;
        server.signal(Signal::SIGTERM);
        // The successor ends as soon as it has done the item.
        let status = server.ended().await;
        server.assert_drained(status, &family);
        assert_eq!(server.log().matches("started process=\"forkring-w0\"").count(), 2);
        assert_eq!(soon("an answer", call).await.expect("a task").expect("a result").attempts, 1);
    });
}

#[test]
fn the_grace_period_cuts_it_short() {
    run(async {
        let files = Files::new();
        let mut server = Server::handlers(&["hold"], "grace = '50ms'").await;
        let family = server.family(1).await;
        let client = server.client().await;
        let call = tokio::spawn({
            let item = files.holding(1, "never");
            async move { client.call(item).await }
        });
        files.began(1).await;
        server.signal(Signal::SIGTERM);
        assert_eq!(server.ended().await.code(), Some(1), "{}", server.log());
        soon("an answer", call).await.expect("a task").expect_err("nobody is there");
        server.assert_gone(&family);
        assert!(!server.segment().exists());
        server.logged("the grace period is over").await;
        server.logged("stopped before the drain was over: 2 processes were killed, and 1 call was not answered").await;
    });
}

#[test]
fn a_subscriber_that_does_not_read_is_waited_for_no_longer_than_that() {
    run(async {
        let mut server = Server::serve(&["--pool", "echo=echo", "--grace", "200ms"]).await;
        let family = server.family(1).await;
        let mut raw = Raw::connect_as(&server, Builder::new().initial_window_size(0)).await;
        let mut deaf = raw.begin("GetUpdates", &[]).await;
        let request = GetUpdatesRequest::default();
        deaf.body.send_data(framed(&request), true).expect("an open stream");
        let response = soon("a response", &mut deaf.response).await.expect("a response");
        let client = server.client().await;
        let receipt = client.submit(tokio_stream::iter([WorkItem::new("echo", "x")])).await.expect("a receipt");
        assert_eq!(receipt.accepted, 1);
        drop(client);
        server.signal(Signal::SIGTERM);
        assert_eq!(server.ended().await.code(), Some(1), "{}", server.log());
        server.assert_gone(&family);
        drop(response);
        // What it did not take is the next server's to deliver.
        let left = server.leave();
        let command = serve_command(&left.name, &["--pool", "echo=echo"]);
        let next = Server::start(left.name.clone(), command, Files::new()).await;
        let mut updates = soon("a stream", next.client().await.updates("", 1)).await.expect("a stream");
        let result = soon("an update", updates.message()).await.expect("a stream").expect("an update");
        assert_eq!(&result.payload[..], b"x");
        next.drain().await;
    });
}

#[test]
fn a_death_during_the_drain_loses_nothing() {
    run(async {
        let files = Files::new();
        let mut server = Server::handlers(&["hold"], "").await;
        let client = server.client().await;
        let call = tokio::spawn({
            let (client, item) = (client.clone(), files.holding(1, "go"));
            async move { client.call(item).await }
        });
        let worker = files.began(1).await[0];
        server.signal(Signal::SIGTERM);
        server.logged("draining").await;
        signal(worker, Signal::SIGKILL);
        files.began(2).await;
        let family = server.family(1).await;
        files.make("go");
        let result = soon("an answer", call).await.expect("a task").expect("a result");
        assert_eq!(result.attempts, 2);
        let status = server.ended().await;
        server.assert_drained(status, &family);
    });
}

#[test]
fn submitted_items_outlive_a_front_that_dies_during_the_drain() {
    run(async {
        let files = Files::new();
        let mut server = Server::handlers(&["hold"], "").await;
        let client = server.client().await;
        let items: Vec<_> = (1..=3).map(|id| files.holding(id, "go")).collect();
        assert_eq!(client.submit(tokio_stream::iter(items)).await.expect("a receipt").accepted, 3);
        files.began(1).await;
        let front = server.child("front").await;
        server.signal(Signal::SIGTERM);
        server.logged("draining").await;
        signal(front, Signal::SIGKILL);
        server.successor("front", front).await;
        let family = server.family(1).await;
        files.make("go");
        let status = server.ended().await;
        server.assert_drained(status, &family);
        assert_eq!(files.lines("journal").len(), 3);
    });
}

#[test]
fn signals_are_for_the_supervisor_alone() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo"]).await;
        let client = server.client().await;
        let family = server.family(1).await;
        // As a Ctrl-C on a terminal does, which goes to the whole group.
        for process in &family {
            for number in [Signal::SIGINT, Signal::SIGTERM] {
                signal(process.pid, number);
            }
        }
        for _ in 0..10 {
            assert_serves(&client, "echo").await;
        }
        assert_eq!(server.children(), family);
        server.drain().await;
    });
}

#[test]
fn a_signal_that_comes_early_is_not_lost_and_does_no_harm() {
    run(async {
        for _ in 0..10 {
            let server = Server::serve(&["--pool", "echo:2=echo"]).await;
            // It listens, and has not forked yet or is about to.
            server.drain().await;
        }
        // Even earlier: from then on that there is a segment to be left behind.
        for _ in 0..10 {
            let name = unique_name();
            let segment = std::path::PathBuf::from(format!("/dev/shm/forkring-{name}"));
            let mut command = serve_command(&name, &["--pool", "echo=echo"]);
            command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
            let mut server = common::program::Killed::start(&mut command);
            until("the segment", || segment.exists().then_some(())).await;
            signal(server.0.id() as i32, Signal::SIGTERM);
            let status = until("its end", || server.0.try_wait().expect("our child")).await;
            assert_eq!(status.code(), Some(0));
            assert!(!segment.exists());
        }
    });
}

/// A server whose supervisor stops between the steps by which it tells the others of a drain; and the folder of `passes`, its
/// file of points.
#[cfg(feature = "crash-points")]
async fn stops_while_it_tells() -> (Server, Files) {
    let files = Files::new();
    let name = unique_name();
    let mut command = serve_command(&name, &["--pool", "echo=echo", "--parent", &std::process::id().to_string()]);
    command.env("FORKRING_STOP", "supervisor/supervisor.entering:1").env("FORKRING_PASSES", files.path("passes"));
    let server = Server::start(name, command, Files::new()).await;
    assert_serves(&server.client().await, "echo").await;
    (server, files)
}

#[cfg(feature = "crash-points")]
#[test]
fn a_drain_is_told_to_a_front_that_is_awake() {
    run(async {
        let (mut server, _) = stops_while_it_tells().await;
        let (client, family) = (server.client().await, server.family(1).await);
        server.signal(Signal::SIGTERM);
        until("the supervisor to stop", || is_stopped(server.pid()).then_some(())).await;
        // Between the two steps the front looks at everything. It may know by now.
        if let Err(status) = soon("an answer", client.call(WorkItem::new("echo", ""))).await {
            assert_eq!(status.code(), Code::Unavailable, "{status}");
        }
        server.signal(Signal::SIGCONT);
        let status = server.ended().await;
        server.assert_drained(status, &family);
    });
}

#[cfg(feature = "crash-points")]
#[test]
fn a_drain_is_told_in_spite_of_who_writes_over_it() {
    run(async {
        // Stage and epoch, in the segment's header.
        const WORDS: u64 = 256;
        let (mut server, files) = stops_while_it_tells().await;
        let family = server.family(1).await;
        let front = server.child("front").await;
        let segment = File::options().read(true).write(true).open(server.segment()).expect("a segment");
        let words = || {
            let mut words = [0; 8];
            segment.read_exact_at(&mut words, WORDS).expect("a segment");
            words
        };
        signal(front, Signal::SIGSTOP);
        until("the front to stop", || is_stopped(front).then_some(())).await;
        let before = words();
        server.signal(Signal::SIGTERM);
        until("the supervisor to stop", || is_stopped(server.pid()).then_some(())).await;
        server.signal(Signal::SIGCONT);
        // The one that says it, the front's and the worker's.
        let rung = |line: &&String| line.starts_with("supervisor ") && line.ends_with(" doorbell.rung");
        until("all bells", || (files.lines("passes").iter().filter(rung).count() == 3).then_some(())).await;
        assert_ne!(words(), before);
        segment.write_all_at(&before, WORDS).expect("a segment");
        signal(front, Signal::SIGCONT);
        let status = server.ended().await;
        server.assert_drained(status, &family);
    });
}

#[test]
fn a_client_that_reads_slowly_gets_all_of_its_answer() {
    run(async {
        let mut server = Server::serve(&["--pool", "echo=echo"]).await;
        let family = server.children();
        let mut frames = Frames::connect(&server).await;
        frames.settle().await;
        frames.call(1);
        frames.write(DATA, END_STREAM, 1, &framed(&WorkItem::new("echo", vec![7; 300 << 10])));
        // The window that HTTP/2 begins with is used up, and the rest of the answer waits in the server.
        let mut received = 0;
        while received < 65_535 {
            let frame = frames.read_without_credit().await.expect("an open connection");
            received += if frame.kind == DATA { frame.payload.len() } else { 0 };
        }
        server.signal(Signal::SIGTERM);
        server.logged("draining").await;
        // From now on the client reads a little at a time, for longer than the server waits for one that does not read.
        let mut pace = tokio::time::interval(Duration::from_millis(40));
        while frames.end_if_known(1).is_none() {
            pace.tick().await;
            for stream in [0, 1] {
                frames.window_update(stream, 4 << 10);
            }
            frames.flush().await;
            while let Some(frame) = frames.read_at_once().await {
                received += if frame.kind == DATA { frame.payload.len() } else { 0 };
            }
        }
        assert!(received > 300 << 10, "{received} bytes came");
        let status = server.ended().await;
        server.assert_drained(status, &family);
    });
}
