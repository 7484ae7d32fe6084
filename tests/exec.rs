//! `exec:COMMAND`: any program is a worker. It may do what it likes, and its worker is well afterwards.

mod common;

use std::{fs, time::Duration};

use common::{
    Files, Server, assert_refused, in_time,
    processes::{is_alive, signal},
    refusal, run, soon, until,
};
use forkring::{client::Client, proto::v1::WorkItem};
use nix::sys::signal::Signal;
use tonic::Code;

const FAILED: (Code, &str) = (Code::Internal, "EXEC_FAILED");

async fn serve(command: &str) -> (Server, Client) {
    let server = Server::serve(&["--pool", &format!("run=exec:{command}")]).await;
    let client = server.client().await;
    (server, client)
}

/// What a program makes of this.
async fn call(client: &Client, payload: &[u8]) -> Result<Vec<u8>, (Code, String, String)> {
    match soon("an answer", client.call(WorkItem::new("run", payload.to_vec()))).await {
        Ok(result) => Ok(result.payload.into()),
        Err(status) => Err(refusal::<()>(Err(status))),
    }
}

fn failure(answer: Result<Vec<u8>, (Code, String, String)>) -> (Code, String, String) {
    answer.expect_err("this must fail")
}

/// The pids that programs wrote to a file of theirs.
async fn pids(files: &Files, name: &str, count: usize) -> Vec<i32> {
    let lines = files.lines_of(name, count).await;
    lines.iter().map(|line| line.trim().parse().expect("a pid")).collect()
}

async fn gone(pids: &[i32]) {
    until("the end of all programs", || pids.iter().all(|pid| !is_alive(*pid)).then_some(())).await;
}

#[test]
fn the_item_is_its_stdin_and_the_result_its_stdout() {
    run(async {
        let (server, client) = serve("tr a-z A-Z").await;
        for len in [0, 5, 100, 100_000, 400_000] {
            let payload = b"shout".repeat(len / 5);
            assert_eq!(call(&client, &payload).await, Ok(payload.to_ascii_uppercase()), "{len}");
        }
        server.drain().await;
    });
}

#[test]
fn words_are_split_as_by_a_shell() {
    run(async {
        let (server, client) = serve("printf '[%s]' one 'two words' \"it's\" '' a\"b c\"d").await;
        assert_eq!(call(&client, b"").await, Ok(b"[one][two words][it's][][ab cd]".to_vec()));
        server.drain().await;
    });
}

#[test]
fn a_program_need_not_read_before_it_writes_nor_at_all() {
    run(async {
        let much = vec![b'x'; 300_000];
        let (server, client) = serve("sh -c 'head -c 200000 /dev/zero; cat'").await;
        assert_eq!(call(&client, &much).await, Ok([vec![0; 200_000], much.clone()].concat()));
        server.drain().await;
        let (server, client) = serve("true").await;
        assert_eq!(call(&client, &much).await, Ok(Vec::new()));
        server.drain().await;
        // Nor need it wait with the one for the end of the other.
        let (server, client) = serve("sh -c 'cat | cat >&2; echo done'").await;
        assert_eq!(call(&client, &much).await, Ok(b"done\n".to_vec()));
        server.drain().await;
    });
}

#[test]
fn a_program_that_fails_says_why_on_stderr() {
    run(async {
        let (server, client) = serve("sh -c 'echo half a result; cat >&2; exit 3'").await;
        let answer = call(&client, b"no such thing\n").await;
        assert_refused(failure(answer), FAILED, "`sh` ended with exit status: 3: no such thing");
        assert_refused(failure(call(&client, b"").await), FAILED, "`sh` ended with exit status: 3");
        // Of much, the end.
        let log = [&b"line\n".repeat(50_000)[..], "at last: \u{fffd}ä".as_bytes()].concat();
        let (code, reason, message) = failure(call(&client, &log).await);
        assert_eq!((code, reason.as_str()), FAILED);
        assert!(message.ends_with("line\nat last: \u{fffd}ä") && message.len() < 1500, "{:?}", &message[900..]);
        server.drain().await;

        let (server, client) = serve("sh -c 'kill -9 $$'").await;
        assert_refused(failure(call(&client, b"").await), FAILED, "signal: 9 (SIGKILL)");
        server.drain().await;
    });
}

