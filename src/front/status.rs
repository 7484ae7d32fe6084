//! Statuses: every failure of the service in one place, each with a code, a reason for programs and a line for people
//! that says what to do. The reason travels as `google.rpc.ErrorInfo` in the status details; where trying again helps,
//! `google.rpc.RetryInfo` says when; where in the handler it was, `google.rpc.DebugInfo`.

use std::{borrow::Cow, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use super::wire::WireError;
use crate::dispatch::{Failure, OfferError, POOL_FAILING};

/// Of the reasons' `ErrorInfo`.
const DOMAIN: &str = "forkring";
/// What a client that was refused for lack of room should wait.
const RETRY_DELAY: Duration = Duration::from_millis(50);

/// What a client should wait whose pool is in a crash loop: a worker has to stay up for as long.
const FAILING_DELAY: Duration = Duration::from_secs(1);

/// An item that was refused.
#[derive(Clone, Debug)]
pub struct Refusal {
    pub code: Code,
    pub reason: Cow<'static, str>,
    pub message: String,
    pub traceback: String,
    /// After what time to try again, if that helps.
    retry: Option<Duration>,
}

/// Bytes of a message that are kept: it travels in headers twice over, and clients take 8 KiB of those in all.
const MESSAGE: usize = 1024;

impl Refusal {
    fn new(code: Code, reason: &'static str, mut message: String) -> Self {
        message.truncate(message.floor_char_boundary(MESSAGE));
        Refusal { code, reason: reason.into(), message, traceback: String::new(), retry: None }
    }

    pub fn unknown_pool(name: &str, pools: &[String]) -> Self {
        let message = format!("there is no pool `{name}`: this server has {}", pools.join(", "));
        Refusal::new(Code::NotFound, "UNKNOWN_POOL", message)
    }

    pub fn no_pool(pools: &[String]) -> Self {
        let message = format!("the item names no pool, and this server has {}", pools.join(", "));
        Refusal::new(Code::InvalidArgument, "POOL_REQUIRED", message)
    }

    pub fn priority(priority: u32) -> Self {
        Refusal::new(Code::InvalidArgument, "BAD_PRIORITY", format!("priority is {priority}: it must be 0 to 3"))
    }

    pub fn compressed(encoding: &str) -> Self {
        let message = format!("grpc-encoding `{encoding}` is not supported: send messages uncompressed");
        Refusal::new(Code::Unimplemented, "COMPRESSED_MESSAGE", message)
    }

    pub fn empty() -> Self {
        Refusal::new(Code::Internal, "NO_MESSAGE", "the call ended without a message".into())
    }

    /// Of a request that is no item.
    pub fn large_request(len: usize, max: usize) -> Self {
        let message = format!("the request has {len} bytes and this method takes {max}");
        Refusal::new(Code::ResourceExhausted, "MESSAGE_TOO_LARGE", message)
    }

    pub fn large_metadata(size: usize, max: usize) -> Self {
        let message =
            format!("the request's metadata has {size} bytes and may have {max}: send less, or send it as payload");
        Refusal::new(Code::ResourceExhausted, "METADATA_TOO_LARGE", message)
    }

    pub fn two_messages() -> Self {
        Refusal::new(Code::Internal, "TOO_MANY_MESSAGES", "the call has more than one message: use Process".into())
    }

    pub fn body_timeout(timeout: Duration) -> Self {
        let message =
            format!("the next 64 KiB of the message, or its end, did not come within {timeout:?}: send it in one go");
        Refusal::new(Code::DeadlineExceeded, "BODY_TIMEOUT", message)
    }

    /// What the client allowed for the RPC itself.
    pub fn late() -> Self {
        let message = "the deadline of the RPC has passed (grpc-timeout)".into();
        Refusal::new(Code::DeadlineExceeded, "DEADLINE_EXCEEDED", message)
    }

    /// The client or its connection broke the request off. No answer will reach it.
    pub fn broken(error: &dyn std::error::Error) -> Self {
        Refusal::new(Code::Cancelled, "STREAM_BROKEN", format!("the request stream broke off: {error}"))
    }

    pub fn is_broken(&self) -> bool {
        self.reason == "STREAM_BROKEN"
    }

    pub fn is_late(&self) -> bool {
        self.reason == "DEADLINE_EXCEEDED"
    }

    pub fn unknown_method(service: &str, method: &str) -> Self {
        let message = format!("forkring.v1.{service} has no method {method}");
        Refusal::new(Code::Unimplemented, "UNKNOWN_METHOD", message)
    }

    pub fn draining() -> Self {
        let message = "the server is shutting down: what it accepted it finishes, send the rest elsewhere".into();
        Refusal { retry: Some(RETRY_DELAY), ..Refusal::new(Code::Unavailable, "DRAINING", message) }
    }

    pub fn invalid_result() -> Self {
        let message = "the worker wrote a result that is not in its memory: it is broken".into();
        Refusal::new(Code::Internal, "INVALID_RESULT", message)
    }

    pub fn not_the_request() -> Self {
        let message = "the message is not this method's request: see forkring.v1.Admin".into();
        Refusal::new(Code::Internal, "MALFORMED_MESSAGE", message)
    }

    pub fn no_letters() -> Self {
        let message = "this server keeps no dead letters: start it with --dead-letters 8MiB".into();
        Refusal::new(Code::FailedPrecondition, "NO_DEAD_LETTERS", message)
    }

    /// `range`: the number before the oldest letter, and that of the newest.
    pub fn no_letter(number: u64, (before, newest): (u64, u64)) -> Self {
        let why = match number {
            _ if number > newest || number == 0 => "there never was one of this number",
            _ if number <= before => "it was dropped to make room for newer ones",
            _ => "it was requeued or dropped before",
        };
        let message = format!("there is no dead letter {number}: {why}; see `forkring dead list`");
        Refusal::new(Code::NotFound, "NO_SUCH_LETTER", message)
    }

    pub fn truncated_letter(number: u64, size: u64) -> Self {
        let message = format!(
            "dead letter {number} cannot be requeued: its payload of {size} bytes was too large to be kept (--dead-letters)"
        );
        Refusal::new(Code::FailedPrecondition, "TRUNCATED_LETTER", message)
    }

    pub fn damaged() -> Self {
        let message = "a worker wrote over the item's record in shared memory: whether it was done is not known".into();
        Refusal::new(Code::DataLoss, "ITEM_DAMAGED", message)
    }

    /// As the RPC's own status.
    pub fn status(&self) -> Status {
        let mut details = ErrorDetails::new();
        details.set_error_info(self.reason.as_ref(), DOMAIN, [("", ""); 0].map(|(k, v)| (k.to_owned(), v.to_owned())));
        if self.retry.is_some() {
            details.set_retry_info(self.retry);
        }
        if !self.traceback.is_empty() {
            details.set_debug_info(self.traceback.lines().map(str::to_owned).collect::<Vec<_>>(), "");
        }
        Status::with_error_details(self.code, self.message.clone(), details)
    }
}

impl From<OfferError> for Refusal {
    fn from(error: OfferError) -> Self {
        let reason = match error {
            OfferError::Items => "QUEUE_FULL",
            OfferError::Arena => "ARENA_FULL",
            OfferError::Lane => "LANE_FULL",
        };
        let message = format!("{error}: try again in {RETRY_DELAY:?}");
        Refusal { retry: Some(RETRY_DELAY), ..Refusal::new(Code::ResourceExhausted, reason, message) }
    }
}

impl From<WireError> for Refusal {
    fn from(error: WireError) -> Self {
        Refusal::new(error.code(), error.reason(), error.to_string())
    }
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        let code = failure.code();
        let Failure { reason, message, traceback, .. } = failure;
        let retry = (code == Code::Unavailable && reason == POOL_FAILING).then_some(FAILING_DELAY);
        Refusal { code, reason, message, traceback, retry }
    }
}
