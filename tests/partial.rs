//! Partial results: streamed in order as they are made, no faster than their client reads, and nothing of them is left, whoever
//! dies.

mod common;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use common::{
    Files, PATIENCE, Server, assert_refused,
    audit::{Copy, faults_at_rest},
    failure, in_time,
    processes::signal,
    raw::{Exchange, Raw, framed},
    refusal, run, soon, until,
};
use forkring::{
    client::Results,
    proto::v1::{WorkItem, WorkResult},
};
use nix::sys::signal::Signal;
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

/// Parts that do not fit in any buffer between here and the handler.
const LARGE: usize = 300_000;
const PARTS: usize = 40;
/// So that four of them and a result fit, and not many more; and what only fits if nothing else is there.
const ROOM: &str = "arena = '2MiB'\nmax_message = '1700KiB'";
const ALL: usize = 1_600_000;

fn parts(id: u64, count: usize, size: usize) -> WorkItem {
    WorkItem::new("parts", count.to_string()).with_id(id).with_metadata("size", size.to_string())
}

async fn next(results: &mut Results) -> WorkResult {
    soon("a result", results.message()).await.expect("a stream").expect("a result")
}

/// It is the n-th part of this attempt.
#[track_caller]
fn assert_part(result: &WorkResult, n: usize, size: usize, attempts: u32) {
    let is_part = (result.partial, result.sequence as usize, result.attempts) == (true, n, attempts);
    assert!(is_part && result.timing.is_none() && result.status.is_none(), "part {n}: {}", head(result));
    assert!(result.payload.len() == size && result.payload.iter().all(|byte| *byte == n as u8), "part {n}");
}

#[track_caller]
fn assert_end(result: &WorkResult, count: usize, attempts: u32) {
    let is_end = (result.partial, result.sequence as usize, result.attempts) == (false, count, attempts);
    assert!(is_end && result.timing.is_some() && result.payload == "end"[..], "the end: {}", head(result));
}

fn head(result: &WorkResult) -> String {
    format!("{:?}", WorkResult { payload: result.payload.slice(..result.payload.len().min(8)), ..result.clone() })
}

/// Nothing is left of all that was, and there is room for the largest.
async fn assert_nothing_left(server: &Server) {
    let client = server.client().await;
    let mut results = client.process(tokio_stream::iter([parts(99, 1, ALL)])).await.expect("a stream");
    assert_part(&next(&mut results).await, 0, ALL, 1);
    assert_end(&next(&mut results).await, 1, 1);
    drop(results);
    let mut faults = Vec::new();
    for _ in 0..PATIENCE.as_millis() / 5 {
        faults = faults_at_rest(server, &[]);
        if faults.is_empty() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("{faults:#?}");
}

/// A stream that is not read beyond what HTTP/2's windows let through unasked.
async fn unread(server: &Server, item: &WorkItem) -> (Raw, Exchange) {
    let mut raw = Raw::connect(server).await;
    let mut exchange = raw.begin("Process", &[]).await;
    exchange.body.send_data(framed(item), true).expect("an open stream");
    (raw, exchange)
}

/// Waits until an item's parts wait for their reader, and nobody does anything: its worker and the front sleep.
async fn until_stalled(server: &Server, wanted: usize) {
    let is_stalled = || {
        let copy = Copy::read(&server.segment()).ok()?;
        let waiting = copy.in_use().keys().map(|item| copy.partials(*item).len()).max()?;
        (waiting == wanted && copy.sleeps(1) && (wanted < 4 || copy.sleeps(2))).then_some(())
    };
    for _ in 0..3 {
        until("a stream that stands still", is_stalled).await;
    }
}

async fn read_all(exchange: Exchange) -> Vec<WorkResult> {
    let answer = exchange.answer().await;
    assert_eq!(answer.code, Code::Ok, "{}", answer.message);
    answer.messages.into_iter().map(|bytes| WorkResult::decode(bytes).expect("a result")).collect()
}

#[test]
fn parts_come_in_order_as_they_are_made() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["parts"], &format!("workers = 2\n{ROOM}")).await;
        let client = server.client().await;
        // The third does not exist before the first two have come.
        let item = parts(1, 5, 10).with_metadata("until", files.name("go")).with_metadata("at", "2");
        let mut results = client.process(tokio_stream::iter([item])).await.expect("a stream");
        for n in 0..2 {
            assert_part(&next(&mut results).await, n, 10, 1);
        }
        files.make("go");
        for n in 2..5 {
            assert_part(&next(&mut results).await, n, 10, 1);
        }
        assert_end(&next(&mut results).await, 5, 1);
        assert_eq!(soon("the end", results.message()).await.expect("a good end"), None);

        // Many, of many items at once, of all sizes; one item has none, and is like any other.
        let sizes = BTreeMap::from([(1, 1), (2, 64), (3, 65), (4, 5_000), (5, 20_000), (6, LARGE), (7, 0)]);
        let items: Vec<_> = sizes.iter().map(|(id, size)| parts(*id, PARTS, *size)).chain([parts(8, 0, 1)]).collect();
        let mut results = client.process(tokio_stream::iter(items)).await.expect("a stream");
        let mut counts = BTreeMap::<u64, usize>::new();
        while counts.len() < 8 || counts.iter().any(|(id, n)| *n < if *id == 8 { 1 } else { PARTS + 1 }) {
            let result = next(&mut results).await;
            let n = counts.entry(result.id).or_default();
            match sizes.get(&result.id) {
                Some(size) if *n < PARTS => assert_part(&result, *n, *size, 1),
                Some(_) => assert_end(&result, PARTS, 1),
                None => assert_end(&result, 0, 1),
            }
            *n += 1;
        }
        assert_eq!(soon("the end", results.message()).await.expect("a good end"), None);
        assert_nothing_left(&server).await;
        server.drain().await;
    });
}

