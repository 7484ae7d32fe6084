//! Requests that say something wrong: each gets one clear answer, and leaves nothing behind.

mod common;

use std::time::Duration;

use bytes::Bytes;
use common::{
    Server, assert_refused, assert_serves, failure,
    raw::{Raw, framed, framed_bytes},
    refusal, run, soon,
};
use forkring::proto::v1::{self, GetUpdatesRequest, SubmitReceipt, WorkItem, WorkResult};
use http::Request;
use prost::Message;
use tonic::Code;

const MAX_MESSAGE: usize = 512 << 10;

/// A server with one pool, whose arena takes one message of the largest size at a time: what is leaked is missed.
async fn small_server() -> Server {
    Server::serve(&["--pool", "echo=echo", "--arena", "576KiB"]).await
}

/// Nothing is left behind: the server has room for the largest message that there may be.
async fn assert_whole(server: Server) {
    let client = server.client().await;
    let result = soon("an answer", client.call(largest())).await.expect("room for the largest message");
    assert_eq!(result.payload.len(), largest().payload.len());
    assert_serves(&client, "echo").await;
    server.drain().await;
}

/// An item whose message has exactly the largest size.
fn largest() -> WorkItem {
    let around = WorkItem::new("echo", vec![0; MAX_MESSAGE]).encoded_len() - MAX_MESSAGE;
    WorkItem::new("echo", vec![0; MAX_MESSAGE - around])
}

/// A field of a `WorkItem` that has a length, as it is on the wire.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut field = vec![number << 3 | 2];
    prost::encoding::encode_varint(bytes.len() as u64, &mut field);
    field.extend_from_slice(bytes);
    field
}

#[test]
fn a_pool_that_is_not_there_is_answered_with_those_that_are() {
    run(async {
        let server = Server::serve(&["--pool", "a=echo", "--pool", "b=echo"]).await;
        let client = server.client().await;
        let call = async |pool: &str| refusal(soon("an answer", client.call(WorkItem::new(pool, "x"))).await);
        assert_refused(call("c").await, (Code::NotFound, "UNKNOWN_POOL"), "no pool `c`: this server has a, b");
        assert_refused(call("").await, (Code::InvalidArgument, "POOL_REQUIRED"), "this server has a, b");
        assert_refused(call("A").await, (Code::NotFound, "UNKNOWN_POOL"), "no pool `A`");

        assert_serves(&client, "a").await;
        server.drain().await;
    });
}

#[test]
fn a_message_may_be_as_large_as_the_server_says_and_not_a_byte_more() {
    run(async {
        let server = small_server().await;
        let client = server.client().await;
        let mut item = largest();
        soon("an answer", client.call(item.clone())).await.expect("a message of the largest size");
        item.payload = vec![0; item.payload.len() + 1].into();
        let wanted = (Code::ResourceExhausted, "MESSAGE_TOO_LARGE");
        let says = "the message has 524289 bytes and this server takes 524288";
        assert_refused(refusal(soon("an answer", client.call(item.clone())).await), wanted, says);

        // On a stream it is the end, after what came before.
        let items = [WorkItem::new("echo", "x").with_id(1), item.clone(), WorkItem::new("echo", "y")];
        let mut results = client.process(tokio_stream::iter(items.clone())).await.expect("a stream");
        let first = soon("a result", results.message()).await.expect("a result").expect("a result");
        assert_eq!(first.id, 1);
        assert_refused(refusal(soon("the end", results.message()).await), wanted, says);
        let refused = refusal(soon("an answer", client.submit(tokio_stream::iter(items))).await);
        assert_refused(refused, wanted, "(items accepted before: 1)");
        assert_whole(server).await;
    });
}

#[test]
fn a_size_that_is_too_large_is_refused_before_it_comes() {
    run(async {
        let server = small_server().await;
        let mut raw = Raw::connect(&server).await;
        for method in ["Call", "Process", "Submit"] {
            let mut exchange = raw.begin(method, &[]).await;
            exchange.body.send_data(Bytes::from_static(&[0, 0xff, 0xff, 0xff, 0xff]), false).expect("an open stream");
            let refused = exchange.answer().await.refusal();
            assert_refused(refused, (Code::ResourceExhausted, "MESSAGE_TOO_LARGE"), "4294967295 bytes");
        }
        assert_whole(server).await;
    });
}

