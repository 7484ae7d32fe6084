//! Dead letters: an item that killed all the workers it was given to is kept whole, whoever dies after it, until somebody
//! requeues or drops it, or newer ones need the room.

mod common;

use std::fs;

use common::{Files, Server, assert_refused, assert_serves, failure, processes::signal, program, refusal, run, soon};
use forkring::{
    client::Client,
    proto::v1::{
        DeadLetter, GetDeadLetterRequest, ListDeadLettersRequest, WorkItem, WorkResult, admin_client::AdminClient,
        attempt::End,
    },
};
use nix::sys::signal::Signal;
use tonic::Code;

const CRASHED: (Code, &str) = (Code::Aborted, "WORKER_CRASHED");
const NO_LETTER: (Code, &str) = (Code::NotFound, "NO_SUCH_LETTER");

fn pattern(id: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|at| (at * (id + 3) % 251) as u8).collect()
}

/// An item that its workers die of.
fn poison(id: u64, len: usize) -> WorkItem {
    WorkItem::new("always_crash", pattern(id, len)).with_id(id)
}

/// Calls with an item that its workers die of; its letter is there when this returns.
async fn die(client: &Client, item: WorkItem) {
    // One that is done in between: deaths of several items in a row would be the handler's own, and refuse the next.
    let harmless = WorkItem::new("always_crash", "").with_metadata("mended", "/");
    soon("an answer", client.call(harmless)).await.expect("a result");
    assert_refused(refusal(soon("an answer", client.call(item)).await), CRASHED, "SIGABRT");
}

async fn letters(client: &Client) -> Vec<DeadLetter> {
    let page = soon("a list", client.dead_letters(0)).await.expect("a list");
    assert_eq!(page.next, 0, "one page");
    page.letters
}

async fn numbers(client: &Client) -> Vec<u64> {
    letters(client).await.iter().map(|letter| letter.number).collect()
}

async fn letter(client: &Client, number: u64) -> DeadLetter {
    soon("a letter", client.dead_letter(number)).await.expect("a letter")
}

async fn update(client: &Client, subscription: &str) -> WorkResult {
    let mut results = soon("a stream", client.updates(subscription, 1)).await.expect("a stream");
    soon("a result", results.message()).await.expect("a stream").expect("a result")
}

async fn submit(client: &Client, item: WorkItem) {
    let receipt = soon("a receipt", client.submit(tokio_stream::iter([item]))).await.expect("a receipt");
    assert_eq!(receipt.accepted, 1);
}

