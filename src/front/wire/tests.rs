//! prost is the oracle: whatever it reads from a message, the codec must read too, however the message is cut.

use std::collections::{BTreeMap, HashMap};

use bytes::{Bytes, BytesMut};
use http::HeaderValue;
use proptest::{collection::vec, prelude::*, sample::Index};
use prost::Message;

use super::*;
use crate::{dispatch::metadata, proto::v1};

const MAX: usize = 1 << 20;

/// Feeds `chunks` and checks on the way what the events promise. The items that were complete come back even when an
/// error ended the stream.
fn read<'a>(chunks: impl IntoIterator<Item = &'a [u8]>, max: usize) -> (Vec<v1::WorkItem>, Result<(), WireError>) {
    let mut decoder = ItemDecoder::new(max);
    let mut items = Vec::new();
    let mut payload: Option<(usize, Vec<u8>)> = None;
    for mut chunk in chunks {
        loop {
            let before = chunk.len();
            let event = match decoder.next(&mut chunk) {
                Ok(Some(event)) => event,
                Ok(None) => break,
                Err(error) => {
                    assert_eq!(decoder.next(&mut &b"\0\0\0\0\0"[..]), Err(error), "an error lasts");
                    assert_eq!((decoder.in_message(), decoder.finish()), (true, Err(error)));
                    return (items, Err(error));
                }
            };
            assert!(chunk.len() <= before);
            match event {
                Event::Payload { len } => {
                    assert!(decoder.in_message() && len <= max);
                    payload = Some((len, Vec::new()));
                }
                Event::Bytes(bytes) => {
                    let (len, got) = payload.as_mut().expect("Payload comes before Bytes");
                    assert!(!bytes.is_empty());
                    got.extend_from_slice(bytes);
                    assert!(got.len() <= *len, "more than announced");
                }
                Event::Item => {
                    assert!(!decoder.in_message());
                    let (len, payload) = payload.take().unwrap_or_default();
                    assert_eq!(payload.len(), len, "less than announced");
                    items.push(item(decoder.head(), payload));
                }
            }
        }
        assert!(chunk.is_empty(), "None, but there were bytes left");
    }
    assert_eq!(decoder.in_message(), decoder.finish().is_err());
    (items, decoder.finish())
}

fn item(head: &ItemHead, payload: Vec<u8>) -> v1::WorkItem {
    v1::WorkItem {
        pool: head.pool.clone(),
        payload: payload.into(),
        id: head.id,
        metadata: metadata::pairs(&head.metadata).map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
        priority: head.priority,
        timeout: head.timeout.map(|timeout| prost_types::Duration {
            seconds: timeout.as_secs() as i64,
            nanos: timeout.subsec_nanos() as i32,
        }),
        subscription: head.subscription.clone(),
    }
}

fn framed(message: &[u8]) -> Vec<u8> {
    let mut frame = vec![0];
    frame.extend_from_slice(&(message.len() as u32).to_be_bytes());
    frame.extend_from_slice(message);
    frame
}

fn cut<'a>(mut bytes: &'a [u8], cuts: &[Index]) -> Vec<&'a [u8]> {
    let mut chunks = Vec::new();
    for cut in cuts {
        let (chunk, rest) = bytes.split_at(cut.index(bytes.len() + 1));
        chunks.push(chunk);
        bytes = rest;
    }
    chunks.push(bytes);
    chunks
}

fn whole(message: &[u8]) -> Result<v1::WorkItem, WireError> {
    let (mut items, end) = read([&framed(message)[..]], MAX);
    end.map(|()| {
        assert_eq!(items.len(), 1);
        items.remove(0)
    })
}

fn work_item() -> impl Strategy<Value = v1::WorkItem> {
    (
        "\\PC{0,60}",
        vec(any::<u8>(), 0..1500),
        any::<u64>(),
        prop::collection::hash_map("\\PC{0,20}", "\\PC{0,40}", 0..4),
        any::<u32>(),
        prop::option::of((0..=MAX_SECONDS, 0..=999_999_999)),
        "\\PC{0,60}",
    )
        .prop_map(|(pool, payload, id, metadata, priority, timeout, subscription)| v1::WorkItem {
            pool,
            payload: payload.into(),
            id,
            metadata,
            priority,
            timeout: timeout.map(|(seconds, nanos)| prost_types::Duration { seconds, nanos }),
            subscription,
        })
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
    out
}

fn len_field(field: u64, body: &[u8]) -> Vec<u8> {
    [varint(field << 3 | 2), varint(body.len() as u64), body.to_vec()].concat()
}

