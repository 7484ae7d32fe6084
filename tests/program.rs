//! Workers that are programs of their own: as good as forked ones.

mod common;

use std::process::Command;

use common::{
    Files, Server, assert_serves,
    processes::signal,
    program::{self, finish},
    run,
    server::{example, serve_command, unique_name},
    soon, until,
};
use forkring::proto::v1::WorkItem;
use nix::sys::signal::Signal;

#[test]
fn a_programs_worker_that_is_killed_is_replaced_and_its_item_retried() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["program"], "workers = 2").await;
        let client = server.client().await;
        let payload: Vec<u8> = (0..200_000_u32).map(|at| (at % 251) as u8).collect();
        let item = WorkItem { pool: "program".into(), payload: payload.clone().into(), ..files.holding(1, "go") };
        let call = tokio::spawn(async move { client.call(item).await });
        let first = files.began(1).await[0];
        // Neither is for the worker to decide.
        signal(first, Signal::SIGTERM);
        signal(first, Signal::SIGINT);
        signal(first, Signal::SIGKILL);
        let second = files.began(2).await[1];
        assert_ne!(first, second);
        files.make("go");
        let result = soon("an answer", call).await.expect("a task").expect("a result");
        assert_eq!((result.id, result.attempts), (1, 2));
        assert!(result.payload == payload);
        // Which one it was depends, but both are there again, by their names.
        for name in ["w0", "w1"] {
            server.child(name).await;
        }
        assert_serves(&server.client().await, "program").await;
        let log = server.drain_by(Signal::SIGINT).await;
        let line = log.lines().find(|line| line.contains(") died: ")).expect("a line about the death");
        assert!(line.contains("SIGKILL") && line.contains("requeued=1"), "{line}");
    });
}

#[test]
fn workers_sleep_and_are_woken() {
    run(async {
        let server = Server::handlers(&["program"], "workers = 2\nspin = 'off'").await;
        let client = server.client().await;
        for _ in 0..200 {
            assert_serves(&client, "program").await;
        }
        server.drain().await;
    });
}

#[test]
fn programs_die_with_their_supervisor() {
    run(async {
        let server = Server::handlers(&["program"], "workers = 2").await;
        let family = server.family(2).await;
        assert_serves(&server.client().await, "program").await;
        server.signal(Signal::SIGKILL);
        until("the end of all", || (!family.iter().any(|one| common::processes::is_alive(one.pid))).then_some(()))
            .await;
    });
}

#[test]
fn a_worker_is_not_started_by_hand() {
    run(async {
        let by_hand = |contract: Option<&str>| {
            let mut command = Command::new(example("handlers"));
            command.arg("--worker").env_remove("FORKRING_WORKER");
            contract.map(|contract| command.env("FORKRING_WORKER", contract));
            finish(command, b"")
        };
        let outcome = by_hand(None).await;
        assert!(outcome.code == Some(1) && outcome.stderr.contains("FORKRING_WORKER is not set"), "{outcome:?}");
        let outcome = by_hand(Some("{}")).await;
        assert!(
            outcome.code == Some(1) && outcome.stderr.contains("is not what a forkring server writes"),
            "{outcome:?}"
        );
        // As a program that a worker starts would inherit it.
        let contract = r#"{"version":2,"supervisor":1,"name":"x","worker":0,"pool":"x","pools":[1],"abi":1,"layout":1,
            "geometry":{"items":1,"fronts":1,"workers":1,"pools":1,"request_bytes":1,"result_bytes":1,"letter_bytes":0},
            "segment":9,"front_bells":[9],
            "worker_bells":[9],"end_bell":9,"arrival":9,"item_timer":null,"is_open":true,"spin":"auto","max_message":1}"#;
        let outcome = by_hand(Some(contract)).await;
        assert!(outcome.code == Some(1) && outcome.stderr.contains("was not started by the server"), "{outcome:?}");
    });
}

#[test]
fn a_python_that_cannot_run_the_handler_is_refused_at_the_start() {
    run(async {
        for (python, says) in [
            ("/bin/false", "`/bin/false` has no package forkring; install the wheel in that Python"),
            ("/no/such", "`/no/such` cannot be run: "),
        ] {
            let name = unique_name();
            let outcome = finish(serve_command(&name, &["app:handle", "--python", python]), b"").await;
            outcome.assert_failed(2, says);
            assert!(outcome.text().is_empty(), "there was no port");
        }
        let outcome = program::run(&["serve", "app"], b"").await;
        outcome.assert_failed(2, "`app` is no handler in Python: write MODULE:FUNCTION");
    });
}