#[test]
fn a_program_that_is_gone_is_its_items_failure() {
    run(async {
        let files = Files::new();
        let program = files.name("program");
        std::fs::copy("/bin/true", &program).expect("a copy");
        let (server, client) = serve(&program).await;
        std::fs::remove_file(&program).expect("its end");
        let wanted = (Code::FailedPrecondition, "EXEC_FAILED");
        assert_refused(failure(call(&client, b"x").await), wanted, &format!("cannot run `{program}`"));
        server.drain().await;
    });
}

#[test]
fn a_program_that_writes_without_end_is_stopped() {
    run(async {
        let files = Files::new();
        let (server, client) = serve(&format!("sh -c 'echo $$ >> {}; exec yes'", files.name("pids"))).await;
        for _ in 0..3 {
            let wanted = (Code::ResourceExhausted, "RESULT_TOO_LARGE");
            assert_refused(failure(call(&client, b"").await), wanted, "--max-message");
        }
        gone(&pids(&files, "pids", 3).await).await;
        server.drain().await;
    });
}

#[test]
fn a_result_may_be_as_large_as_a_message() {
    run(async {
        // Just as much arena as one such result needs.
        let server = Server::serve(&["--pool", "run=exec:head -c 524288 /dev/zero", "--arena", "576KiB"]).await;
        let client = server.client().await;
        for _ in 0..3 {
            assert_eq!(call(&client, b"").await.map(|result| result.len()), Ok(524_288));
        }
        server.drain().await;
    });
}

