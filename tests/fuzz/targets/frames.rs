//! gRPC frames of `WorkItem`s, cut anywhere. However they are cut they read the same; what is accepted, prost accepts too
//! and reads the same; and no more is ever handed out than was announced.
#![no_main]

use forkring::{
    dispatch::metadata,
    front::wire::{Event, ItemDecoder, ItemHead, WireError, parse_grpc_timeout},
    proto::v1::WorkItem,
};
use http::HeaderValue;
use prost::Message as _;

const MOST: usize = 2000;

type Items = Vec<(ItemHead, Vec<u8>)>;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    if let Ok(value) = HeaderValue::from_bytes(input) {
        let _ = parse_grpc_timeout(&value);
    }
    let _ = metadata::pairs(input).count();

    // Where to cut, and what.
    let Some((&[count, most], rest)) = input.split_first_chunk() else { return };
    let Some((cuts, bytes)) = rest.split_at_checked(usize::from(count) % 32) else { return };
    let most = if most < 128 { MOST } else { usize::from(most) };
    let (whole, end) = read(std::iter::once(bytes), most);
    let (cut, cut_end) = read(chunks(cuts, bytes), most);
    assert_eq!((&whole, end), (&cut, cut_end));

    // prost has no prefixes: they are walked by what has been accepted.
    let mut at = 0;
    for (head, payload) in whole {
        let len = u32::from_be_bytes(bytes[at + 1..at + 5].try_into().expect("a prefix")) as usize;
        assert!(bytes[at] == 0 && len <= most);
        let item = WorkItem::decode(&bytes[at + 5..at + 5 + len]).expect("what is accepted is protobuf");
        at += 5 + len;
        assert_eq!((item.pool, item.id, item.priority), (head.pool, head.id, head.priority));
        assert_eq!((&item.payload[..], item.subscription), (&payload[..], head.subscription));
        assert!(metadata::pairs(&head.metadata).all(|(key, _)| item.metadata.contains_key(key)));
        for (key, value) in &item.metadata {
            let last = metadata::pairs(&head.metadata).filter(|(name, _)| name == key).last();
            assert_eq!(last.map(|(_, value)| value), Some(value.as_str()));
        }
        let timeout = item.timeout.map(|timeout| timeout.try_into().expect("a duration that is not negative"));
        assert_eq!(timeout, head.timeout);
    }
});

fn chunks<'a>(cuts: &'a [u8], mut bytes: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
    let mut cuts = cuts.iter();
    std::iter::from_fn(move || {
        let len = cuts.next().map_or(bytes.len(), |&cut| usize::from(cut).min(bytes.len()));
        let (chunk, rest) = bytes.split_at(len);
        let more = !bytes.is_empty();
        bytes = rest;
        more.then_some(chunk)
    })
}

/// All items, and how it ended.
fn read<'a>(chunks: impl Iterator<Item = &'a [u8]>, most: usize) -> (Items, Result<(), WireError>) {
    let mut decoder = ItemDecoder::new(most);
    let (mut items, mut payload, mut announced) = (Items::new(), Vec::new(), 0);
    for mut chunk in chunks {
        loop {
            match decoder.next(&mut chunk) {
                Ok(Some(Event::Payload { len })) => {
                    assert!(len <= most);
                    payload.clear();
                    announced = len;
                }
                Ok(Some(Event::Bytes(bytes))) => {
                    assert!(!bytes.is_empty());
                    payload.extend_from_slice(bytes);
                    assert!(payload.len() <= announced);
                }
                Ok(Some(Event::Item)) => {
                    assert_eq!(payload.len(), announced);
                    items.push((decoder.head().clone(), std::mem::take(&mut payload)));
                    announced = 0;
                }
                Ok(None) => break assert!(chunk.is_empty()),
                Err(error) => return (items, Err(error)),
            }
        }
    }
    let end = decoder.finish();
    assert_eq!(end.is_err(), decoder.in_message());
    (items, end)
}
