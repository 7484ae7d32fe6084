//! Tests of `--log-failures`, which logs failed items.

mod common;

use std::time::Duration;

use common::{
    Files, Server, run,
    server::{serve_command, unique_name},
    soon, until,
};
use forkring::{client::Client, proto::v1::WorkItem};
use serde_json::Value;

async fn fail(client: &Client, pool: &str, id: u64) {
    soon("an error", client.call(WorkItem::new(pool, "x").with_id(id))).await.expect_err("it fails");
}

fn with_message(log: &str, message: &str) -> Vec<Value> {
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter(|line| line["message"] == message).collect()
}

#[test]
fn a_failed_item_is_a_line_that_says_which_and_why() {
    run(async {
        let name = unique_name();
        let pool = "fail=exec:sh -c 'echo broken >&2; exit 3'";
        let args = ["--pool", "echo=echo", "--pool", pool, "--log", "json", "--log-failures"];
        let server = Server::start(name.clone(), serve_command(&name, &args), Files::new()).await;
        let client = server.client().await;
        common::assert_serves(&client, "echo").await;
        fail(&client, "fail", 17).await;
        server.logged("an item failed").await;
        let lines = with_message(&server.drain().await, "an item failed");
        assert_eq!(lines.len(), 1, "{lines:?}");
        let line = &lines[0];
        assert_eq!((line["level"].as_str(), line["item"].as_u64()), (Some("WARN"), Some(17)), "{line}");
        assert_eq!((line["pool"].as_str(), line["worker"].as_u64()), (Some("fail"), Some(1)), "{line}");
        assert_eq!((line["reason"].as_str(), line["attempts"].as_u64()), (Some("EXEC_FAILED"), Some(1)), "{line}");
        assert!(line["error"].as_str().is_some_and(|error| error.contains("broken")), "{line}");
    });
}

#[test]
fn panics_and_deaths_are_failures_too_and_what_a_client_gave_up_is_not() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["panic", "crash", "hold"], "log_failures = true\nmax_attempts = 1").await;
        let client = server.client().await;
        fail(&client, "panic", 1).await;
        fail(&client, "crash", 2).await;
        let late = files.holding(3, "never").with_timeout(Duration::from_millis(1));
        soon("an error", client.call(late)).await.expect_err("its time is over");
        files.make("never");
        for says in [
            "item=1 pool=\"panic\" worker=0 attempts=1 reason=\"HANDLER_PANICKED\" error=",
            // The supervisor completed this item, so that there is no worker to name.
            "item=2 pool=\"crash\" attempts=1 reason=\"WORKER_CRASHED\" error=",
        ] {
            let line = server.logged(says).await;
            assert!(line.contains("WARN an item failed "), "{line}");
        }
        assert_eq!(server.drain().await.matches("an item failed").count(), 2);
    });
}

#[test]
fn however_many_fail_all_are_lines_or_counted() {
    run(async {
        let name = unique_name();
        let args = ["--pool", "fail=exec:false", "--log", "json", "--log-failures"];
        let server = Server::start(name.clone(), serve_command(&name, &args), Files::new()).await;
        let client = server.client().await;
        for id in 0..100 {
            fail(&client, "fail", id).await;
        }
        let told = |log: &str| {
            let counts = with_message(log, "more items failed, which have no lines of their own");
            let counted: u64 = counts.iter().filter_map(|line| line["count"].as_u64()).sum();
            with_message(log, "an item failed").len() as u64 + counted
        };
        until("all of them", || (told(&server.log()) == 100).then_some(())).await;
        assert_eq!(told(&server.drain().await), 100);
    });
}

#[test]
fn failures_are_not_logged_unless_that_is_asked_for() {
    run(async {
        let server = Server::serve(&["--pool", "fail=exec:false"]).await;
        fail(&server.client().await, "fail", 1).await;
        let log = server.drain().await;
        assert!(!log.contains("an item failed"), "{log}");
    });
}
