//! Processes that die or stop: what was accepted is finished, and nobody else notices.

mod common;

use std::{
    collections::BTreeMap,
    env,
    process::Command,
    time::{Duration, Instant},
};

use common::{
    Files, Server, assert_refused, assert_serves,
    audit::{CLAIMED, Copy},
    failure,
    processes::{children, is_alive, signal},
    program::{behind, finish},
    raw::{Raw, framed},
    refusal, run,
    server::{serve_command, unique_name},
    soon, until,
};
use forkring::{
    client::{Client, Results},
    proto::v1::{WorkItem, WorkResult},
};
use nix::sys::signal::Signal;
use tokio::task::JoinHandle;
use tonic::{Code, Status};

fn spawn_call(client: &Client, item: WorkItem) -> JoinHandle<Result<WorkResult, Status>> {
    let client = client.clone();
    tokio::spawn(async move { client.call(item).await })
}

async fn answer(call: JoinHandle<Result<WorkResult, Status>>) -> Result<WorkResult, Status> {
    soon("an answer", call).await.expect("a task")
}

/// The payloads of all results of a stream by their ids, each of which comes once.
async fn collect(mut results: Results) -> BTreeMap<u64, WorkResult> {
    let mut all = BTreeMap::new();
    while let Some(result) = soon("a result", results.message()).await.expect("an open stream") {
        let before = all.insert(result.id, result);
        assert!(before.is_none(), "{before:?} came twice");
    }
    all
}

fn pattern(id: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|at| (at * (id + 3) % 251) as u8).collect()
}

#[test]
fn the_item_of_a_worker_that_is_killed_is_given_to_another() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["hold"], "workers = 2").await;
        let client = server.client().await;
        let call = spawn_call(&client, WorkItem { payload: pattern(1, 200_000).into(), ..files.holding(1, "go") });
        let first = files.began(1).await[0];
        signal(first, Signal::SIGKILL);
        let second = files.began(2).await[1];
        assert_ne!(first, second);
        files.make("go");
        let result = answer(call).await.expect("a result");
        assert_eq!((result.id, result.attempts), (1, 2));
        assert!(result.payload == pattern(1, 200_000), "the payload is there for the second worker too");
        let log = server.drain().await;
        let line = log.lines().find(|line| line.contains(") died: ")).expect("a line about the death");
        let says =
            format!("(pool \"hold\", pid {first}) died: killed by SIGKILL; its item 1 is retried (attempt 1 of 3)");
        assert!(line.contains(&says) && line.contains("requeued=1 failed=0"), "{line}");
    });
}

#[test]
fn an_item_that_its_worker_died_of_knows_so_the_next_time() {
    run(async {
        let server = Server::handlers(&["crash", "count"], "").await;
        let client = server.client().await;
        let result = soon("an answer", client.call(WorkItem::new("crash", ""))).await.expect("a result");
        assert_eq!((&result.payload[..], result.attempts), (&b"attempt 2"[..], 2));
        // Not three: so many different ones would be the handler's own.
        let items = (1..=2).map(|id| WorkItem::new("crash", "").with_id(id));
        let results = collect(client.process(tokio_stream::iter(items)).await.expect("a stream")).await;
        assert_eq!(results.values().filter(|result| result.attempts == 2).count(), 2);
        server.drain().await;
    });
}

#[test]
fn an_item_that_workers_keep_dying_of_fails_and_harms_no_other() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["always_crash", "count"], "max_attempts = 3").await;
        let client = server.client().await;
        let wanted = (Code::Aborted, "WORKER_CRASHED");
        let item = WorkItem::new("always_crash", "").with_metadata("journal", files.name("journal"));
        let call = spawn_call(&client, item.clone());
        for count in 1..=50 {
            let result = soon("an answer", client.call(WorkItem::new("count", ""))).await.expect("a result");
            assert_eq!(result.payload, count.to_string(), "the other pool's worker lives");
        }
        assert_refused(refusal(answer(call).await), wanted, "killed by SIGABRT");
        assert_eq!(files.lines("journal"), ["attempt 1", "attempt 2", "attempt 3"]);

        let mut results = client.process(tokio_stream::iter([item])).await.expect("a stream");
        let result = soon("a result", results.message()).await.expect("a stream").expect("a result");
        assert_eq!(result.attempts, 3);
        assert_refused(failure(result), wanted, "SIGABRT");
        server.drain().await;
    });
}

