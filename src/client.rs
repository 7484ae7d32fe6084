//! The Rust client: tonic's generated one with the settings that large messages need, and an item that is built in one
//! expression.
//!
//! A [`Client`] is a handle on one HTTP/2 connection; clones share it and it connects anew when the connection is lost.
//! It adds no retries and no timeouts of its own: what was accepted is the server's to finish, and a call that is
//! dropped is a cancel.
//!
//! A client that was made before a fork works after it, in the parent and in the child, where it connects for itself
//! on the child's runtime. The child must not go on with a future or a runtime of its parent's; how its own main ends is
//! best `std::process::exit`, which drops neither.

mod process;
mod wait;

use std::{fmt, time::Duration};

use bytes::Bytes;
use tokio_stream::Stream;
use tonic::{
    Code,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt as _;

use self::process::Channels;
pub use self::process::Results;
pub(crate) use self::wait::until_connected;
use crate::config::format_duration;
use crate::proto::v1::{
    self, DeadLetter, DropDeadLetterRequest, GetDeadLetterRequest, GetUpdatesRequest, ListDeadLettersRequest,
    ListDeadLettersResponse, RequeueDeadLetterRequest, SubmitReceipt, WorkItem, WorkResult, admin_client::AdminClient,
    dispatcher_client::DispatcherClient,
};

/// The largest result that a client takes unless told otherwise: the server's own limit is what should bind.
pub const MAX_MESSAGE: usize = 1 << 30;

// HTTP/2's default window of 64 KiB would stop a large message every 64 KiB for a round trip.
const STREAM_WINDOW: u32 = 16 << 20;
const CONNECTION_WINDOW: u32 = 64 << 20;
const MAX_FRAME: u32 = 1 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Finds out that a peer is gone. By TCP and not by HTTP/2 pings, which would wake an idle server.
const TCP_KEEPALIVE: Duration = Duration::from_secs(60);

/// A client of one server.
///
/// ```standalone_crate
/// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs"));
/// use forkring::{client::Client, proto::v1::WorkItem};
///
/// # fn main() {
/// # example::run(example::hashes, async |_| {
/// let address = "127.0.0.1:50051";
/// # let address = &example::here().to_string();
/// let client = Client::connect(address).await?;
/// let result = client.call(WorkItem::new("sha256", "some bytes").with_priority(1)).await?;
/// assert_eq!(result.payload.len(), 32);
/// # Ok(())
/// # });
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Client {
    channels: Channels,
    max_message: usize,
}

impl Client {
    /// Connects to `HOST:PORT` or `http://HOST:PORT`.
    pub async fn connect(addr: &str) -> Result<Self, ConnectError> {
        let endpoint = endpoint(addr)?;
        let channel = endpoint.connect().await.map_err(|error| ConnectError::unreachable(addr, &error))?;
        Ok(Self::new(channel, Some(endpoint)))
    }

    /// Connects like [`connect`](Self::connect), and waits up to `patience` for a server that is not there yet: it connects
    /// within 100 ms of the server's start. After a second it logs that it waits.
    ///
    /// ```standalone_crate
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs"));
    /// # use forkring::client::Client;
    /// # fn main() {
    /// # example::run(example::hashes, async |_| {
    /// use std::time::Duration;
    ///
    /// let address = "127.0.0.1:50051";
    /// # let address = &example::here().to_string();
    /// let client = Client::connect_within(address, Duration::from_secs(30)).await?;
    /// # Ok(())
    /// # });
    /// # }
    /// ```
    pub async fn connect_within(addr: &str, patience: Duration) -> Result<Self, ConnectError> {
        let tell = || tracing::warn!(addr, patience = %format_duration(patience), "waiting for a server");
        Self::connect_telling(addr, patience, tell).await
    }

    /// Connects like [`connect_within`](Self::connect_within), and calls `tell` when it has waited for a second.
    pub(crate) async fn connect_telling(
        addr: &str,
        patience: Duration,
        tell: impl FnOnce(),
    ) -> Result<Self, ConnectError> {
        until_connected(addr, patience, async || Self::connect(addr).await, tell).await
    }

    /// Connects when the first call needs it; a call that finds no server fails at once with `UNAVAILABLE`, and the next one
    /// tries again. Call it where a tokio runtime is.
    pub fn connect_lazy(addr: &str) -> Result<Self, ConnectError> {
        let endpoint = endpoint(addr)?;
        Ok(Self::new(endpoint.connect_lazy(), Some(endpoint)))
    }

    /// Over a channel with settings of your own. Such a client is of no use in a forked child, which could not make
    /// that channel again.
    pub fn from_channel(channel: Channel) -> Self {
        Self::new(channel, None)
    }

    fn new(channel: Channel, endpoint: Option<Endpoint>) -> Self {
        Self { channels: Channels::new(channel, endpoint), max_message: MAX_MESSAGE }
    }

    /// Takes results of up to so many bytes instead of [`MAX_MESSAGE`].
    pub fn with_max_message(self, bytes: usize) -> Self {
        Self { max_message: bytes, ..self }
    }

    fn here(&self) -> Result<DispatcherClient<Channel>, tonic::Status> {
        let client = DispatcherClient::new(self.channels.here()?);
        Ok(client.max_decoding_message_size(self.max_message).max_encoding_message_size(usize::MAX))
    }

    fn admin(&self) -> Result<AdminClient<Channel>, tonic::Status> {
        Ok(AdminClient::new(self.channels.here()?).max_decoding_message_size(self.max_message))
    }

    /// One item in, its result out. A failed item is the error; [`v1::Status::from`] finds its reason.
    ///
    /// To bound the call, and not only the item, wrap it in `tokio::time::timeout`: dropping it cancels the item.
    pub async fn call(&self, item: WorkItem) -> Result<WorkResult, tonic::Status> {
        Ok(self.here()?.call(item).await?.into_inner())
    }

    /// Many items in, one receipt out when the stream ends. Results go to [`updates`](Self::updates).
    ///
    /// ```standalone_crate
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs"));
    /// # use forkring::proto::v1::WorkItem;
    /// # fn main() {
    /// # example::run(example::hashes, async |client| {
    /// let items = (1..=1000).map(|id| WorkItem::new("sha256", format!("item {id}")).with_id(id));
    /// let receipt = client.submit(tokio_stream::iter(items)).await?;
    /// assert_eq!((receipt.accepted, receipt.rejected), (1000, 0));
    /// # Ok(())
    /// # });
    /// # }
    /// ```
    pub async fn submit<S>(&self, items: S) -> Result<SubmitReceipt, tonic::Status>
    where
        S: Stream<Item = WorkItem> + Send + 'static,
    {
        Ok(self.here()?.submit(items).await?.into_inner())
    }

    /// The results of submitted items as they are done; ends after `limit` of them unless that is 0.
    ///
    /// ```standalone_crate
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs"));
    /// # use forkring::proto::v1::WorkItem;
    /// # fn main() {
    /// # example::run(example::hashes, async |client| {
    /// # let items = (1..=100).map(|id| WorkItem::new("sha256", "").with_id(id).with_subscription("mine"));
    /// # client.submit(tokio_stream::iter(items)).await?;
    /// let mut results = client.updates("mine", 100).await?;
    /// while let Some(result) = results.message().await? {
    ///     println!("{}: {} bytes", result.id, result.payload.len());
    /// }
    /// # Ok(())
    /// # });
    /// # }
    /// ```
    pub async fn updates(&self, subscription: &str, limit: u64) -> Result<Results, tonic::Status> {
        let request = GetUpdatesRequest { subscription: subscription.to_owned(), limit };
        Ok(Results::new(self.here()?.get_updates(request).await?.into_inner()))
    }

    /// Items in, results out, both at once; match them by id. A failed item is a result whose
    /// [`outcome`](WorkResult::outcome) is an error.
    ///
    /// ```standalone_crate
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs"));
    /// # use forkring::proto::v1::WorkItem;
    /// # fn main() {
    /// # example::run(example::hashes, async |client| {
    /// let items = (1..=1000).map(|id| WorkItem::new("sha256", format!("item {id}")).with_id(id));
    /// let mut results = client.process(tokio_stream::iter(items)).await?;
    /// while let Some(result) = results.message().await? {
    ///     match result.outcome() {
    ///         Ok(payload) => println!("{} bytes", payload.len()),
    ///         Err(status) => println!("{status}"),
    ///     }
    /// }
    /// # Ok(())
    /// # });
    /// # }
    /// ```
    pub async fn process<S>(&self, items: S) -> Result<Results, tonic::Status>
    where
        S: Stream<Item = WorkItem> + Send + 'static,
    {
        Ok(Results::new(self.here()?.process(items).await?.into_inner()))
    }

    /// A page of the dead letters with numbers above `after`, without their payloads. The next page follows `next`, if that
    /// is not 0.
    pub async fn dead_letters(&self, after: u64) -> Result<ListDeadLettersResponse, tonic::Status> {
        let request = ListDeadLettersRequest { after, limit: 0 };
        Ok(self.admin()?.list_dead_letters(request).await?.into_inner())
    }

    /// A dead letter with its payload.
    pub async fn dead_letter(&self, number: u64) -> Result<DeadLetter, tonic::Status> {
        Ok(self.admin()?.get_dead_letter(GetDeadLetterRequest { number }).await?.into_inner())
    }

    /// Submits a dead letter's item once more; under `subscription`, if it had none of its own.
    pub async fn requeue_dead_letter(&self, number: u64, subscription: &str) -> Result<(), tonic::Status> {
        let request = RequeueDeadLetterRequest { number, subscription: subscription.to_owned() };
        self.admin()?.requeue_dead_letter(request).await.map(|_| ())
    }

    /// Throws a dead letter away.
    pub async fn drop_dead_letter(&self, number: u64) -> Result<(), tonic::Status> {
        self.admin()?.drop_dead_letter(DropDeadLetterRequest { number }).await.map(|_| ())
    }
}

fn endpoint(addr: &str) -> Result<Endpoint, ConnectError> {
    let bad = || ConnectError::Address(addr.to_owned());
    let url = if addr.contains("://") { addr.to_owned() } else { format!("http://{addr}") };
    let endpoint = Endpoint::from_shared(url).map_err(|_| bad())?;
    let uri = endpoint.uri();
    // Of the schemes that there are only plain HTTP is spoken, and one that is not would fail as "cannot reach".
    if uri.scheme_str() != Some("http") || uri.host().is_none_or(str::is_empty) || uri.port_u16().is_none() {
        return Err(bad());
    }
    Ok(endpoint
        .tcp_nodelay(true)
        .tcp_keepalive(Some(TCP_KEEPALIVE))
        .connect_timeout(CONNECT_TIMEOUT)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME))
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// Not an address.
    #[error("`{0}` is not an address: give HOST:PORT or http://HOST:PORT")]
    Address(String),
    /// Nobody answers there.
    #[error("cannot reach {addr}: {cause}; is `forkring serve` running?")]
    Unreachable {
        /// Where.
        addr: String,
        /// Why, in the words of the system.
        cause: String,
    },
}

