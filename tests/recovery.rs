//! How long it takes until a death is mended. The figures are printed (`--nocapture`); what is asserted is that it is mended.

#[path = "storm/chance.rs"]
#[allow(dead_code)]
mod chance;
mod common;
#[path = "storm/tally.rs"]
#[allow(dead_code)]
mod tally;

use std::time::Duration;

use common::{Files, Server, processes::signal, run, server::unique_name, soon, until};
use forkring::{client::Client, process::now, proto::v1::WorkItem};
use nix::sys::signal::Signal;
use tally::{Execution, journal};

fn report(what: &str, wanted: Duration, mut times: Vec<Duration>) {
    times.sort_unstable();
    let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
    println!("{what}: median {median:.1?}, worst {worst:.1?} of {} (wanted: {wanted:?})", times.len());
}

/// One item that outlives worker after worker: each notes when it has it.
#[test]
fn the_item_of_a_worker_that_is_killed_is_claimed_by_another() {
    run(async {
        let files = Files::new();
        let path = files.path("journal");
        let server = Server::handlers_with(
            &unique_name(),
            &["trace"],
            "workers = 4\nmax_attempts = 255",
            &[("JOURNAL", &files.name("journal"))],
        )
        .await;
        server.family(4).await;
        let client = server.client().await;
        let item = WorkItem::new("trace", "").with_metadata("until", files.name("go"));
        let call = tokio::spawn(async move { client.call(item).await });
        let mut times = Vec::new();
        for attempt in 1..=25 {
            let execution =
                async |attempt| until("an execution", || journal(&path).find(|one| one.attempt == attempt)).await;
            let Execution { pid, .. } = execution(attempt).await;
            // There is somebody to take it.
            until("other workers", || (server.children().len() > 2).then_some(())).await;
            let killed = now();
            signal(pid as i32, Signal::SIGKILL);
            times.push(Duration::from_nanos(execution(attempt + 1).await.at.saturating_sub(killed)));
        }
        files.make("go");
        let result = soon("an answer", call).await.expect("a task").expect("a result");
        assert_eq!(result.attempts, 26);
        report("SIGKILL of a worker to the next claim of its item", Duration::from_millis(5), times);
        server.drain().await;
    });
}

#[test]
fn a_new_front_serves_the_same_port() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo"]).await;
        let mut front = server.child("front").await;
        let mut times = Vec::new();
        for _ in 0..3 {
            // One that dies young is not replaced at once.
            tokio::time::sleep(Duration::from_millis(1100)).await;
            let killed = now();
            signal(front, Signal::SIGKILL);
            // It may reach the old one's backlog, whose connections the kernel keeps for the new one, or be cut off.
            let answered = async {
                loop {
                    let Ok(client) = Client::connect(&server.addr).await else { continue };
                    if client.call(WorkItem::new("echo", "x")).await.is_ok() {
                        return now();
                    }
                }
            };
            times.push(Duration::from_nanos(soon("an answer", answered).await - killed));
            front = server.successor("front", front).await;
        }
        report("SIGKILL of a front to the next answer at its port", Duration::from_secs(1), times);
        server.drain().await;
    });
}
