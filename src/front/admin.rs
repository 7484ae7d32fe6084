//! `forkring.v1.Admin`: the dead letters, for operators.
//!
//! Not hot: prost and plain copies. A letter is copied out of the log and read as a message, whatever the supervisor does
//! with it meanwhile. Looking at a letter, offering its item and marking it gone is one step of this thread, so that of
//! two who requeue the same letter one is refused. Only a death of the front between the last two can double an item.

use bytes::{Bytes, BytesMut};
use prost::Message;

use super::{
    hub::{Hub, NotOffered},
    status::Refusal,
    unary::UnaryBody,
    wire::{ItemHead, MAX_SUBSCRIPTION, WireError, encode_message},
};
use crate::{
    crash_point::crash_point,
    dispatch::metadata,
    proto::v1::{
        DeadLetter, DropDeadLetterRequest, DropDeadLetterResponse, GetDeadLetterRequest, ListDeadLettersRequest,
        ListDeadLettersResponse, RequeueDeadLetterRequest, RequeueDeadLetterResponse,
    },
    segment::Letters,
};

/// A page of a list is full with so many bytes.
const PAGE: usize = 256 << 10;

/// The methods.
#[derive(Clone, Copy, Debug)]
pub enum Method {
    List,
    Get,
    Requeue,
    Drop,
}

impl Method {
    /// By its name in the proto.
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "ListDeadLetters" => Method::List,
            "GetDeadLetter" => Method::Get,
            "RequeueDeadLetter" => Method::Requeue,
            "DropDeadLetter" => Method::Drop,
            _ => return None,
        })
    }
}

/// Answers a request's one message.
pub fn answer(hub: &Hub, method: Method, message: Bytes) -> Result<UnaryBody, Refusal> {
    let letters = hub.with_front(|front| front.segment()).letters().ok_or_else(Refusal::no_letters)?;
    match method {
        Method::List => read(message).map(|request| reply(&list(letters, &request))),
        Method::Get => look(letters, read::<GetDeadLetterRequest>(message)?.number, true).map(|letter| reply(&letter)),
        Method::Requeue => requeue(hub, letters, read(message)?).map(|()| reply(&RequeueDeadLetterResponse {})),
        Method::Drop => {
            let number = read::<DropDeadLetterRequest>(message)?.number;
            look(letters, number, false)?;
            letters.mark_gone(number);
            Ok(reply(&DropDeadLetterResponse {}))
        }
    }
}

fn read<M: Message + Default>(message: Bytes) -> Result<M, Refusal> {
    M::decode(message).map_err(|_| Refusal::not_the_request())
}

fn reply(message: &impl Message) -> UnaryBody {
    let mut bytes = BytesMut::new();
    encode_message(&mut bytes, message);
    UnaryBody::new(bytes.freeze())
}

fn list(letters: Letters<'_>, request: &ListDeadLettersRequest) -> ListDeadLettersResponse {
    let mut page = ListDeadLettersResponse { dropped: letters.dropped(), ..Default::default() };
    let (evicted, filed) = letters.range();
    let mut size = 0;
    for number in request.after.max(evicted).saturating_add(1)..=filed {
        let is_full = request.limit != 0 && page.letters.len() >= request.limit as usize || size >= PAGE;
        // What is gone, or made room just now, is left out.
        let Ok(letter) = look(letters, number, false) else { continue };
        if let (true, Some(last)) = (is_full, page.letters.last()) {
            page.next = last.number;
            break;
        }
        size += letter.encoded_len();
        page.letters.push(letter);
    }
    page
}

fn look(letters: Letters<'_>, number: u64, with_payload: bool) -> Result<DeadLetter, Refusal> {
    let found = letters.read(number, with_payload).ok_or_else(|| Refusal::no_letter(number, letters.range()))?;
    // One that cannot be read is seen and can be dropped, but not requeued.
    let letter = DeadLetter::decode(&found.head[..]).unwrap_or(DeadLetter { truncated: true, ..Default::default() });
    Ok(DeadLetter { number, payload: found.body.into(), ..letter })
}

fn requeue(hub: &Hub, letters: Letters<'_>, request: RequeueDeadLetterRequest) -> Result<(), Refusal> {
    let letter = look(letters, request.number, true)?;
    if letter.truncated {
        return Err(Refusal::truncated_letter(letter.number, letter.payload_size));
    }
    // Those of another server, which was here before, may have been larger.
    if letter.payload.len() > hub.max_message {
        return Err(WireError::TooLarge { len: letter.payload.len(), max: hub.max_message }.into());
    }
    if request.subscription.len() > MAX_SUBSCRIPTION {
        let (field, len, max) = ("subscription", request.subscription.len(), MAX_SUBSCRIPTION);
        return Err(WireError::FieldTooLong { field, len, max }.into());
    }
    let mut head = ItemHead {
        pool: letter.pool,
        id: letter.id,
        priority: letter.priority,
        timeout: None,
        subscription: letter.subscription.unwrap_or(request.subscription),
        metadata: Vec::new(),
    };
    letter.metadata.iter().for_each(|(key, value)| metadata::push(&mut head.metadata, key, value));
    let mut payload = hub.request(letter.payload.len(), true)?;
    hub.write(&mut payload, &letter.payload);
    match hub.offer_submitted(&head, &mut payload) {
        Ok(()) => {
            crash_point!("dead.offered");
            letters.mark_gone(letter.number);
            Ok(())
        }
        Err(error) => {
            hub.discard(payload);
            Err(match error {
                NotOffered::Later(error) => error.into(),
                NotOffered::Never(refusal) => refusal,
            })
        }
    }
}