impl ConnectError {
    fn unreachable(addr: &str, error: &tonic::transport::Error) -> Self {
        // "transport error" and "tcp connect error" say nothing; the last in the chain does.
        let mut cause: &dyn std::error::Error = error;
        while let Some(deeper) = cause.source() {
            cause = deeper;
        }
        Self::Unreachable { addr: addr.to_owned(), cause: cause.to_string() }
    }
}

/// Building an item in one expression. What is not set is left to the server.
impl WorkItem {
    /// An item for a pool. The pool may be `""` when the server has one.
    pub fn new(pool: impl Into<String>, payload: impl Into<Bytes>) -> Self {
        Self { pool: pool.into(), payload: payload.into(), ..Self::default() }
    }

    /// The client's own number, echoed in the result.
    pub fn with_id(mut self, id: u64) -> Self {
        self.id = id;
        self
    }

    /// What the handler can look up beside the payload.
    pub fn with_metadata(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.metadata.insert(key.into(), value.into());
        self
    }

    /// 0 (the default) to 3: an item of a higher priority is taken before any of a lower one.
    pub fn with_priority(mut self, priority: u32) -> Self {
        self.priority = priority;
        self
    }

    /// How long the item may take from its arrival.
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        // Longer than protobuf can say is longer than anybody waits: no limit.
        self.timeout = timeout.try_into().ok();
        self
    }

    /// `Submit` only: whose updates the result becomes.
    pub fn with_subscription(mut self, subscription: impl Into<String>) -> Self {
        self.subscription = subscription.into();
        self
    }
}