#[test]
fn an_idle_worker_that_is_killed_is_replaced() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo"]).await;
        let client = server.client().await;
        let mut worker = server.child("w0").await;
        for _ in 0..4 {
            signal(worker, Signal::SIGKILL);
            // The next one has its items, when it comes.
            assert_serves(&client, "echo").await;
            worker = server.successor("w0", worker).await;
        }
        server.logged(") died: ").await;
        server.drain().await;
    });
}

#[test]
fn results_outlive_the_worker_that_wrote_them() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo", "--arena", "4MiB"]).await;
        let client = server.client().await;
        let submit = async |ids: std::ops::Range<u64>| {
            let items = ids.map(|id| WorkItem::new("echo", pattern(id, 150_000)).with_id(id));
            client.submit(tokio_stream::iter(items.collect::<Vec<_>>())).await.expect("a receipt");
            // One worker, so when this is answered the others are done.
            assert_serves(&client, "echo").await;
        };
        submit(0..5).await;
        let worker = server.child("w0").await;
        signal(worker, Signal::SIGKILL);
        // Its successor writes beside them.
        submit(5..10).await;
        let results = collect(soon("a stream", client.updates("", 10)).await.expect("a stream")).await;
        assert_eq!(results.len(), 10);
        for (id, result) in results {
            assert!(result.payload == pattern(id, 150_000), "the result of {id} is damaged");
        }
        // All of the arena is there again.
        let item = WorkItem::new("echo", pattern(11, 500_000));
        for _ in 0..10 {
            soon("an answer", client.call(item.clone())).await.expect("room for the result");
        }
        server.drain().await;
    });
}

#[test]
fn under_a_hail_of_kills_each_item_completes_once() {
    run(async {
        let server = Server::serve(&["--pool", "echo:3=echo", "--max-attempts", "255", "--capacity", "32"]).await;
        let client = server.client().await;
        let sizes = |id: u64| [10, 64, 65, 5_000, 40_000][id as usize % 5];
        let items = (0..2000).map(move |id| WorkItem::new("echo", pattern(id, sizes(id))).with_id(id));
        let results = client.process(tokio_stream::iter(items)).await.expect("a stream");
        let killing = async {
            for n in (0..3).cycle() {
                let worker = server.child(&format!("w{n}")).await;
                signal(worker, Signal::SIGKILL);
                server.successor(&format!("w{n}"), worker).await;
            }
        };
        let results = tokio::select! {
            results = collect(results) => results,
            () = killing => unreachable!("it goes on for ever"),
        };
        assert!(results.keys().copied().eq(0..2000));
        for (id, result) in results {
            assert!(result.payload == pattern(id, sizes(id)), "{id}: {:?}", result.status);
        }
        assert_serves(&client, "echo").await;
        server.drain().await;
    });
}

#[test]
fn what_was_submitted_outlives_the_front() {
    run(async {
        let files = Files::new();
        // An arena that the items below fill by half.
        let server = Server::handlers(&["hold"], "arena = '576KiB'").await;
        let client = server.client().await;
        let item = |id, until: &str| {
            let item = files.holding(id, until).with_subscription("mine");
            WorkItem { payload: pattern(id, 60_000).into(), ..item }
        };
        // One is done, one in work, and others wait.
        files.make("gone");
        let items = [item(1, "gone"), item(2, "go"), item(3, "go"), item(4, "go")];
        let receipt = soon("a receipt", client.submit(tokio_stream::iter(items))).await.expect("a receipt");
        assert_eq!(receipt.accepted, 4);
        files.began(2).await;
        let front = server.child("front").await;
        signal(front, Signal::SIGKILL);
        server.successor("front", front).await;

        // The address is the same, and a client that was there before may come back.
        let updates = until_connected(&server).await.updates("mine", 4).await.expect("a stream");
        files.make("go");
        let results = collect(updates).await;
        assert!(results.keys().copied().eq(1..=4));
        for (id, result) in results {
            assert!(result.payload == pattern(id, 60_000), "{id}: {:?}", result.status);
            assert_eq!(result.attempts, 1);
        }
        // What they had of the arena is there again.
        let large = WorkItem { payload: pattern(5, 500_000).into(), ..files.holding(5, "go") };
        let result = soon("an answer", until_connected(&server).await.call(large)).await.expect("room");
        assert_eq!(result.payload.len(), 500_000);
        server.drain().await;
    });
}

/// A client that the front has answered: connections wait while there is none.
async fn until_connected(server: &Server) -> Client {
    server.client().await
}

