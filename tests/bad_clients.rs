//! Clients that behave badly: they fall silent, break off, talk nonsense, come in crowds or never listen. Each costs the
//! server a bounded amount of memory and time, and others nothing.

mod common;

use std::time::{Duration, Instant};

use bytes::Bytes;
use common::{
    Files, Server, assert_refused, assert_serves,
    frames::{DATA, END_STREAM, Frames},
    raw::{Answer, Exchange, Raw, framed},
    run, soon, until,
};
use forkring::proto::v1::{self, GetUpdatesRequest, WorkItem, WorkResult};
use h2::client::Builder;
use prost::Message as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc,
    task::JoinSet,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

/// Bytes that the server lets a client send ahead.
const STREAM_WINDOW: usize = 2 << 20;
const CONNECTION_WINDOW: usize = 64 << 20;

/// An item that takes most of the arena of these tests' servers, so that there is room for one at a time.
fn large() -> WorkItem {
    WorkItem::new("echo", vec![7; 300 << 10])
}

/// There is room for a large item, which there is not while half of another lies about.
async fn assert_room(server: &Server) {
    let client = server.client().await;
    let answer = soon("an answer", async {
        loop {
            match client.call(large()).await {
                // This client can be too slow, too.
                Err(status) if v1::Status::from(&status).reason == "BODY_TIMEOUT" => {}
                answer => return answer,
            }
        }
    });
    assert!(answer.await.expect("room for a large item").payload == large().payload);
}

/// Says these bytes to the server, and waits until it hangs up.
async fn hang_up(server: &Server, says: &[u8]) {
    let mut stream = TcpStream::connect(&server.addr).await.expect("a connection");
    stream.write_all(says).await.expect("room in the socket");
    let mut answer = Vec::new();
    // A reset is as good as an end.
    let _ = soon("the end of the connection", stream.read_to_end(&mut answer)).await;
    assert!(answer.len() < 1000, "{} bytes of answer", answer.len());
}

#[test]
fn half_a_message_and_then_silence_is_timed_out() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo", "--arena", "576KiB", "--body-timeout", "50ms"]).await;
        let mut raw = Raw::connect(&server).await;
        let message = framed(&large());
        for method in ["Call", "Process", "Submit"] {
            // In the prefix, in the head, in the payload.
            for part in [2, 8, 100_000] {
                let mut exchange = raw.begin(method, &[]).await;
                exchange.body.send_data(message.slice(..part), false).expect("an open stream");
                let refused = exchange.answer().await.refusal();
                assert_refused(refused, (Code::DeadlineExceeded, "BODY_TIMEOUT"), "did not come within 50ms");
                assert_room(&server).await;
            }
        }
        // The request of GetUpdates is read by other means.
        let request = framed(&GetUpdatesRequest { subscription: "s".to_owned(), limit: 1 });
        let mut exchange = raw.begin("GetUpdates", &[]).await;
        exchange.body.send_data(request.slice(..request.len() - 1), false).expect("an open stream");
        let refused = exchange.answer().await.refusal();
        assert_refused(refused, (Code::DeadlineExceeded, "BODY_TIMEOUT"), "did not come within 50ms");
        server.drain().await;
    });
}

#[test]
fn a_byte_now_and_then_is_timed_out_like_silence() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo", "--arena", "576KiB", "--body-timeout", "100ms"]).await;
        let mut raw = Raw::connect(&server).await;
        let message = framed(&large());
        for method in ["Call", "Process", "Submit"] {
            // In the head, and in the payload.
            for start in [8, 100_000] {
                let Exchange { response, mut body } = raw.begin(method, &[]).await;
                body.send_data(message.slice(..start), false).expect("an open stream");
                let drip = async {
                    for at in start.. {
                        // It goes on after the answer; that is thrown away, or nobody takes it.
                        let _ = body.send_data(message.slice(at..at + 1), false);
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                };
                let answer = tokio::select! {
                    answer = Answer::of(response) => answer.refusal(),
                    () = drip => unreachable!("the message is longer"),
                };
                let late = (Code::DeadlineExceeded, "BODY_TIMEOUT");
                assert_refused(answer, late, "64 KiB of the message, or its end, did not come within 100ms");
                drop(body);
                assert_room(&server).await;
            }
        }
        server.drain().await;
    });
}