impl WorkResult {
    /// What the handler wrote, or why there is nothing.
    pub fn outcome(self) -> Result<Bytes, v1::Status> {
        match self.status {
            Some(status) if status.code != Code::Ok as i32 => Err(status),
            _ => Ok(self.payload),
        }
    }
}

impl v1::Status {
    /// The code as gRPC's documents write it, such as `RESOURCE_EXHAUSTED`.
    pub fn code_name(&self) -> &'static str {
        match Code::from_i32(self.code) {
            Code::Ok => "OK",
            Code::Cancelled => "CANCELLED",
            Code::Unknown => "UNKNOWN",
            Code::InvalidArgument => "INVALID_ARGUMENT",
            Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
            Code::NotFound => "NOT_FOUND",
            Code::AlreadyExists => "ALREADY_EXISTS",
            Code::PermissionDenied => "PERMISSION_DENIED",
            Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
            Code::FailedPrecondition => "FAILED_PRECONDITION",
            Code::Aborted => "ABORTED",
            Code::OutOfRange => "OUT_OF_RANGE",
            Code::Unimplemented => "UNIMPLEMENTED",
            Code::Internal => "INTERNAL",
            Code::Unavailable => "UNAVAILABLE",
            Code::DataLoss => "DATA_LOSS",
            Code::Unauthenticated => "UNAUTHENTICATED",
        }
    }
}

