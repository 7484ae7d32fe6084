//! A worker that writes garbage over the shared memory it may write. What it destroys is lost; but front and supervisor
//! survive it, nothing hangs, and once it is dead the server serves as before.
//!
//! FORKRING_TEST_SEED is the first of the numbers that the garbage comes of, 1 unless it is set.

mod common;

use std::{collections::HashSet, fs, os::unix::fs::FileExt, path::Path};

use common::{
    Files, Server,
    audit::{CLAIMED, Copy, READY, Word},
    health::Health,
    processes::{is_alive, signal},
    run, soon, until, variable,
};
use forkring::{
    client::Client,
    proto::v1::{self, WorkItem, WorkResult},
};
use nix::sys::signal::Signal;
use tonic::{Code, Status};

/// What clients may be told of items that were in the way.
const CLEAR: [(Code, &str); 7] = [
    (Code::DataLoss, "ITEM_DAMAGED"),
    (Code::Internal, "INVALID_RESULT"),
    (Code::Internal, "MALFORMED_ITEM"),
    (Code::Internal, "HANDLER_FAILED"),
    (Code::Aborted, "WORKER_CRASHED"),
    (Code::Cancelled, "CANCELLED"),
    (Code::DeadlineExceeded, "DEADLINE_EXCEEDED"),
];

/// Bytes at the beginning of a segment that nobody changes.
const HEADER: usize = 256;

/// A mapping of the segment: permissions, offset and length.
type Mapping = (String, u64, u64);

fn mappings(pid: i32) -> Vec<Mapping> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("a process");
    let segment = maps.lines().filter(|line| line.contains("/dev/shm/forkring-"));
    let hex = |text: &str| u64::from_str_radix(text, 16).expect("a number");
    let mapping = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        let (start, end) = words[0].split_once('-').expect("a range");
        (words[1].to_owned(), hex(words[2]), hex(end) - hex(start))
    };
    let mut all: Vec<_> = segment.map(mapping).collect();
    all.sort_by_key(|(_, offset, _)| *offset);
    all
}

/// An item that comes back as it is.
fn echo(id: u64) -> WorkItem {
    let len = [3, 60, 200, 9000][id as usize % 4];
    WorkItem::new("hold", vec![id as u8; len]).with_id(id)
}

/// Whether a result is right; if not, that it says so.
#[track_caller]
fn is_right(item: &WorkItem, answer: Result<WorkResult, Status>) -> bool {
    match answer {
        Ok(result) => {
            assert_eq!(result.id, item.id);
            assert!(result.payload == item.payload, "item {} has another's result", item.id);
            true
        }
        Err(status) => {
            let reason = v1::Status::from(&status).reason;
            assert!(CLEAR.contains(&(status.code(), &reason)), "{status:?}");
            false
        }
    }
}

/// The server is well: what is sent is done, perhaps after a few that are told what happened to them.
async fn assert_recovers(client: &Client, server: &Server) {
    let (mut well, mut failed) = (0, Vec::new());
    for id in 0.. {
        let item = echo(id);
        let answer = soon("an answer", client.call(item.clone())).await;
        let what = format!("{answer:?}");
        if is_right(&item, answer) {
            well += 1;
        } else {
            failed.push(what);
        }
        if well == 20 {
            break;
        }
        assert!(failed.len() < 20, "{failed:?}\n{}", server.log());
    }
    Health::of(server).await.until("", true).await;
}

fn deaths(server: &Server) -> usize {
    server.log().matches(") died: ").count()
}

#[test]
fn a_worker_can_write_control_and_its_own_results_and_nothing_else() {
    run(async {
        let server = Server::handlers(&["hold"], "workers = 2").await;
        let (front, workers) = (server.child("front").await, [server.child("w0").await, server.child("w1").await]);
        let maps = workers.map(mappings);
        let size = fs::metadata(server.segment()).expect("a segment").len();
        let mut writable = HashSet::new();
        for maps in &maps {
            let [(control, 0, control_len), (requests, requests_at, requests_len), (results, at, len)] = &maps[..]
            else {
                panic!("{maps:?}");
            };
            assert_eq!([control.as_str(), requests, results], ["rw-s", "r--s", "rw-s"]);
            assert!(requests_at >= control_len, "they do not overlap");
            assert!(requests_at + requests_len <= *at && at + len <= size);
            writable.insert((*at, *len));
        }
        assert_eq!(writable.len(), 2, "each has its own results");
        let front = mappings(front);
        let results = front
            .iter()
            .find(|(_, at, _)| writable.contains(&(*at, size - at)) || writable.iter().any(|one| one.0 == *at));
        assert_eq!(results.map(|(permissions, ..)| permissions.as_str()), Some("r--s"), "{front:?}");
        server.drain().await;
    });
}

