//! Many items in hand at once in one worker: each is watched, finished, cancelled and given back for itself.

mod common;

use std::time::Duration;

use common::{
    Files, Server, assert_refused, assert_serves,
    audit::{CLAIMED, Copy},
    processes::signal,
    raw::{Raw, framed},
    refusal, run, soon, until,
};
use forkring::{
    client::Client,
    proto::v1::{WorkItem, WorkResult},
};
use nix::sys::signal::Signal;
use prost::Message as _;
use tokio::task::JoinHandle;
use tonic::{Code, Status};

type Call = JoinHandle<Result<WorkResult, Status>>;

const LARGE: usize = 50_000;

fn holding(files: &Files, id: u64) -> WorkItem {
    WorkItem { pool: "many".into(), ..files.holding(id, &format!("go-{id}")) }
}

/// Odd ones are large.
fn payload(id: u64) -> Vec<u8> {
    vec![id as u8; if id % 2 == 1 { LARGE } else { 20 }]
}

fn spawn(client: &Client, item: WorkItem) -> Call {
    let client = client.clone();
    tokio::spawn(async move { client.call(item).await })
}

async fn answer(call: Call) -> Result<WorkResult, Status> {
    soon("an answer", call).await.expect("a task")
}

/// Calls with these ids, all of them in hand.
async fn in_hand(client: &Client, files: &Files, ids: std::ops::RangeInclusive<u64>) -> Vec<(u64, Call)> {
    let before = files.lines("journal").len();
    let call = |id| (id, spawn(client, WorkItem { payload: payload(id).into(), ..holding(files, id) }));
    let calls: Vec<_> = ids.map(call).collect();
    files.began(before + calls.len()).await;
    calls
}

/// Nothing is in use, and the table, the rings and the arenas agree.
async fn assert_nothing_left(server: &Server) {
    until("nothing in use", || Copy::read(&server.segment()).ok()?.faults_when_idle().is_empty().then_some(())).await;
}

#[test]
fn they_end_in_any_order() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["many"], "").await;
        let client = server.client().await;
        let mut calls = in_hand(&client, &files, 1..=8).await;
        // As many as it takes at once: the next one waits.
        let ninth = spawn(&client, holding(&files, 9));
        let mut raw = Raw::connect(&server).await;
        raw.settled().await;
        for id in [8, 1, 5, 4, 7, 2, 3, 6] {
            assert_eq!(calls.iter().filter(|(_, call)| call.is_finished()).count(), 0);
            files.make(&format!("go-{id}"));
            let at = calls.iter().position(|(other, _)| *other == id).expect("a call");
            let result = answer(calls.remove(at).1).await.expect("a result");
            assert_eq!((result.id, result.attempts, result.worker), (id, 1, 0));
            assert!(result.payload == payload(id), "{id}");
        }
        files.make("go-9");
        answer(ninth).await.expect("a result");
        assert_nothing_left(&server).await;
        server.drain().await;
    });
}

#[test]
fn a_worker_that_sleeps_is_woken() {
    run(async {
        let server = Server::handlers(&["many"], "workers = 2\nspin = 'off'").await;
        let client = server.client().await;
        for _ in 0..300 {
            assert_serves(&client, "many").await;
        }
        server.drain().await;
    });
}

#[test]
fn a_worker_that_is_killed_gives_all_of_them_back() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["many"], "max_attempts = 2").await;
        let client = server.client().await;
        let calls = in_hand(&client, &files, 1..=5).await;
        let first = files.began(5).await[0];
        signal(first, Signal::SIGKILL);
        let began = files.began(10).await;
        assert!(began[..5].iter().all(|pid| *pid == first) && began[5..].iter().all(|pid| *pid != first), "{began:?}");
        let line = server.logged(") died: ").await;
        assert!(line.contains("requeued=5 failed=0"), "{line}");
        (1..=3).for_each(|id| files.make(&format!("go-{id}")));
        let mut left = Vec::new();
        for (id, call) in calls {
            if id > 3 {
                left.push(call);
                continue;
            }
            let result = answer(call).await.expect("a result");
            assert!((result.id, result.attempts) == (id, 2) && result.payload == payload(id), "{id}");
        }
        // Whichever it dies of, those in its hands have had their attempts.
        signal(began[5], Signal::SIGKILL);
        for call in left {
            assert_refused(refusal(answer(call).await), (Code::Aborted, "WORKER_CRASHED"), "SIGKILL");
        }
        assert_nothing_left(&server).await;
        assert_serves(&client, "many").await;
        server.drain().await;
    });
}

