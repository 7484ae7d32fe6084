//! `WorkItem`s from a stream of DATA frames, with the payload left where it is.
//!
//! The reader is pulled, not called back: each [`ItemDecoder::next`] eats from the front of a chunk until there is
//! something to tell. It stops at field boundaries only for the payload, so a message that lies in one chunk is read
//! straight from it; what straddles two chunks (a prefix, a field's header, a small field) is joined in a buffer
//! that the decoder keeps.

use std::{mem, time::Duration};

use crate::dispatch::metadata;

use super::{
    MAX_METADATA, MAX_POOL, MAX_SECONDS, MAX_SUBSCRIPTION, PREFIX,
    WireError::{self, Malformed},
    field::{self, Header, MAX_HEADER, PAST_END, Stop, WRONG_TYPE, len_key, varint_key},
};

const POOL: u32 = len_key(1);
const PAYLOAD: u32 = len_key(2);
const ID: u32 = varint_key(3);
const METADATA: u32 = len_key(4);
const PRIORITY: u32 = varint_key(5);
const TIMEOUT: u32 = len_key(6);
const SUBSCRIPTION: u32 = len_key(7);
const LAST_FIELD: u32 = 7;

/// The longest `timeout` that is joined: its two varints are far shorter, the rest is room for fields yet unknown.
const MAX_TIMEOUT: usize = 255;

/// What the decoder found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event<'a> {
    /// The payload has `len` bytes, which now come as [`Event::Bytes`]. Protobuf lets a field come twice and the last
    /// one win: a second `Payload` within a message means to forget the first and start again.
    Payload {
        /// Never more than the decoder's `max_message`.
        len: usize,
    },
    /// The next of the payload: never empty, and not one byte more in all than announced.
    Bytes(&'a [u8]),
    /// The message is complete: read [`ItemDecoder::head`]. Without a `Payload` before it, its payload is empty.
    Item,
}

/// An item but for its payload.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ItemHead {
    /// At most [`MAX_POOL`] bytes.
    pub pool: String,
    /// The client's own.
    pub id: u64,
    /// As it was sent, unchecked.
    pub priority: u32,
    /// Up to 10,000 years: add it to a clock with saturation.
    pub timeout: Option<Duration>,
    /// At most [`MAX_SUBSCRIPTION`] bytes.
    pub subscription: String,
    /// At most [`MAX_METADATA`] bytes, for [`pairs`](crate::dispatch::metadata::pairs).
    pub metadata: Vec<u8>,
}

/// Reads a stream of `WorkItem`s.
///
/// After an error the stream has lost its meaning: every further call gives the same error.
#[derive(Debug)]
pub struct ItemDecoder {
    max_message: usize,
    state: State,
    /// Bytes of the message that are still to come.
    rest: usize,
    /// The first bytes of a prefix or a header that its chunk cut off.
    cut: [u8; MAX_HEADER],
    cut_len: usize,
    /// The first bytes of a small field that its chunk cut off.
    joined: Vec<u8>,
    head: ItemHead,
    /// Seconds and nanoseconds as sent: a second occurrence merges with the first, so they are judged at the end.
    timeout: Option<(i64, i32)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Prefix,
    /// At a field's header.
    Header,
    /// Within the payload, `left` bytes before its end.
    Payload {
        left: usize,
    },
    /// Within a field that nobody knows.
    Skip {
        left: usize,
    },
    /// Within a small field of `len` bytes that did not come in one piece.
    Join {
        field: Small,
        len: usize,
    },
    Failed(WireError),
}

/// The fields that are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Small {
    Pool,
    Metadata,
    Timeout,
    Subscription,
}

impl ItemDecoder {
    /// Refuses messages of more than `max_message` bytes, prefix not counted.
    pub fn new(max_message: usize) -> Self {
        Self {
            max_message,
            state: State::Prefix,
            rest: 0,
            cut: [0; MAX_HEADER],
            cut_len: 0,
            joined: Vec::new(),
            head: ItemHead::default(),
            timeout: None,
        }
    }

    /// The item that is being read, complete when [`Event::Item`] says so and valid until the next call of
    /// [`next`](Self::next). Its buffers are used again for the next item.
    pub fn head(&self) -> &ItemHead {
        &self.head
    }

    /// Whether a message has begun and not ended: the stream must not end here.
    pub fn in_message(&self) -> bool {
        self.state != State::Prefix || self.cut_len > 0
    }

    /// To be asked at the end of the stream: is this a place to end?
    pub fn finish(&self) -> Result<(), WireError> {
        match self.state {
            State::Prefix if self.cut_len == 0 => Ok(()),
            State::Prefix => Err(WireError::Truncated { missing: PREFIX - self.cut_len }),
            State::Failed(error) => Err(error),
            _ => Err(WireError::Truncated { missing: self.rest }),
        }
    }