#[test]
fn a_worker_that_dies_of_a_wild_pointer_is_dead_like_any_other() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["hold"], "").await;
        let client = server.client().await;
        let call = tokio::spawn({
            let (client, item) = (client.clone(), files.holding(1, "go"));
            async move { client.call(item).await }
        });
        let worker = files.began(1).await[0];
        until("its death", || {
            // The first may be swallowed by the handler that Rust has for it: a fault would come again.
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(worker), Signal::SIGSEGV);
            (!is_alive(worker)).then_some(())
        })
        .await;
        files.began(2).await;
        files.make("go");
        let result = soon("an answer", call).await.expect("a task").expect("a result");
        assert_eq!((result.attempts, &result.payload[..]), (2, &b"item 1"[..]));
        let log = server.drain().await;
        assert!(log.contains("killed by SIGSEGV"), "{log}");
    });
}

#[test]
fn a_worker_that_writes_to_a_request_dies_of_it_and_the_next_one_has_what_was_sent() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["wild", "hold"], "").await;
        let client = server.client().await;
        let (other, front) = (server.child("w1").await, server.child("front").await);
        // Large, so that it is read in place: what is small is copied.
        let payload: Vec<u8> = (0..70_000_u32).map(|at| (at % 251) as u8).collect();
        let item = WorkItem { pool: "wild".into(), payload: payload.clone().into(), ..files.holding(1, "go") };
        let call = tokio::spawn({
            let client = client.clone();
            async move { client.call(item).await }
        });
        let line = server.logged(") died: ").await;
        assert!(line.contains("killed by SIGSEGV") && line.contains("requeued=1 failed=0"), "{line}");
        // Its second worker has it, and others go on.
        assert_ne!(files.began(1).await[0], other);
        assert_recovers(&client, &server).await;
        files.make("go");
        let result = soon("an answer", call).await.expect("a task").expect("a result");
        assert_eq!(result.attempts, 2);
        assert!(result.payload == payload, "the payload is unharmed");
        assert_eq!((server.child("w1").await, server.child("front").await), (other, front), "nobody else noticed");
        let log = server.drain().await;
        assert_eq!(log.matches(") died: ").count(), 1, "{log}");
    });
}

#[test]
fn garbage_on_any_page_is_survived_and_mended() {
    run(async {
        let server = Server::handlers(&["hold"], "workers = 8\ncapacity = 64").await;
        let client = server.client().await;
        let front = server.child("front").await;
        let control = mappings(server.child("w0").await)[0].2;
        let segment = fs::OpenOptions::new().write(true).open(server.segment()).expect("the segment");
        let (mut state, mut round) = (1_u64, 0);
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        for page in 0..control / 4096 {
            let garbage = [vec![0; 4096], vec![0xff; 4096], vec![0x55; 4096], (0..4096).map(|_| random()).collect()];
            for garbage in garbage {
                assert_recovers(&client, &server).await;
                segment.write_all_at(&garbage, page * 4096).expect("its own test's segment");
                // Another one each time: those that die often are started ever more slowly.
                round += 1;
                let (worker, before) = (server.child(&format!("w{}", round % 8)).await, deaths(&server));
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(worker), Signal::SIGKILL);
                until("its death", || (deaths(&server) > before).then_some(())).await;
            }
        }
        assert_recovers(&client, &server).await;
        assert_eq!(server.child("front").await, front, "the front lived through it all");

        // The header again, and this time everybody has to begin anew.
        segment.write_all_at(&[0xff; 4096], 0).expect("its own test's segment");
        for name in ["w0", "w1", "w2", "front"] {
            let child = server.child(name).await;
            signal(child, Signal::SIGKILL);
            server.successor(name, child).await;
        }
        assert_recovers(&server.client().await, &server).await;
        end(server).await;
    });
}

/// What nobody changes is there again when the worker that wrote over it is dead, so that the next server knows what it finds.
#[test]
fn a_header_that_was_written_over_is_as_before_for_the_next_server() {
    run(async {
        let files = Files::new();
        let settings = "workers = 4\ncapacity = 64\nmax_attempts = 9";
        let server = Server::handlers(&["hold"], settings).await;
        let client = server.client().await;
        server.family(4).await;
        let submitted = tokio_stream::iter([files.holding(7, "go").with_subscription("s")]);
        assert_eq!(soon("a receipt", client.submit(submitted)).await.expect("a receipt").accepted, 1);
        files.began(1).await;
        // Identity, geometry and gate; then comes what changes.
        let header = || fs::read(server.segment()).expect("the segment")[..HEADER].to_vec();
        let before = header();
        let segment = fs::OpenOptions::new().write(true).open(server.segment()).expect("the segment");
        for (n, garbage) in [0, 0xff, 0x55].into_iter().enumerate() {
            segment.write_all_at(&[garbage; HEADER], 0).expect("its own test's segment");
            assert_ne!(header(), before);
            signal(server.child(&format!("w{n}")).await, Signal::SIGKILL);
            until("the header", || (header() == before).then_some(())).await;
        }
        let left = server.kill().await;
        files.make("go");
        let server = Server::handlers_as(&left.name, &["hold"], settings).await;
        let client = server.client().await;
        let mut updates = soon("a stream", client.updates("s", 1)).await.expect("a stream");
        let update = soon("an update", updates.message()).await.expect("an open stream").expect("an update");
        assert_eq!((update.id, &update.payload[..]), (7, &b"item 7"[..]));
        server.drain().await;
    });
}

