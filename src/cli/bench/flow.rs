//! How items travel: one driver per connection, which opens its RPCs, keeps the window full, settles what comes back
//! and connects anew when the connection breaks.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinSet,
};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Code, Streaming};

use super::{
    BenchArgs, Mode,
    connection::{self, Client, Connection, Target},
    pace::{Pace, Ticket},
    tally::{Report, Tally},
};
use crate::client::ConnectError;
use crate::proto::v1::{self, GetUpdatesRequest, WorkItem, WorkResult};

/// Between a connection's end and the next attempt: a server that is down must not be hammered.
const RECONNECT_PAUSE: Duration = Duration::from_millis(100);
/// How much of the payload's head `--check` makes the item's own.
const ID_BYTES: usize = size_of::<u64>();

/// A run's load, shared by its drivers.
pub struct Load {
    mode: Mode,
    target: Target,
    pool: String,
    subscription: String,
    payload: Bytes,
    check: bool,
    open_loop: bool,
    in_flight: u32,
    pace: Arc<Pace>,
    /// One window per connection.
    windows: Vec<Semaphore>,
    // The run has one thread, so this is never contended.
    state: Mutex<State>,
}

struct State {
    tally: Tally,
    /// Items on streams that have no result yet, by id.
    outstanding: HashMap<u64, Outstanding>,
}

struct Outstanding {
    ticket: Ticket,
    owner: usize,
}

/// Why a driver's session on a connection ended.
enum Ended {
    /// The run is over.
    Over,
    /// The connection or a stream broke.
    Broken(v1::Status),
}

impl Load {
    /// A load as the options say.
    pub fn new(args: &BenchArgs, in_flight: u32, target: Target, pace: Arc<Pace>, tally: Tally) -> Self {
        Self {
            mode: args.mode,
            target,
            pool: args.pool.clone(),
            subscription: format!("bench-{}-{:?}", std::process::id(), std::time::SystemTime::now()),
            // Not zeros: nothing on the way may find it easy.
            payload: (0..args.payload.bytes()).map(|n| (n % 251) as u8).collect(),
            check: args.check,
            open_loop: args.rate.is_some(),
            in_flight,
            windows: (0..args.connections).map(|_| Semaphore::new(in_flight as usize)).collect(),
            pace,
            state: Mutex::new(State { tally, outstanding: HashMap::new() }),
        }
    }

    /// Takes stock.
    pub fn report(&self, cpu: f64) -> Report {
        self.state().tally.report(&self.pace, cpu)
    }

    /// Ends the run here and now.
    pub fn interrupt(&self) {
        self.state().tally.interrupt(Instant::now());
        self.pace.end();
    }

    /// Drives one connection, and its successors, until the run is over.
    pub async fn drive(self: Arc<Self>, owner: usize, connection: Connection) {
        let mut connection = Some(connection);
        loop {
            let ended = match connection.take() {
                Some(connection) => self.session(owner, connection).await,
                None => match self.target.connect().await {
                    Ok(fresh) => {
                        connection = Some(fresh);
                        continue;
                    }
                    Err(error) => Ended::Broken(unavailable(error)),
                },
            };
            match ended {
                Ended::Over => return,
                Ended::Broken(status) => self.broken(owner, &status),
            }
            if self.pace.is_over() {
                return;
            }
            tokio::time::sleep(RECONNECT_PAUSE).await;
        }
    }

    async fn session(self: &Arc<Self>, owner: usize, connection: Connection) -> Ended {
        let result = match self.mode {
            Mode::Call => return self.call(connection).await,
            Mode::Process => self.process(owner, self.target.client(connection)).await,
            Mode::Submit => self.submit(owner, self.target.client(connection)).await,
        };
        result.map_or_else(|status| Ended::Broken(v1::Status::from(&status)), |()| Ended::Over)
    }

    /// Unary: as many tasks as there may be calls in flight, each with one.
    async fn call(self: &Arc<Self>, connection: Connection) -> Ended {
        let mut callers = JoinSet::new();
        for _ in 0..self.in_flight {
            let (load, connection) = (self.clone(), connection.clone());
            callers.spawn(async move { load.call_in_turn(connection).await });
        }
        let mut ended = Ended::Over;
        while let Some(caller) = callers.join_next().await {
            if let Ok(broken @ Ended::Broken(_)) = caller {
                ended = broken;
            }
        }
        ended
    }

    async fn call_in_turn(&self, connection: Connection) -> Ended {
        let mut client = self.target.client(connection.clone());
        while let Some(ticket) = self.begin().await {
            match client.call(connection::request(self.item(&ticket))).await {
                Ok(result) => self.conclude(&ticket, result.into_inner()),
                Err(status) => {
                    let status = v1::Status::from(&status);
                    self.state().tally.failed(ticket.measured, &status);
                    if connection.is_closed() {
                        return Ended::Broken(status);
                    }
                    // A refusal that needed no I/O must not keep the runtime from its other tasks.
                    tokio::task::yield_now().await;
                }
            }
        }
        Ended::Over
    }

    /// Bidirectional: a window of items on one stream.
    async fn process(&self, owner: usize, mut client: Client) -> Result<(), tonic::Status> {
        let (items, source) = mpsc::unbounded_channel();
        let send = async {
            self.feed(owner, items).await;
            Ok(())
        };
        let receive = async {
            let results = client.process(UnboundedReceiverStream::new(source)).await?.into_inner();
            self.settle_all(results).await?;
            self.owes_nothing(owner)
        };
        tokio::try_join!(send, receive).map(|((), ())| ())
    }