#[test]
fn an_item_that_its_workers_died_of_is_kept_with_its_history() {
    run(async {
        // Many workers: one that dies again and again comes back ever later.
        let server = Server::handlers(&["always_crash"], "workers = 12").await;
        let client = server.client().await;
        // In the record, in an arena, nothing at all; with metadata that fits beside it and some that does not.
        for (number, len) in (1..).zip([10, 64, 65, 200_000, 0]) {
            let text = "x".repeat(number as usize * 20);
            die(&client, poison(40 + number, len).with_priority(2).with_metadata("key", &text)).await;
            let found = letter(&client, number).await;
            assert_eq!(
                (found.number, found.pool.as_str(), found.id, found.priority),
                (number, "always_crash", 40 + number, 2)
            );
            assert!(found.payload == pattern(40 + number, len), "the payload of {len} bytes");
            assert_eq!((found.payload_size, found.truncated, found.subscription), (len as u64, false, None));
            assert_eq!(found.metadata, [("key".to_owned(), text)].into());
            assert!(found.time.is_some_and(|time| time.seconds > 1_700_000_000));

            assert_eq!(found.attempts, 3);
            let attempts: Vec<_> = found.history.iter().map(|one| (one.attempt, one.end)).collect();
            assert_eq!(attempts, [1, 2, 3].map(|n| (n, Some(End::Signal(6)))));
            assert!(found.history.iter().all(|one| one.worker < 12));
            let mut pids: Vec<_> = found.history.iter().map(|one| one.pid).collect();
            pids.sort_unstable();
            pids.dedup();
            assert_eq!(pids.len(), 3, "each of them was another process");
            assert!(found.history.iter().all(|one| one.cause == "killed by SIGABRT"));
        }
        let listed = letters(&client).await;
        assert_eq!(listed.iter().map(|letter| letter.number).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
        assert!(listed.iter().all(|letter| letter.payload.is_empty() && letter.history.len() == 3));
        assert_eq!(listed[3].payload_size, 200_000);

        let log = server.drain().await;
        let line = log.lines().find(|line| line.contains("is a dead letter")).expect("a line about the letter");
        for part in ["WARN", "pool=\"always_crash\"", "id=41", "letter=1", "cause=\"killed by SIGABRT\""] {
            assert!(line.contains(part), "{line}");
        }
        assert!(log.contains("dead letters that were neither requeued nor dropped are gone letters=5"), "{log}");
    });
}

#[test]
fn an_item_that_was_retried_and_done_is_no_letter() {
    run(async {
        let server = Server::handlers(&["crash", "always_crash"], "max_attempts = 2").await;
        let client = server.client().await;
        // The same record each time: what is known of one item must not be told of the next.
        for _ in 0..2 {
            soon("an answer", client.call(WorkItem::new("crash", ""))).await.expect("a result");
        }
        assert_eq!(numbers(&client).await, [0; 0]);
        die(&client, poison(1, 10)).await;
        let found = letter(&client, 1).await;
        assert_eq!(found.history.iter().map(|one| one.attempt).collect::<Vec<_>>(), [1, 2]);
        server.drain().await;
    });
}

#[test]
fn a_requeued_item_is_delivered_to_its_subscriber() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["always_crash"], "max_attempts = 2").await;
        let client = server.client().await;
        let item = |id, len| poison(id, len).with_metadata("mended", files.name("mended"));
        submit(&client, item(1, 100_000).with_subscription("mine")).await;
        assert_refused(failure(update(&client, "mine").await), CRASHED, "SIGABRT");
        assert_eq!(letter(&client, 1).await.subscription.as_deref(), Some("mine"));
        die(&client, item(2, 20)).await;

        // The handler is not mended yet: it dies again, and the item is another letter.
        soon("an answer", client.requeue_dead_letter(1, "ignored")).await.expect("it is accepted");
        assert_refused(failure(update(&client, "mine").await), CRASHED, "SIGABRT");
        assert_eq!(numbers(&client).await, [2, 3]);
        assert_refused(
            refusal(client.requeue_dead_letter(1, "").await),
            NO_LETTER,
            "there is no dead letter 1: it was requeued or dropped before",
        );
        assert_eq!(letter(&client, 3).await.history.len(), 2, "its attempts count anew");

        files.make("mended");
        for (number, id, len, subscription) in [(3, 1, 100_000, "mine"), (2, 2, 20, "others")] {
            soon("an answer", client.requeue_dead_letter(number, "others")).await.expect("it is accepted");
            let result = update(&client, subscription).await;
            assert_eq!((result.id, result.attempts), (id, 1));
            assert!(result.outcome().expect("a result") == pattern(id, len));
        }
        assert_eq!(numbers(&client).await, [0; 0]);
        let log = server.drain().await;
        assert!(!log.contains("dead letters that were"), "{log}");
    });
}

