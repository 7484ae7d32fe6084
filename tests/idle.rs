//! Idle is idle: while there is nothing to do nobody wakes, whoever is connected.

mod common;

use std::{collections::BTreeMap, fs, time::Duration};

use common::{Server, assert_serves, health::Health, run, soon};
use forkring::proto::v1::WorkItem;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// How often each process of a server has woken, all its threads together: its voluntary context switches.
fn wakes(server: &Server) -> BTreeMap<String, u64> {
    let count = |pid| -> u64 {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("a process");
        let statuses = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("status")).ok());
        let value = |status: String| {
            status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")?.trim().parse().ok())
        };
        statuses.map(|status| value(status).unwrap_or(0)).sum()
    };
    let family = server.children().into_iter().map(|child| (child.name, child.pid));
    family.chain([("supervisor".to_owned(), server.pid())]).map(|(name, pid)| (name, count(pid))).collect()
}

#[test]
fn nobody_wakes_while_there_is_nothing_to_do() {
    run(async {
        let server = Server::handlers(&["hold", "program"], "workers = 2\nitem_timeout = '1h'").await;
        server.family(4).await;
        // All the kinds of clients that stay, and each has been served.
        let client = server.client().await;
        for pool in ["hold", "program"] {
            assert_serves(&client, pool).await;
        }
        let mut updates = soon("a stream", client.updates("mine", 0)).await.expect("a stream");
        let item = || WorkItem::new("hold", "x").with_subscription("mine");
        soon("a receipt", client.submit(tokio_stream::iter([item()]))).await.expect("a receipt");
        soon("an update", updates.message()).await.expect("a stream").expect("an update");
        let (items, stream) = mpsc::channel(1);
        items.send(item()).await.expect("an open stream");
        let mut results = client.process(ReceiverStream::new(stream)).await.expect("a stream");
        soon("a result", results.message()).await.expect("a stream").expect("a result");
        Health::of(&server).await.until("hold", true).await;

        // What is under way comes to its end, which takes a second or so after a start.
        let mut before = wakes(&server);
        assert_eq!(before.len(), 6, "{before:?}");
        let mut seen = Vec::new();
        for _ in 0..5 {
            tokio::time::sleep(Duration::from_secs(3)).await;
            let after = wakes(&server);
            if after == before {
                server.drain().await;
                return;
            }
            seen.push(before);
            before = after;
        }
        panic!("somebody woke in each of these times: {seen:#?}");
    });
}