/// A field of a WorkItem, or one it does not know, encoded by hand: as any client may send it.
fn any_field() -> impl Strategy<Value = Vec<u8>> {
    let text = |field: u64| "\\PC{0,30}".prop_map(move |text| len_field(field, text.as_bytes()));
    let uint = |field: u64| any::<u64>().prop_map(move |value| [varint(field << 3), varint(value)].concat());
    let unknown = 8..1u64 << 29;
    let duration = vec(
        prop_oneof![
            (0..=MAX_SECONDS as u64).prop_map(|v| [vec![0x08], varint(v)].concat()),
            (0..=999_999_999u64).prop_map(|v| [vec![0x10], varint(v)].concat()),
            uint(3),
            text(9),
        ],
        0..3,
    );
    let entry = vec(prop_oneof![text(1), text(2), text(3), uint(4)], 0..4);
    prop_oneof![
        text(1),
        vec(any::<u8>(), 0..300).prop_map(|payload| len_field(2, &payload)),
        uint(3),
        entry.prop_map(|fields| len_field(4, &fields.concat())),
        uint(5),
        duration.prop_map(|fields| len_field(6, &fields.concat())),
        text(7),
        (unknown.clone(), any::<u64>()).prop_map(|(f, v)| [varint(f << 3), varint(v)].concat()),
        (unknown.clone(), any::<[u8; 8]>()).prop_map(|(f, v)| [varint(f << 3 | 1), v.to_vec()].concat()),
        (unknown.clone(), vec(any::<u8>(), 0..300)).prop_map(|(f, v)| len_field(f, &v)),
        (unknown, any::<[u8; 4]>()).prop_map(|(f, v)| [varint(f << 3 | 5), v.to_vec()].concat()),
    ]
}

proptest! {
    #[test]
    fn items_of_prost_survive_any_cuts(items in vec(work_item(), 1..4), cuts in vec(any::<Index>(), 0..12)) {
        let mut stream = BytesMut::new();
        for item in &items {
            encode_message(&mut stream, item);
        }
        prop_assert_eq!(read(cut(&stream, &cuts), MAX), (items.clone(), Ok(())));
        prop_assert_eq!(read(stream.chunks(1), MAX), (items, Ok(())));
    }

    #[test]
    fn fields_come_in_any_order_and_number(fields in vec(any_field(), 0..12), cuts in vec(any::<Index>(), 0..12)) {
        let message = fields.concat();
        let expected = v1::WorkItem::decode(&message[..]).expect("prost reads what any_field makes");
        let stream = framed(&message);
        prop_assert_eq!(read(cut(&stream, &cuts), MAX), (vec![expected], Ok(())));
    }

    #[test]
    fn damaged_messages_are_judged_as_prost_judges_them(
        fields in vec(any_field(), 0..6),
        damage in vec((any::<Index>(), any::<u8>()), 0..4),
        cuts in vec(any::<Index>(), 0..6),
    ) {
        let mut message = fields.concat();
        for (at, byte) in damage {
            if !message.is_empty() {
                let at = at.index(message.len());
                message[at] = byte;
            }
        }
        let stream = framed(&message);
        let (items, end) = read(cut(&stream, &cuts), MAX);
        prop_assert_eq!(read(stream.chunks(1), MAX), (items.clone(), end));
        match (end, v1::WorkItem::decode(&message[..])) {
            (Ok(()), expected) => prop_assert_eq!(Ok(items), expected.map(|item| vec![item])),
            // What this decoder alone refuses: limits, timeouts that are none, unknown groups, and a map entry of the
            // wrong wire type, which prost takes for a length.
            (Err(WireError::FieldTooLong { .. } | WireError::BadTimeout { .. }), _) => {}
            (Err(WireError::Malformed(field::GROUP | field::WRONG_TYPE)), _) => {}
            (Err(error), expected) => prop_assert!(expected.is_err(), "{} but prost reads {:?}", error, expected),
        }
    }

    #[test]
    fn garbage_does_no_harm(garbage in vec(any::<u8>(), 0..2000), cuts in vec(any::<Index>(), 0..8), frame: bool) {
        let stream = if frame { framed(&garbage) } else { garbage };
        // `read` checks each event.
        let joined = read([&stream[..]], 1000);
        prop_assert_eq!(read(cut(&stream, &cuts), 1000), joined.clone());
        prop_assert_eq!(read(stream.chunks(1), 1000), joined);
    }

    #[test]
    fn metadata_garbage_ends_the_iterator(garbage in vec(any::<u8>(), 0..200)) {
        let read: usize = metadata::pairs(&garbage).map(|(key, value)| metadata::len(key, value)).sum();
        prop_assert!(read <= garbage.len());
    }

    #[test]
    fn results_are_what_prost_reads(
        id: u64,
        status in prop::option::of((any::<i32>(), "\\PC{0,200}", "[A-Z_]{0,20}", "\\PC{0,200}")),
        timing: [u64; 3],
        shifts in prop::array::uniform4(0u32..64),
        attempts: u32,
        worker: u32,
        (partial, sequence) in any::<(bool, u32)>(),
        payload in vec(any::<u8>(), 0..1000),
    ) {
        let id = id >> shifts[3];
        let [queued_ns, worked_ns, returned_ns] = [0, 1, 2].map(|i| timing[i] >> shifts[i]);
        let head = ResultHead {
            id,
            status: status.as_ref().map(|(code, message, reason, traceback)| ResultStatus {
                code: *code,
                message,
                reason,
                traceback,
            }),
            queued_ns,
            worked_ns,
            returned_ns,
            attempts,
            worker,
            partial,
            sequence,
        };
        let expected = v1::WorkResult {
            id,
            payload: Bytes::from(payload.clone()),
            status: status
                .clone()
                .map(|(code, message, reason, traceback)| v1::Status { code, message, reason, traceback }),
            timing: (!partial).then_some(v1::Timing { queued_ns, worked_ns, returned_ns }),
            attempts,
            worker,
            partial,
            sequence,
        };
        let mut reference = BytesMut::from("before");
        encode_message(&mut reference, &expected);

        let mut joined = BytesMut::from("before");
        encode_result(&mut joined, &head, &payload);
        prop_assert_eq!(joined.len(), reference.len(), "not one byte more than prost");
        prop_assert_eq!(&joined[..11], &reference[..11]);
        prop_assert_eq!(v1::WorkResult::decode(&joined[11..]), Ok(expected));

        let mut apart = BytesMut::from("before");
        encode_result_prefix(&mut apart, &head, payload.len());
        apart.extend_from_slice(&payload);
        prop_assert_eq!(apart, joined);
    }

    #[test]
    fn grpc_timeouts_are_digits_and_a_unit(digits in "[0-9]{1,8}", unit in "[HMSmun]") {
        let nanos = digits.parse::<u128>().unwrap() * match &*unit {
            "H" => 3_600_000_000_000,
            "M" => 60_000_000_000,
            "S" => 1_000_000_000,
            "m" => 1_000_000,
            "u" => 1_000,
            _ => 1,
        };
        let header = HeaderValue::from_str(&format!("{digits}{unit}")).unwrap();
        prop_assert_eq!(parse_grpc_timeout(&header).map(|timeout| timeout.as_nanos()), Ok(nanos));
    }
}

