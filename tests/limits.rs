//! Limits of a pool's workers: the time for an item, their memory, and how often they may die in a row.

mod common;

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    time::Duration,
};

use common::{
    Files, Server, assert_refused, assert_serves,
    audit::{Copy, DONE},
    cgroup::Cgroup,
    failure,
    health::Health,
    in_time,
    processes::{is_alive, is_stopped, signal},
    refusal, run, skip, soon, until,
};
use forkring::{
    client::Client,
    proto::v1::{WorkItem, WorkResult},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::task::JoinHandle;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

const TIMEOUT: (Code, &str) = (Code::DeadlineExceeded, "ITEM_TIMEOUT");
const CRASHED: (Code, &str) = (Code::Aborted, "WORKER_CRASHED");

fn spawn_call(client: &Client, item: WorkItem) -> JoinHandle<Result<WorkResult, Status>> {
    let client = client.clone();
    tokio::spawn(async move { client.call(item).await })
}

async fn answer(call: JoinHandle<Result<WorkResult, Status>>) -> Result<WorkResult, Status> {
    soon("an answer", call).await.expect("a task")
}

/// The timers that a process has for its workers' items, and when each is due: the kernel's words.
fn timers(pid: i32) -> Vec<String> {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).expect("a process");
    let is_timer = |fd: &PathBuf| fs::read_link(fd).is_ok_and(|to| to.as_os_str() == "anon_inode:[timerfd]");
    let timers = fds.filter_map(|fd| Some(fd.ok()?.path())).filter(is_timer);
    let due = |fd: PathBuf| {
        let info = fd.parent()?.with_file_name("fdinfo").join(fd.file_name()?);
        let text = fs::read_to_string(info).ok()?;
        Some(text.lines().find_map(|line| line.strip_prefix("it_value: "))?.to_owned())
    };
    timers.filter_map(due).collect()
}

#[test]
fn an_item_that_takes_too_long_is_tried_again_and_then_fails() {
    run(async {
        let attempt = async |time: Duration| {
            let (files, timeout) = (Files::new(), format!("item_timeout = '{time:?}'"));
            let server = Server::handlers(&["hold"], &format!("workers = 2\nmax_attempts = 2\n{timeout}")).await;
            let call = spawn_call(&server.client().await, files.holding(1, "never"));
            let says = format!("died: ended after --item-timeout {time:?}");
            assert_refused(refusal(answer(call).await), TIMEOUT, &says);
            // Who is not let run for that long is killed before it has said that it began.
            let pids = files.began(0).await;
            assert!(pids.len() <= 2, "two attempts and no more");
            (pids.len() == 2).then_some((server, pids))
        };
        let (server, pids) = in_time(Duration::from_millis(150), attempt).await;
        // Neither is there any more, and both were replaced.
        until("their end", || pids.iter().all(|pid| !is_alive(*pid)).then_some(())).await;
        server.family(2).await;
        let log = server.drain().await;
        assert_eq!(log.matches(") takes too long for its item 1: it is told to end").count(), 2, "{log}");
        let line = log.lines().find(|line| line.contains("takes too long")).expect("a line about the item");
        assert!(line.contains("(pool \"hold\", pid "), "{line}");
        assert_eq!(log.matches(") died: ended after --item-timeout").count(), 2, "{log}");
        assert!(!log.contains("SIGKILL"), "it would read like the OOM killer\n{log}");
    });
}

#[test]
fn an_item_that_hung_once_is_done_by_another_worker() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["hold"], "max_attempts = 255\nitem_timeout = '150ms'").await;
        let call = spawn_call(&server.client().await, files.holding(1, "go"));
        server.logged("ended after --item-timeout 150ms; its item 1 is retried (attempt 1 of 255)").await;
        files.make("go");
        assert!(answer(call).await.expect("a result").attempts >= 2);
        server.drain().await;
    });
}

