//! A server that is killed and started again finishes what it had accepted, and repeats nothing that was completed.

mod common;

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    os::unix::fs::FileExt as _,
    process::{Child, Stdio},
    time::Duration,
};

use bytes::Bytes;
use common::{
    Files, Server, assert_refused, assert_serves, failure,
    processes::{children, signal},
    program::{Killed, Outcome, finish},
    raw::{Raw, framed},
    run,
    server::{Left, serve_command, unique_name},
    soon, until,
};
use forkring::{
    client::Client,
    proto::v1::{self, WorkItem, WorkResult},
};
use nix::sys::signal::Signal;
use tokio::task::JoinHandle;
use tonic::Code;

/// Accepts all of these.
async fn submit(client: &Client, items: impl IntoIterator<Item = WorkItem>) {
    let items: Vec<_> = items.into_iter().collect();
    let count = items.len() as u64;
    let receipt = soon("a receipt", client.submit(tokio_stream::iter(items))).await.expect("a receipt");
    assert_eq!((receipt.accepted, receipt.rejected), (count, 0));
}

/// So many updates, each id of which comes once: the attempts it took.
async fn updates(client: &Client, count: usize) -> BTreeMap<u64, u32> {
    let mut updates = soon("a stream", client.updates("s", count as u64)).await.expect("a stream");
    let mut all = BTreeMap::new();
    while let Some(result) = soon("an update", updates.message()).await.expect("an open stream") {
        let (id, attempts) = (result.id, result.attempts);
        assert_eq!(result.outcome().map(|bytes| bytes == payload(id)), Ok(true), "{id}");
        assert_eq!(all.insert(id, attempts), None, "{id} came twice");
    }
    assert_eq!(all.len(), count);
    all
}

/// Ends a server whose results have all been fetched.
async fn drain(server: Server) {
    assert_serves(&server.client().await, "hold").await;
    let log = server.drain().await;
    assert!(!log.contains("results that no subscriber fetched"), "{log}");
}

fn payload(id: u64) -> Bytes {
    let len = [3, 64, 2000, 20_000][id as usize % 4];
    (0..len).map(|at| (at * (id + 3) % 251) as u8).collect()
}

/// An item that its worker holds until there is a file of that name.
fn held(files: &Files, id: u64, until: &str) -> WorkItem {
    WorkItem { payload: payload(id), ..files.holding(id, until).with_subscription("s") }
}

fn spawn_call(client: &Client, item: WorkItem) -> JoinHandle<Result<WorkResult, tonic::Status>> {
    let client = client.clone();
    tokio::spawn(async move { client.call(item).await })
}

/// How often each item began.
fn begun(files: &Files) -> BTreeMap<u64, u32> {
    let mut begun = BTreeMap::new();
    for line in files.lines("journal") {
        let id = line.split(' ').next().and_then(|id| id.parse().ok());
        *begun.entry(id.expect("a line of the handler's")).or_insert(0) += 1;
    }
    begun
}

/// The next server of a name, with the same light settings.
async fn next(left: &Left, args: &[&str]) -> Server {
    Server::start(left.name.clone(), serve_command(&left.name, args), Files::new()).await
}

async fn refused(left: &Left, args: &[&str], says: &str) -> Outcome {
    let before = fs::read(left.segment()).expect("the segment");
    let outcome = finish(serve_command(&left.name, args), b"").await;
    outcome.assert_failed(2, says);
    assert!(fs::read(left.segment()).expect("the segment") == before, "nothing was changed in it");
    outcome
}

/// A killed server of the pool `echo` that has three results for the subscription `s`.
async fn killed_with_three_results() -> Left {
    let server = Server::serve(&["--pool", "echo=echo"]).await;
    let client = server.client().await;
    submit(&client, (1..=3).map(|id| WorkItem::new("echo", payload(id)).with_id(id).with_subscription("s"))).await;
    // The one worker takes them in their order.
    assert_serves(&client, "echo").await;
    server.kill().await
}