#[test]
fn a_message_in_one_chunk_gives_its_payload_in_one_slice() {
    let message = [len_field(1, b"p"), len_field(2, b"payload"), vec![0x18, 7]].concat();
    let stream = framed(&message);
    let mut chunk = &stream[..];
    let mut decoder = ItemDecoder::new(MAX);
    let mut next = || decoder.next(&mut chunk);
    assert_eq!(next(), Ok(Some(Event::Payload { len: 7 })));
    assert_eq!(next(), Ok(Some(Event::Bytes(b"payload"))));
    assert_eq!(next(), Ok(Some(Event::Item)));
    assert_eq!(next(), Ok(None));
    assert_eq!((&*decoder.head().pool, decoder.head().id), ("p", 7));
}

#[test]
fn an_empty_payload_has_no_bytes_and_an_absent_one_no_event() {
    let stream = [framed(&len_field(2, b"")), framed(b"")].concat();
    let mut chunk = &stream[..];
    let mut decoder = ItemDecoder::new(MAX);
    let mut next = || decoder.next(&mut chunk);
    assert_eq!(next(), Ok(Some(Event::Payload { len: 0 })));
    assert_eq!(next(), Ok(Some(Event::Item)));
    assert_eq!(next(), Ok(Some(Event::Item)));
    assert_eq!(next(), Ok(None));
    assert_eq!(decoder.head(), &ItemHead::default());
}

#[test]
fn nothing_of_an_item_is_left_in_the_next() {
    let full = v1::WorkItem {
        pool: "pool".into(),
        payload: Bytes::from_static(b"payload"),
        id: 1,
        metadata: HashMap::from([("key".into(), "value".into())]),
        priority: 2,
        timeout: Some(prost_types::Duration { seconds: 3, nanos: 4 }),
        subscription: "subscription".into(),
    };
    let stream = [framed(&full.encode_to_vec()), framed(b"")].concat();
    let expected = vec![full, v1::WorkItem::default()];
    assert_eq!(read([&stream[..]], MAX), (expected, Ok(())));
}