#[test]
fn a_stopped_worker_is_over_its_time_like_any_other() {
    run(async {
        in_time(Duration::from_millis(300), async |time| {
            let files = Files::new();
            let server = Server::handlers(&["hold"], &format!("max_attempts = 255\nitem_timeout = '{time:?}'")).await;
            let call = spawn_call(&server.client().await, files.holding(1, "go"));
            let worker = files.began(1).await[0];
            // Its time may be over already.
            let _ = kill(Pid::from_raw(worker), Signal::SIGSTOP);
            let stopped = until("it to stop", || (is_stopped(worker) || !is_alive(worker)).then(|| is_stopped(worker)));
            let stopped = stopped.await;
            files.make("go");
            let result = answer(call).await.expect("a result");
            assert!(result.attempts > 1 && !is_alive(worker), "it was killed, stopped as it was");
            server.drain().await;
            stopped.then_some(())
        })
        .await;
    });
}

#[test]
fn a_worker_that_ends_its_item_in_the_grace_lives_on() {
    run(async {
        // The test has a second to say go; on a machine that takes longer, it is tried again.
        for _ in 0..20 {
            let files = Files::new();
            let server = Server::handlers(&["hold"], "item_timeout = '1s'").await;
            let client = server.client().await;
            let call = spawn_call(&client, files.holding(1, "go"));
            let worker = files.began(1).await[0];
            server.logged("takes too long for its item").await;
            files.make("go");
            let result = answer(call).await.expect("a result");
            if result.attempts > 1 {
                continue;
            }
            // What it does next is another item.
            let next = answer(spawn_call(&client, files.holding(2, "go"))).await.expect("a result");
            if next.attempts > 1 {
                continue;
            }
            server.logged("ended its item after all").await;
            assert_eq!(server.child("w0").await, worker, "it was not killed");
            let log = server.drain().await;
            assert!(!log.contains(") died: "), "{log}");
            return;
        }
        panic!("in no try the worker was let go in time");
    });
}

#[test]
fn a_program_is_told_to_end_and_takes_all_it_started_along() {
    run(async {
        let files = Files::new();
        let script = format!(
            "trap 'echo told >> {0}; exit 1' TERM; sh -c 'echo $$ >> {1}; exec sleep 1000' | sleep 1000 & wait",
            files.name("told"),
            files.name("pids"),
        );
        fs::write(files.path("script"), script).expect("a file");
        let pool = format!("run=exec:sh {}", files.name("script"));
        in_time(Duration::from_millis(500), async |time| {
            let before = files.lines("pids").len();
            let args = ["--pool", &pool, "--item-timeout", &format!("run={time:?}"), "--max-attempts", "1"];
            let server = Server::serve(&args).await;
            let call = spawn_call(&server.client().await, WorkItem::new("run", ""));
            assert_refused(refusal(answer(call).await), TIMEOUT, &format!("ended after --item-timeout {time:?}"));
            // In time both to begin and to say its last words.
            let started = files.lines("pids").get(before)?.parse().expect("a pid");
            until("the end of the pipeline", || (!is_alive(started)).then_some(())).await;
            let log = server.drain().await;
            assert!(log.contains(&format!("ended after --item-timeout {time:?}")), "{log}");
            (files.lines("told") == ["told"]).then_some(())
        })
        .await;
    });
}

#[test]
fn a_signal_that_is_not_the_supervisors_ends_no_program() {
    run(async {
        let files = Files::new();
        let script =
            format!("echo $PPID >> {0}; until [ -e {1} ]; do sleep 0.01; done", files.name("pids"), files.name("go"));
        fs::write(files.path("script"), script).expect("a file");
        let pool = format!("run=exec:sh {}", files.name("script"));
        let server = Server::serve(&["--pool", &pool]).await;
        let call = spawn_call(&server.client().await, WorkItem::new("run", ""));
        let worker = files.lines_of("pids", 1).await[0].parse().expect("a pid");
        // As a service manager does it, which then waits for the end of all.
        signal(worker, Signal::SIGTERM);
        files.make("go");
        assert_eq!(answer(call).await.expect("a result").attempts, 1);
        assert_eq!(server.child("w0").await, worker);
        server.drain().await;
    });
}