#[test]
fn what_was_accepted_is_finished_and_what_was_done_is_not_repeated() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["hold"], "workers = 2").await;
        let client = server.client().await;
        files.make("past");
        submit(&client, (1..=4).map(|id| held(&files, id, "past"))).await;
        files.began(4).await;
        // Each of the two workers has one of these, so all before are done.
        submit(&client, [held(&files, 10, "go")]).await;
        let call = spawn_call(&client, files.holding(100, "go"));
        files.began(6).await;
        submit(&client, (11..=20).map(|id| held(&files, id, "go"))).await;
        // A call that nobody has taken yet, but that has been accepted.
        let mut raw = Raw::connect(&server).await;
        let mut waiting = raw.begin("Call", &[]).await;
        waiting.body.send_data(framed(&files.holding(101, "go")), true).expect("an open stream");
        raw.settled().await;
        let pid = server.pid();
        let left = server.kill().await;
        soon("an answer", call).await.expect("a task").expect_err("nobody is there");

        let server = Server::handlers_as(&left.name, &["hold"], "workers = 2").await;
        let line = server.logged("adopted what a dead server left behind").await;
        assert!(line.contains(&format!("pid={pid} pending=11 done=4")), "{line}");
        files.make("go");
        let client = server.client().await;
        let attempts = updates(&client, 15).await;
        let wanted = (1..=4).chain(10..=20).map(|id| (id, if id == 10 { 2 } else { 1 }));
        assert_eq!(attempts, wanted.clone().collect());
        drain(server).await;
        // The claimed one had begun before. Of the calls one had, and neither did again.
        let mut wanted: BTreeMap<_, _> = wanted.collect();
        wanted.insert(100, 1);
        let mut begun = begun(&files);
        begun.remove(&7);
        assert_eq!(begun, wanted);
    });
}

#[test]
fn default_sizes_are_those_of_what_was_left() {
    run(async {
        let sizes = ["--arena", "3MiB", "--max-message", "1MiB"];
        let server = Server::serve(&[&["--pool", "echo=echo"], &sizes[..]].concat()).await;
        let client = server.client().await;
        submit(&client, (1..=3).map(|id| WorkItem::new("echo", payload(id)).with_id(id).with_subscription("s"))).await;
        assert_serves(&client, "echo").await;
        let left = server.kill().await;
        let with_defaults = |args: &[&str]| {
            let mut command = serve_command(&left.name, args);
            ["FORKRING_ARENA", "FORKRING_MAX_MESSAGE"].iter().for_each(|variable| _ = command.env_remove(variable));
            command
        };
        // A configured largest message that does not fit, and a configured arena, are not overridden.
        for (args, says) in [
            (["--pool", "echo=echo", "--max-message", "3MiB"], "served with --arena 3MiB, not "),
            (["--pool", "echo=echo", "--arena", "4MiB"], "served with --arena 3MiB, not 4MiB"),
        ] {
            finish(with_defaults(&args), b"").await.assert_failed(2, says);
        }
        let server = Server::start(left.name.clone(), with_defaults(&["--pool", "echo=echo"]), Files::new()).await;
        server.logged("adopted what a dead server left behind").await;
        let client = server.client().await;
        updates(&client, 3).await;
        // Its largest message follows from the arena of the adopted segment.
        let item = |bytes| WorkItem::new("echo", vec![1; bytes]);
        soon("an answer", client.call(item(2 << 20))).await.expect("a result");
        let error = soon("an answer", client.call(item(3 << 20))).await.expect_err("too large");
        assert_eq!(v1::Status::from(&error).reason, "MESSAGE_TOO_LARGE");
        server.drain().await;
    });
}

#[test]
fn a_chain_of_kills_keeps_the_order_and_fails_nothing() {
    run(async {
        let files = Files::new();
        let mut server = Server::handlers(&["hold"], "max_attempts = 2").await;
        submit(&server.client().await, (1..=9).map(|id| held(&files, id, "go"))).await;
        // Removed last, whatever happens.
        let mut all_left = Vec::new();
        for kills in 1..=3 {
            files.began(kills).await;
            let left = server.kill().await;
            server = Server::handlers_as(&left.name, &["hold"], "max_attempts = 2").await;
            all_left.push(left);
        }
        files.began(4).await;
        files.make("go");
        let attempts = updates(&server.client().await, 9).await;
        let wanted = (1..=9).map(|id| (id, if id == 1 { 4 } else { 1 }));
        assert_eq!(attempts, wanted.collect());
        drain(server).await;
        let order: Vec<_> =
            files.lines("journal").iter().map(|line| line.split(' ').next().unwrap_or("").to_owned()).collect();
        assert_eq!(order, ["1", "1", "1", "1", "2", "3", "4", "5", "6", "7", "8", "9"]);
    });
}