    /// Eats from the front of `chunk` up to the next event. `None`: the chunk is used up and more is needed.
    #[inline]
    pub fn next<'a>(&mut self, chunk: &mut &'a [u8]) -> Result<Option<Event<'a>>, WireError> {
        self.advance(chunk).inspect_err(|&error| self.state = State::Failed(error))
    }

    #[inline]
    fn advance<'a>(&mut self, chunk: &mut &'a [u8]) -> Result<Option<Event<'a>>, WireError> {
        loop {
            match self.state {
                State::Header => {}
                State::Payload { left } => {
                    let bytes = self.eat(chunk, left);
                    if bytes.is_empty() {
                        return Ok(None);
                    }
                    let left = left - bytes.len();
                    self.state = if left > 0 { State::Payload { left } } else { State::Header };
                    return Ok(Some(Event::Bytes(bytes)));
                }
                State::Prefix => match self.prefix(chunk) {
                    Some(prefix) => self.begin(prefix)?,
                    None => return Ok(None),
                },
                State::Failed(error) => return Err(error),
                State::Skip { .. } | State::Join { .. } => {
                    if !self.resume(chunk)? {
                        return Ok(None);
                    }
                }
            }
            while self.state == State::Header {
                if self.rest == 0 {
                    self.end()?;
                    return Ok(Some(Event::Item));
                }
                let Some(header) = self.header(chunk)? else {
                    return Ok(None);
                };
                if let Some(event) = self.field(header, chunk)? {
                    return Ok(Some(event));
                }
            }
        }
    }

    /// Goes on with a field that its chunk cut off, or that is to be skipped: is it done?
    #[cold]
    fn resume(&mut self, chunk: &mut &[u8]) -> Result<bool, WireError> {
        match self.state {
            State::Skip { left } => {
                let skipped = self.eat(chunk, left).len();
                if skipped < left {
                    self.state = State::Skip { left: left - skipped };
                    return Ok(false);
                }
            }
            State::Join { field, len } => {
                let bytes = self.eat(chunk, len - self.joined.len());
                self.joined.extend_from_slice(bytes);
                if self.joined.len() < len {
                    return Ok(false);
                }
                let joined = mem::take(&mut self.joined);
                self.keep(field, &joined)?;
                self.joined = joined;
                self.joined.clear();
            }
            _ => {}
        }
        self.state = State::Header;
        Ok(true)
    }

    /// Up to `want` bytes of the message from the front of `chunk`.
    #[inline]
    fn eat<'a>(&mut self, chunk: &mut &'a [u8], want: usize) -> &'a [u8] {
        let (bytes, rest) = chunk.split_at(want.min(chunk.len()));
        *chunk = rest;
        self.rest -= bytes.len();
        bytes
    }

    #[inline]
    fn prefix(&mut self, chunk: &mut &[u8]) -> Option<[u8; PREFIX]> {
        if self.cut_len == 0
            && let Some((prefix, rest)) = chunk.split_first_chunk()
        {
            *chunk = rest;
            return Some(*prefix);
        }
        let (bytes, rest) = chunk.split_at((PREFIX - self.cut_len).min(chunk.len()));
        *chunk = rest;
        self.hold(bytes);
        if self.cut_len < PREFIX {
            return None;
        }
        self.cut_len = 0;
        self.cut.first_chunk().copied()
    }

    fn hold(&mut self, bytes: &[u8]) {
        self.cut[self.cut_len..][..bytes.len()].copy_from_slice(bytes);
        self.cut_len += bytes.len();
    }

    #[inline]
    fn begin(&mut self, [flag, len @ ..]: [u8; PREFIX]) -> Result<(), WireError> {
        match flag {
            0 => {}
            1 => return Err(WireError::Compressed),
            _ => return Err(Malformed("its compressed flag is neither 0 nor 1")),
        }
        let len = u32::from_be_bytes(len) as usize;
        if len > self.max_message {
            return Err(WireError::TooLarge { len, max: self.max_message });
        }
        let head = &mut self.head;
        head.pool.clear();
        head.id = 0;
        head.priority = 0;
        head.timeout = None;
        head.subscription.clear();
        head.metadata.clear();
        self.timeout = None;
        self.rest = len;
        self.state = State::Header;
        Ok(())
    }

    #[inline]
    fn end(&mut self) -> Result<(), WireError> {
        if let Some((seconds, nanos)) = self.timeout {
            let bad = WireError::BadTimeout { seconds, nanos };
            if seconds > MAX_SECONDS || nanos > 999_999_999 {
                return Err(bad);
            }
            let seconds = u64::try_from(seconds).map_err(|_| bad)?;
            let nanos = u32::try_from(nanos).map_err(|_| bad)?;
            self.head.timeout = Some(Duration::new(seconds, nanos));
        }
        self.state = State::Prefix;
        Ok(())
    }

    /// The next field's header, from the chunk alone if it lies there in one piece.
    #[inline]
    fn header(&mut self, chunk: &mut &[u8]) -> Result<Option<Header>, WireError> {
        if self.cut_len > 0 {
            return self.cut_header(chunk);
        }
        let here = &chunk[..chunk.len().min(self.rest)];
        let mut after = here;
        match field::header(&mut after) {
            Ok(header) => {
                self.eat(chunk, here.len() - after.len());
                Ok(Some(header))
            }
            Err(Stop::More) => self.cut_header(chunk),
            Err(Stop::Bad(why)) => Err(Malformed(why)),
        }
    }

    /// A header that began in an earlier chunk or will end in a later one.
    #[cold]
    fn cut_header(&mut self, chunk: &mut &[u8]) -> Result<Option<Header>, WireError> {
        let before = self.cut_len;
        let here = &chunk[..(MAX_HEADER - before).min(chunk.len()).min(self.rest)];
        self.hold(here);
        let held = &self.cut[..self.cut_len];
        let mut after = held;
        match field::header(&mut after) {
            Ok(header) => {
                let used = held.len() - after.len() - before;
                self.cut_len = 0;
                self.eat(chunk, used);
                Ok(Some(header))
            }
            Err(Stop::More) if here.len() == self.rest => Err(Malformed(PAST_END)),
            Err(Stop::More) => {
                self.eat(chunk, here.len());
                Ok(None)
            }
            Err(Stop::Bad(why)) => Err(Malformed(why)),
        }
    }

    /// Acts on a header; an event only for the payload.
    #[inline]
    fn field<'a>(&mut self, header: Header, chunk: &mut &[u8]) -> Result<Option<Event<'a>>, WireError> {
        let Header { key, value } = header;
        match key {
            ID => self.head.id = value,
            // Protobuf cuts a uint32 that is too wide.
            PRIORITY => self.head.priority = value as u32,
            PAYLOAD => {
                let len = self.within(value)?;
                if len > 0 {
                    self.state = State::Payload { left: len };
                }
                return Ok(Some(Event::Payload { len }));
            }
            POOL => self.small(Small::Pool, value, chunk)?,
            METADATA => self.small(Small::Metadata, value, chunk)?,
            TIMEOUT => self.small(Small::Timeout, value, chunk)?,
            SUBSCRIPTION => self.small(Small::Subscription, value, chunk)?,
            _ if header.field() <= LAST_FIELD => return Err(Malformed(WRONG_TYPE)),
            _ if header.is_varint() => {}
            _ => self.state = State::Skip { left: self.within(value)? },
        }
        Ok(None)
    }

    /// The length of a field, which cannot be longer than what is left of its message.
    #[inline]
    fn within(&self, len: u64) -> Result<usize, WireError> {
        match usize::try_from(len) {
            Ok(len) if len <= self.rest => Ok(len),
            _ => Err(Malformed(PAST_END)),
        }
    }

    #[inline]
    fn small(&mut self, field: Small, len: u64, chunk: &mut &[u8]) -> Result<(), WireError> {
        let len = self.within(len)?;
        let (name, max) = match field {
            Small::Pool => ("pool", MAX_POOL),
            Small::Metadata => ("metadata", MAX_METADATA),
            Small::Timeout => ("timeout", MAX_TIMEOUT),
            Small::Subscription => ("subscription", MAX_SUBSCRIPTION),
        };
        if len > max {
            return Err(WireError::FieldTooLong { field: name, len, max });
        }
        if len > chunk.len() {
            self.state = State::Join { field, len };
            return Ok(());
        }
        let bytes = self.eat(chunk, len);
        self.keep(field, bytes)
    }

    #[inline]
    fn keep(&mut self, field: Small, bytes: &[u8]) -> Result<(), WireError> {
        match field {
            Small::Pool => replace(&mut self.head.pool, bytes),
            Small::Subscription => replace(&mut self.head.subscription, bytes),
            Small::Metadata => self.keep_metadata(bytes),
            Small::Timeout => self.keep_timeout(bytes),
        }
    }

    fn keep_metadata(&mut self, mut entry: &[u8]) -> Result<(), WireError> {
        let (mut key, mut value) = ("", "");
        while let Some(found) = field::next_field(&mut entry)? {
            match found.header.field() {
                1 => key = found.text()?,
                2 => value = found.text()?,
                _ => {}
            }
        }
        let len = self.head.metadata.len() + metadata::len(key, value);
        if len > MAX_METADATA {
            return Err(WireError::FieldTooLong { field: "metadata", len, max: MAX_METADATA });
        }
        metadata::push(&mut self.head.metadata, key, value);
        Ok(())
    }

    fn keep_timeout(&mut self, mut duration: &[u8]) -> Result<(), WireError> {
        let (seconds, nanos) = self.timeout.get_or_insert((0, 0));
        while let Some(found) = field::next_field(&mut duration)? {
            // Signed numbers travel as the 64 bits of their two's complement.
            match found.header.field() {
                1 => *seconds = found.varint()? as i64,
                2 => *nanos = found.varint()? as i32,
                _ => {}
            }
        }
        Ok(())
    }
}

#[inline]
fn replace(old: &mut String, bytes: &[u8]) -> Result<(), WireError> {
    let new = field::text(bytes)?;
    old.clear();
    old.push_str(new);
    Ok(())
}