#[test]
fn a_request_that_is_no_item_has_a_limit_of_its_own() {
    run(async {
        let server = small_server().await;
        let mut raw = Raw::connect(&server).await;
        let too_large = (Code::ResourceExhausted, "MESSAGE_TOO_LARGE");
        let request = |len| GetUpdatesRequest { subscription: "x".repeat(len), limit: 1 };
        for (len, says) in [(4094, "4099 bytes"), (100_000, "100006 bytes")] {
            // In one piece; and by its length alone, when the rest of it is read and thrown away.
            let refused = raw.ask("GetUpdates", &[], framed(&request(len))).await.refusal();
            assert_refused(refused, too_large, &format!("{says} and this method takes 4096"));
            let mut exchange = raw.begin("GetUpdates", &[]).await;
            exchange.body.send_data(framed(&request(len)).slice(..7), false).expect("an open stream");
            let response = soon("a response", &mut exchange.response).await.expect("a response");
            assert_eq!(response.headers()["grpc-status"], (Code::ResourceExhausted as i32).to_string());
            exchange.body.send_data(framed(&request(len)).slice(7..), true).expect("an open stream");
            raw.settled().await;
        }
        // More than the message that was announced is too much, too.
        let body = [&[0, 0, 0, 0, 1][..], &[0; 4097]].concat();
        assert_refused(raw.ask("GetUpdates", &[], body.into()).await.refusal(), too_large, "4097 bytes");
        assert_eq!(framed(&request(4091)).len(), 5 + 4096);
        let mut fits = raw.begin("GetUpdates", &[]).await;
        fits.body.send_data(framed(&request(4091)), true).expect("an open stream");
        assert_eq!(soon("a response", fits.response).await.expect("a response").headers().get("grpc-status"), None);
        assert_whole(server).await;
    });
}

#[test]
fn nothing_is_a_fine_payload_and_even_a_fine_message() {
    run(async {
        let server = small_server().await;
        let mut raw = Raw::connect(&server).await;
        for message in [&[][..], &field(2, b""), &field(1, b"echo")] {
            let answer = raw.ask("Call", &[], framed_bytes(0, message)).await;
            assert_eq!(answer.code, Code::Ok, "{message:?}: {}", answer.message);
            let result = WorkResult::decode(answer.messages[0].clone()).expect("a result");
            assert!(result.payload.is_empty() && result.status.is_none() && result.attempts == 1);
        }
        // No message at all is none for a call, and none too few for a stream.
        let refused = raw.ask("Call", &[], Bytes::new()).await.refusal();
        assert_refused(refused, (Code::Internal, "NO_MESSAGE"), "without a message");
        let refused = raw.ask("GetUpdates", &[], Bytes::new()).await.refusal();
        assert_refused(refused, (Code::Internal, "NO_MESSAGE"), "without a message");
        let answer = raw.ask("Process", &[], Bytes::new()).await;
        assert_eq!((answer.code, answer.messages.len()), (Code::Ok, 0));
        let answer = raw.ask("Submit", &[], Bytes::new()).await;
        assert_eq!(SubmitReceipt::decode(answer.messages[0].clone()), Ok(SubmitReceipt::default()));
        assert_whole(server).await;
    });
}

#[test]
fn a_call_has_one_message() {
    run(async {
        let server = small_server().await;
        let mut raw = Raw::connect(&server).await;
        let twice = [framed(&largest()), framed(&WorkItem::new("echo", "x"))].concat();
        let refused = raw.ask("Call", &[], twice.into()).await.refusal();
        assert_refused(refused, (Code::Internal, "TOO_MANY_MESSAGES"), "use Process");
        assert_whole(server).await;
    });
}

