//! Dead letters: what becomes of an item that killed all the workers that it was given to.
//!
//! The sweep files it before it completes the item, while its payload is still in the request arena, so that an item whose
//! client is told that it is over can be looked at and requeued. A sweep that was cut short in between finds the letter
//! there when it is run again: the log tells items apart.
//!
//! A letter's head is the proto's own `DeadLetter` without number and payload. How an item's earlier workers died is
//! private memory of the supervisor: a successor of it knows how many they were, which the item's word says.

use std::{
    collections::HashMap, os::unix::process::ExitStatusExt as _, process::ExitStatus, sync::atomic::Ordering::*,
    time::SystemTime,
};

use prost::Message as _;

use super::{
    Failure, Phase, Word,
    front::{extra_bytes, front_of, is_submitted, metadata, request_spans},
};
use crate::{
    dispatch::metadata::pairs,
    proto::v1::{Attempt, DeadLetter, attempt::End},
    segment::{INLINE, ItemRecord, LetterKey, PRIORITIES, Segment},
};

/// Of a payload that is too large to be kept, the bytes that are.
const KEPT: usize = 4096;
/// Subscription and metadata are never more than this; a record that says so is broken.
const EXTRA: u32 = 64 << 10;

/// How a worker died.
#[derive(Clone, Debug)]
pub struct Death {
    /// Its number.
    pub worker: u16,
    /// Its pid.
    pub pid: u32,
    /// How it ended.
    pub status: ExitStatus,
    /// What becomes of an item that it had as the last of all.
    pub failure: Failure,
}

/// What the supervisor knows of items that their workers died of.
#[derive(Debug, Default)]
pub struct DeadLetters {
    pools: Vec<String>,
    /// Of items that have been given to another worker, by index: who they are now, and their attempts so far.
    histories: HashMap<u32, (LetterKey, Vec<Attempt>)>,
}

impl DeadLetters {
    /// For a server with these pools.
    pub fn new(pools: Vec<String>) -> Self {
        DeadLetters { pools, histories: HashMap::new() }
    }

    /// A worker died of an item, and another gets it.
    pub(super) fn retry(&mut self, index: u32, record: &ItemRecord, word: Word, requeued: Word, death: &Death) {
        let history = self.history(index, record, word, death);
        self.histories.insert(index, (key(index, record, requeued), history));
    }

    /// A worker died of an item, and no other gets it: files it. Before DONE is stored.
    pub(super) fn file(&mut self, segment: &Segment, index: u32, word: Word, death: &Death) {
        let record = segment.item(index);
        let history = self.history(index, record, word, death);
        let Some(log) = segment.letter_log() else { return };
        let mut line = [0; INLINE];
        let payload = payload(segment, index, record, &mut line);
        let lane = u32::from(word.lane());
        let pool = self.pools.get((lane / PRIORITIES) as usize).cloned().unwrap_or_default();
        let id = record.id.load(Relaxed);
        let mut letter = DeadLetter {
            pool: pool.clone(),
            id,
            priority: lane % PRIORITIES,
            payload_size: record.payload_len.load(Relaxed).into(),
            truncated: payload.is_none(),
            time: Some(SystemTime::now().into()),
            attempts: u32::from(word.attempts()) + 1,
            history,
            ..DeadLetter::default()
        };
        if record.extra_len.load(Relaxed) <= EXTRA {
            let front = front_of(segment, index);
            let extra = extra_bytes(segment, front, record).unwrap_or_default();
            let metadata = metadata(segment, front, record);
            letter.metadata = pairs(&metadata).map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
            let subscription = &extra[..extra.len() - metadata.len()];
            letter.subscription = is_submitted(record).then(|| String::from_utf8_lossy(subscription).into_owned());
        }
        let mut payload = payload.unwrap_or_default();
        let mut head = letter.encode_to_vec();
        if head.len().saturating_add(payload.len()) > log.largest() {
            payload = &payload[..payload.len().min(KEPT)];
            letter.truncated = true;
            head = letter.encode_to_vec();
        }
        match log.file(key(index, record, word), &head, payload) {
            Some(number) => tracing::warn!(
                pool,
                id,
                letter = number,
                attempts = letter.attempts,
                cause = death.failure.message,
                "an item is a dead letter: its workers died of it"
            ),
            None => tracing::error!(pool, id, "an item that its workers died of is too large for the dead letters"),
        }
    }

    /// How an item's workers died, the last one included.
    fn history(&mut self, index: u32, record: &ItemRecord, word: Word, death: &Death) -> Vec<Attempt> {
        let mut history = match self.histories.remove(&index) {
            Some((of, history)) if of == key(index, record, word) => history,
            _ => Vec::new(),
        };
        history.push(Attempt {
            attempt: u32::from(word.attempts()) + 1,
            worker: death.worker.into(),
            pid: death.pid,
            cause: death.failure.message.clone(),
            time: Some(SystemTime::now().into()),
            end: death.status.signal().map(End::Signal).or_else(|| death.status.code().map(End::ExitCode)),
        });
        history
    }

    /// Forgets those that somebody completed after all.
    pub(super) fn forget_completed(&mut self, segment: &Segment) {
        self.histories.retain(|&index, (of, _)| {
            let record = segment.item(index);
            let word = Word::load(&record.word);
            matches!(word.phase(), Phase::Ready | Phase::Claimed) && *of == key(index, record, word)
        });
    }
}

/// Whether an item was filed by somebody who died before it was completed.
pub(super) fn is_filed(segment: &Segment, index: u32, word: Word) -> bool {
    segment.letter_log().is_some_and(|log| log.find(key(index, segment.item(index), word)).is_some())
}

fn key(index: u32, record: &ItemRecord, word: Word) -> LetterKey {
    LetterKey { index, generation: word.generation(), offered: record.offered.load(Relaxed) }
}

/// The payload of an item; none if the record is broken.
fn payload<'a>(segment: &'a Segment, index: u32, record: &ItemRecord, line: &'a mut [u8; INLINE]) -> Option<&'a [u8]> {
    match request_spans(record) {
        (Some(span), _) => segment.read_request(front_of(segment, index), span.offset, span.len),
        (None, _) => {
            let payload = line.get_mut(..record.payload_len.load(Relaxed) as usize)?;
            record.request.load(payload);
            Some(payload)
        }
    }
}