    /// Items on one stream, their updates on another.
    async fn submit(&self, owner: usize, mut client: Client) -> Result<(), tonic::Status> {
        let (items, source) = mpsc::unbounded_channel();
        let mut subscriber = client.clone();
        let receive = async {
            let request = GetUpdatesRequest { subscription: self.subscription.clone(), ..Default::default() };
            // Not awaited before the first item is sent: a server may hold the headers back until it has an update.
            let updates = subscriber.get_updates(request).await?.into_inner();
            self.settle_all(updates).await?;
            Err(tonic::Status::unavailable("the server ended the updates"))
        };
        let send = async {
            let feed = async {
                self.feed(owner, items).await;
                Ok(())
            };
            let receipt = async { client.submit(UnboundedReceiverStream::new(source)).await };
            let ((), receipt) = tokio::try_join!(feed, receipt)?;
            for rejection in receipt.into_inner().rejections {
                self.fail(rejection.id, &rejection.status.unwrap_or_default());
            }
            // Streams of one subscription share its updates: listen until every connection has got its own.
            for window in &self.windows {
                if window.acquire_many(self.in_flight).await.is_err() {
                    break;
                }
            }
            Ok(())
        };
        tokio::select! {
            sent = send => sent,
            received = receive => received,
        }
    }

    /// Puts an item on the stream whenever the window has room, until the run is over; then half-closes it.
    async fn feed(&self, owner: usize, items: mpsc::UnboundedSender<WorkItem>) {
        let over = self.pace.over();
        tokio::pin!(over);
        loop {
            // A window that never opens again must not keep the stream open beyond the end.
            let room = tokio::select! {
                biased;
                room = self.windows[owner].acquire() => room,
                () = &mut over => return,
            };
            let Ok(room) = room else { return };
            let Some(ticket) = self.begin().await else { return };
            room.forget();
            self.state().outstanding.insert(ticket.id, Outstanding { ticket, owner });
            if items.send(self.item(&ticket)).is_err() {
                // The stream is gone; its other half says why.
                return;
            }
        }
    }

    async fn settle_all(&self, mut results: Streaming<WorkResult>) -> Result<(), tonic::Status> {
        while let Some(result) = results.message().await? {
            if result.partial {
                // Of a streaming handler it is the end that counts.
                continue;
            }
            let found = self.state().outstanding.remove(&result.id);
            match found {
                Some(Outstanding { ticket, owner }) => {
                    self.conclude(&ticket, result);
                    self.windows[owner].add_permits(1);
                }
                None => self.state().tally.stray(),
            }
        }
        Ok(())
    }

    async fn begin(&self) -> Option<Ticket> {
        let ticket = self.pace.next().await?;
        if self.open_loop && ticket.measured {
            self.state().tally.sent_late(ticket.due.elapsed());
        }
        Some(ticket)
    }

    fn item(&self, ticket: &Ticket) -> WorkItem {
        let payload = if self.check { self.own_payload(ticket.id) } else { self.payload.clone() };
        let subscription = match self.mode {
            Mode::Submit => self.subscription.clone(),
            Mode::Call | Mode::Process => String::new(),
        };
        WorkItem { pool: self.pool.clone(), payload, id: ticket.id, subscription, ..Default::default() }
    }

    /// The payload with the item's id at its head.
    fn own_payload(&self, id: u64) -> Bytes {
        let mut own = BytesMut::from(&self.payload[..]);
        for (byte, of_id) in own.iter_mut().zip(id.to_le_bytes()) {
            *byte = of_id;
        }
        own.freeze()
    }

    /// Counts an item that has a result, good or bad.
    fn conclude(&self, ticket: &Ticket, result: WorkResult) {
        let now = Instant::now();
        let id = result.id;
        let tally = &mut self.state().tally;
        match result.outcome() {
            Err(status) => tally.failed(ticket.measured, &status),
            Ok(_) if self.check && id != ticket.id => {
                tally.failed(ticket.measured, &data_loss("the result's id is not the item's"));
            }
            Ok(payload) if self.check && !self.is_echo(ticket.id, &payload) => {
                tally.failed(ticket.measured, &data_loss("the result's payload is not the item's"));
            }
            Ok(_) => tally.succeeded(ticket.due, ticket.measured, now),
        }
    }

    fn is_echo(&self, id: u64, echoed: &[u8]) -> bool {
        let head = ID_BYTES.min(self.payload.len());
        echoed.len() == self.payload.len()
            && echoed[..head] == id.to_le_bytes()[..head]
            && echoed[head..] == self.payload[head..]
    }

    /// Counts an outstanding item as failed and makes room in its window.
    fn fail(&self, id: u64, status: &v1::Status) {
        let mut state = self.state();
        if let Some(Outstanding { ticket, owner }) = state.outstanding.remove(&id) {
            state.tally.failed(ticket.measured, status);
            self.windows[owner].add_permits(1);
        }
    }

    /// After the server ended a stream with OK: whatever it did not answer has failed.
    fn owes_nothing(&self, owner: usize) -> Result<(), tonic::Status> {
        if self.state().outstanding.values().any(|item| item.owner == owner) {
            return Err(tonic::Status::unavailable("the server ended the stream before its last result"));
        }
        Ok(())
    }

    /// After a break: the connection's items on streams have failed with it.
    fn broken(&self, owner: usize, status: &v1::Status) {
        let ids: Vec<u64> = {
            let state = self.state();
            state.outstanding.iter().filter(|(_, item)| item.owner == owner).map(|(id, _)| *id).collect()
        };
        if ids.is_empty() {
            self.state().tally.connection_failed(status);
        }
        for id in ids {
            self.fail(id, status);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unavailable(error: ConnectError) -> v1::Status {
    v1::Status { code: Code::Unavailable as i32, message: error.to_string(), ..Default::default() }
}

fn data_loss(message: &str) -> v1::Status {
    v1::Status { code: Code::DataLoss as i32, message: message.to_owned(), ..Default::default() }
}