#[test]
fn a_slow_link_that_gets_on_is_not_timed_out() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo", "--body-timeout", "1s"]).await;
        let item = framed(&large());
        let small = framed(&WorkItem::new("echo", "x"));
        let halves = [small.slice(..7), small.slice(7..)];
        // On a machine that takes longer than a second for a piece, again.
        for _ in 0..20 {
            let mut raw = Raw::connect(&server).await;
            let mut stream = raw.begin("Process", &[]).await;
            stream.body.reserve_capacity(1 << 20);
            let begin = Instant::now();
            let mut longest = Duration::ZERO;
            let pieces = item.chunks(64 << 10).map(|piece| item.slice_ref(piece));
            // Then small ones, each of which takes a while.
            for piece in pieces.chain([&halves, &halves].into_iter().flatten().cloned()) {
                let last = Instant::now();
                tokio::time::sleep(Duration::from_millis(300)).await;
                let _ = stream.body.send_data(piece, false);
                raw.settled().await;
                longest = longest.max(last.elapsed());
            }
            let _ = stream.body.send_data(Bytes::new(), true);
            let answer = stream.answer().await;
            if longest < Duration::from_millis(900) {
                assert_eq!((answer.code, answer.messages.len()), (Code::Ok, 3), "{}", answer.message);
                assert!(begin.elapsed() > Duration::from_secs(2), "it took much longer than a piece may");
                server.drain().await;
                return;
            }
        }
        panic!("in no try it was fast enough");
    });
}

#[test]
fn the_time_that_a_client_waits_for_room_is_not_its_own() {
    run(async {
        // On a machine that takes longer than a second for a step, again.
        for _ in 0..20 {
            let files = Files::new();
            let server = Server::handlers(&["hold"], "arena = '576KiB'\nbody_timeout = '1s'").await;
            let large = |id| WorkItem { payload: large().payload, ..files.holding(id, "go") };
            let (client, held) = (server.client().await, large(1));
            let held = tokio::spawn(async move { client.call(held).await });
            files.began(1).await;
            let mut raw = Raw::connect(&server).await;
            let (mut stream, message) = (raw.begin("Process", &[]).await, framed(&large(2)));
            let begin = Instant::now();
            // Its time begins, and then there is no room for it.
            for piece in [message.slice(..3), message.slice(3..50_000)] {
                stream.body.send_data(piece, false).expect("an open stream");
                raw.settled().await;
            }
            let mut longest = begin.elapsed();
            // Another one is timed out, whose time began later.
            let mut late = raw.begin("Process", &[]).await;
            late.body.send_data(message.slice(..3), false).expect("an open stream");
            assert_eq!(late.answer().await.reason, "BODY_TIMEOUT");
            let begin = Instant::now();
            files.make("go");
            soon("an answer", held).await.expect("a task").expect("a result");
            raw.settled().await;
            let _ = stream.body.send_data(message.slice(50_000..), true);
            let answer = stream.answer().await;
            longest = longest.max(begin.elapsed());
            if longest < Duration::from_millis(900) {
                assert_eq!((answer.code, answer.messages.len()), (Code::Ok, 1), "{}", answer.message);
                server.drain().await;
                return;
            }
        }
        panic!("in no try it was fast enough");
    });
}

#[test]
fn silence_between_messages_is_not_timed_out() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo", "--body-timeout", "50ms"]).await;
        let mut raw = Raw::connect(&server).await;
        let mut silent = raw.begin("Process", &[]).await;
        let item = framed(&WorkItem::new("echo", "x").with_id(1));
        silent.body.send_data(item.clone(), false).expect("an open stream");
        // Another one is timed out, which began to wait later.
        let mut late = raw.begin("Process", &[]).await;
        late.body.send_data(item.slice(..3), false).expect("an open stream");
        assert_eq!(late.answer().await.reason, "BODY_TIMEOUT");
        silent.body.send_data(item, true).expect("an open stream");
        let answer = silent.answer().await;
        assert_eq!((answer.code, answer.messages.len()), (Code::Ok, 2));
        server.drain().await;
    });
}