#[test]
fn what_is_no_work_item_is_refused_with_what_is_wrong_about_it() {
    run(async {
        let server = small_server().await;
        let mut raw = Raw::connect(&server).await;
        let payload = field(2, &[7; 1000]);
        let malformed = (Code::Internal, "MALFORMED_MESSAGE");
        let too_long = (Code::InvalidArgument, "FIELD_TOO_LONG");
        let entry = |text: &str| {
            let item = WorkItem::default().with_metadata("k", text);
            item.encode_to_vec()
        };
        let duration = |seconds, nanos| {
            let timeout = Some(prost_types::Duration { seconds, nanos });
            WorkItem { timeout, ..Default::default() }.encode_to_vec()
        };
        for (message, wanted, says) in [
            (vec![0xff; 20], malformed, "not a forkring.v1.WorkItem"),
            (vec![0x0f], malformed, "not a forkring.v1.WorkItem"),
            // A payload that is longer than its message, an id that is text, a pool that is not.
            (vec![2 << 3 | 2, 100, 1], malformed, "not a forkring.v1.WorkItem"),
            (field(3, b"x"), malformed, "not a forkring.v1.WorkItem"),
            (field(1, &[0xff]), malformed, "not a forkring.v1.WorkItem"),
            (field(1, &[b'x'; 256]), too_long, "pool has 256 bytes: use 255 at most"),
            (field(7, &[b'x'; 256]), too_long, "subscription has 256 bytes: use 255 at most"),
            (entry(&"x".repeat(17_000)), too_long, "metadata has"),
            (duration(-1, 0), (Code::InvalidArgument, "BAD_TIMEOUT"), "timeout is -1 s"),
            (duration(0, -1), (Code::InvalidArgument, "BAD_TIMEOUT"), "timeout is 0 s and -1 ns"),
            (duration(0, 1_000_000_000), (Code::InvalidArgument, "BAD_TIMEOUT"), "at most"),
        ] {
            // Behind a payload that has its place already.
            let message = framed_bytes(0, &[payload.clone(), message].concat());
            for method in ["Call", "Process", "Submit"] {
                assert_refused(raw.ask(method, &[], message.clone()).await.refusal(), wanted, says);
            }
        }
        let refused = raw.ask("GetUpdates", &[], framed_bytes(0, &[0xff; 20])).await.refusal();
        assert_refused(refused, malformed, "");
        let refused = raw.ask("GetUpdates", &[], Bytes::from_static(&[0, 0, 0, 0, 9, 1])).await.refusal();
        assert_refused(refused, malformed, "");
        assert_whole(server).await;
    });
}

#[test]
fn compression_is_not_understood_and_says_so() {
    run(async {
        let server = small_server().await;
        let mut raw = Raw::connect(&server).await;
        let gzip = [("grpc-encoding", "gzip")];
        let message = framed(&v1::WorkItem::new("echo", vec![1; 1000]));
        for method in ["Call", "Process", "Submit", "GetUpdates"] {
            let refused = raw.ask(method, &gzip, message.clone()).await.refusal();
            assert_refused(refused, (Code::Unimplemented, "COMPRESSED_MESSAGE"), "`gzip` is not supported");
        }
        let exchange = raw.begin("Call", &gzip).await;
        let response = soon("a response", exchange.response).await.expect("a response");
        assert_eq!(response.headers()["grpc-accept-encoding"], "identity");
        let answer = raw.ask("Call", &[("grpc-encoding", "identity")], message.clone()).await;
        assert_eq!(answer.code, Code::Ok, "no compression is understood");
        // Compressed by something that was not named, and by something that there is not.
        for method in ["Call", "Process", "Submit"] {
            let refused = raw.ask(method, &[], framed_bytes(1, b"zzz")).await.refusal();
            assert_refused(refused, (Code::Internal, "COMPRESSED_MESSAGE"), "send it uncompressed");
            let refused = raw.ask(method, &[], framed_bytes(2, b"zzz")).await.refusal();
            assert_refused(refused, (Code::Internal, "MALFORMED_MESSAGE"), "neither 0 nor 1");
        }
        let refused = raw.ask("GetUpdates", &[], framed_bytes(1, b"")).await.refusal();
        assert_refused(refused, (Code::Internal, "COMPRESSED_MESSAGE"), "send it uncompressed");
        assert_whole(server).await;
    });
}

#[test]
fn half_a_message_is_none() {
    run(async {
        let server = small_server().await;
        let mut raw = Raw::connect(&server).await;
        let whole = framed(&largest());
        for method in ["Call", "Process", "Submit"] {
            for part in [3, 5, 7, 1000, whole.len() - 1] {
                let refused = raw.ask(method, &[], whole.slice(..part)).await.refusal();
                assert_refused(refused, (Code::Internal, "TRUNCATED_MESSAGE"), "ended within a message");
            }
        }
        assert_whole(server).await;
    });
}

