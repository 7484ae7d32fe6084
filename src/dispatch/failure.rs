//! Failures: what a client gets instead of a result, and how it travels in the result's place.

use std::{borrow::Cow, error::Error, fmt, io};

use tonic::Code;

use super::ReplyError;

/// Why an item failed: what its client gets instead of a result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub(crate) code: u8,
    pub(crate) reason: Cow<'static, str>,
    pub(crate) message: String,
    pub(crate) traceback: String,
}

/// The reason of [`Failure::pool_failing`].
pub(crate) const POOL_FAILING: &str = "POOL_FAILING";
/// Bytes of a message that are kept: the client gets it in HTTP/2 headers, which are bounded.
const MESSAGE: usize = 1024;
/// And of a traceback, from its end, for the same reason.
const TRACEBACK: usize = 2048;

impl Failure {
    /// A failure with a gRPC code, a reason for programs (a constant in UPPER_SNAKE_CASE) and a message for people.
    /// `Code::Ok` is no failure and becomes `Unknown`.
    pub fn new(code: Code, reason: impl Into<Cow<'static, str>>, message: impl fmt::Display) -> Self {
        let code = if code == Code::Ok { Code::Unknown } else { code };
        Failure { code: code as u8, reason: reason.into(), message: message.to_string(), traceback: String::new() }
    }

    /// Says where in the handler it was. Of a long text the end travels.
    pub fn with_traceback(mut self, traceback: impl Into<String>) -> Self {
        self.traceback = traceback.into();
        self
    }

    /// `INTERNAL`, reason `HANDLER_FAILED`.
    pub fn handler(message: impl fmt::Display) -> Self {
        Failure::new(Code::Internal, "HANDLER_FAILED", message)
    }

    /// `DEADLINE_EXCEEDED`: the item expired before it was claimed, or its answer would come too late.
    pub fn deadline() -> Self {
        Failure::new(Code::DeadlineExceeded, "DEADLINE_EXCEEDED", "the item's deadline has passed")
    }

    /// `CANCELLED`: nobody waits for the item any more.
    pub fn cancelled() -> Self {
        Failure::new(Code::Cancelled, "CANCELLED", "the item was cancelled by its client")
    }

    /// `UNAVAILABLE`: all workers of the item's pool are in a crash loop.
    pub fn pool_failing(pool: &str) -> Self {
        let message = format!(
            "the workers of pool `{pool}` keep dying: the server's log says why; try again when the pool serves, see grpc.health.v1"
        );
        Failure::new(Code::Unavailable, POOL_FAILING, message)
    }

    /// How it travels in a result: a byte for the length of the reason, two for that of the message, then reason, message
    /// and traceback.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let reason = prefix(&self.reason, u8::MAX.into());
        let message = prefix(&self.message, MESSAGE);
        let traceback = suffix(&self.traceback, TRACEBACK);
        let mut bytes = Vec::with_capacity(3 + reason.len() + message.len() + traceback.len());
        bytes.push(reason.len() as u8);
        bytes.extend_from_slice(&(message.len() as u16).to_le_bytes());
        [reason, message, traceback].iter().for_each(|text| bytes.extend_from_slice(text.as_bytes()));
        bytes
    }

    /// What a result of this code says, whatever the bytes are.
    pub(crate) fn from_result(code: u32, bytes: &[u8]) -> Self {
        // Of a copy: a worker that runs wild may write to its result while this looks at it.
        let most = 3 + usize::from(u8::MAX) + usize::from(u16::MAX) + TRACEBACK;
        let bytes = bytes[..bytes.len().min(most)].to_vec();
        let (lens, rest) = bytes.split_first_chunk::<3>().unwrap_or((&[0; 3], &[]));
        let (reason, rest) = rest.split_at(rest.len().min(lens[0].into()));
        let (message, traceback) = rest.split_at(rest.len().min(u16::from_le_bytes([lens[1], lens[2]]).into()));
        let text = |bytes: &[u8], most: usize| String::from_utf8_lossy(&bytes[..bytes.len().min(most)]).into_owned();
        Failure::new(Code::from_i32(code as i32), text(reason, MESSAGE), text(message, MESSAGE))
            .with_traceback(text(traceback, TRACEBACK))
    }

    /// The code.
    pub(crate) fn code(&self) -> Code {
        Code::from_i32(self.code.into())
    }
}

/// The longest prefix of at most so many bytes that ends between characters.
fn prefix(text: &str, most: usize) -> &str {
    &text[..text.floor_char_boundary(most)]
}

/// The longest suffix of at most so many bytes that begins between characters.
fn suffix(text: &str, most: usize) -> &str {
    &text[text.ceil_char_boundary(text.len().saturating_sub(most))..]
}

/// Any error of a handler is `INTERNAL` with reason `HANDLER_FAILED`; but a result that is too large, however deep in
/// the error's sources that is, is `RESOURCE_EXHAUSTED` with reason `RESULT_TOO_LARGE`, one that has no room
/// `RESULTS_FULL`, and one that nobody waits for `CANCELLED` or
/// `DEADLINE_EXCEEDED`.
impl<E: Error + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        let mut cause: Option<&(dyn Error + 'static)> = Some(&error);
        while let Some(one) = cause {
            let inner = one.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
            let reply = one.downcast_ref().or_else(|| inner?.downcast_ref());
            let reason = match reply {
                Some(ReplyError::TooLarge { .. }) => Some("RESULT_TOO_LARGE"),
                Some(ReplyError::NoRoom) => Some("RESULTS_FULL"),
                Some(ReplyError::Cancelled) => return Failure::cancelled(),
                Some(ReplyError::Expired) => return Failure::deadline(),
                None => None,
            };
            if let (Some(reply), Some(reason)) = (reply, reason) {
                return Failure::new(Code::ResourceExhausted, reason, reply);
            }
            cause = one.source();
        }
        Failure::handler(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_travel() {
        let failure = Failure::new(Code::NotFound, "NO_SUCH_ROW", "row 7 is missing");
        assert_eq!(Failure::from_result(failure.code.into(), &failure.encode()), failure);
        let failure = failure.with_traceback("line 1");
        assert_eq!(Failure::from_result(failure.code.into(), &failure.encode()), failure);
        assert_eq!(Failure::new(Code::Ok, "X", "").code, Code::Unknown as u8);
        assert_eq!(Failure::from_result(0, &[]).code, Code::Unknown as u8, "a failure is never a success");
        assert_eq!(Failure::from_result(13, &[200, 0, 0, b'A', 0xff]).reason, "A\u{fffd}");
        let long = Failure::handler("ä".repeat(5000)).with_traceback(format!("{}é", "ü".repeat(5000))).encode();
        let long = Failure::from_result(13, &long);
        assert!(long.message.chars().all(|c| c == 'ä'), "cut between characters");
        assert!(long.traceback.starts_with('ü') && long.traceback.ends_with('é'), "of a traceback the end counts");
        assert!(long.message.len() <= MESSAGE && long.traceback.len() <= TRACEBACK);
    }

    #[test]
    fn errors_become_failures() {
        let parse: Failure = "x".parse::<u32>().unwrap_err().into();
        assert_eq!(parse.reason, "HANDLER_FAILED");
        let large = ReplyError::TooLarge { len: 2, most: 1 };
        assert_eq!(Failure::from(large).reason, "RESULT_TOO_LARGE");
        assert_eq!(Failure::from(std::io::Error::from(large)).reason, "RESULT_TOO_LARGE");
        assert_eq!(Failure::from(std::io::Error::from(ReplyError::Cancelled)), Failure::cancelled());
    }
}