/// Of these the one whose deadline has passed comes first, although its worker has another in hand.
async fn assert_expired(server: &Server, id: u64) {
    let mut updates = soon("a stream", server.client().await.updates("s", 1)).await.expect("a stream");
    let result = soon("an update", updates.message()).await.expect("an open stream").expect("an update");
    assert_eq!((result.id, result.attempts), (id, 0));
    assert_refused(failure(result), (Code::DeadlineExceeded, "DEADLINE_EXCEEDED"), "the item's deadline has passed");
}

#[test]
fn deadlines_pass_for_the_next_front_and_for_the_next_server() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["hold"], "").await;
        let short = |id| held(&files, id, "go").with_timeout(Duration::from_millis(500));
        submit(&server.client().await, [held(&files, 1, "go")]).await;
        files.began(1).await;
        submit(&server.client().await, [short(2)]).await;
        let front = server.child("front").await;
        signal(front, Signal::SIGKILL);
        server.successor("front", front).await;
        assert_expired(&server, 2).await;

        submit(&server.client().await, [short(3)]).await;
        let left = server.kill().await;
        let server = Server::handlers_as(&left.name, &["hold"], "").await;
        assert_expired(&server, 3).await;
        files.make("go");
        assert_eq!(updates(&server.client().await, 1).await, [(1, 2)].into());
        drain(server).await;
        let begun = begun(&files);
        assert!(!begun.contains_key(&2) && !begun.contains_key(&3), "{begun:?}");
    });
}

#[test]
fn a_server_that_is_killed_while_it_drains_serves_the_next_time() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["hold"], "").await;
        submit(&server.client().await, (1..=3).map(|id| held(&files, id, "go"))).await;
        files.began(1).await;
        server.signal(Signal::SIGTERM);
        server.logged("draining").await;
        let left = server.kill().await;
        let server = Server::handlers_as(&left.name, &["hold"], "").await;
        files.make("go");
        let client = server.client().await;
        assert_serves(&client, "hold").await;
        assert_eq!(updates(&client, 3).await, [(1, 2), (2, 1), (3, 1)].into());
        drain(server).await;
    });
}

#[test]
fn a_drain_that_is_cut_short_leaves_submitted_items_to_the_next() {
    run(async {
        let files = Files::new();
        let mut server = Server::handlers(&["hold"], "").await;
        submit(&server.client().await, (1..=3).map(|id| held(&files, id, "go"))).await;
        files.began(1).await;
        server.signal(Signal::SIGTERM);
        server.logged("draining").await;
        server.signal(Signal::SIGTERM);
        assert_eq!(server.ended().await.code(), Some(1));
        server.logged("submitted items stay in shared memory").await;
        let left = server.leave();
        let server = Server::handlers_as(&left.name, &["hold"], "").await;
        files.make("go");
        assert_eq!(updates(&server.client().await, 3).await, [(1, 2), (2, 1), (3, 1)].into());
        drain(server).await;
    });
}

#[test]
fn other_settings_are_refused_and_the_same_are_not() {
    run(async {
        let left = killed_with_three_results().await;
        for (args, says) in [
            (&["--pool", "echo=echo", "--capacity", "128"][..], "--capacity 256, not 128."),
            (&["--pool", "echo=echo", "--arena", "2MiB"], "--arena 1MiB, not 2MiB."),
            (&["--pool", "echo:2=echo"], "the pools and workers echo:1, not echo:2."),
            (&["--pool", "other=echo"], "the pools and workers echo:1, not other:1."),
            (&["--pool", "echo=echo", "--pool", "b=echo"], "the pools and workers echo:1, not echo:1 b:1."),
        ] {
            let outcome = refused(&left, args, says).await;
            assert!(outcome.stderr.contains("or with --fresh to throw it away"), "{}", outcome.stderr);
        }
        // What else differs does not matter: handlers may be mended.
        let server = next(&left, &["--pool", "echo=sha256", "--max-message", "256KiB", "--outbox", "1"]).await;
        assert_eq!(updates(&server.client().await, 3).await, [(1, 1), (2, 1), (3, 1)].into());
        server.drain().await;
    });
}