#[test]
fn timers_are_there_for_pools_with_a_timeout_only_and_set_only_at_work() {
    run(async {
        let pools = ["--pool", "a:3=echo", "--pool", "b:2=echo", "--pool", "c=sleep:1h"];
        let server = Server::serve(&pools).await;
        assert_serves(&server.client().await, "a").await;
        assert_eq!(timers(server.pid()), [""; 0]);
        server.drain().await;

        let limits = ["--item-timeout", "a=0", "--item-timeout", "1h", "--item-timeout", "c=2h"];
        let server = Server::serve(&[pools.as_slice(), limits.as_slice()].concat()).await;
        let client = server.client().await;
        for pool in ["a", "b"] {
            assert_serves(&client, pool).await;
        }
        assert_eq!(timers(server.pid()), ["(0, 0)"; 3], "two of b, one of c, none of a; nobody works");
        let call = spawn_call(&client, WorkItem::new("c", ""));
        // Longer than any of the others.
        let is_set = |due: &String| {
            let seconds = due.trim_start_matches('(').split(',').next().and_then(|text| text.parse().ok());
            seconds.is_some_and(|left: u64| (3600..7200).contains(&left))
        };
        until("a timer that is set", || timers(server.pid()).iter().any(is_set).then_some(())).await;
        call.abort();
    });
}

#[test]
fn a_worker_that_wants_too_much_memory_dies_of_it() {
    run(async {
        let server = Server::handlers(&["hog"], "worker_memory = '64MiB'\nmax_attempts = 2").await;
        let client = server.client().await;
        let hog = |mib: u32| client.call(WorkItem::new("hog", mib.to_string()));
        let enough = soon("an answer", hog(32)).await.expect("so much it may have");
        assert_eq!(enough.payload, (32_u32 << 20).to_string());
        assert_refused(refusal(soon("an answer", hog(1024)).await), CRASHED, "killed by SIGABRT");
        // The next worker has as much again.
        assert_eq!(soon("an answer", hog(32)).await.expect("a result").attempts, 1);
        server.drain().await;

        let server = Server::handlers(&["hog"], "").await;
        let result = server.client().await.call(WorkItem::new("hog", "256")).await.expect("there is no limit");
        assert_eq!(result.payload, (256_u32 << 20).to_string());
        server.drain().await;
    });
}

#[test]
fn who_the_kernel_kills_for_want_of_memory_died_like_any_other() {
    run(async {
        let Some(group) = Cgroup::with_memory(&common::server::unique_name(), 256 << 20) else {
            return skip("no memory cgroup can be made here, so no OOM killer for a test's server alone");
        };
        let server = Server::handlers(&["hog"], "max_attempts = 2").await;
        let client = server.client().await;
        let family = server.family(1).await;
        let front = server.child("front").await;
        // All of them, as in a container: who has most is killed, and that is who wanted too much.
        for pid in family.iter().map(|process| process.pid).chain([server.pid()]) {
            group.add(pid).expect("a cgroup of ours");
        }
        let hog = |mib: u32| client.call(WorkItem::new("hog", mib.to_string()));
        assert_refused(refusal(soon("an answer", hog(1024)).await), CRASHED, "killed by SIGKILL");
        // The next one works, and nobody else was harmed.
        assert_eq!(soon("an answer", hog(32)).await.expect("a result").attempts, 1);
        assert_eq!(server.child("front").await, front);
        let log = server.drain().await;
        assert_eq!(log.matches(") died: ").count(), 2, "{log}");
    });
}

#[test]
fn the_memory_of_programs_is_limited_too() {
    run(async {
        let pools = ["--pool", "free=exec:sh -c 'ulimit -d'", "--pool", "tight=exec:sh -c 'ulimit -d'"];
        let server = Server::serve(&[pools.as_slice(), &["--worker-memory", "tight=48MiB"]].concat()).await;
        let client = server.client().await;
        let mut limits = Vec::new();
        for pool in ["free", "tight"] {
            let result = soon("an answer", client.call(WorkItem::new(pool, ""))).await.expect("a result");
            limits.push(String::from_utf8(result.payload.into()).expect("text"));
        }
        assert_ne!(limits[0], limits[1]);
        assert_eq!(limits[1].trim(), (48 << 10).to_string(), "KiB");
        server.drain().await;
    });
}