#[test]
fn the_oldest_make_room_and_are_counted() {
    run(async {
        // So many workers that each dies once.
        let server = Server::handlers(&["always_crash"], "max_attempts = 1\nworkers = 8\ndead_letters = '64KiB'").await;
        let client = server.client().await;
        let mut admin = AdminClient::new(
            tonic::transport::Endpoint::from_shared(format!("http://{}", server.addr))
                .expect("an address")
                .connect_lazy(),
        );
        for id in 1..=4 {
            die(&client, poison(id, 20_000)).await;
        }
        let list = |limit, after| ListDeadLettersRequest { limit, after };
        let page = soon("a list", client.dead_letters(0)).await.expect("a list");
        assert_eq!((page.letters.len(), page.dropped), (3, 1));
        let gone = refusal(client.dead_letter(1).await);
        assert_refused(gone, NO_LETTER, "there is no dead letter 1: it was dropped to make room for newer ones");

        // One that was dropped by hand is not lost by making room.
        soon("an answer", client.drop_dead_letter(2)).await.expect("it is there");
        assert_refused(refusal(client.drop_dead_letter(2).await), NO_LETTER, "there is no dead letter 2");
        die(&client, poison(5, 30_000)).await;
        let page = soon("a list", admin.list_dead_letters(list(1, 0))).await.expect("a list").into_inner();
        assert_eq!((page.letters.len(), page.letters[0].number, page.next, page.dropped), (1, 4, 4, 2));
        let page = soon("a list", admin.list_dead_letters(list(1, 4))).await.expect("a list").into_inner();
        assert_eq!((page.letters.len(), page.letters[0].number, page.next), (1, 5, 0));
        let page = soon("a list", admin.list_dead_letters(list(0, u64::MAX))).await.expect("a list").into_inner();
        assert_eq!((page.letters.len(), page.next), (0, 0));
        for (number, len) in [(4, 20_000), (5, 30_000)] {
            let found = soon("a letter", admin.get_dead_letter(GetDeadLetterRequest { number })).await;
            assert!(found.expect("a letter").into_inner().payload == pattern(number, len), "round the end of the area");
        }
        server.drain().await;
    });
}

#[test]
fn a_payload_that_is_larger_than_the_area_is_cut_and_takes_no_room() {
    run(async {
        let server = Server::handlers(&["always_crash"], "max_attempts = 1\nworkers = 8\ndead_letters = '64KiB'").await;
        let client = server.client().await;
        die(&client, poison(1, 40_000)).await;
        die(&client, poison(2, 66_000)).await;
        let found = letter(&client, 2).await;
        assert_eq!((found.payload_size, found.truncated), (66_000, true));
        assert!(found.payload == pattern(2, 66_000)[..4096]);
        let refused = refusal(client.requeue_dead_letter(2, "").await);
        assert_refused(refused, (Code::FailedPrecondition, "TRUNCATED_LETTER"), "66000 bytes was too large");
        assert!(letter(&client, 1).await.payload == pattern(1, 40_000), "the other is still there");
        assert_eq!(numbers(&client).await, [1, 2]);
        server.drain().await;
    });
}

#[test]
fn letters_outlive_the_front_and_so_do_the_marks_on_them() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["always_crash", "hold"], "max_attempts = 1\nworkers = 4").await;
        let client = server.client().await;
        for id in 1..=3 {
            die(&client, poison(id, 5_000).with_metadata("mended", files.name("mended"))).await;
        }
        client.drop_dead_letter(2).await.expect("it is there");
        let front = server.child("front").await;
        signal(front, Signal::SIGKILL);
        server.successor("front", front).await;
        let client = server.client().await;
        assert_serves(&client, "hold").await;
        assert_eq!(numbers(&client).await, [1, 3]);
        assert!(letter(&client, 3).await.payload == pattern(3, 5_000));
        files.make("mended");
        client.requeue_dead_letter(3, "").await.expect("it is accepted");
        assert!(update(&client, "").await.outcome().expect("a result") == pattern(3, 5_000));
        server.drain().await;
    });
}