#[test]
fn a_program_whose_time_is_over_is_killed_with_all_that_it_started() {
    run(async {
        let files = Files::new();
        // A child of its own, which has its stdout. Its item is where to tell of both.
        let (server, client) = serve("sh -c 'read f; echo $$ >> $f; sleep 1000 & echo $! >> $f; wait'").await;
        let item = |file: &str| WorkItem::new("run", files.name(file) + "\n");
        let expired = (Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
        let file = in_time(Duration::from_millis(200), async |time| {
            let file = format!("{time:?}");
            let answer = soon("an answer", client.call(item(&file).with_timeout(time))).await;
            assert_refused(refusal(answer), expired, "the item's deadline has passed");
            (files.lines(&file).len() == 2).then_some(file)
        });
        gone(&pids(&files, &file.await, 2).await).await;

        let call = tokio::spawn({
            let (client, item) = (client.clone(), item("pids"));
            async move { client.call(item).await }
        });
        let programs = pids(&files, "pids", 2).await;
        assert!(programs.iter().all(|pid| is_alive(*pid)));
        call.abort();
        gone(&programs).await;
        server.drain().await;
    });
}

#[test]
fn a_program_that_has_closed_its_output_is_killed_like_any_other() {
    run(async {
        let files = Files::new();
        // A child of its own, which only its group tells of.
        let script = "exec >&- 2>&-; echo $$ >> {0}; sleep 1000 & echo $! >> {0}; wait";
        fs::write(files.path("script"), script.replace("{0}", &files.name("pids"))).expect("a file");
        let pool = format!("run=exec:sh {}", files.name("script"));
        let server = Server::serve(&["--pool", &pool]).await;
        let client = server.client().await;
        let call = tokio::spawn({
            let client = client.clone();
            async move { client.call(WorkItem::new("run", "")).await }
        });
        let programs = pids(&files, "pids", 2).await;
        call.abort();
        gone(&programs).await;
        server.drain().await;

        in_time(Duration::from_millis(500), async |time| {
            let before = files.lines("pids").len();
            let timeout = format!("{time:?}");
            let server = Server::serve(&["--pool", &pool, "--item-timeout", &timeout, "--max-attempts", "1"]).await;
            let answer = soon("an answer", server.client().await.call(WorkItem::new("run", ""))).await;
            let says = format!("ended after --item-timeout {timeout}");
            assert_refused(refusal(answer), (Code::DeadlineExceeded, "ITEM_TIMEOUT"), &says);
            let programs = pids(&files, "pids", before).await;
            gone(&programs).await;
            server.drain().await;
            (programs.len() == before + 2).then_some(())
        })
        .await;
    });
}

#[test]
fn a_program_gets_all_of_its_item_whatever_it_has_closed() {
    run(async {
        let files = Files::new();
        let script = format!("exec >&- 2>&-; cat > {0}; exit 3", files.name("copy"));
        fs::write(files.path("script"), script).expect("a file");
        let (server, client) = serve(&format!("sh {}", files.name("script"))).await;
        let payload = b"all of it".repeat(50_000);
        assert_refused(failure(call(&client, &payload).await), FAILED, "`sh` ended with exit status: 3");
        assert!(fs::read(files.path("copy")).expect("a file") == payload);
        server.drain().await;
    });
}

#[test]
fn a_program_dies_with_its_worker() {
    run(async {
        let files = Files::new();
        let (server, client) = serve(&format!("sh -c 'echo $$ >> {}; exec sleep 1000'", files.name("pids"))).await;
        let call = tokio::spawn(async move { client.call(WorkItem::new("run", "")).await });
        let first = pids(&files, "pids", 1).await;
        signal(server.child("w0").await, Signal::SIGKILL);
        gone(&first).await;
        // The item is given to the next worker, which starts the program anew.
        let both = pids(&files, "pids", 2).await;
        call.abort();
        gone(&both).await;
        server.drain().await;
    });
}

#[test]
fn a_program_gets_the_signals_that_it_is_sent() {
    run(async {
        // Workers block some, and what they start must not.
        let (server, client) = serve("sh -c 'grep SigBlk /proc/self/status'").await;
        let mask = String::from_utf8(call(&client, b"").await.expect("a result")).expect("text");
        assert_eq!(mask, "SigBlk:\t0000000000000000\n");
        server.drain().await;
        let (server, client) = serve("sh -c 'kill -TERM $$; echo still here'").await;
        assert_refused(failure(call(&client, b"").await), FAILED, "signal: 15 (SIGTERM)");
        server.drain().await;
    });
}

#[test]
fn a_program_has_no_business_with_the_server() {
    run(async {
        // Neither segment nor doorbells nor the others' pidfds.
        let (server, client) = serve("sh -c 'ls -l /proc/self/fd; cat /proc/self/maps'").await;
        let open = String::from_utf8(call(&client, b"").await.expect("a result")).expect("text");
        assert!(open.contains("pipe:") && open.contains("[heap]"), "{open}");
        assert!(!open.contains("anon_inode") && !open.contains("/dev/shm"), "{open}");
        server.drain().await;
    });
}

#[test]
fn many_programs_leave_nothing_behind() {
    run(async {
        let server = Server::serve(&["--pool", "run:2=exec:cat"]).await;
        let client = server.client().await;
        let workers = [server.child("w0").await, server.child("w1").await];
        let open = || workers.map(|pid| fs::read_dir(format!("/proc/{pid}/fd")).expect("a process").count());
        call(&client, b"x").await.expect("a result");
        let before = open();
        let items = (0..100).map(|id| WorkItem::new("run", id.to_string()).with_id(id));
        let mut results = client.process(tokio_stream::iter(items)).await.expect("a stream");
        while let Some(result) = soon("a result", results.message()).await.expect("a stream") {
            assert_eq!(result.payload, result.id.to_string());
        }
        assert_eq!(open(), before, "descriptors are closed");
        for worker in workers {
            assert!(common::processes::children(worker).is_empty(), "programs are reaped");
        }
        server.drain().await;
    });
}