#[test]
fn to_whom_a_result_comes_in_one_it_comes_whole() {
    run(async {
        let server = Server::handlers(&["parts"], ROOM).await;
        let client = server.client().await;
        let whole = |size: usize| [(0..5).flat_map(|n| vec![n; size]).collect(), b"end".to_vec()].concat();
        for size in [1, 30, 70_000] {
            let result = soon("an answer", client.call(parts(1, 5, size))).await.expect("a result");
            assert!(!result.partial && result.sequence == 0 && result.payload == whole(size), "{}", head(&result));
            let receipt = client.submit(tokio_stream::iter([parts(2, 5, size).with_subscription("s")])).await;
            assert_eq!(receipt.expect("a receipt").accepted, 1);
            let mut updates = soon("a stream", client.updates("s", 1)).await.expect("a stream");
            let result = next(&mut updates).await;
            assert!(!result.partial && result.payload == whole(size), "{}", head(&result));
        }
        let (code, reason, _) = refusal(soon("an answer", client.call(parts(3, 10, LARGE))).await);
        assert_eq!((code, reason.as_str()), (Code::ResourceExhausted, "RESULT_TOO_LARGE"));
        assert_nothing_left(&server).await;
        server.drain().await;
    });
}

#[test]
fn who_reads_slowly_slows_the_handler_down_and_nobody_else() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["parts", "count"], ROOM).await;
        let item = parts(1, PARTS, LARGE).with_metadata("sent", files.name("sent"));
        let (_raw, exchange) = unread(&server, &item).await;
        until_stalled(&server, 4).await;
        // Besides those that wait some are in the buffers of HTTP/2 and of the sockets.
        let sent = files.lines("sent").len();
        assert!((4..PARTS / 2).contains(&sent), "{sent} parts are under way");
        let client = server.client().await;
        for n in 1..=3 {
            let result = soon("an answer", client.call(WorkItem::new("count", ""))).await.expect("a result");
            assert_eq!(result.payload, n.to_string());
        }
        assert_eq!(files.lines("sent").len(), sent, "nobody has read any");
        let all = read_all(exchange).await;
        assert_eq!(all.len(), PARTS + 1);
        all[..PARTS].iter().enumerate().for_each(|(n, part)| assert_part(part, n, LARGE, 1));
        assert_end(&all[PARTS], PARTS, 1);
        assert_nothing_left(&server).await;
        server.drain().await;
    });
}

#[test]
fn a_worker_that_dies_in_the_middle_begins_anew() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["parts"], ROOM).await;
        let client = server.client().await;
        let item = parts(1, 6, 1000).with_metadata("until", files.name("go")).with_metadata("at", "3");
        let item = item.with_metadata("journal", files.name("journal"));
        let mut results = client.process(tokio_stream::iter([item])).await.expect("a stream");
        for n in 0..3 {
            assert_part(&next(&mut results).await, n, 1000, 1);
        }
        signal(files.began(1).await[0], Signal::SIGKILL);
        for n in 0..3 {
            assert_part(&next(&mut results).await, n, 1000, 2);
        }
        files.make("go");
        for n in 3..6 {
            assert_part(&next(&mut results).await, n, 1000, 2);
        }
        assert_end(&next(&mut results).await, 6, 2);

        // One that is slow to be read: what of the first attempt was under way comes, and the second is whole.
        let item = parts(2, PARTS, LARGE).with_metadata("journal", files.name("journal"));
        let (_raw, exchange) = unread(&server, &item).await;
        until_stalled(&server, 4).await;
        signal(files.began(3).await[2], Signal::SIGKILL);
        files.began(4).await;
        let all = read_all(exchange).await;
        let second = all.iter().position(|result| result.attempts == 2).expect("a second attempt");
        all[..second].iter().enumerate().for_each(|(n, part)| assert_part(part, n, LARGE, 1));
        assert_eq!(all.len(), second + PARTS + 1);
        all[second..][..PARTS].iter().enumerate().for_each(|(n, part)| assert_part(part, n, LARGE, 2));
        assert_end(&all[second + PARTS], PARTS, 2);
        assert_nothing_left(&server).await;
        server.drain().await;
    });
}