#[test]
fn one_that_is_dropped_fails_and_one_that_is_cancelled_is_told() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["many"], "").await;
        let client = server.client().await;
        let calls = in_hand(&client, &files, 1..=2).await;
        let dropped = WorkItem::new("many", "x").with_metadata("drop", "");
        let refused = refusal(answer(spawn(&client, dropped)).await);
        assert_refused(refused, (Code::Internal, "ITEM_DROPPED"), "gave the item up");

        let (mut calls, before) = (calls.into_iter(), files.lines("journal").len());
        let (_, cancelled) = calls.next().expect("two");
        cancelled.abort();
        assert_eq!(files.lines_of("journal", before + 1).await[before], "cancelled");
        // Its deadline tells an item, too.
        let late = holding(&files, 3).with_timeout(Duration::from_millis(100));
        let (code, ..) = refusal(answer(spawn(&client, late)).await);
        assert_eq!(code, Code::DeadlineExceeded);
        files.lines_of("journal", before + 3).await;
        files.make("go-2");
        answer(calls.next().expect("two").1).await.expect("a result");
        assert_nothing_left(&server).await;
        server.drain().await;
    });
}

#[test]
fn the_oldest_of_them_is_timed() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["many"], "max_attempts = 2\nitem_timeout = '300ms'").await;
        let client = server.client().await;
        let calls = in_hand(&client, &files, 1..=3).await;
        // Those that come and go meanwhile do not hide it.
        for _ in 0..20 {
            assert_serves(&client, "many").await;
        }
        server.logged("takes too long for its item").await;
        // The next worker has all three, and is in time.
        files.began(6).await;
        (1..=3).for_each(|id| files.make(&format!("go-{id}")));
        for (id, call) in calls {
            let result = answer(call).await.expect("a result");
            assert_eq!((result.id, result.attempts), (id, 2));
        }
        let log = server.drain().await;
        assert_eq!(log.matches(") died: ").count(), 1, "{log}");
    });
}

#[test]
fn a_drain_waits_for_all_of_them() {
    run(async {
        let files = Files::new();
        let mut server = Server::handlers(&["many"], "").await;
        let client = server.client().await;
        let family = server.family(1).await;
        let calls = in_hand(&client, &files, 1..=5).await;
        server.signal(Signal::SIGTERM);
        server.logged("draining").await;
        for (id, call) in calls {
            files.make(&format!("go-{id}"));
            assert_eq!(answer(call).await.expect("a result").id, id);
        }
        let status = server.ended().await;
        server.assert_drained(status, &family);
    });
}

/// What nobody waits for any more is in hand when the front has gone: it is finished before the worker leaves.
#[test]
fn a_worker_that_is_to_stop_finishes_what_it_has() {
    run(async {
        let files = Files::new();
        let mut server = Server::handlers(&["many"], "").await;
        let client = server.client().await;
        let family = server.family(1).await;
        let stubborn = |id| holding(&files, id).with_metadata("stubborn", "");
        let calls: Vec<_> = (1..=3).map(|id| spawn(&client, stubborn(id))).collect();
        files.began(3).await;
        calls.iter().for_each(Call::abort);
        server.signal(Signal::SIGTERM);
        until("the front's end", || (server.children().len() == 1).then_some(())).await;
        let claimed = Copy::read(&server.segment()).expect("a segment").in_use();
        assert!(claimed.len() == 3 && claimed.values().all(|word| word.phase == CLAIMED), "{claimed:?}");
        (1..=3).for_each(|id| files.make(&format!("go-{id}")));
        let status = server.ended().await;
        assert!(!server.log().contains(") died: "), "{}", server.log());
        server.assert_drained(status, &family);
    });
}

#[test]
fn one_whose_reader_is_slow_holds_up_no_other() {
    run(async {
        const PARTS: usize = 5_000;
        let server = Server::handlers(&["many"], "").await;
        let item = WorkItem::new("many", PARTS.to_string()).with_metadata("parts", "");
        let mut raw = Raw::connect(&server).await;
        let mut exchange = raw.begin("Process", &[]).await;
        exchange.body.send_data(framed(&item.with_id(1)), true).expect("an open stream");
        let is_stalled = || {
            let copy = Copy::read(&server.segment()).ok()?;
            let waiting = copy.in_use().keys().map(|item| copy.partials(*item).len()).max()?;
            (waiting == 4 && copy.sleeps(1) && copy.sleeps(2)).then_some(())
        };
        for _ in 0..3 {
            until("a stream that stands still", is_stalled).await;
        }
        let client = server.client().await;
        for _ in 0..20 {
            assert_serves(&client, "many").await;
        }
        let copy = Copy::read(&server.segment()).expect("a segment");
        assert_eq!(copy.in_use().values().filter(|word| word.phase == CLAIMED).count(), 1, "and it is not over");
        let answer = exchange.answer().await;
        let all: Vec<_> = answer.messages.into_iter().map(|one| WorkResult::decode(one).expect("a result")).collect();
        assert_eq!(all.len(), PARTS + 1);
        for (n, result) in all.iter().enumerate() {
            assert_eq!((result.partial, result.sequence as usize), (n < PARTS, n));
        }
        assert_eq!(all[PARTS].payload, PARTS.to_string());
        assert_nothing_left(&server).await;
        server.drain().await;
    });
}