#[test]
fn the_calls_of_a_front_that_dies_are_cancelled() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["cancel", "hold"], "").await;
        let client = server.client().await;
        let cancelled = WorkItem::new("cancel", "").with_metadata("journal", files.name("cancelled"));
        let running = spawn_call(&client, cancelled);
        let holding = spawn_call(&client, files.holding(1, "go"));
        files.lines_of("cancelled", 1).await;
        files.began(1).await;
        // This one waits behind the first: once it has been read, so that the front is known to have it.
        let mut raw = Raw::connect(&server).await;
        let mut waiting = raw.begin("Call", &[]).await;
        waiting.body.send_data(framed(&files.holding(2, "go")), true).expect("an open stream");
        raw.settled().await;

        let front = server.child("front").await;
        signal(front, Signal::SIGKILL);
        for call in [running, holding] {
            let (code, ..) = refusal(answer(call).await);
            assert!([Code::Unavailable, Code::Unknown, Code::Internal, Code::Cancelled].contains(&code), "{code:?}");
        }
        assert_eq!(files.lines_of("cancelled", 2).await, ["began", "cancelled"]);
        server.successor("front", front).await;
        files.make("go");
        let client = server.client().await;
        soon("an answer", client.call(files.holding(3, "go"))).await.expect("a result");
        let began = files.lines("journal");
        assert!(began[0].starts_with("1 began") && began[1].starts_with("3 began") && began.len() == 2, "{began:?}");
        server.drain().await;
    });
}

#[test]
fn a_client_reconnects_to_the_next_front() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo"]).await;
        let client = server.client().await;
        let mut front = server.child("front").await;
        for _ in 0..3 {
            signal(front, Signal::SIGKILL);
            front = server.successor("front", front).await;
            // The connection that broke is an error once, and then there is another.
            loop {
                match soon("an answer", client.call(WorkItem::new("echo", "x"))).await {
                    Ok(_) => break,
                    Err(status) => assert!(status.code() != Code::NotFound, "{status}"),
                }
            }
        }
        server.drain().await;
    });
}

#[test]
fn nobody_outlives_the_supervisor() {
    run(async {
        let files = Files::new();
        let program = format!("run=exec:sh -c 'echo $$ > {}; exec sleep 1000'", files.name("pid"));
        let mut server = Server::serve(&["--pool", "echo:2=echo", "--pool", &program]).await;
        let mut family = server.family(3).await;
        let call = spawn_call(&server.client().await, WorkItem::new("run", ""));
        files.lines_of("pid", 1).await;
        let worker = server.child("w2").await;
        family.extend(until("the program", || Some(children(worker)).filter(|them| !them.is_empty())).await);
        assert_eq!(family.len(), 5);
        server.signal(Signal::SIGKILL);
        assert_eq!(server.ended().await.code(), None);
        until("the end of all", || family.iter().all(|process| !is_alive(process.pid)).then_some(())).await;
        answer(call).await.expect_err("nobody is there");
        assert!(server.segment().exists(), "there was nobody to remove it");
    });
}

#[test]
fn a_worker_that_was_stopped_idle_stalls_nobody() {
    run(async {
        let server = Server::serve(&["--pool", "echo:2=echo"]).await;
        let client = server.client().await;
        assert_serves(&client, "echo").await;
        let stopped = server.child("w0").await;
        signal(stopped, Signal::SIGSTOP);
        for _ in 0..20 {
            let result = soon("an answer", client.call(WorkItem::new("echo", "x"))).await.expect("a result");
            assert_eq!((result.worker, result.attempts), (1, 1));
        }
        signal(stopped, Signal::SIGCONT);
        let family = server.children();
        assert!(family.iter().any(|process| process.pid == stopped), "it was not dead");
        server.drain().await;
    });
}

#[test]
fn a_worker_that_does_not_respond_is_named_once_while_items_wait_for_it() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo"]).await;
        let client = server.client().await;
        let stopped = server.child("w0").await;
        let says = format!("worker 0 (pool \"echo\", pid {stopped}) does not respond");
        for episode in 1..=2 {
            assert_serves(&client, "echo").await;
            signal(stopped, Signal::SIGSTOP);
            let call = spawn_call(&client, WorkItem::new("echo", "x").with_id(episode));
            let count = || server.log().matches(&says).count();
            until("a line about it", || (count() == episode as usize).then_some(())).await;
            // However often it is looked at, it is told once.
            tokio::time::sleep(Duration::from_millis(2500)).await;
            assert_eq!(count(), episode as usize, "{}", server.log());
            signal(stopped, Signal::SIGCONT);
            assert_eq!(answer(call).await.expect("a result").attempts, 1);
        }
        server.drain().await;
    });
}

