//! The outbox: results of submitted items wait for a subscriber, go to one, and are never lost on the way.

mod common;

use std::collections::BTreeSet;

use bytes::{Buf as _, BytesMut};
use common::{
    Files, Server, assert_refused, assert_serves,
    audit::Copy,
    failure,
    processes::signal,
    raw::{Raw, framed},
    refusal, run, soon, until,
};
use forkring::{
    client::{Client, Results},
    proto::v1::{GetUpdatesRequest, WorkItem, WorkResult},
};
use h2::client::Builder;
use nix::sys::signal::Signal;
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

async fn submit(client: &Client, items: impl IntoIterator<Item = WorkItem>) -> u64 {
    let items: Vec<_> = items.into_iter().collect();
    let receipt = soon("a receipt", client.submit(tokio_stream::iter(items))).await.expect("a receipt");
    assert_eq!(receipt.rejected, 0);
    receipt.accepted
}

/// The ids of so many updates, or of all up to the end of the stream.
async fn ids(updates: &mut Results, count: usize) -> Vec<u64> {
    let mut ids = Vec::new();
    while ids.len() < count {
        let Some(result) = soon("an update", updates.message()).await.expect("an open stream") else { break };
        ids.push(result.id);
    }
    ids
}

fn item(id: u64, len: usize, subscription: &str) -> WorkItem {
    WorkItem::new("echo", vec![id as u8; len]).with_id(id).with_subscription(subscription)
}

#[test]
fn an_update_comes_the_moment_it_is_done() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo"]).await;
        let client = server.client().await;
        let mut updates = soon("a stream", client.updates("s", 0)).await.expect("a stream");
        let (items, stream) = mpsc::channel(1);
        let submitting = tokio::spawn({
            let client = client.clone();
            async move { client.submit(ReceiverStream::new(stream)).await }
        });
        // Each comes while the stream of items is open and the next has not been sent.
        for id in 1..=20 {
            items.send(item(id, 100, "s")).await.expect("an open stream");
            assert_eq!(ids(&mut updates, 1).await, [id]);
        }
        drop(items);
        assert_eq!(soon("a receipt", submitting).await.expect("a task").expect("a receipt").accepted, 20);
        drop(updates);
        server.drain().await;
    });
}

#[test]
fn results_wait_for_their_own_subscriber() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo"]).await;
        let client = server.client().await;
        let names = [(0, ""), (10, "a"), (20, "b"), (30, "ä/?")];
        for (at, name) in names {
            assert_eq!(submit(&client, (1..=5).map(|id| item(at + id, 500, name))).await, 5);
        }
        // In another connection than they were submitted by, which is gone.
        drop(client);
        let client = server.client().await;
        for (at, name) in names.into_iter().rev() {
            let mut updates = soon("a stream", client.updates(name, 5)).await.expect("a stream");
            assert_eq!(ids(&mut updates, 9).await, (1..=5).map(|id| at + id).collect::<Vec<_>>());
        }
        server.drain().await;
    });
}

#[test]
fn a_failed_item_is_an_update_too() {
    run(async {
        let server = Server::handlers(&["fail", "always_crash"], "max_attempts = 1").await;
        let client = server.client().await;
        submit(&client, [WorkItem::new("fail", "x").with_id(1)]).await;
        let mut updates = soon("a stream", client.updates("", 2)).await.expect("a stream");
        let result = soon("an update", updates.message()).await.expect("a stream").expect("an update");
        assert_eq!((result.id, result.attempts), (1, 1));
        assert_refused(failure(result), (Code::NotFound, "NO_SUCH_ROW"), "no row `x`");
        submit(&client, [WorkItem::new("always_crash", "").with_id(2)]).await;
        let result = soon("an update", updates.message()).await.expect("a stream").expect("an update");
        assert_eq!((result.id, result.attempts), (2, 1));
        assert_refused(failure(result), (Code::Aborted, "WORKER_CRASHED"), "SIGABRT");
        server.drain().await;
    });
}

#[test]
fn a_stream_ends_after_its_limit_and_leaves_the_rest() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo"]).await;
        let client = server.client().await;
        submit(&client, (1..=10).map(|id| item(id, 20_000, "s"))).await;
        for first in [1, 4, 7] {
            let mut updates = soon("a stream", client.updates("s", 3)).await.expect("a stream");
            assert_eq!(ids(&mut updates, 9).await, [first, first + 1, first + 2]);
        }
        let mut updates = soon("a stream", client.updates("s", 0)).await.expect("a stream");
        assert_eq!(ids(&mut updates, 1).await, [10]);
        drop(updates);
        server.drain().await;
    });
}