/// A call's own status in the form that the streams have: the reason is that of the `google.rpc.ErrorInfo` in its details.
impl From<&tonic::Status> for v1::Status {
    fn from(status: &tonic::Status) -> Self {
        Self {
            code: status.code() as i32,
            message: status.message().to_owned(),
            reason: status.get_details_error_info().map(|info| info.reason).unwrap_or_default(),
            traceback: status.get_details_debug_info().map(|info| info.stack_entries.join("\n")).unwrap_or_default(),
        }
    }
}

/// `CODE (REASON): message`, leaving out what is empty or said twice.
impl fmt::Display for v1::Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let code = self.code_name();
        f.write_str(code)?;
        if !self.reason.is_empty() && self.reason != code {
            write!(f, " ({})", self.reason)?;
        }
        if !self.message.is_empty() {
            write!(f, ": {}", self.message)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use socket2::{Domain, Socket, Type};

    use super::*;

    #[test]
    fn an_address_is_host_and_port_over_plain_http() {
        for good in ["127.0.0.1:50051", "http://localhost:1", "[::1]:7", "http://[::1]:7/"] {
            assert!(endpoint(good).is_ok(), "{good}");
        }
        for bad in
            ["", "localhost", "http://localhost", "https://localhost:1", ":50051", "a b:1", "h:99999", "unix:///s"]
        {
            assert!(matches!(endpoint(bad), Err(ConnectError::Address(_))), "{bad}");
        }
    }

    #[test]
    fn nobody_there_is_one_line_that_says_what_to_do() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        // Bound, so that nobody else has it meanwhile, and not listened on.
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a port");
        let addr = socket.local_addr().expect("a port").as_socket().expect("an address").to_string();
        let error = runtime.block_on(Client::connect(&addr)).expect_err("nobody listens").to_string();
        let wanted = format!("cannot reach {addr}: Connection refused (os error 111); is `forkring serve` running?");
        assert_eq!(error, wanted);
    }

    #[test]
    fn a_client_waits_for_its_server_and_gives_up_when_its_patience_is_over() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a port");
        let addr = socket.local_addr().expect("a port").as_socket().expect("an address").to_string();
        runtime.block_on(async {
            let patience = Duration::from_millis(50);
            let error = Client::connect_within(&addr, patience).await.expect_err("nobody listens").to_string();
            assert!(error.starts_with(&format!("cannot reach {addr}: Connection refused")), "{error}");
            // A client that waits for a second calls `tell`, which starts the listener here.
            let listen = || socket.listen(1).expect("a listener");
            Client::connect_telling(&addr, Duration::from_secs(60), listen).await.expect("a connection");
            // No patience helps an invalid address.
            let error = Client::connect_within("nonsense", Duration::MAX).await.expect_err("no address");
            assert!(matches!(error, ConnectError::Address(_)));
        });
    }

    #[test]
    fn a_timeout_that_protobuf_cannot_say_is_none() {
        let item = WorkItem::new("", "").with_timeout(Duration::from_millis(1500));
        assert_eq!(item.timeout, Some(prost_types::Duration { seconds: 1, nanos: 500_000_000 }));
        assert_eq!(WorkItem::new("", "").with_timeout(Duration::MAX).timeout, None);
    }

    #[test]
    fn a_calls_status_and_a_streams_read_alike() {
        use tonic_types::{ErrorDetails, StatusExt as _};
        let details = ErrorDetails::with_error_info("HANDLER_FAILED", "forkring", []);
        let status = tonic::Status::with_error_details(Code::Internal, "no such file", details);
        let read = v1::Status::from(&status);
        assert_eq!(read.to_string(), "INTERNAL (HANDLER_FAILED): no such file");
        let bare = v1::Status { code: 4, reason: "DEADLINE_EXCEEDED".into(), ..Default::default() };
        assert_eq!(bare.to_string(), "DEADLINE_EXCEEDED");
    }

    #[test]
    fn a_result_with_a_code_is_a_failure() {
        let failed = v1::Status { code: 13, ..Default::default() };
        let result = |status| WorkResult { payload: "x".into(), status, ..Default::default() };
        assert_eq!(result(None).outcome(), Ok("x".into()));
        assert_eq!(result(Some(v1::Status::default())).outcome(), Ok("x".into()));
        assert_eq!(result(Some(failed.clone())).outcome(), Err(failed));
    }
}