#[test]
fn letters_outlive_a_server_that_is_killed() {
    run(async {
        let pools = ["always_crash"];
        let settings = "max_attempts = 1\nworkers = 4";
        let server = Server::handlers(&pools, settings).await;
        let client = server.client().await;
        die(&client, poison(1, 5_000)).await;
        die(&client, poison(2, 10)).await;
        client.drop_dead_letter(2).await.expect("it is there");
        let left = server.kill().await;
        let server = Server::handlers_as(&left.name, &pools, settings).await;
        let client = server.client().await;
        assert_eq!(numbers(&client).await, [1]);
        assert!(letter(&client, 1).await.payload == pattern(1, 5_000));
        die(&client, poison(3, 10)).await;
        assert_eq!(numbers(&client).await, [1, 3], "they are numbered on");
        server.drain().await;
    });
}

#[test]
fn a_server_may_keep_none() {
    run(async {
        let server = Server::handlers(&["always_crash"], "max_attempts = 2\ndead_letters = 0").await;
        let client = server.client().await;
        die(&client, poison(1, 5_000)).await;
        let none = (Code::FailedPrecondition, "NO_DEAD_LETTERS");
        assert_refused(refusal(client.dead_letters(0).await), none, "start it with --dead-letters");
        assert_refused(refusal(client.dead_letter(1).await), none, "keeps no dead letters");
        let list = program::run(&["dead", "list", "--addr", &server.addr], b"").await;
        list.assert_failed(1, "this server keeps no dead letters");
        let log = server.drain().await;
        assert!(!log.contains("dead letter"), "{log}");
    });
}

#[test]
fn requests_that_mean_nothing_are_refused() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["always_crash", "hold"], "max_attempts = 1").await;
        let client = server.client().await;
        for number in [0, 1, u64::MAX] {
            let refused = refusal(client.dead_letter(number).await);
            assert_refused(refused, NO_LETTER, "there never was one of this number; see `forkring dead list`");
        }
        die(&client, poison(1, 10).with_metadata("mended", files.name("mended"))).await;
        let refused = refusal(client.requeue_dead_letter(1, &"x".repeat(256)).await);
        assert_refused(refused, (Code::InvalidArgument, "FIELD_TOO_LONG"), "subscription has 256 bytes");
        let refused = refusal(client.requeue_dead_letter(1, &"x".repeat(5000)).await);
        assert_refused(refused, (Code::ResourceExhausted, "MESSAGE_TOO_LARGE"), "bytes and this method takes 4096");
        let mut grpc = tonic::client::Grpc::new(
            tonic::transport::Endpoint::from_shared(format!("http://{}", server.addr))
                .expect("an address")
                .connect_lazy(),
        );
        for (method, message, wanted) in [
            ("GetDeadLetter", "not protobuf", (Code::Internal, "MALFORMED_MESSAGE")),
            ("Resurrect", "", (Code::Unimplemented, "UNKNOWN_METHOD")),
        ] {
            grpc.ready().await.expect("a connection");
            let path = format!("/forkring.v1.Admin/{method}").parse().expect("a path");
            let answer = grpc.unary(tonic::Request::new(message.to_owned()), path, Text).await;
            assert_refused(
                refusal(answer),
                wanted,
                if wanted.0 == Code::Unimplemented { "Admin has no method" } else { "not this method" },
            );
        }
        assert_eq!(numbers(&client).await, [1]);
        assert_serves(&client, "hold").await;
        server.drain().await;
    });
}

/// A codec whose requests are text, whatever the method wants.
#[derive(Clone, Copy, Default)]
struct Text;

impl tonic::codec::Codec for Text {
    type Encode = String;
    type Decode = ();
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Text
    }

    fn decoder(&mut self) -> Self {
        Text
    }
}

impl tonic::codec::Encoder for Text {
    type Item = String;
    type Error = tonic::Status;

    fn encode(&mut self, text: String, to: &mut tonic::codec::EncodeBuf<'_>) -> Result<(), tonic::Status> {
        bytes::BufMut::put_slice(to, text.as_bytes());
        Ok(())
    }
}

impl tonic::codec::Decoder for Text {
    type Item = ();
    type Error = tonic::Status;

