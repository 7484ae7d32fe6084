//! A long run leaves nothing behind: descriptors, threads and memory of every process are afterwards what they were
//! before, whatever shapes the items came in and whoever died meanwhile.
//!
//! What leaks grows in each span. Memory that is kept for reuse grows once, to the most that was ever needed at a time, and when
//! that is depends on who was scheduled when; so of several spans, one without growth is enough.
//!
//! `FORKRING_TEST_ITEMS=1000000` is how many items a span has at least.

mod common;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    time::Duration,
};

use common::{Files, PATIENCE, Server, health::Health, processes::signal, raw::Raw, run_within, soon, until, variable};
use forkring::{client::Client, proto::v1::WorkItem};
use nix::sys::signal::Signal;

const SPANS: usize = 6;
/// Of a span, unless more are asked for.
const ITEMS: u64 = 10_000;

/// What a process has. Memory in KiB, its own without the segment.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Has {
    fds: Vec<String>,
    threads: String,
    memory: i64,
}

impl Has {
    fn of(pid: i32) -> Self {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
        let value =
            |key| status.lines().find_map(|line| line.strip_prefix(key)).expect("a line of the kernel's").trim();
        let fds = fs::read_dir(format!("/proc/{pid}/fd"))
            .expect("a process")
            .filter_map(|fd| fs::read_link(fd.ok()?.path()).ok());
        // What they are, not which.
        let what = |to: std::path::PathBuf| to.to_string_lossy().split(['[', ':']).next().map(str::to_owned);
        let mut fds: Vec<_> = fds.filter_map(what).collect();
        fds.sort();
        let memory = value("RssAnon:").trim_end_matches(" kB").parse().expect("a number");
        Has { fds, threads: value("Threads:").to_owned(), memory }
    }
}

/// What everybody has, by name, once the connections of before are closed.
async fn family(server: &Server, workers: usize) -> BTreeMap<String, Has> {
    let mut all: BTreeMap<_, _> =
        server.family(workers).await.into_iter().map(|child| (child.name, Has::of(child.pid))).collect();
    all.insert("supervisor".to_owned(), Has::of(server.pid()));
    all
}

fn sockets(server: &Server, front: i32) -> usize {
    assert!(server.children().iter().any(|child| child.pid == front), "the front lives");
    Has::of(front).fds.iter().filter(|fd| *fd == "socket").count()
}

fn pattern(id: u64) -> Vec<u8> {
    let len = [0, 10, 64, 65, 3000, 20_000, 100_000][id as usize % 7];
    vec![id as u8; len]
}

/// A bit of everything, each over connections of its own; how many items.
async fn work(server: &Server, files: &Files, round: u64) -> u64 {
    let client = server.client().await;
    let item = |id: u64| WorkItem::new("hold", pattern(id)).with_id(id);
    for id in 0..20 {
        let result = soon("an answer", client.call(item(id))).await.expect("a result");
        assert!(result.payload == pattern(id));
        soon("a refusal", client.call(WorkItem::new("fail", "x"))).await.expect_err("it fails");
        let late = item(id).with_timeout(Duration::from_nanos(1));
        soon("a refusal", client.call(late)).await.expect_err("it is late");
    }

    let streamed = server.client().await;
    let mut results =
        soon("a stream", streamed.process(tokio_stream::iter((0..300).map(item)))).await.expect("a stream");
    let mut count = 0;
    while let Some(result) = soon("a result", results.message()).await.expect("an open stream") {
        assert!(result.payload == pattern(result.id));
        count += 1;
    }
    assert_eq!(count, 300);

    let subscription = format!("s{round}");
    let items: Vec<_> = (0..100).map(|id| item(id).with_subscription(&subscription)).collect();
    let submitter = server.client().await;
    let subscriber = server.client().await;
    let mut updates = soon("a stream", subscriber.updates(&subscription, 100)).await.expect("a stream");
    let receipt = soon("a receipt", submitter.submit(tokio_stream::iter(items))).await.expect("a receipt");
    assert_eq!(receipt.accepted, 100);
    let mut count = 0;
    while soon("an update", updates.message()).await.expect("an open stream").is_some() {
        count += 1;
    }
    assert_eq!(count, 100);

    // Who does not wait for the end.
    let name = format!("cancelled{round}");
    let leaving = server.client().await;
    let cancelled = WorkItem::new("cancel", "").with_metadata("journal", files.name(&name));
    let call = tokio::spawn(async move { leaving.call(cancelled).await });
    files.lines_of(&name, 1).await;
    call.abort();
    files.lines_of(&name, 2).await;
    Health::of(server).await.until("hold", true).await;
    20 * 3 + 300 + 100 + 1
}