#[test]
fn subscribers_of_one_name_share_its_results() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo"]).await;
        let client = server.client().await;
        let other = server.client().await;
        // Neither can have all of them.
        let mut one = soon("a stream", client.updates("s", 100)).await.expect("a stream");
        let mut two = soon("a stream", other.updates("s", 100)).await.expect("a stream");
        let submitting = submit(&client, (1..=200).map(|id| item(id, 30, "s")));
        let (accepted, one, two) = tokio::join!(submitting, ids(&mut one, 200), ids(&mut two, 200));
        assert_eq!((accepted, one.len(), two.len()), (200, 100, 100));
        let all: BTreeSet<_> = one.into_iter().chain(two).collect();
        assert!(all.into_iter().eq(1..=200), "each came to one of them");
        server.drain().await;
    });
}

/// Items that come one at a time are not all for whoever subscribed first, or one with a limit would wait for ever.
#[test]
fn subscribers_of_one_name_take_turns() {
    run(async {
        const ITEMS: u64 = 40;
        let server = Server::serve(&["--pool", "echo=echo"]).await;
        let clients = [server.client().await, server.client().await];
        let mut one = soon("a stream", clients[0].updates("s", 0)).await.expect("a stream");
        let mut two = soon("a stream", clients[1].updates("s", 0)).await.expect("a stream");
        let client = server.client().await;
        let mut counts = [0, 0];
        for id in 1..=ITEMS {
            submit(&client, [item(id, 100, "s")]).await;
            let of_which = async { tokio::select!(got = one.message() => (0, got), got = two.message() => (1, got)) };
            let (which, got) = soon("an update", of_which).await;
            assert_eq!(got.expect("an open stream").expect("an update").id, id);
            counts[which] += 1;
        }
        assert!(counts.iter().all(|count| *count >= ITEMS / 4), "{counts:?}");
        drop((one, two));
        server.drain().await;
    });
}

/// Subscribes with a window of so many bytes, reads as many, and goes away: by a reset, or without a word.
/// The ids of the results that it got whole.
async fn read_a_part(server: &Server, window: u32, reset: bool) -> Vec<u64> {
    let mut windows = Builder::new();
    windows.initial_window_size(window).initial_connection_window_size(1 << 24);
    let mut raw = Raw::connect_as(server, &windows).await;
    let mut exchange = raw.begin("GetUpdates", &[]).await;
    let request = GetUpdatesRequest { subscription: "s".to_owned(), limit: 0 };
    exchange.body.send_data(framed(&request), true).expect("an open stream");
    let response = soon("a response", &mut exchange.response).await.expect("a response");
    let mut body = response.into_body();
    let mut data = BytesMut::new();
    // Nothing is given back, so nothing more comes.
    while data.len() < window as usize {
        data.extend_from_slice(&soon("data", body.data()).await.expect("an open stream").expect("data"));
    }
    if reset {
        exchange.body.send_reset(h2::Reason::CANCEL);
        raw.settled().await;
    } else {
        raw.cut();
    }
    let mut ids = Vec::new();
    while data.len() >= 5 {
        let len = (&data[1..5]).get_u32() as usize;
        if data.len() < 5 + len {
            break;
        }
        let message = data.split_to(5 + len).split_off(5);
        ids.push(WorkResult::decode(message).expect("a result").id);
    }
    ids
}

#[test]
fn a_subscriber_that_goes_away_loses_nothing() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo", "--arena", "8MiB"]).await;
        let client = server.client().await;
        // Results that share a frame, and results with a frame each, straight from the arena.
        for len in [1000, 20_000] {
            submit(&client, (1..=60).map(|id| item(id, len, "s"))).await;
            let mut got = BTreeSet::new();
            for (window, reset) in [(0, true), (0, false), (len as u32 * 7, true), (len as u32 * 40, false)] {
                got.extend(read_a_part(&server, window, reset).await);
            }
            assert!(got.len() >= 6, "{got:?}");
            // What it did not get waits for the next, should the server still have to notice.
            let mut updates = soon("a stream", client.updates("s", 0)).await.expect("a stream");
            while got.len() < 60 {
                let result = soon("an update", updates.message()).await.expect("a stream").expect("an update");
                assert!(result.payload.iter().all(|byte| u64::from(*byte) == result.id));
                got.insert(result.id);
            }
            assert!(got.into_iter().eq(1..=60));
        }
        server.drain().await;
    });
}