    fn decode(&mut self, _: &mut tonic::codec::DecodeBuf<'_>) -> Result<Option<()>, tonic::Status> {
        Ok(Some(()))
    }
}

#[test]
fn the_command_lists_shows_requeues_and_drops() {
    run(async {
        let files = Files::new();
        let server = Server::handlers(&["always_crash"], "max_attempts = 1\nworkers = 6").await;
        let client = server.client().await;
        let dead = async |args: &[&str]| {
            let args = [&["dead"], args, &["--addr", &server.addr]].concat();
            program::run(&args, b"").await
        };
        let empty = dead(&["list"]).await;
        let none = (Some(0), "", "forkring: there are no dead letters\n");
        assert_eq!((empty.code, empty.text(), &empty.stderr[..]), none);
        let empty = dead(&["list", "--json"]).await;
        empty.assert_succeeded();
        assert_eq!(empty.text(), "");
        for id in 1..=5 {
            let item = WorkItem { payload: format!("item {id}\n").into(), ..poison(id, 0) };
            die(&client, item.with_metadata("mended", files.name("mended"))).await;
        }

        let before = program::run(&["dead", "--addr", &server.addr, "list"], b"").await;
        before.assert_succeeded();
        let list = dead(&["list"]).await;
        list.assert_succeeded();
        assert_eq!(before.text(), list.text());
        let lines: Vec<_> = list.text().lines().collect();
        assert_eq!(lines.len(), 5);
        assert!(
            lines[0].starts_with("1  20") && lines[0].contains("  always_crash  id 1  7 bytes  killed by SIGABRT"),
            "{}",
            lines[0]
        );
        let list = dead(&["list", "--json"]).await;
        list.assert_succeeded();
        let lines = list.json();
        assert_eq!((lines.len(), &lines[4]["number"], &lines[4]["history"][0]["signal"]), (5, &5.into(), &6.into()));

        let show = dead(&["show", "2"]).await;
        show.assert_succeeded();
        assert!(show.text().contains("payload       7 bytes\n              item 2\\n\n"), "{}", show.text());
        let show = dead(&["show", "2", "--json"]).await;
        assert_eq!(show.json()[0]["payload_hex"], "6974656d20320a");
        let payload = dead(&["show", "2", "--payload", "-"]).await;
        payload.assert_succeeded();
        assert_eq!(payload.text(), "item 2\n");
        let saved = dead(&["show", "3", "--payload", &files.name("saved")]).await;
        saved.assert_succeeded();
        assert_eq!((saved.text(), fs::read(files.path("saved")).expect("a file")), ("", b"item 3\n".to_vec()));
        let nowhere = dead(&["show", "3", "--payload", &files.name("no/folder")]).await;
        nowhere.assert_failed(1, "cannot write");

        for command in ["show", "requeue", "drop"] {
            dead(&[command, "99"]).await.assert_failed(1, "NOT_FOUND (NO_SUCH_LETTER): there is no dead letter 99");
            let help = format!("see `forkring dead {command} --help`");
            dead(&[command, "x"]).await.assert_failed(2, &help);
            dead(&[command]).await.assert_failed(2, "required arguments");
        }
        dead(&["drop", "1", "--all"]).await.assert_failed(2, "cannot be used with");

        let some = dead(&["drop", "1", "99", "2"]).await;
        assert_eq!((some.code, some.text()), (Some(1), "dropped 1\ndropped 2\n"));
        assert!(some.stderr.ends_with("forkring: 1 of 3 letters were not dropped\n"), "{}", some.stderr);
        files.make("mended");
        let requeued = dead(&["requeue", "4", "--subscription", "s"]).await;
        requeued.assert_succeeded();
        assert_eq!(requeued.text(), "requeued 4\n");
        assert_eq!(update(&client, "s").await.outcome().expect("a result"), "item 4\n");
        let requeued = dead(&["requeue", "--all"]).await;
        requeued.assert_succeeded();
        assert_eq!(requeued.text(), "requeued 3\nrequeued 5\n");
        let mut ids = [update(&client, "").await.id, update(&client, "").await.id];
        ids.sort_unstable();
        assert_eq!(ids, [3, 5]);
        let left = dead(&["drop", "--all"]).await;
        assert_eq!((left.code, left.text(), &left.stderr[..]), none);
        assert!(numbers(&client).await.is_empty());
        server.drain().await;
    });
}

