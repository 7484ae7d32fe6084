//! Protobuf's own grammar: varints, field headers, and fields within a complete slice. Strict where prost is strict.

use super::WireError::{self, Malformed};

/// The longest header: a key and a length or value, each a varint.
pub(super) const MAX_HEADER: usize = 20;

// What can be wrong with a message.
pub(super) const PAST_END: &str = "a field runs past the end of its message";
pub(super) const WRONG_TYPE: &str = "a field has the wrong wire type";
pub(super) const BAD_VARINT: &str = "a varint is longer than 64 bits";
pub(super) const BAD_KEY: &str = "a field number is out of range";
pub(super) const GROUP: &str = "it holds a group or an unknown wire type";
pub(super) const NOT_UTF8: &str = "a string is not UTF-8";

/// Why no header was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// The bytes end before it does.
    More,
    /// More bytes will not help: what is wrong.
    Bad(&'static str),
}

/// How a field begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    /// Field number and wire type, as [`varint_key`] and [`len_key`] make them.
    pub key: u32,
    /// A varint field's value; for any other, how many bytes follow, checked against nothing yet.
    pub value: u64,
}

pub(super) const fn varint_key(field: u32) -> u32 {
    field << 3
}

pub(super) const fn len_key(field: u32) -> u32 {
    field << 3 | 2
}

impl Header {
    pub(super) fn field(self) -> u32 {
        self.key >> 3
    }

    pub(super) fn is_varint(self) -> bool {
        self.key & 7 == 0
    }
}

/// Reads a header from the front of `input`, which moves on only if there is one.
#[inline]
pub(super) fn header(input: &mut &[u8]) -> Result<Header, Stop> {
    let mut rest = *input;
    let key = u32::try_from(varint(&mut rest)?).map_err(|_| Stop::Bad(BAD_KEY))?;
    if key < 8 {
        return Err(Stop::Bad(BAD_KEY));
    }
    let value = match key & 7 {
        0 | 2 => varint(&mut rest)?,
        1 => 8,
        5 => 4,
        _ => return Err(Stop::Bad(GROUP)),
    };
    *input = rest;
    Ok(Header { key, value })
}

#[inline]
fn varint(input: &mut &[u8]) -> Result<u64, Stop> {
    match input.split_first() {
        Some((&byte, rest)) if byte < 0x80 => {
            *input = rest;
            Ok(u64::from(byte))
        }
        Some(_) => long_varint(input),
        None => Err(Stop::More),
    }
}

fn long_varint(input: &mut &[u8]) -> Result<u64, Stop> {
    let mut value = 0;
    for (i, &byte) in input.iter().enumerate().take(10) {
        // The tenth byte holds the 64th bit and nothing else.
        if i == 9 && byte > 1 {
            break;
        }
        value |= u64::from(byte & 0x7f) << (7 * i);
        if byte < 0x80 {
            *input = &input[i + 1..];
            return Ok(value);
        }
    }
    Err(if input.len() < 10 { Stop::More } else { Stop::Bad(BAD_VARINT) })
}

/// A field of a message that is there in one piece.
pub(super) struct Field<'a> {
    pub header: Header,
    /// Empty if it is a varint.
    bytes: &'a [u8],
}

impl<'a> Field<'a> {
    pub(super) fn varint(&self) -> Result<u64, WireError> {
        if self.header.is_varint() { Ok(self.header.value) } else { Err(Malformed(WRONG_TYPE)) }
    }

    pub(super) fn text(&self) -> Result<&'a str, WireError> {
        if self.header.key == len_key(self.header.field()) { text(self.bytes) } else { Err(Malformed(WRONG_TYPE)) }
    }
}

/// Reads the next field from the front of `message`; `None` at the end.
pub(super) fn next_field<'a>(message: &mut &'a [u8]) -> Result<Option<Field<'a>>, WireError> {
    if message.is_empty() {
        return Ok(None);
    }
    let header = header(message).map_err(|stop| match stop {
        Stop::More => Malformed(PAST_END),
        Stop::Bad(why) => Malformed(why),
    })?;
    let len = if header.is_varint() { 0 } else { usize::try_from(header.value).map_err(|_| Malformed(PAST_END))? };
    let (bytes, rest) = message.split_at_checked(len).ok_or(Malformed(PAST_END))?;
    *message = rest;
    Ok(Some(Field { header, bytes }))
}

#[inline]
pub(super) fn text(bytes: &[u8]) -> Result<&str, WireError> {
    std::str::from_utf8(bytes).map_err(|_| Malformed(NOT_UTF8))
}