#[test]
fn the_prefix_alone_tells_too_large_and_compressed() {
    let prefix = |flag: u8, len: u32| [&[flag][..], &len.to_be_bytes()].concat();
    let end = |prefix: &[u8]| read([prefix], 1000).1;
    assert_eq!(end(&prefix(0, 1001)), Err(WireError::TooLarge { len: 1001, max: 1000 }));
    assert_eq!(end(&prefix(0, 1000)), Err(WireError::Truncated { missing: 1000 }));
    assert_eq!(end(&prefix(1, 3)), Err(WireError::Compressed));
    assert!(matches!(end(&prefix(2, 3)), Err(WireError::Malformed(_))));
}

#[test]
fn a_stream_that_ends_within_a_message_is_told_from_one_that_ends_after_it() {
    let stream = framed(&[len_field(1, b"pool"), len_field(2, &[7; 300]), vec![0x18, 0x80, 1]].concat());
    for end in 1..stream.len() {
        let missing = if end < PREFIX { PREFIX } else { stream.len() } - end;
        for chunk in [1, stream.len()] {
            let (items, result) = read(stream[..end].chunks(chunk), MAX);
            assert_eq!((items.len(), result), (0, Err(WireError::Truncated { missing })), "cut at {end}");
        }
    }
    assert_eq!(ItemDecoder::new(MAX).finish(), Ok(()));
}

#[test]
fn small_fields_have_limits() {
    for (field, name, max) in [(1, "pool", MAX_POOL), (7, "subscription", MAX_SUBSCRIPTION)] {
        assert!(whole(&len_field(field, &vec![b'a'; max])).is_ok());
        let len = max + 1;
        let error = WireError::FieldTooLong { field: name, len, max };
        assert_eq!(whole(&len_field(field, &vec![b'a'; len])), Err(error));
    }
    let entry = |value: usize| len_field(4, &len_field(2, &vec![b'v'; value]));
    assert!(whole(&entry(MAX_METADATA - 8)).is_ok());
    let too_long = |len| Err(WireError::FieldTooLong { field: "metadata", len, max: MAX_METADATA });
    assert_eq!(whole(&entry(MAX_METADATA - 7)), too_long(MAX_METADATA + 1));
    assert_eq!(whole(&[entry(MAX_METADATA - 8), entry(1)].concat()), too_long(MAX_METADATA + 9));
    // Empty entries take memory too.
    assert_eq!(whole(&len_field(4, b"").repeat(MAX_METADATA / 8 + 1)), too_long(MAX_METADATA + 8));
}

#[test]
fn timeouts_must_be_durations() {
    let read = |seconds: i64, nanos: i32| {
        let timeout = Some(prost_types::Duration { seconds, nanos });
        let item = v1::WorkItem { timeout, ..Default::default() };
        whole(&item.encode_to_vec()).map(|item| item.timeout)
    };
    assert_eq!(read(0, 0), Ok(Some(prost_types::Duration::default())));
    assert!(read(MAX_SECONDS, 999_999_999).is_ok());
    for (seconds, nanos) in [(-1, 0), (0, -1), (1, -1), (0, 1_000_000_000), (MAX_SECONDS + 1, 0), (i64::MIN, i32::MIN)]
    {
        assert_eq!(read(seconds, nanos), Err(WireError::BadTimeout { seconds, nanos }));
    }
    assert!(matches!(whole(&len_field(6, &[0; 256])), Err(WireError::FieldTooLong { field: "timeout", .. })));
}