#[test]
fn another_format_is_refused_and_thrown_away_on_demand() {
    run(async {
        let left = killed_with_three_results().await;
        let file = OpenOptions::new().write(true).open(left.segment()).expect("the segment");
        // Behind the magic number.
        file.write_all_at(&999_u32.to_ne_bytes(), 8).expect("the segment");
        refused(&left, &["--pool", "echo=echo"], "another version of forkring (segment format 999;").await;
        let server = next(&left, &["--pool", "echo=echo", "--fresh"]).await;
        server.logged("threw away the segment that a dead server left behind").await;
        assert_serves(&server.client().await, "echo").await;
        server.drain().await;
    });
}

#[test]
fn fresh_throws_away_what_was_left() {
    run(async {
        let files = Files::new();
        fs::write(files.path("settings.toml"), "fresh = true").expect("a file");
        let config = files.name("settings.toml");
        for (args, variable) in [(&["--fresh"][..], None), (&[], Some("1")), (&["--config", &config], None)] {
            let left = killed_with_three_results().await;
            // Other pools, too.
            let mut command = serve_command(&left.name, &["--pool", "hold:2=echo"]);
            command.args(args);
            if let Some(value) = variable {
                command.env("FORKRING_FRESH", value);
            }
            let server = Server::start(left.name.clone(), command, Files::new()).await;
            server.logged("threw away the segment that a dead server left behind").await;
            let client = server.client().await;
            submit(&client, [WorkItem::new("hold", payload(9)).with_id(9).with_subscription("s")]).await;
            assert_eq!(updates(&client, 1).await, [(9, 1)].into());
            drain(server).await;
        }
        // A flag goes over the file, as always.
        let left = killed_with_three_results().await;
        let server = next(&left, &["--pool", "echo=echo", "--config", &config, "--fresh=false"]).await;
        updates(&server.client().await, 3).await;
        server.drain().await;
    });
}

#[test]
fn one_that_was_half_made_is_made_anew() {
    run(async {
        let left = Left { name: unique_name() };
        let file = File::create(left.segment()).expect("a file in /dev/shm");
        file.set_len(1 << 16).expect("a file in /dev/shm");
        let server = next(&left, &["--pool", "hold=echo"]).await;
        server.logged("its maker had died before it was ready").await;
        drain(server).await;
    });
}

#[test]
fn a_server_waits_for_the_last_of_the_dead_one() {
    run(async {
        let left = killed_with_three_results().await;
        // As a child does that takes its time to die.
        let last = File::open(left.segment()).expect("the segment");
        until("the end of all children", || last.try_lock_shared().ok()).await;
        let mut command = serve_command(&left.name, &["--pool", "echo=echo"]);
        let output = Files::new();
        let file = |name| File::create(output.path(name)).expect("a file");
        command.stdin(Stdio::null()).stdout(file("stdout")).stderr(file("stderr"));
        let mut server = Killed(command.spawn().expect("the program"));
        let said = || fs::read_to_string(output.path("stderr")).unwrap_or_default();
        until("it to wait", || said().contains("waiting for the processes of a dead server").then_some(())).await;
        assert!(!said().contains("adopted"));
        drop(last);
        until("the adoption", || said().contains("pending=0 done=3").then_some(())).await;
        let pid = server.0.id() as i32;
        until("front and worker", || (children(pid).len() == 2).then_some(())).await;
        signal(pid, Signal::SIGTERM);
        assert_eq!(until("its end", || server.0.try_wait().expect("our child")).await.code(), Some(0));
        assert!(!left.segment().exists());
    });
}