#[test]
fn a_pool_in_a_crash_loop_does_not_serve_until_a_worker_stays_up() {
    run(async {
        let server = Server::serve(&["--pool", "bad=echo", "--pool", "good=echo"]).await;
        let health = Health::of(&server).await;
        let recovered = || server.log().contains("the pool serves again");
        let mut worker = 0;
        until_async("the verdict", async || {
            worker = server.successor("w0", worker).await;
            signal(worker, Signal::SIGKILL);
            until("its death", || (!is_alive(worker)).then_some(())).await;
            server.log().contains("the pool does not serve")
        })
        .await;
        // It is started again, and that is not enough.
        for _ in 0..2 {
            worker = server.successor("w0", worker).await;
            for _ in 0..20 {
                assert!(!health.serves("bad").await || recovered());
            }
            signal(worker, Signal::SIGKILL);
        }
        assert!(health.serves("good").await && health.serves("").await);
        // But to stay is.
        server.successor("w0", worker).await;
        server.logged("the pool serves again").await;
        health.until("bad", true).await;
        let log = server.drain().await;
        let verdict = log.lines().find(|line| line.contains("the pool does not serve")).expect("it was there");
        for says in
            ["ERROR", "pool=\"bad\"", "killed by SIGKILL", "soon after they start", "deaths_in_a_row=5", "next_try_in="]
        {
            assert!(verdict.contains(says), "`{verdict}` does not say {says}");
        }
        assert!(!log.contains("pool=\"good\""), "{log}");
    });
}

#[test]
fn who_dies_after_an_item_did_not_die_of_its_start() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo"]).await;
        let (client, health) = (server.client().await, Health::of(&server).await);
        let mut worker = 0;
        for id in 1..=12 {
            worker = server.successor("w0", worker).await;
            answer(spawn_call(&client, WorkItem::new("echo", "").with_id(id))).await.expect("a result");
            signal(worker, Signal::SIGKILL);
            until("its death", || (!is_alive(worker)).then_some(())).await;
        }
        server.successor("w0", worker).await;
        health.until("echo", true).await;
        let log = server.drain().await;
        assert_eq!(log.matches("restart_in=0ns").count(), 12, "{log}");
        assert!(!log.contains("does not serve"), "{log}");
    });
}

#[test]
fn a_death_of_an_item_is_no_failed_start() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["crash_until", "count"], "max_attempts = 3").await;
        let client = server.client().await;
        let poison = WorkItem::new("crash_until", "").with_metadata("until", files.name("never"));
        for id in 1..=2 {
            assert_refused(
                refusal(soon("an answer", client.call(poison.clone().with_id(id))).await),
                CRASHED,
                "SIGABRT",
            );
        }
        soon("an answer", client.call(WorkItem::new("crash_until", "").with_id(3))).await.expect("a result");
        let log = server.drain().await;
        assert_eq!(log.matches("restart_in=0ns").count(), 6, "{log}");
        assert_eq!(log.matches("died_of=\"item\"").count(), 6, "{log}");
        assert!(!log.contains("does not serve"), "{log}");
    });
}

#[test]
fn deaths_of_three_items_with_no_completion_between_them_are_the_handlers_own() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["crash_until", "count"], "max_attempts = 1").await;
        let (client, health) = (server.client().await, Health::of(&server).await);
        let poison = WorkItem::new("crash_until", "").with_metadata("until", files.name("never"));
        for id in 1..=3 {
            assert_refused(
                refusal(soon("an answer", client.call(poison.clone().with_id(id))).await),
                CRASHED,
                "SIGABRT",
            );
        }
        let verdict = server.logged("the pool does not serve").await;
        for says in ["ERROR", "pool=\"crash_until\"", "different items", "killed by SIGABRT", "next_try_in=50ms"] {
            assert!(verdict.contains(says), "`{verdict}` does not say {says}");
        }
        // It ends by itself, like a crash loop of starts.
        server.logged("the pool serves again").await;
        health.until("crash_until", true).await;
        soon("an answer", client.call(WorkItem::new("crash_until", ""))).await.expect("a result");
        server.drain().await;
    });
}

/// The same for what takes awaiting.
async fn until_async(what: &str, mut look: impl AsyncFnMut() -> bool) {
    let begin = std::time::Instant::now();
    while !look().await {
        assert!(begin.elapsed() < common::PATIENCE, "waited for {what}");
    }
}

