//! The orders in which a client's frames may come around an answer. HTTP/2 lets a client send END_STREAM, more data,
//! trailers or window updates after the server has answered, and cancel at any time. None of this may make the server
//! reset a stream, because h2 counts resets for the life of a connection and ends it after 1,024. So each test repeats its
//! order more often than that on one connection. Floods, which nothing but an attack causes, must still end theirs.

mod common;

use common::{
    Server,
    frames::{DATA, END_STREAM, End, Frames},
    processes::{is_stopped, signal},
    raw::{framed, framed_bytes},
    run, run_within, until,
};
use forkring::proto::v1::{GetUpdatesRequest, WorkItem};
use nix::sys::signal::Signal;
use std::time::Duration;

/// More streams than h2 lets a server reset on one connection, in batches of more than it remembers.
const BATCH: u32 = 100;
const BATCHES: u32 = 11;

/// What a client does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Sends HEADERS.
    Begin,
    /// Sends the request's message.
    Message,
    /// Sends data that the answer did not wait for.
    More,
    /// Sends END_STREAM in a DATA frame of its own.
    End,
    /// Sends END_STREAM in trailers.
    Trailers,
    /// Sends WINDOW_UPDATE.
    Window,
    /// Sends RST_STREAM.
    Cancel,
    /// Waits for the server's END_STREAM.
    Answer,
}

use Step::{Answer, Begin, Cancel, End as HalfClose, Message, More, Trailers, Window};

/// A request by its path, its headers and its message.
struct Request {
    name: &'static str,
    path: &'static str,
    headers: Vec<(&'static str, String)>,
    message: Vec<u8>,
}

impl Request {
    fn new(name: &'static str, path: &'static str, message: impl AsRef<[u8]>) -> Self {
        Request { name, path, headers: Vec::new(), message: message.as_ref().to_vec() }
    }

    fn with(mut self, header: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((header, value.into()));
        self
    }