#[test]
fn half_a_message_and_then_nobody_leaves_nothing() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo", "--arena", "576KiB", "--body-timeout", "1h"]).await;
        let message = framed(&large());
        for method in ["Call", "Process", "Submit"] {
            for cut in [false, true] {
                let mut raw = Raw::connect(&server).await;
                let mut exchange = raw.begin(method, &[]).await;
                exchange.body.send_data(message.slice(..100_000), false).expect("an open stream");
                // A stream that was opened after it has been answered: so it has been read.
                raw.settled().await;
                if cut {
                    raw.cut();
                } else {
                    exchange.body.send_reset(h2::Reason::CANCEL);
                    raw.settled().await;
                }
                // A stream waits for the room, should the server not have noticed yet.
                let client = server.client().await;
                let mut results = client.process(tokio_stream::iter([large()])).await.expect("a stream");
                let result = soon("a result", results.message()).await.expect("a stream").expect("a result");
                assert!(result.payload == large().payload);
            }
        }
        server.drain().await;
    });
}

#[test]
fn who_says_nothing_is_shown_out() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo", "--max-connections", "2"]).await;
        // One says nothing at all, one stops in the middle of the first line. With them the server is full.
        let mut silent = TcpStream::connect(&server.addr).await.expect("a connection");
        let mut hesitant = TcpStream::connect(&server.addr).await.expect("a connection");
        hesitant.write_all(b"PRI * HTTP").await.expect("room in the socket");
        let client = server.client();
        let (served, ..) = tokio::join!(
            async { assert_serves(&client.await, "echo").await },
            async { soon("its end", silent.read(&mut [0; 100])).await },
            async { soon("its end", hesitant.read(&mut [0; 100])).await },
        );
        let () = served;
        server.drain().await;
    });
}

#[test]
fn nonsense_is_hung_up_on() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo"]).await;
        let garbage: Vec<u8> = (0..100_000_u32).map(|at| (at.wrapping_mul(at) >> 3) as u8).collect();
        hang_up(&server, &garbage).await;
        hang_up(&server, &[0; 24]).await;
        hang_up(&server, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
        // TLS, as by a client that was told https.
        hang_up(&server, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 and then some more of it").await;
        // HTTP/2 up to the preface, then a frame that is too large and none that there is.
        hang_up(&server, &[b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &[0xff; 100][..]].concat()).await;
        assert_serves(&server.client().await, "echo").await;
        server.drain().await;
    });
}

#[test]
fn headers_have_a_limit() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo"]).await;
        let mut raw = Raw::connect(&server).await;
        let item = framed(&WorkItem::new("echo", "x"));
        let long = "x".repeat(20_000);
        let refused = raw.ask("Call", &[("long", &long)], item.clone()).await.refusal();
        assert_refused(refused, (Code::ResourceExhausted, "METADATA_TOO_LARGE"), "and may have 16384: send less");
        // HTTP/2 itself refuses what is larger still.
        let long = "x".repeat(40_000);
        let mut exchange = raw.begin("Call", &[("long", &long)]).await;
        // It may have been refused before this comes.
        let _ = exchange.body.send_data(item, true);
        let response = soon("a response", exchange.response).await;
        assert!(response.is_ok_and(|response| response.status() == 431), "Request Header Fields Too Large");
        assert_serves(&server.client().await, "echo").await;
        server.drain().await;
    });
}

#[test]
fn any_number_of_refusals_leaves_the_connection_as_it_was() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo", "--max-message", "1KiB", "--arena", "64KiB"]).await;
        let mut frames = Frames::connect(&server).await;
        for stream in (1..2400).step_by(2) {
            frames.call(stream);
            // It is answered when its length is known, and the rest of it comes all the same.
            frames.data(stream, &[0, 0, 1, 0, 0]);
            frames.end_of(stream).await;
            frames.data(stream, &[0; 100]);
            frames.write(DATA, END_STREAM, stream, &[0; 100]);
        }
        frames.call(2401);
        frames.write(DATA, END_STREAM, 2401, &framed(&WorkItem::new("echo", "x")));
        frames.end_of(2401).await;
        server.drain().await;
    });
}