#[test]
fn the_next_front_tells_of_a_stopped_worker_for_which_items_were_left() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo"]).await;
        let client = server.client().await;
        assert_serves(&client, "echo").await;
        let stopped = server.child("w0").await;
        signal(stopped, Signal::SIGSTOP);
        let item = WorkItem::new("echo", "x").with_id(1);
        soon("a receipt", client.submit(tokio_stream::iter([item]))).await.expect("a receipt");
        // The front has not asked for a look yet: it does so after a second.
        let front = server.child("front").await;
        signal(front, Signal::SIGKILL);
        server.successor("front", front).await;
        server.logged(&format!("worker 0 (pool \"echo\", pid {stopped}) does not respond")).await;
        signal(stopped, Signal::SIGCONT);
        let updates = until_connected(&server).await.updates("", 1).await.expect("a stream");
        assert_eq!(collect(updates).await.into_keys().collect::<Vec<_>>(), [1]);
        server.drain().await;
    });
}

#[test]
fn an_item_does_not_wait_for_a_stopped_worker_however_busy_the_front_is() {
    run(async {
        let server = Server::serve(&["--pool", "echo:2=echo", "--pool", "other=echo"]).await;
        let client = server.client().await;
        assert_serves(&client, "echo").await;
        let stopped = server.child("w0").await;
        signal(stopped, Signal::SIGSTOP);
        // The front wakes for each of these, and far more often than it looks after an item that waits.
        let busy = server.client().await;
        let traffic = async {
            let item = || WorkItem::new("other", "x");
            loop {
                let (a, b, c, d) =
                    tokio::join!(busy.call(item()), busy.call(item()), busy.call(item()), busy.call(item()));
                for answer in [a, b, c, d] {
                    answer.expect("a result");
                }
            }
        };
        let calls = async {
            for _ in 0..20 {
                assert_serves(&client, "echo").await;
            }
        };
        tokio::select! {
            () = calls => {}
            () = traffic => unreachable!("it goes on for ever"),
        }
        signal(stopped, Signal::SIGCONT);
        server.drain().await;
    });
}

/// How long a worker is stopped; FORKRING_TEST_STOP makes it so many seconds.
fn stop() -> Duration {
    let seconds = env::var("FORKRING_TEST_STOP").ok();
    seconds.map_or(Duration::from_millis(100), |seconds| Duration::from_secs(seconds.parse().expect("a number")))
}

#[test]
fn a_worker_that_was_stopped_at_work_keeps_its_item() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["hold"], "workers = 2").await;
        let client = server.client().await;
        let call = spawn_call(&client, WorkItem { payload: pattern(1, 200_000).into(), ..files.holding(1, "go") });
        let stopped = files.began(1).await[0];
        signal(stopped, Signal::SIGSTOP);
        files.make("go");
        for _ in 0..20 {
            assert_serves(&client, "hold").await;
        }
        let word = || {
            let copy = Copy::read(&server.segment()).expect("a segment");
            copy.in_use().into_iter().find_map(|(item, word)| (copy.id(item) == 1).then_some(word))
        };
        let (before, begin) = (word(), Instant::now());
        assert_eq!(before.map(|word| word.phase), Some(CLAIMED));
        while begin.elapsed() < stop() {
            assert_serves(&client, "hold").await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(!call.is_finished());
        assert_eq!(word(), before, "nothing of its is reclaimed");
        signal(stopped, Signal::SIGCONT);
        let result = answer(call).await.expect("a result");
        assert_eq!(result.attempts, 1, "nobody took it from who was only stopped");
        assert!(result.payload == pattern(1, 200_000));
        server.drain().await;
    });
}

#[test]
fn whoever_started_it_ignores_dead_children_is_no_matter() {
    run(async {
        // It comes over exec, and then the kernel reaps children by itself.
        let ignoring = |command: &Command| behind(&["env", "--ignore-signal=CHLD"], command);
        let name = unique_name();
        let parent = std::process::id().to_string();
        let pools = ["--pool", "echo:2=echo", "--pool", "run=exec:cat", "--parent", &parent];
        let server = Server::start(name.clone(), ignoring(&serve_command(&name, &pools)), Files::new()).await;
        for process in ["w0", "front"] {
            let pid = server.child(process).await;
            signal(pid, Signal::SIGKILL);
            server.successor(process, pid).await;
        }
        let client = server.client().await;
        assert_serves(&client, "echo").await;
        assert_serves(&client, "run").await;
        let log = server.drain().await;
        assert_eq!(log.matches("killed by SIGKILL").count(), 2, "{log}");

        // Before there is a port, a program is asked whether it can run the handler.
        let name = unique_name();
        let command = serve_command(&name, &["app:handle", "--python", "/bin/false"]);
        finish(ignoring(&command), b"").await.assert_failed(2, "cannot run `app:handle`");
    });
}
