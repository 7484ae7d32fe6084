//! The front's own codec of the hot messages: `WorkItem` in, `WorkResult` out.
//!
//! tonic's codec gathers a message before it decodes it, and copies a payload to encode it. This one does neither:
//! [`ItemDecoder`] reads HTTP/2 DATA frames as they come and hands the payload out in slices of them, so that the
//! one copy is the one into shared memory; [`encode_result_prefix`] ends a message's head right before its payload,
//! so that the payload goes out as a frame of its own.
//!
//! Nothing here does I/O or waits, and no input can make it panic or hold more than a bounded amount of memory:
//! small fields have limits, the payload is never kept. What it accepts, prost accepts and reads the same.

mod decode;
mod encode;
mod field;
#[cfg(test)]
mod tests;

use std::time::Duration;

use http::HeaderValue;
use tonic::Code;

pub use decode::{Event, ItemDecoder, ItemHead};
pub use encode::{ResultHead, ResultStatus, encode_message, encode_result, encode_result_prefix};

/// Bytes that gRPC puts before a message: the compressed flag and the length.
pub const PREFIX: usize = 5;
/// The longest pool name, in bytes.
pub const MAX_POOL: usize = 255;
/// The longest subscription name, in bytes.
pub const MAX_SUBSCRIPTION: usize = 255;
/// The most metadata an item may have, as [`pairs`](crate::dispatch::metadata::pairs) reads it: 8 bytes and the texts for each entry.
pub const MAX_METADATA: usize = 16 * 1024;
/// The largest payload that the server may let through: a gRPC length has 32 bits, and a result's other fields need
/// room.
pub const MAX_PAYLOAD: usize = u32::MAX as usize - (1 << 20);

/// Why a message, or the header of a call, cannot be read. It ends the call: what follows on the stream has lost its
/// meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// More than the server takes, known from the prefix alone.
    #[error("the message has {len} bytes and this server takes {max}: send less at a time or raise --max-message")]
    TooLarge {
        /// What the prefix announced.
        len: usize,
        /// What the server takes.
        max: usize,
    },
    /// The compressed flag is set, but the call named no `grpc-encoding`.
    #[error("the message is marked as compressed, but no grpc-encoding was agreed on: send it uncompressed")]
    Compressed,
    /// Not protobuf, or not this message.
    #[error("the message is not a forkring.v1.WorkItem: {0}")]
    Malformed(&'static str),
    /// The client ended the stream within a message.
    #[error("the stream ended within a message: {missing} or more bytes of it were still to come")]
    Truncated {
        /// How many bytes did not come, as far as is known.
        missing: usize,
    },
    /// A field other than the payload is longer than it may be.
    #[error("{field} has {len} bytes: use {max} at most")]
    FieldTooLong {
        /// Its name in the proto.
        field: &'static str,
        /// How long it is.
        len: usize,
        /// How long it may be.
        max: usize,
    },
    /// `WorkItem.timeout` is negative or no valid `google.protobuf.Duration`.
    #[error(
        "timeout is {seconds} s and {nanos} ns: both must be 0 or more, with at most {MAX_SECONDS} s and 999999999 ns"
    )]
    BadTimeout {
        /// Its whole seconds.
        seconds: i64,
        /// What it has beside them.
        nanos: i32,
    },
    /// The `grpc-timeout` header is not what gRPC defines.
    #[error("grpc-timeout is malformed: give 1 to 8 digits and one of H, M, S, m, u, n")]
    BadTimeoutHeader,
}

/// What `google.protobuf.Duration` may hold: about 10,000 years.
const MAX_SECONDS: i64 = 315_576_000_000;

impl WireError {
    /// The status code to end the call with. Where gRPC implementations agree on one, it is theirs.
    pub fn code(&self) -> Code {
        match self {
            Self::TooLarge { .. } => Code::ResourceExhausted,
            Self::Compressed | Self::Malformed(_) | Self::Truncated { .. } => Code::Internal,
            Self::FieldTooLong { .. } | Self::BadTimeout { .. } | Self::BadTimeoutHeader => Code::InvalidArgument,
        }
    }

    /// The constant for programs that goes into the status' details.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::TooLarge { .. } => "MESSAGE_TOO_LARGE",
            Self::Compressed => "COMPRESSED_MESSAGE",
            Self::Malformed(_) => "MALFORMED_MESSAGE",
            Self::Truncated { .. } => "TRUNCATED_MESSAGE",
            Self::FieldTooLong { .. } => "FIELD_TOO_LONG",
            Self::BadTimeout { .. } | Self::BadTimeoutHeader => "BAD_TIMEOUT",
        }
    }
}

/// Reads a `grpc-timeout` header: 1 to 8 digits and a unit. Up to 11,000 years: add it to a clock with saturation.
pub fn parse_grpc_timeout(value: &HeaderValue) -> Result<Duration, WireError> {
    let bad = WireError::BadTimeoutHeader;
    let (&unit, digits) = value.as_bytes().split_last().ok_or(bad)?;
    if !(1..=8).contains(&digits.len()) || !digits.iter().all(u8::is_ascii_digit) {
        return Err(bad);
    }
    let amount = digits.iter().fold(0u64, |sum, digit| sum * 10 + u64::from(digit - b'0'));
    match unit {
        b'H' => Ok(Duration::from_secs(amount * 3600)),
        b'M' => Ok(Duration::from_secs(amount * 60)),
        b'S' => Ok(Duration::from_secs(amount)),
        b'm' => Ok(Duration::from_millis(amount)),
        b'u' => Ok(Duration::from_micros(amount)),
        b'n' => Ok(Duration::from_nanos(amount)),
        _ => Err(bad),
    }
}