#[test]
fn of_two_that_start_at_once_one_wins() {
    run(async {
        for round in 0..8 {
            // There is something to adopt, or not.
            let left = if round % 2 == 0 { killed_with_three_results().await } else { Left { name: unique_name() } };
            let output = Files::new();
            let start = |number: u32| {
                let mut command = serve_command(&left.name, &["--pool", "echo=echo"]);
                let file = |kind| File::create(output.path(&format!("{kind}{number}"))).expect("a file");
                command.stdin(Stdio::null()).stdout(file("stdout")).stderr(file("stderr"));
                Killed(command.spawn().expect("the program"))
            };
            let mut racers = [start(0), start(1)];
            let ended = |racers: &mut [Killed; 2]| {
                let mut codes = racers.iter_mut().map(|one: &mut Killed| one.0.try_wait().expect("our child"));
                codes.position(|code| code.is_some())
            };
            let loser = until("one to give up", || ended(&mut racers)).await;
            let said = fs::read_to_string(output.path(&format!("stderr{loser}"))).expect("a file");
            assert!(said.contains("is in use by a live server"), "{said}");
            let [first, second] = &mut racers;
            let (loser, winner): (&mut Child, &mut Child) =
                if loser == 0 { (&mut first.0, &mut second.0) } else { (&mut second.0, &mut first.0) };
            assert_eq!(loser.wait().expect("our child").code(), Some(2));
            let pid = winner.id() as i32;
            assert!(said.contains(&format!("(pid {pid})")), "{said}");
            until("front and worker", || (children(pid).len() == 2).then_some(())).await;
            signal(pid, Signal::SIGTERM);
            assert_eq!(until("its end", || winner.try_wait().expect("our child")).await.code(), Some(0));
            assert!(!left.segment().exists());
        }
    });
}

/// Starts a server of this name that kills itself at a point, and waits for its end.
#[cfg(feature = "crash-points")]
async fn crash(left: &Left, args: &[&str], point: &str) {
    let mut command = serve_command(&left.name, args);
    command.env("FORKRING_CRASH", format!("supervisor/{point}"));
    let outcome = finish(command, b"").await;
    assert_eq!(outcome.code, None, "{point} was not passed: {}", outcome.stderr);
}

#[cfg(feature = "crash-points")]
#[test]
fn an_adoption_that_dies_at_any_step_is_made_again() {
    run(async {
        let files = Files::new();
        let script = format!(
            "hold=exec:sh -c 'echo began >> {}; until [ -e {} ]; do sleep 0.01; done; cat'",
            files.name("journal"),
            files.name("go")
        );
        let pools = ["--pool", "echo=echo", "--pool", &script];
        let server = Server::serve(&pools).await;
        let client = server.client().await;
        let item = |pool: &str, id| WorkItem::new(pool, payload(id)).with_id(id).with_subscription("s");
        submit(&client, (1..=3).map(|id| item("echo", id))).await;
        assert_serves(&client, "echo").await;
        submit(&client, (11..=14).map(|id| item("hold", id))).await;
        files.lines_of("journal", 1).await;
        let mut raw = Raw::connect(&server).await;
        let mut waiting = raw.begin("Call", &[]).await;
        waiting.body.send_data(framed(&WorkItem::new("hold", "x")), true).expect("an open stream");
        raw.settled().await;

        let left = server.kill().await;
        // In the order in which they are passed, so that each is there to be passed.
        for point in [
            "segment.made:1",
            "segment.locked:1",
            "segment.reserved:1",
            "adopt.owned:1",
            "adopt.reset:1",
            "adopt.closed:1",
            "adopt.staged:1",
            "adopt.requeued:1",
            "adopt.settled:1",
        ] {
            crash(&left, &pools, point).await;
        }
        let server = next(&left, &pools).await;
        server.logged("pending=4 done=3").await;
        files.make("go");
        let wanted = [(1, 1), (2, 1), (3, 1), (11, 2), (12, 1), (13, 1), (14, 1)];
        assert_eq!(updates(&server.client().await, 7).await, wanted.into());
        assert_eq!(files.lines("journal").len(), 5, "the call did not begin");
        server.drain().await;
    });
}

#[cfg(feature = "crash-points")]
#[test]
fn a_segment_whose_maker_dies_at_any_step_is_made_anew() {
    run(async {
        let pools = ["--pool", "hold=echo"];
        for fresh in [false, true] {
            let left = if fresh { killed_with_three_results().await } else { Left { name: unique_name() } };
            let args: Vec<_> = pools.into_iter().chain(fresh.then_some("--fresh")).collect();
            for point in [
                "segment.made:1",
                "segment.locked:1",
                "segment.sized:1",
                "segment.sized:2",
                "segment.reserved:1",
                "segment.filled:1",
                "segment.formatted:1",
            ] {
                crash(&left, &args, point).await;
            }
            let server = next(&left, &pools).await;
            let client = server.client().await;
            submit(&client, [WorkItem::new("hold", payload(9)).with_id(9).with_subscription("s")]).await;
            assert_eq!(updates(&client, 1).await, [(9, 1)].into());
            drain(server).await;
        }
    });
}