/// Whatever byte of the word of an item that waits, or that is in work, is another: after its worker's death each of them
/// comes to an end. A word whose owner is nobody would be claimed by nobody and swept by nobody.
#[test]
fn no_byte_of_a_word_makes_an_item_wait_for_ever() {
    const WORKERS: usize = 8;
    run(async {
        let server = Server::handlers(&["hold"], "workers = 8\ncapacity = 64").await;
        let client = server.client().await;
        let segment = fs::OpenOptions::new().write(true).open(server.segment()).expect("the segment");
        server.family(WORKERS).await;
        for byte in 0..WORKERS {
            let files = Files::new();
            let call = |id| {
                let (client, item) = (client.clone(), files.holding(id, "go"));
                tokio::spawn(async move { client.call(item).await })
            };
            let mut calls: Vec<_> = (0..WORKERS as u64).map(call).collect();
            files.began(WORKERS).await;
            calls.push(call(WORKERS as u64));
            let look = || Copy::read(&server.segment()).expect("a segment");
            let has = |phase, owner| {
                let wanted = |word: &Word| word.phase == phase && word.owner == owner;
                look().in_use().into_iter().find_map(|(item, word)| wanted(&word).then_some(item))
            };
            let waiting = until("an item that waits", || has(READY, 0)).await;
            let in_work = until("an item in work", || has(CLAIMED, byte as u64)).await;
            for item in [waiting, in_work] {
                let at = look().record(item) + byte as u64;
                segment.write_all_at(&[0xa5], at).expect("its own test's segment");
            }
            // Another one each time: those that die often are started ever more slowly.
            let (worker, before) = (server.child(&format!("w{byte}")).await, deaths(&server));
            signal(worker, Signal::SIGKILL);
            until("its death", || (deaths(&server) > before).then_some(())).await;
            files.make("go");
            for call in calls {
                if let Err(status) = soon("an end", call).await.expect("a task") {
                    let reason = v1::Status::from(&status).reason;
                    assert!(CLEAR.contains(&(status.code(), &reason)), "byte {byte}: {status:?}");
                }
            }
            assert_recovers(&client, &server).await;
        }
        end(server).await;
    });
}

/// It still drains.
async fn end(mut server: Server) {
    let family = server.children();
    server.signal(Signal::SIGTERM);
    let status = server.ended().await;
    assert_eq!(status.code(), Some(0), "{}", server.log());
    server.assert_gone(&family);
}

#[test]
fn a_worker_that_scribbles_and_dies_takes_nobody_along() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["scribble", "hold"], "workers = 6\ncapacity = 64\nmax_attempts = 2").await;
        let client = server.client().await;
        let front = server.child("front").await;
        let first: u64 = variable("FORKRING_TEST_SEED").unwrap_or(1);
        for seed in first..first + 25 {
            // Some are done, some in work, some wait, some have results that nobody fetched.
            let go = format!("go{seed}");
            let calls: Vec<_> = (0..6)
                .map(|id| {
                    let item = files.holding(100 + id, &go);
                    let client = client.clone();
                    tokio::spawn(async move { client.call(item).await })
                })
                .collect();
            let subscription = format!("s{seed}");
            let submitted = (0..6).map(|id| files.holding(200 + id, &go).with_subscription(&subscription));
            let submitted = tokio_stream::iter(submitted.collect::<Vec<_>>());
            let receipt = soon("a receipt", client.submit(submitted)).await.expect("a receipt");
            assert_eq!(receipt.accepted, 6);

            let before = deaths(&server);
            let once = files.name(&format!("once{seed}"));
            let item = WorkItem::new("scribble", seed.to_string()).with_metadata("once", once.clone());
            let scribble = tokio::spawn({
                let client = client.clone();
                async move { client.call(item).await }
            });
            until("the scribbler's death", || (Path::new(&once).exists() && deaths(&server) > before).then_some(()))
                .await;
            // Those in the way end somehow, and all of them end.
            files.make(&go);
            soon("its end", scribble).await.expect("a task").expect_err("it died, or was damaged");
            for call in calls {
                if let Err(status) = soon("an end", call).await.expect("a task") {
                    let reason = v1::Status::from(&status).reason;
                    assert!(CLEAR.contains(&(status.code(), &reason)), "{status:?}");
                }
            }
            let mut updates = soon("a stream", client.updates(&subscription, 6)).await.expect("a stream");
            let mut ids = HashSet::new();
            while let Some(result) = soon("an update", updates.message()).await.expect("an open stream") {
                ids.insert(result.id);
            }
            assert_eq!(ids, (200..206).collect(), "each that was accepted comes to some end");
            assert_recovers(&client, &server).await;
        }
        assert_eq!(server.child("front").await, front, "the front lived through it all");
        end(server).await;
    });
}