#[test]
fn parts_outlive_a_worker_that_was_done() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["parts", "count"], ROOM).await;
        // As many as may wait, so that it is done before anybody reads.
        let item = parts(1, 4, LARGE).with_metadata("journal", files.name("journal"));
        let (_raw, exchange) = unread(&server, &item).await;
        let is_done = || {
            let copy = Copy::read(&server.segment()).ok()?;
            copy.in_use().into_iter().find(|(_, word)| word.phase == common::audit::DONE).map(|(item, _)| item)
        };
        let waiting = until("an item that is done", || {
            let item = is_done()?;
            Some(Copy::read(&server.segment()).ok()?.partials(item).len())
        })
        .await;
        let pid = files.began(1).await[0];
        signal(pid, Signal::SIGKILL);
        server.successor("w0", pid).await;
        // The next worker has what is left of the memory, and no more.
        let client = server.client().await;
        let mut results = client.process(tokio_stream::iter([parts(2, 20, 50_000)])).await.expect("a stream");
        for n in 0..20 {
            assert_part(&next(&mut results).await, n, 50_000, 1);
        }
        assert_end(&next(&mut results).await, 20, 1);
        let all = read_all(exchange).await;
        assert!(waiting > 0 && all.len() == 5, "{waiting} had waited, {} came", all.len());
        all[..4].iter().enumerate().for_each(|(n, part)| assert_part(part, n, LARGE, 1));
        assert_end(&all[4], 4, 1);
        assert_nothing_left(&server).await;
        server.drain().await;
    });
}

#[test]
fn the_handler_learns_that_nobody_reads_any_more() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["parts"], ROOM).await;
        let item = |id| parts(id, PARTS, LARGE).with_metadata("journal", files.name("journal"));
        // The client goes away while the handler waits for it.
        let (raw, exchange) = unread(&server, &item(1)).await;
        until_stalled(&server, 4).await;
        drop(exchange);
        raw.cut();
        let ended = |line: &String| line.starts_with("the item") && line.contains(" at ");
        assert!(ended(&files.lines_of("journal", 2).await[1]), "{:?}", files.lines("journal"));
        assert_nothing_left(&server).await;

        // Its time is over.
        let exchange = in_time(Duration::from_millis(300), async |time| {
            let journal = format!("{time:?}");
            let late = item(2).with_metadata("journal", files.name(&journal)).with_timeout(time);
            let (raw, exchange) = unread(&server, &late).await;
            let sent = Instant::now();
            let lines = until("its end, or its deadline", || {
                let lines = files.lines(&journal);
                (lines.len() == 2 || lines.is_empty() && sent.elapsed() > 2 * time).then_some(lines)
            });
            let began = lines.await;
            assert!(began.last().is_none_or(ended), "{began:?}");
            (began.len() == 2).then_some((raw, exchange))
        });
        let (_raw, exchange) = exchange.await;
        let mut all = read_all(exchange).await;
        let end = all.pop().expect("an end");
        assert_refused(failure(end), (Code::DeadlineExceeded, "DEADLINE_EXCEEDED"), "deadline");
        all.iter().enumerate().for_each(|(n, part)| assert_part(part, n, LARGE, 1));

        // The front goes.
        let (_raw, _exchange) = unread(&server, &item(3)).await;
        until_stalled(&server, 4).await;
        let front = server.child("front").await;
        signal(front, Signal::SIGKILL);
        assert!(ended(&files.lines_of("journal", 4).await[3]), "{:?}", files.lines("journal"));
        server.successor("front", front).await;
        assert_nothing_left(&server).await;
        assert_eq!(files.lines("journal").len(), 4, "nothing is retried that nobody waits for");
        server.drain().await;
    });
}

#[test]
fn a_drain_finishes_streams() {
    run(async {
        let files = Files::new();
        let mut server = Server::handlers(&["parts"], ROOM).await;
        let client = server.client().await;
        let family = server.family(1).await;
        let (items, stream) = mpsc::channel(1);
        let mut results = client.process(ReceiverStream::new(stream)).await.expect("a stream");
        let item = parts(1, PARTS, LARGE).with_metadata("until", files.name("go")).with_metadata("at", "1");
        items.send(item).await.expect("an open stream");
        assert_part(&next(&mut results).await, 0, LARGE, 1);
        server.signal(Signal::SIGTERM);
        server.logged("draining").await;
        files.make("go");
        for n in 1..PARTS {
            assert_part(&next(&mut results).await, n, LARGE, 1);
        }
        assert_end(&next(&mut results).await, PARTS, 1);
        let refused = refusal(soon("the end", results.message()).await);
        assert_refused(refused, (Code::Unavailable, "DRAINING"), "shutting down");
        let status = server.ended().await;
        server.assert_drained(status, &family);
        drop(items);
    });
}