#[test]
fn malformed_messages_are_refused() {
    for (message, why) in [
        (&b"\x08\x01"[..], field::WRONG_TYPE),
        (b"\x12", field::PAST_END),
        (b"\x12\x01", field::PAST_END),
        (b"\x0a\x01", field::PAST_END),
        (b"\x7a\x01", field::PAST_END),
        (b"\x79\0\0\0\0\0\0\0", field::PAST_END),
        (b"\x18\xff", field::PAST_END),
        (b"\x19\0\0\0\0\0\0\0\0", field::WRONG_TYPE),
        (b"\x1a\0", field::WRONG_TYPE),
        (b"\x38\0", field::WRONG_TYPE),
        (b"\x18\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02", field::BAD_VARINT),
        (b"\x18\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80", field::BAD_VARINT),
        (b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", field::PAST_END),
        (b"\0\0", field::BAD_KEY),
        (b"\x02\0", field::BAD_KEY),
        (b"\x80\x80\x80\x80\x10\0", field::BAD_KEY),
        (b"\x7b\x7c", field::GROUP),
        (b"\x7c", field::GROUP),
        (b"\x7e", field::GROUP),
        (b"\x0a\x01\xff", field::NOT_UTF8),
        (b"\x3a\x01\xff", field::NOT_UTF8),
        (b"\x22\x03\x0a\x01\xff", field::NOT_UTF8),
        (b"\x22\x02\x0a\x01", field::PAST_END),
        (b"\x22\x02\x08\x01", field::WRONG_TYPE),
        (b"\x32\x02\x0a\x00", field::WRONG_TYPE),
    ] {
        // What follows must not be taken for the rest of it.
        let stream = [framed(message), vec![0; 50]].concat();
        for chunk in [stream.len(), 1] {
            let (items, end) = read(stream.chunks(chunk), MAX);
            assert_eq!((items.len(), end), (0, Err(WireError::Malformed(why))), "{message:x?}");
        }
    }
}

#[test]
fn varints_have_up_to_64_bits() {
    let id = |message: &[u8]| whole(message).map(|item| item.id);
    assert_eq!(id(b"\x18\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"), Ok(u64::MAX));
    assert_eq!(id(b"\x18\x81\x80\x80\x00"), Ok(1));
    assert_eq!(id(b"\x98\x80\x80\x00\x05"), Ok(5));
}

#[test]
fn metadata_is_length_prefixed_and_the_last_of_a_key_counts() {
    let mut bytes = Vec::new();
    for (key, value) in [("a", "1"), ("", ""), ("a", "2")] {
        metadata::push(&mut bytes, key, value);
    }
    assert_eq!(bytes[..10], *b"\x01\0\0\0a\x01\0\0\x001");
    assert_eq!(metadata::pairs(&bytes).collect::<Vec<_>>(), [("a", "1"), ("", ""), ("a", "2")]);
    let map: BTreeMap<_, _> = metadata::pairs(&bytes).collect();
    assert_eq!(map["a"], "2");
    assert_eq!(metadata::pairs(&bytes[..bytes.len() - 1]).count(), 2);
}

#[test]
fn malformed_grpc_timeouts_are_refused() {
    for header in ["", "S", "5", "5s", "5 S", "-5S", "+5S", "123456789S", "5SS", "1.5S", "0x1S"] {
        let header = HeaderValue::from_static(header);
        assert_eq!(parse_grpc_timeout(&header), Err(WireError::BadTimeoutHeader), "{header:?}");
    }
    let opaque = HeaderValue::from_bytes(b"5\xffS").unwrap();
    assert_eq!(parse_grpc_timeout(&opaque), Err(WireError::BadTimeoutHeader));
}

#[test]
fn the_largest_result_head_fits_its_stack_buffer() {
    let text = "x".repeat(300);
    let head = ResultHead {
        partial: false,
        sequence: u32::MAX,
        id: u64::MAX,
        status: Some(ResultStatus { code: -1, message: &text, reason: &text, traceback: &text }),
        queued_ns: u64::MAX,
        worked_ns: u64::MAX,
        returned_ns: u64::MAX,
        attempts: u32::MAX,
        worker: u32::MAX,
    };
    for head in [head, ResultHead { status: None, ..head }, ResultHead::default()] {
        let mut out = BytesMut::new();
        encode_result_prefix(&mut out, &head, MAX_PAYLOAD);
        let announced = u32::from_be_bytes([out[1], out[2], out[3], out[4]]) as usize;
        assert_eq!(announced, out.len() - PREFIX + MAX_PAYLOAD);
    }
}

#[test]
fn errors_have_a_code_a_reason_and_one_line() {
    for (error, code, reason) in [
        (WireError::TooLarge { len: 2, max: 1 }, Code::ResourceExhausted, "MESSAGE_TOO_LARGE"),
        (WireError::Compressed, Code::Internal, "COMPRESSED_MESSAGE"),
        (WireError::Malformed(field::PAST_END), Code::Internal, "MALFORMED_MESSAGE"),
        (WireError::Truncated { missing: 1 }, Code::Internal, "TRUNCATED_MESSAGE"),
        (WireError::FieldTooLong { field: "pool", len: 2, max: 1 }, Code::InvalidArgument, "FIELD_TOO_LONG"),
        (WireError::BadTimeout { seconds: -1, nanos: 0 }, Code::InvalidArgument, "BAD_TIMEOUT"),
        (WireError::BadTimeoutHeader, Code::InvalidArgument, "BAD_TIMEOUT"),
    ] {
        assert_eq!((error.code(), error.reason()), (code, reason));
        assert_eq!(error.to_string().lines().count(), 1);
    }
}