    fn echo() -> Self {
        Request::new("a call", CALL, framed(&WorkItem::new("echo", "x")))
    }
}

const CALL: &str = "/forkring.v1.Dispatcher/Call";
const PROCESS: &str = "/forkring.v1.Dispatcher/Process";
const SUBMIT: &str = "/forkring.v1.Dispatcher/Submit";
const UPDATES: &str = "/forkring.v1.Dispatcher/GetUpdates";
const CHECK: &str = "/grpc.health.v1.Health/Check";

async fn server() -> Server {
    Server::serve(&["--pool", "echo=echo", "--pool", "slow=sleep:100ms"]).await
}

/// Repeats an order on one connection, each step on a batch of streams before the next step.
async fn repeat(server: &Server, request: &Request, order: &[Step]) {
    let mut frames = Frames::connect(server).await;
    let headers: Vec<_> = request.headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
    for batch in 0..BATCHES {
        let streams = (0..BATCH).map(|n| 2 * (batch * BATCH + n) + 1);
        for step in order {
            for stream in streams.clone() {
                match step {
                    Begin => frames.begin(stream, request.path, &headers),
                    Message => frames.data(stream, &request.message),
                    More => frames.data(stream, &[0; 300]),
                    HalfClose => frames.end(stream),
                    Trailers => frames.trailers(stream),
                    Window => frames.window_update(stream, 1),
                    Cancel => frames.reset(stream),
                    Answer => {
                        let end = frames.end_of(stream).await;
                        assert_eq!(end, End::Answered, "{}: {order:?}, stream {stream}", request.name);
                    }
                }
            }
            frames.flush().await;
        }
        frames.settle().await;
        assert_eq!(frames.resets, [], "{}: {order:?}", request.name);
    }
    println!("{}: {order:?}", request.name);
    // The connection is as good as new.
    let last = 2 * BATCH * BATCHES + 1;
    frames.call(last);
    frames.write(DATA, END_STREAM, last, &framed(&WorkItem::new("echo", "x")));
    assert_eq!(frames.end_of(last).await, End::Answered);
}

/// Ends a server that must not have warned of anything.
async fn drain_without_a_warning(server: Server) {
    let log = server.drain().await;
    let loud: Vec<_> = log.lines().filter(|line| line.contains(" WARN ") || line.contains("ERROR ")).collect();
    assert!(loud.is_empty(), "{loud:#?}");
}

#[test]
fn a_client_may_half_close_after_its_answer() {
    run(async {
        let server = server().await;
        repeat(&server, &Request::echo(), &[Begin, Message, Answer, HalfClose]).await;
        drain_without_a_warning(server).await;
    });
}

#[test]
fn every_order_of_frames_around_an_answer_is_served() {
    run(async {
        let server = server().await;
        for order in [
            &[Begin, Message, HalfClose, Answer, Window][..],
            &[Begin, Window, Message, Window, Answer, Window, HalfClose, Window],
            &[Begin, Message, Answer, Trailers],
            &[Begin, Message, Trailers, Answer, Cancel],
            &[Begin, Message, Answer, More, More, HalfClose],
            &[Begin, Message, Answer, More, Trailers],
            &[Begin, Message, Answer, Cancel, Window],
            &[Begin, Message, Answer, More, Cancel, Cancel],
            &[Begin, Message, HalfClose, Answer, Cancel],
            &[Begin, Message, Cancel, Window],
            &[Begin, Message, HalfClose, Cancel],
            &[Begin, Cancel, Cancel],
        ] {
            repeat(&server, &Request::echo(), order).await;
        }
        drain_without_a_warning(server).await;
    });
}

#[test]
fn every_early_end_of_an_rpc_leaves_its_request_to_be_read() {
    run_within(Duration::from_secs(180), async {
        let server = server().await;
        let slow = framed(&WorkItem::new("slow", ""));
        let garbage = framed_bytes(0, &[0xff; 20]);
        let compressed = framed_bytes(1, b"x");
        let large = [0, 0, 0x10, 0, 0];
        let reflection = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
        // Those that are answered before their message, and those that are not.
        let early = [
            Request::new("a time-out that is none", CALL, &slow).with("grpc-timeout", "soon"),
            Request::new("a compression", CALL, &slow).with("grpc-encoding", "gzip"),
            Request::new("no gRPC", CALL, &slow).with("content-type", "text/plain"),
            Request::new("a method that is none", "/forkring.v1.Dispatcher/Shout", &slow),
            Request::new("a method of Admin that is none", "/forkring.v1.Admin/Shout", &slow),
            Request::new("a service that is none", "/a.B/C", &slow),
            Request::new("large metadata", CALL, &slow).with("long", "x".repeat(17 << 10)),
        ];
        for request in early {
            repeat(&server, &request, &[Begin, Answer, Message, More, HalfClose]).await;
        }
        let late = [
            Request::new("a pool that is none", CALL, framed(&WorkItem::new("none", ""))),
            Request::new("a garbled item", CALL, &garbage),
            Request::new("a large item", CALL, large),
            Request::new("a call's deadline", CALL, &slow).with("grpc-timeout", "1m"),
            Request::new("two messages", CALL, [&slow[..], &slow[..]].concat()),
            Request::new("a garbled item of a stream", PROCESS, &garbage),
            Request::new("a garbled item to submit", SUBMIT, &garbage),
            Request::new("a submission's deadline", SUBMIT, b"\0").with("grpc-timeout", "1m"),
            Request::new("a subscription's deadline", UPDATES, framed(&GetUpdatesRequest::default()))
                .with("grpc-timeout", "1m"),
            Request::new("a large subscription", UPDATES, large),
            Request::new("a large request to Admin", "/forkring.v1.Admin/ListDeadLetters", large),
            Request::new("a garbled check", CHECK, &garbage),
            Request::new("a compressed check", CHECK, &compressed),
            Request::new("a large check", CHECK, [0, 0x7f, 0, 0, 0]),
            Request::new("a garbled watch", "/grpc.health.v1.Health/Watch", &garbage),
            Request::new("a garbled reflection", reflection, &garbage),
        ];
        for request in late {
            repeat(&server, &request, &[Begin, Message, Answer, More, HalfClose]).await;
        }
        drain_without_a_warning(server).await;
    });
}

/// Streams of one batch that the server reads in one turn.
async fn flood(server: &Server, batches: u32, order: impl Fn(&mut Frames, u32)) -> (Frames, bool) {
    let mut frames = Frames::connect(server).await;
    frames.settle().await;
    let mut stream = 1;
    for _ in 0..batches {
        for _ in 0..BATCH {
            order(&mut frames, stream);
            stream += 2;
        }
        if !frames.is_open().await {
            return (frames, false);
        }
    }
    (frames, true)
}

#[test]
fn a_client_that_cancels_more_at_once_than_the_server_has_seen_is_served() {
    run(async {
        let server = server().await;
        // All of it is there before the front has its turn.
        let front = server.child("front").await;
        let mut frames = Frames::connect(&server).await;
        let item = framed(&WorkItem::new("echo", "x"));
        frames.short_call(1);
        frames.write(DATA, END_STREAM, 1, &item);
        assert_eq!(frames.end_of(1).await, End::Answered);
        signal(front, Signal::SIGSTOP);
        until("a front that is stopped", || is_stopped(front).then_some(())).await;
        // More than h2 allows to be unseen, in several turns of the front, and no more than the sockets' buffers take.
        const LAST: u32 = 12_001;
        for stream in (3..LAST).step_by(2) {
            frames.short_call(stream);
            frames.reset(stream);
        }
        frames.flush().await;
        signal(front, Signal::SIGCONT);
        frames.short_call(LAST);
        frames.write(DATA, END_STREAM, LAST, &item);
        assert_eq!(frames.end_of(LAST).await, End::Answered);
        assert_eq!(frames.resets, []);
        drain_without_a_warning(server).await;
    });
}

#[test]
fn a_flood_of_resets_ends_its_own_connection() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo", "--max-resets", "200"]).await;
        let message = framed(&WorkItem::new("echo", "x"));
        let (mut other, _) = flood(&server, 0, |_, _| {}).await;
        // CVE-2023-44487, with and without a request to be worked on.
        let bare = |frames: &mut Frames, stream| {
            frames.call(stream);
            frames.reset(stream);
        };
        let whole = |frames: &mut Frames, stream| {
            frames.call(stream);
            frames.write(DATA, END_STREAM, stream, &message);
            frames.reset(stream);
        };
        let (_, is_open) = flood(&server, 19, bare).await;
        assert!(is_open, "within the limit");
        let (_, is_open) = flood(&server, 19, whole).await;
        assert!(is_open, "within the limit");
        let (mut frames, _) = flood(&server, 40, bare).await;
        frames.closed().await;
        let (mut frames, _) = flood(&server, 40, whole).await;
        frames.closed().await;
        let (mut frames, _) = flood(&server, 40, |frames, stream| {
            frames.begin(stream, "/forkring.v1.Dispatcher/Shout", &[]);
            frames.reset(stream);
        })
        .await;
        frames.closed().await;
        let (mut frames, _) = flood(&server, 40, |frames, stream| {
            frames.begin(stream, CHECK, &[]);
            frames.reset(stream);
        })
        .await;
        frames.closed().await;
        // CVE-2025-8671: the client makes the server reset its streams.
        let (mut frames, _) = flood(&server, 40, |frames, stream| {
            frames.call(stream);
            frames.window_update(stream, 0);
        })
        .await;
        assert!(frames.closed().await, "closed with no GOAWAY");
        // Others are served throughout.
        other.call(1);
        other.write(DATA, END_STREAM, 1, &message);
        assert_eq!(other.end_of(1).await, End::Answered);
        let log = server.drain().await;
        let warned = log.lines().filter(|line| line.contains("--max-resets")).count();
        assert_eq!(warned, 4, "{log}");
        assert!(log.contains("127.0.0.1:"), "{log}");
    });
}