#[test]
fn what_comes_back_comes_first() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["hold"], "").await;
        let client = server.client().await;
        let held = |id| files.holding(id, "go").with_subscription("s");
        submit(&client, (1..=5).map(|id| WorkItem::new("hold", "x").with_id(id).with_subscription("s"))).await;
        submit(&client, [held(6)]).await;
        files.began(1).await;
        // It gets none of the first five.
        assert!(read_a_part(&server, 0, true).await.is_empty());
        files.make("go");
        let mut updates = soon("a stream", client.updates("s", 6)).await.expect("a stream");
        assert_eq!(ids(&mut updates, 9).await, [1, 2, 3, 4, 5, 6]);
        server.drain().await;
    });
}

#[test]
fn the_outbox_is_bounded_by_items() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo", "--outbox", "8"]).await;
        let client = server.client().await;
        let submitting = tokio::spawn({
            let client = client.clone();
            async move { submit(&client, (1..=50).map(|id| item(id, 100, "s"))).await }
        });
        // For calls there is room, however long submitters must wait.
        for _ in 0..20 {
            assert_serves(&client, "echo").await;
        }
        assert!(!submitting.is_finished(), "50 results wait where 8 may");
        // Any subscriber makes room, and others' items need it too.
        let mut updates = soon("a stream", client.updates("s", 50)).await.expect("a stream");
        let (accepted, got) = tokio::join!(submitting, ids(&mut updates, 99));
        assert_eq!(accepted.expect("a task"), 50);
        assert!(got.into_iter().eq(1..=50));
        server.drain().await;
    });
}

#[test]
fn the_outbox_is_bounded_by_bytes() {
    run(async {
        // A worker's arena has room for ten of these results.
        let server = Server::serve(&["--pool", "echo=echo", "--arena", "1MiB"]).await;
        let client = server.client().await;
        let submitting = tokio::spawn({
            let client = client.clone();
            async move { submit(&client, (1..=30).map(|id| item(id, 100_000, "s"))).await }
        });
        for _ in 0..20 {
            // Its request may have to come again while those of the stream are in work; its result has room.
            loop {
                match soon("an answer", client.call(WorkItem::new("echo", vec![1; 100_000]))).await {
                    Ok(_) => break,
                    Err(status) => assert_eq!(refusal::<()>(Err(status)).1, "ARENA_FULL"),
                }
            }
        }
        assert!(!submitting.is_finished());
        let mut updates = soon("a stream", client.updates("s", 30)).await.expect("a stream");
        let (accepted, got) = tokio::join!(submitting, ids(&mut updates, 99));
        assert_eq!(accepted.expect("a task"), 30);
        assert!(got.into_iter().eq(1..=30));
        server.drain().await;
    });
}

#[test]
fn room_in_the_outbox_that_small_results_leave_is_found() {
    run(async {
        // The outbox has room for 512 lines, and the table for more.
        let settings = "arena = '64KiB'\nmax_message = '48KiB'\ncapacity = 2048\noutbox = 1024";
        let server = Server::handlers(&["count"], settings).await;
        let client = server.client().await;
        let worker = server.child("w0").await;
        signal(worker, Signal::SIGSTOP);
        let submitting = tokio::spawn({
            let client = client.clone();
            let items = (1..=600).map(|id| WorkItem::new("count", vec![1; 64]).with_id(id).with_subscription("s"));
            async move { submit(&client, items).await }
        });
        until("a full outbox", || {
            (Copy::read(&server.segment()).expect("a segment").in_use().len() == 512).then_some(())
        })
        .await;
        // Nobody fetches the results, which are some digits each.
        signal(worker, Signal::SIGCONT);
        assert_eq!(soon("a receipt", submitting).await.expect("a task"), 600);
        server.drain().await;
    });
}

#[test]
fn a_subscriber_of_nothing_costs_nothing() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo"]).await;
        let client = server.client().await;
        // More streams than there are items, each of a name of its own.
        let mut streams = Vec::new();
        for name in 0..500 {
            streams.push(soon("a stream", client.updates(&name.to_string(), 1)).await.expect("a stream"));
        }
        submit(&client, [item(7, 10, "499")]).await;
        assert_eq!(ids(&mut streams[499], 9).await, [7]);
        streams.clear();
        submit(&client, [item(8, 10, "3")]).await;
        let mut updates = soon("a stream", client.updates("3", 1)).await.expect("a stream");
        assert_eq!(ids(&mut updates, 9).await, [8]);
        server.drain().await;
    });
}