#[test]
fn a_thousand_streams_at_once_are_each_served() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["hold"], "capacity = 2048").await;
        let client = server.client().await;
        let mut streams = JoinSet::new();
        let mut senders = Vec::new();
        for id in 0..1000 {
            let (sender, receiver) = mpsc::channel(2);
            sender.send(files.holding(id, "go")).await.expect("an open stream");
            senders.push(sender);
            let client = client.clone();
            streams.spawn(async move {
                let mut results = client.process(ReceiverStream::new(receiver)).await.expect("a stream");
                let result = results.message().await.expect("a stream").expect("a result");
                assert_eq!(result.id, id);
                results
            });
        }
        files.began(1).await;
        files.make("go");
        let mut open = soon("all results", streams.join_all()).await;
        // All of them are open still.
        drop(senders);
        for results in &mut open {
            assert_eq!(soon("the end", results.message()).await.expect("a good end"), None);
        }
        server.drain().await;
    });
}

#[test]
fn more_connections_than_the_server_takes_wait_their_turn() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo", "--max-connections", "50"]).await;
        let mut clients = JoinSet::new();
        for id in 0..200 {
            let mut raw = Raw::connect(&server).await;
            clients.spawn(async move {
                let answer = raw.ask("Call", &[], framed(&WorkItem::new("echo", "x").with_id(id))).await;
                WorkResult::decode(answer.messages[0].clone()).expect("a result").id == id
            });
        }
        let good = soon("all answers", clients.join_all()).await;
        assert_eq!(good.iter().filter(|good| **good).count(), 200);
        server.drain().await;
    });
}

#[test]
fn who_sends_and_never_reads_is_not_read_either() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo", "--capacity", "64"]).await;
        // Not a byte of response may be sent to this client.
        let mut raw = Raw::connect_as(&server, Builder::new().initial_window_size(0)).await;
        let mut deaf = raw.begin("Process", &[]).await;
        let item = framed(&WorkItem::new("echo", vec![1; 50_000]));
        deaf.body.reserve_capacity(1 << 30);
        let client = server.client().await;
        let mut sent = 0;
        // It sends for as long as it may. When the server has stopped reading, the others are served all the same.
        loop {
            let more = std::future::poll_fn(|cx| deaf.body.poll_capacity(cx));
            match tokio::time::timeout(Duration::from_millis(200), more).await {
                Ok(capacity) => {
                    let _ = capacity.expect("an open stream").expect("capacity");
                    deaf.body.send_data(item.clone(), false).expect("an open stream");
                    sent += item.len();
                    assert!(sent < 100 << 20, "the server reads on without end");
                }
                Err(_) => break,
            }
        }
        for _ in 0..100 {
            assert_serves(&client, "echo").await;
        }
        raw.cut();
        drop(deaf);
        // All that it had is there again: for a stream, which waits should the server not have noticed yet.
        let items = (1..=500).map(|id| WorkItem::new("echo", vec![2; 50_000]).with_id(id));
        let mut results = client.process(tokio_stream::iter(items)).await.expect("a stream");
        let mut count = 0;
        while let Some(result) = soon("a result", results.message()).await.expect("a stream") {
            assert_eq!(result.outcome().expect("a success").len(), 50_000);
            count += 1;
        }
        assert_eq!(count, 500);
        server.drain().await;
    });
}

/// Bytes of private memory that a process has.
fn private_memory(pid: i32) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a living process");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("it has some");
    line.trim().trim_end_matches(" kB").parse::<usize>().expect("a number") << 10
}

#[test]
fn clients_that_are_not_read_cost_a_window_for_each_stream() {
    run(unread(4, 4, 4 * 4 * STREAM_WINDOW));
}