/// Deaths between the steps of filing and of requeueing.
#[cfg(feature = "crash-points")]
mod deaths {
    use std::fs::File;

    use common::server::{serve_command, unique_name};
    use forkring::segment::{Segment, Slot};

    use super::*;

    /// A server whose handler kills its worker until there is a file `mended`, and of which a process dies when it passes
    /// a point for the first time.
    async fn server(name: String, files: &Files, point: Option<&str>) -> Server {
        let handler =
            format!("--pool=always_crash=exec:sh -c 'test -e {} || kill -9 $PPID; cat'", files.name("mended"));
        let mut command = serve_command(&name, &[&handler, "--max-attempts", "1", "--workers", "4"]);
        command.args(["--parent", &std::process::id().to_string()]);
        if let Some(point) = point {
            command.env("FORKRING_CRASH", format!("{point}:1"));
        }
        Server::start(name, command, Files::new()).await
    }

    #[test]
    fn a_front_that_dies_while_it_requeues_loses_nothing() {
        for (point, left) in [("front/dead.offered", &[1][..]), ("front/dead.gone", &[])] {
            run(async {
                let files = Files::new();
                let server = server(unique_name(), &files, Some(point)).await;
                let client = server.client().await;
                let item = poison(1, 5_000);
                let refused = refusal(soon("an answer", client.call(item)).await);
                assert_refused(refused, CRASHED, "SIGKILL");
                files.make("mended");
                let front = server.child("front").await;
                soon("an answer", client.requeue_dead_letter(1, "mine")).await.expect_err("the front died");
                server.successor("front", front).await;
                let client = server.client().await;
                let result = update(&client, "mine").await;
                assert!(result.outcome().expect("a result") == pattern(1, 5_000), "what was offered is done");
                assert_eq!(numbers(&client).await, left, "{point}");
                server.drain().await;
            });
        }
    }

    #[test]
    fn a_supervisor_that_dies_while_it_files_leaves_a_whole_letter_or_none_and_its_successor_files_no_second() {
        for (point, filed) in
            [("supervisor/dead.evicted", 0), ("supervisor/dead.written", 0), ("supervisor/dead.filed", 1)]
        {
            run(async {
                let files = Files::new();
                let mut first = server(unique_name(), &files, Some(point)).await;
                let client = first.client().await;
                let item = poison(1, 5_000).with_subscription("mine");
                // The receipt may come or not: that the supervisor died shows that the item was accepted.
                let _ = soon("an answer", client.submit(tokio_stream::iter([item]))).await;
                first.ended().await;
                let left = first.leave();
                let object = File::options().read(true).write(true).open(left.segment()).expect("it is left");
                let segment = Segment::attach(&object, &left.name, Slot::Front(0)).expect("a segment");
                assert_eq!(segment.letters().expect("they are kept").range(), (0, filed), "{point}");

                let next = server(left.name.clone(), &files, None).await;
                let client = next.client().await;
                let says = if filed == 1 { "its workers died of it: forkring dead list" } else { "SIGKILL" };
                assert_refused(failure(update(&client, "mine").await), CRASHED, says);
                assert_eq!(numbers(&client).await, [1], "{point}");
                let found = letter(&client, 1).await;
                assert!(found.payload == pattern(1, 5_000));
                assert_eq!((found.id, found.subscription.as_deref()), (1, Some("mine")));
                next.drain().await;
            });
        }
    }
}