#[test]
fn what_came_before_a_bad_message_is_not_touched_by_it() {
    run(async {
        let server = small_server().await;
        let mut raw = Raw::connect(&server).await;
        let good = framed(&WorkItem::new("echo", vec![1; 2000]).with_id(1).with_subscription("s"));
        let bad = framed_bytes(0, &[0xff; 20]);
        let body: Bytes = [good.clone(), good, bad].concat().into();
        let answer = raw.ask("Process", &[], body.clone()).await;
        assert_eq!((answer.code, answer.reason.as_str()), (Code::Internal, "MALFORMED_MESSAGE"));
        let results = answer.messages.iter().map(|message| WorkResult::decode(message.clone()).expect("a result"));
        assert!(results.map(|result| (result.id, result.payload.len())).eq([(1, 2000); 2]));
        let refused = raw.ask("Submit", &[], body).await.refusal();
        assert_refused(refused, (Code::Internal, "MALFORMED_MESSAGE"), "(items accepted before: 2)");
        let mut updates = server.client().await.updates("s", 2).await.expect("a stream");
        for _ in 0..2 {
            let result = soon("an update", updates.message()).await.expect("a stream").expect("an update");
            assert_eq!((result.id, result.payload.len()), (1, 2000));
        }
        assert_whole(server).await;
    });
}

#[test]
fn a_timeout_that_cannot_be_read_is_not_ignored() {
    run(async {
        let server = small_server().await;
        let mut raw = Raw::connect(&server).await;
        let message = framed(&WorkItem::new("echo", "x"));
        for timeout in ["", "10", "m", "-1S", "123456789S", "1x", "1.5S"] {
            for method in ["Call", "Process", "Submit", "GetUpdates"] {
                let refused = raw.ask(method, &[("grpc-timeout", timeout)], message.clone()).await.refusal();
                assert_refused(refused, (Code::InvalidArgument, "BAD_TIMEOUT"), "1 to 8 digits");
            }
        }
        for timeout in ["99999999H", "60S"] {
            let answer = raw.ask("Call", &[("grpc-timeout", timeout)], message.clone()).await;
            assert_eq!(answer.code, Code::Ok, "{timeout}: {}", answer.message);
        }
        // As long as protobuf can say.
        let item = WorkItem::new("echo", "x").with_timeout(Duration::from_secs(315_576_000_000));
        soon("an answer", server.client().await.call(item)).await.expect("a result");
        assert_whole(server).await;
    });
}

#[test]
fn a_priority_that_there_is_not_is_refused() {
    run(async {
        let server = small_server().await;
        let client = server.client().await;
        for priority in [4, u32::MAX] {
            let item = || WorkItem::new("echo", vec![0; 1000]).with_priority(priority);
            let wanted = (Code::InvalidArgument, "BAD_PRIORITY");
            let says = format!("priority is {priority}: it must be 0 to 3");
            assert_refused(refusal(soon("an answer", client.call(item())).await), wanted, &says);
            let mut results = client.process(tokio_stream::iter([item()])).await.expect("a stream");
            let result = soon("a result", results.message()).await.expect("a stream").expect("a result");
            assert_refused(failure(result), wanted, &says);
        }
        assert_whole(server).await;
    });
}

#[test]
fn what_is_no_call_of_ours_is_told_so() {
    run(async {
        let server = small_server().await;
        let mut raw = Raw::connect(&server).await;
        let answer = raw.ask("Shout", &[], Bytes::new()).await;
        assert_eq!(answer.code, Code::Unimplemented, "{}", answer.message);
        assert!(answer.message.contains("no method Shout"), "{}", answer.message);
        let request = |path: &str| Request::post(format!("http://localhost{path}"));
        let grpc = request("/other.Service/Method").header("content-type", "application/grpc");
        let exchange = raw.send(grpc.body(()).expect("a request")).await;
        assert_eq!(exchange.answer().await.code, Code::Unimplemented);
        // A browser, or something that posts JSON.
        for content_type in [None, Some("application/json")] {
            let mut plain = request("/forkring.v1.Dispatcher/Call");
            if let Some(content_type) = content_type {
                plain = plain.header("content-type", content_type);
            }
            let exchange = raw.send(plain.body(()).expect("a request")).await;
            let response = soon("a response", exchange.response).await.expect("a response");
            assert_eq!(response.status(), 415);
        }
        assert_whole(server).await;
    });
}