#[test]
fn what_is_submitted_to_a_pool_in_a_crash_loop_waits_for_its_end() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["crash_until", "count"], "max_attempts = 255").await;
        let client = server.client().await;
        let health = Health::of(&server).await;
        let item = |id| WorkItem::new("crash_until", "").with_id(id).with_metadata("until", files.name("mended"));
        let submit = async |ids: std::ops::RangeInclusive<u64>| {
            let items: Vec<_> = ids.map(item).collect();
            let receipt = soon("a receipt", client.submit(tokio_stream::iter(items))).await.expect("a receipt");
            receipt.accepted
        };
        assert_eq!(submit(1..=3).await, 3);
        server.logged("the pool does not serve").await;
        health.until("crash_until", false).await;
        assert_eq!(submit(4..=5).await, 2);
        files.make("mended");
        let mut updates = soon("a stream", client.updates("", 5)).await.expect("a stream");
        let mut ids = Vec::new();
        while let Some(result) = soon("an update", updates.message()).await.expect("a stream") {
            ids.push(result.id);
            result.outcome().expect("a result");
        }
        ids.sort_unstable();
        assert_eq!(ids, [1, 2, 3, 4, 5]);
        health.until("crash_until", true).await;
        let log = server.drain().await;
        for once in ["the pool does not serve", "the pool serves again"] {
            assert_eq!(log.matches(once).count(), 1, "{log}");
        }
    });
}

const POOL_FAILING: (Code, &str) = (Code::Unavailable, "POOL_FAILING");

#[test]
fn calls_to_a_pool_in_a_crash_loop_are_refused() {
    run(async {
        let server = Server::handlers(&["program", "hold"], NO_WORKERS).await;
        let client = server.client().await;
        // One that comes before the pool is known to fail waits, until it is.
        let early = spawn_call(&client, WorkItem::new("program", "x"));
        let says = "the workers of pool `program` keep dying";
        assert_refused(refusal(answer(early).await), POOL_FAILING, says);
        server.logged("the pool does not serve").await;
        let late = answer(spawn_call(&client, WorkItem::new("program", "x"))).await;
        let status = late.as_ref().expect_err("it is refused");
        assert!(status.get_details_retry_info().is_some_and(|info| info.retry_delay.is_some()), "{status:?}");
        assert!(status.message().contains("log"), "{status:?}");
        assert_refused(refusal(late), POOL_FAILING, says);

        let items = [1, 2].map(|id| WorkItem::new("program", "x").with_id(id));
        let mut results = client.process(tokio_stream::iter(items)).await.expect("a stream");
        for _ in 0..2 {
            let result = soon("a result", results.message()).await.expect("a stream").expect("a result");
            assert_refused(failure(result), POOL_FAILING, says);
        }
        // Submitted items are accepted and wait, and other pools serve.
        submit(&client, 1..=2, Duration::from_secs(3600)).await;
        assert_serves(&client, "hold").await;
    });
}

#[test]
fn calls_to_a_pool_whose_zygote_keeps_dying_are_refused() {
    run(async {
        let files = Files::new();
        // An interpreter that can be asked about the handler, and that ends when it is to load it.
        let python = files.name("python");
        let script = "#!/bin/sh\nfor word; do [ \"$word\" = --check ] && exit 0; done\nexit 3\n";
        fs::write(&python, script).expect("a script");
        fs::set_permissions(&python, Permissions::from_mode(0o755)).expect("a script");
        let pools = ["--pool", "echo=echo", "--pool", "app:2=app:handle", "--preload", "--python", &python];
        let server = Server::serve(&pools).await;
        let client = server.client().await;
        // A call that comes before the pool is known to fail waits until it is.
        let early = answer(spawn_call(&client, WorkItem::new("app", "x"))).await;
        assert_refused(refusal(early), POOL_FAILING, "the workers of pool `app` keep dying");
        let verdict = server.logged("the pool does not serve").await;
        for says in
            ["ERROR", "pool=\"app\"", "its zygote dies soon after it starts", "exit code 3", "deaths_in_a_row=5"]
        {
            assert!(verdict.contains(says), "`{verdict}` does not say {says}");
        }
        let late = answer(spawn_call(&client, WorkItem::new("app", "x"))).await;
        assert_refused(refusal(late), POOL_FAILING, "the workers of pool `app` keep dying");
        assert_serves(&client, "echo").await;
        server.drain().await;
    });
}