/// An item that its worker dies of, and one that loses its worker.
async fn death(server: &Server, files: &Files, round: u64) {
    let client: Client = server.client().await;
    let result = soon("an answer", client.call(WorkItem::new("crash", ""))).await.expect("a result");
    assert_eq!(result.attempts, 2);
    let until = format!("go{round}");
    let before = files.lines("journal").len();
    // Of a pool of their own, so that the workers that do the work live as long as the server.
    let item = WorkItem { pool: "parts".to_owned(), payload: "1".into(), ..files.holding(round, &until) };
    let item = item.with_metadata("at", "0");
    let call = tokio::spawn({
        let client = client.clone();
        async move { client.call(item).await }
    });
    let worker = *files.began(before + 1).await.last().expect("a line");
    signal(worker, Signal::SIGKILL);
    files.began(before + 2).await;
    files.make(&until);
    soon("an answer", call).await.expect("a task").expect("a result");
}

#[test]
fn a_long_run_leaves_nothing_behind() {
    let wanted = variable("FORKRING_TEST_ITEMS").unwrap_or(ITEMS);
    run_within(3 * PATIENCE * wanted.div_ceil(ITEMS) as u32, async {
        let files = Files::new();
        let pools = ["hold", "fail", "cancel", "crash", "parts"];
        let settings = "workers = 2\narena = '2MiB'\nitem_timeout = '1h'\nworker_memory = '1GiB'";
        let server = Server::handlers(&pools, settings).await;
        let workers = 2 * pools.len();
        let front = server.child("front").await;
        // A front that answers has opened what it needs; the one connection is the test's.
        let mut connection = Raw::connect(&server).await;
        connection.settled().await;
        let idle = sockets(&server, front) - 1;
        connection.cut();
        // What is made once has been made after this.
        for round in 0..5 {
            work(&server, &files, round).await;
        }
        death(&server, &files, 0).await;
        until("closed connections", || (sockets(&server, front) == idle).then_some(())).await;
        let mut before = family(&server, workers).await;
        let mut growing: BTreeSet<_> = before.keys().cloned().collect();
        let mut rounds = 5;

        for _ in 0..SPANS {
            let mut items = 0;
            while items < wanted {
                items += work(&server, &files, rounds).await;
                if rounds % 5 == 0 {
                    death(&server, &files, rounds).await;
                }
                rounds += 1;
            }
            until("closed connections", || (sockets(&server, front) == idle).then_some(())).await;
            let after = family(&server, workers).await;

            assert_eq!(server.child("front").await, front, "it is the same front");
            for (name, before) in before {
                let after = &after[&name];
                assert_eq!((&after.fds, &after.threads), (&before.fds, &before.threads), "{name}");
                let grown = after.memory - before.memory;
                println!("{name}: {} KiB, {grown} KiB more", after.memory);
                // The least object has 16 bytes.
                if grown * 1024 < 12 * items as i64 {
                    growing.remove(&name);
                }
            }
            if growing.is_empty() {
                break;
            }
            before = after;
        }
        assert!(growing.is_empty(), "{growing:?} had more memory after each of {SPANS} spans");
        server.drain().await;
    });
}