#[test]
fn answered_requests_make_up_for_resets() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo", "--max-resets", "20"]).await;
        let mut frames = Frames::connect(&server).await;
        for n in 0..3000 {
            let stream = 4 * n + 1;
            frames.call(stream);
            frames.reset(stream);
            frames.call(stream + 2);
            frames.write(DATA, END_STREAM, stream + 2, &framed(&WorkItem::new("echo", "x")));
            frames.end_of(stream + 2).await;
        }
        drain_without_a_warning(server).await;
    });
}

#[test]
fn a_drain_resets_no_stream() {
    run(async {
        let mut server = server().await;
        let family = server.children();
        let mut frames = Frames::connect(&server).await;
        let streams = |first: u32| (0..BATCH).map(move |n| first + 2 * n);
        let (answered, open, submitting) = (streams(1), streams(1001), streams(2001));
        for stream in answered.clone() {
            frames.call(stream);
            frames.data(stream, &framed(&WorkItem::new("echo", "x")));
        }
        for stream in answered.clone() {
            assert_eq!(frames.end_of(stream).await, End::Answered);
        }
        open.clone().for_each(|stream| frames.begin(stream, PROCESS, &[]));
        submitting.clone().for_each(|stream| frames.begin(stream, SUBMIT, &[]));
        assert!(frames.is_open().await);
        server.signal(Signal::SIGTERM);
        for stream in open.clone().chain(submitting.clone()) {
            assert_eq!(frames.end_while_draining(stream).await, End::Answered);
        }
        answered.chain(open).chain(submitting).for_each(|stream| frames.end(stream));
        frames.closed().await;
        assert_eq!(frames.resets, []);
        let status = server.ended().await;
        server.assert_drained(status, &family);
    });
}