/// Settings of a server whose pool `program` never has a worker: the loader lists what the program needs and ends it.
const NO_WORKERS: &str = "outbox = 4\nworker_env = { LD_TRACE_LOADED_OBJECTS = '1' }";

async fn submit(client: &Client, ids: std::ops::RangeInclusive<u64>, timeout: Duration) {
    let count = ids.clone().count() as u64;
    let items = ids.map(move |id| WorkItem::new("program", "x").with_id(id).with_timeout(timeout));
    let receipt = soon("a receipt", client.submit(tokio_stream::iter(items))).await.expect("a receipt");
    assert_eq!(receipt.accepted, count);
}

/// These and no others have expired; which are told of as they come.
async fn assert_expired(client: &Client, ids: std::ops::RangeInclusive<u64>) {
    let mut updates = soon("a stream", client.updates("", ids.clone().count() as u64)).await.expect("a stream");
    let mut expired = Vec::new();
    while let Some(result) = soon("an update", updates.message()).await.expect("a stream") {
        assert_eq!(result.attempts, 0);
        expired.push(result.id);
        let late = (Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
        assert_refused(failure(result), late, "the item's deadline has passed");
    }
    expired.sort_unstable();
    assert!(expired.iter().copied().eq(ids.clone()), "{ids:?}: {expired:?}");
}

#[test]
fn what_is_submitted_to_a_pool_without_workers_ends_by_its_deadline() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["program", "hold"], NO_WORKERS).await;
        server.logged("the pool does not serve").await;
        let client = server.client().await;
        // Many times as many as there is room for: they make room for each other.
        tokio::join!(submit(&client, 1..=20, Duration::from_millis(20)), assert_expired(&client, 1..=20));

        // Of these some have ended when the front is killed, which nobody has been told of, and some have not.
        submit(&client, 21..=22, Duration::ZERO).await;
        until("their end in shared memory", || {
            let ended = Copy::read(&server.segment()).expect("a segment").in_use();
            (ended.len() == 2 && ended.values().all(|word| word.phase == DONE)).then_some(())
        })
        .await;
        submit(&client, 23..=24, Duration::from_millis(500)).await;
        let front = server.child("front").await;
        signal(front, Signal::SIGKILL);
        server.successor("front", front).await;
        let client = server.client().await;
        assert_expired(&client, 21..=24).await;

        // The same of the whole server.
        submit(&client, 25..=26, Duration::ZERO).await;
        submit(&client, 27..=28, Duration::from_millis(500)).await;
        let left = server.kill().await;
        let server = Server::handlers_as(&left.name, &["program", "hold"], NO_WORKERS).await;
        let client = server.client().await;
        assert_expired(&client, 25..=28).await;

        // A drain waits for their end, and not longer.
        submit(&client, 29..=29, Duration::from_millis(500)).await;
        files.make("go");
        soon("an answer", client.call(files.holding(1, "go"))).await.expect("a result");
        let log = server.drain().await;
        assert!(log.contains("results that no subscriber fetched are gone results=1"), "{log}");
    });
}

#[test]
fn what_workers_cannot_have_is_refused() {
    run(async {
        for (args, says) in [
            (["--preload", "--fresh"], "preload is for handlers in Python, MODULE:FUNCTION, and there is none"),
            (["--item-timeout", "b=1s"], "--item-timeout b=…: there is no pool `b`"),
            (["--item-timeout", "soon"], "`soon` is not a duration"),
            (["--worker-memory", "a=1x"], "`1x` is not a size"),
            (["--worker-memory", "1MiB"], "pool a has a worker_memory of 1MiB: give its workers at least 8MiB"),
            (["--worker-env", "b:A=1"], "--worker-env b:A=…: there is no pool `b`"),
            (["--worker-env", "A"], "`A` is not a variable: give [POOL:]NAME=VALUE"),
            (["--affinity", "b=auto"], "--affinity b=…: there is no pool `b`"),
            (["--affinity", "3-1"], "`3-1` is not an affinity: give auto, off, or CPUs such as 0-3,8"),
            (["--affinity", "1023"], "pool a: affinity names CPU 1023, but this process may use only "),
        ] {
            let name = common::server::unique_name();
            let mut command = common::server::serve_command(&name, &["--pool", "a=echo"]);
            command.args(args);
            common::program::finish(command, b"").await.assert_failed(2, says);
        }
    });
}