#[test]
fn a_client_of_which_many_streams_are_not_read_costs_the_window_of_its_connection() {
    run(unread(1, 64, CONNECTION_WINDOW));
}

/// Clients send as much as they may, on streams that wait for room, and want more. `windows` is what all of them hold then.
async fn unread(clients: usize, streams: usize, windows: usize) {
    const ITEM: usize = 300 << 10;
    let files = Files::new();
    let server = Server::handlers(&["hold", "count"], "arena = '576KiB'").await;
    let client = server.client().await;
    // While the worker has this there is no room for another one.
    let held = WorkItem { payload: vec![7; ITEM].into(), ..files.holding(1, "go") };
    let held = tokio::spawn({
        let client = client.clone();
        async move { client.call(held).await }
    });
    files.began(1).await;
    let front = server.child("front").await;
    let before = private_memory(front);
    let mut senders = JoinSet::new();
    for n in 0..clients {
        let mut raw = Raw::connect(&server).await;
        for stream in 0..streams {
            let mut exchange = raw.begin(["Process", "Submit"][(n + stream) % 2], &[]).await;
            let item = framed(&WorkItem::new("hold", vec![7; ITEM]));
            senders.spawn(async move {
                loop {
                    exchange.body.reserve_capacity(item.len());
                    let more = std::future::poll_fn(|cx| exchange.body.poll_capacity(cx)).await;
                    let _ = more.expect("an open stream").expect("capacity");
                    exchange.body.send_data(item.clone(), false).expect("an open stream");
                }
            });
        }
        senders.spawn(async move {
            let _raw = raw;
            std::future::pending().await
        });
    }
    let least = windows - clients * (1 << 20);
    until("full windows", || (private_memory(front) > before + least).then_some(())).await;
    // And each stream has taken up the item that waits.
    let most = windows + clients * streams * ITEM + (8 << 20);
    for _ in 0..100 {
        soon("an answer", client.call(WorkItem::new("count", ""))).await.expect("others are served");
        let grown = private_memory(front) - before;
        assert!(grown < most, "{} MiB", grown >> 20);
    }
    senders.shutdown().await;
    files.make("go");
    soon("an answer", held).await.expect("a task").expect("a result");
    server.drain().await;
}

#[test]
fn a_subscriber_that_never_reads_takes_nothing_from_others() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo", "--outbox", "32"]).await;
        let mut raw = Raw::connect_as(&server, Builder::new().initial_window_size(0)).await;
        let mut deaf = raw.begin("GetUpdates", &[]).await;
        let request = framed(&GetUpdatesRequest { subscription: "s".to_owned(), limit: 0 });
        deaf.body.send_data(request, true).expect("an open stream");
        let response = soon("a response", &mut deaf.response).await.expect("a response");
        let client = server.client().await;
        let items = |from: u64, to: u64, subscription: &'static str| {
            let item = move |id| WorkItem::new("echo", vec![3; 1000]).with_id(id).with_subscription(subscription);
            tokio_stream::iter((from..=to).map(item))
        };
        let receipt = soon("a receipt", client.submit(items(1, 20, "s"))).await.expect("a receipt");
        assert_eq!(receipt.accepted, 20);
        // Calls and other subscriptions go on.
        assert_serves(&client, "echo").await;
        let mut others = soon("a stream", client.updates("t", 100)).await.expect("a stream");
        let updates = async {
            for _ in 0..100 {
                soon("an update", others.message()).await.expect("a stream").expect("an update");
            }
        };
        let (receipt, ()) = tokio::join!(client.submit(items(1, 100, "t")), updates);
        assert_eq!(receipt.expect("a receipt").accepted, 100);

        // What it did not get waits for the next.
        raw.cut();
        drop(response);
        let mut updates = soon("a stream", client.updates("s", 20)).await.expect("a stream");
        let mut ids = Vec::new();
        while let Some(result) = soon("an update", updates.message()).await.expect("a stream") {
            ids.push(result.id);
        }
        assert!(ids.iter().copied().eq(1..=20), "{ids:?}");
        server.drain().await;
    });
}
