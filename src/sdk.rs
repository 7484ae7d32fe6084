//! The worker SDK: how a program of one's own becomes a worker of a server that started it.
//!
//! ```standalone_crate
//! # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs"));
//! # fn main() {
//! use forkring::sdk::Attached;
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     // Load what takes long first: no item is taken before `run`.
//!     let mut worker = Attached::from_env()?;
//!     worker.run(&mut |item: &forkring::Item<'_>, reply: &mut forkring::Reply<'_, '_>| {
//!         reply.write(&item.payload().to_ascii_uppercase())?;
//!         Ok(())
//!     })?;
//!     Ok(())
//! }
//! # let serve = || {
//! #     let program = forkring::Program::new("/proc/self/exe").args(["--worker"]);
//! #     let pool = forkring::Pool::program("shout", program).workers(1);
//! #     forkring::Server::new().configure(example::settings).pool(pool).run()
//! # };
//! # if std::env::args().any(|argument| argument == "--worker") {
//! #     main().unwrap();
//! # } else {
//! #     example::run(serve, async |client| {
//! #         let item = forkring::proto::v1::WorkItem::new("shout", "hello").with_id(7);
//! #         let result = client.call(item).await?;
//! #         assert_eq!((result.id, &result.payload[..]), (7, &b"HELLO"[..]));
//! #         Ok(())
//! #     });
//! # }
//! # }
//! ```
//!
//! # Many items at once
//!
//! [`Attached::run`] hands a handler one item after the other. A handler that works on many at once, such as one on an event
//! loop or one that makes batches, takes them itself and finishes them in any order:
//!
//! ```standalone_crate
//! # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs"));
//! # fn main() {
//! use forkring::sdk::{Attached, OpenItem};
//!
//! fn work(worker: &mut Attached) -> std::io::Result<()> {
//!     const MOST: usize = 32;
//!     let mut open: Vec<OpenItem> = Vec::new();
//!     loop {
//!         while let Some(item) = (open.len() < MOST).then(|| worker.take()).flatten() {
//!             open.push(item);
//!         }
//!         if worker.is_stopping() && open.is_empty() {
//!             return Ok(());
//!         }
//!         // From here on the bell rings for whatever is not seen by the look at the items.
//!         let mut sleeps = worker.arm(open.len() < MOST);
//!         // … go on with each item as far as that goes …
//!         if let Some(item) = open.pop() {
//!             item.complete();
//!             sleeps = false;
//!         }
//!         if sleeps {
//!             // An event loop watches its descriptor instead.
//!             worker.bell().wait()?;
//!         }
//!         worker.disarm()?;
//!     }
//! }
//! # let serve = || {
//! #     let program = forkring::Program::new("/proc/self/exe").args(["--worker"]);
//! #     let pool = forkring::Pool::program("many", program).workers(1);
//! #     forkring::Server::new().configure(example::settings).pool(pool).run()
//! # };
//! # if std::env::args().any(|argument| argument == "--worker") {
//! #     work(&mut Attached::from_env().unwrap()).unwrap();
//! # } else {
//! #     example::run(serve, async |client| {
//! #         let item = forkring::proto::v1::WorkItem::new("many", "hello").with_id(7);
//! #         let result = client.call(item).await?;
//! #         assert_eq!((result.id, &result.payload[..]), (7, &b""[..]));
//! #         Ok(())
//! #     });
//! # }
//! # }
//! ```
//!
//! # What it promises
//!
//! - The process is killed when its supervisor dies, and does not attach to a server that is not its parent, so a variable
//!   that was inherited by accident does no harm.
//! - What it has inherited is not inherited by the programs that it starts, from [`inherit`] on. [`Attached::from_env`] sees to
//!   that, too; what runs code of others before that, as an import of modules may, says it first.
//!
//! SIGTERM and SIGINT are blocked at the start: they go to the whole process group, and only the supervisor may decide.

mod nursery;

use std::{
    cell::Cell,
    collections::HashMap,
    env, fs, io, mem,
    os::fd::{OwnedFd, RawFd},
    rc::Rc,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use rustix::io::Errno;

use crate::{
    config::Spin,
    contract::{Contract, ContractError, VARIABLE},
    crash_point::crash_point,
    dispatch::{Bells, Open, Topology, Worker},
    doorbell::Bell,
    handler::{Failure, Handler, Item, Reply},
    process,
    segment::{Segment, SegmentError, Slot, Stage},
    supervisor::overdue::{ItemTimer, Running, Timed, Timers},
    worker,
};

pub use nursery::Nursery;

/// Why a program cannot be a worker.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum AttachError {
    #[error("{0} is not set: a worker is started by `forkring serve`, not by hand")]
    NoServer(&'static str),
    #[error(transparent)]
    Contract(#[from] ContractError),
    #[error("this process was not started by the server that its environment names: start workers by `forkring serve`")]
    NotItsChild,
    #[error("this process has attached before: it is one worker")]
    Twice,
    #[error("{VARIABLE} does not fit the segment: the server and this program are not of one version")]
    Mismatch,
    #[error(transparent)]
    Segment(#[from] SegmentError),
    #[error("cannot attach to the server: {0}")]
    Io(#[from] io::Error),
}

/// What the server has left open for this process.
enum Heritage {
    Untouched,
    Taken(Box<Contract>, HashMap<RawFd, OwnedFd>),
    /// It has attached by it.
    Spent,
}

static HERITAGE: Mutex<Heritage> = Mutex::new(Heritage::Untouched);

/// Takes what the server has left open for this process. Programs that it starts from now on do not inherit it: by the segment's
/// descriptor they would keep the server's name for as long as they live.
pub fn inherit() -> Result<(), AttachError> {
    let mut heritage = HERITAGE.lock().unwrap_or_else(PoisonError::into_inner);
    match *heritage {
        Heritage::Untouched => {}
        Heritage::Taken(..) => return Ok(()),
        Heritage::Spent => return Err(AttachError::Twice),
    }
    let text = env::var(VARIABLE).map_err(|_| AttachError::NoServer(VARIABLE))?;
    let contract = Contract::from_text(&text)?;
    if !process::die_with_supervisor(contract.supervisor)? {
        return Err(AttachError::NotItsChild);
    }
    let fds = contract.fds().map(|fd| Ok((fd, process::inherited(fd)?))).collect::<io::Result<_>>()?;
    *heritage = Heritage::Taken(Box::new(contract), fds);
    Ok(())
}

/// Shows in `ps` which worker this process is, once it has [inherited](inherit): for programs that have no better title. A
/// process that cannot have one, as for its threads, goes on without.
pub fn set_title() {
    if let Heritage::Taken(contract, _) = &*HERITAGE.lock().unwrap_or_else(PoisonError::into_inner) {
        show(&process::worker_title(contract.worker, &contract.pool));
    }
}

fn show(title: &str) {
    if let Ok(title) = process::Title::set(title) {
        title.keep();
    }
}

/// A process that is a worker.
pub struct Attached {
    worker: Worker<'static>,
    timers: Option<Rc<Timers>>,
    segment: &'static Segment,
    pool: String,
    spin: Spin,
    max_message: usize,
    /// It has been told that the server stops.
    knows_the_end: Cell<bool>,
}

impl Attached {
    /// Attaches to the server that started this process, once.
    pub fn from_env() -> Result<Self, AttachError> {
        inherit()?;
        let heritage = mem::replace(&mut *HERITAGE.lock().unwrap_or_else(PoisonError::into_inner), Heritage::Spent);
        let Heritage::Taken(contract, mut fds) = heritage else { return Err(AttachError::Twice) };
        let mut take = |fd: RawFd| fds.remove(&fd).ok_or(io::Error::from(Errno::BADF));
        let name = format!("forkring-w{}", contract.worker);
        let _ = fs::write("/proc/self/comm", name);

        let object = take(contract.segment)?;
        let end = take(contract.end_bell)?;
        let mut take_all = |fds: &[RawFd]| fds.iter().map(|fd| take(*fd)).collect::<io::Result<Vec<_>>>();
        let bells = Bells::of(take_all(&contract.front_bells)?, take_all(&contract.worker_bells)?, end);
        let topology = Topology::new(contract.pools.iter().copied());
        // For as long as the process lives, and so does the lock that comes with the descriptor.
        let object = &*Box::leak(Box::new(object));
        let layout = contract.layout().ok_or(AttachError::Mismatch)?;
        let slot = Slot::Worker(contract.worker);
        let segment = &*Box::leak(Box::new(Segment::attach_by(layout, object, &contract.name, slot)?));
        let geometry = segment.geometry();
        let (fronts, workers) = bells.counts();
        let total: u32 = contract.pools.iter().map(|count| u32::from(*count)).sum();
        let spin = contract.spin.parse().map_err(|_| AttachError::Mismatch)?;
        if (fronts, workers) != (geometry.fronts, geometry.workers)
            || (total, u32::from(topology.pools())) != (geometry.workers, geometry.pools)
        {
            return Err(AttachError::Mismatch);
        }
        let item_timer = contract
            .item_timer
            .map(|(fd, limit)| Ok::<_, io::Error>(ItemTimer::of(take(fd)?, Duration::from_nanos(limit))));
        let timers = item_timer.transpose()?.map(Timers::new);
        let arrival = Bell::from(take(contract.arrival)?);
        if !contract.is_open {
            segment.pass_gate();
        }
        let worker = Worker::attach(segment, topology, bells, contract.worker).ok_or(AttachError::Mismatch)?;
        let max_message = usize::try_from(contract.max_message).map_err(|_| AttachError::Mismatch)?;
        crash_point!("sdk.attached");
        arrival.ring()?;
        crash_point!("sdk.arrived");
        Ok(Attached {
            worker,
            timers,
            segment,
            pool: contract.pool,
            spin,
            max_message,
            knows_the_end: Cell::new(false),
        })
    }

    /// The worker's number, from 0, over all pools.
    pub fn number(&self) -> u16 {
        self.worker.number()
    }

    /// The name of the worker's pool.
    pub fn pool(&self) -> &str {
        &self.pool
    }

    /// The segment, for [pins](Segment::pin).
    pub fn segment(&self) -> &'static Segment {
        self.segment
    }

    /// Handles items until the server stops.
    pub fn run(&mut self, handler: &mut dyn Handler) -> io::Result<()> {
        match &self.timers {
            None => worker::run(&mut self.worker, handler, self.spin, self.max_message),
            Some(timers) => {
                let mut timed = Timed::new(handler, timers.timer());
                worker::run(&mut self.worker, &mut timed, self.spin, self.max_message)
            }
        }
    }

    /// Takes an item without waiting, to be open beside others; none, if there is none. Items that have expired or were
    /// given up are not among them. None also, if another worker is to take this one's place.
    pub fn take(&mut self) -> Option<OpenItem> {
        if self.is_retiring() {
            return None;
        }
        loop {
            let claimed = self.worker.take()?;
            self.worker.chain();
            crash_point!("sdk.taken");
            let began = process::now();
            let refusal = worker::refusal(&claimed, began);
            let open = match refusal {
                Some(refusal) => Err(refusal),
                None => self.worker.open_beside(&claimed, self.max_message, began).ok_or_else(worker::malformed),
            };
            match open {
                Ok(open) => return Some(OpenItem { open, _running: self.timers.as_ref().map(Timers::begin) }),
                Err(failure) => {
                    self.worker.reply(&claimed, self.max_message).fail(claimed, &failure, began, process::now());
                }
            }
        }
    }

    /// Says that this worker is about to sleep while items may be open: from now on its [bell](Attached::bell) rings when a
    /// partial result was taken, an item was cancelled, a result fetched or the server stops; and when there is an item to
    /// take, if `for_items`: only who is ready to take one may say so, for nobody else is woken for it. False, if it must not
    /// sleep: there is an item, or the server stops and [`Attached::is_stopping`] has not said so yet.
    ///
    /// After this, look once more at whatever else is waited for, and sleep only if there is nothing: what came before it
    /// rings no bell. Then, whatever woke it, [`Attached::disarm`].
    pub fn arm(&self, for_items: bool) -> bool {
        // Who takes no more does not look for any.
        let armed = self.worker.arm(for_items && !self.is_retiring());
        crash_point!("sdk.armed");
        armed && (self.knows_the_end.get() || !self.is_over())
    }

    /// The counterpart of [`Attached::arm`]: forgets the rings so far. Look at everything that is waited for after it.
    pub fn disarm(&self) -> io::Result<()> {
        let disarmed = self.worker.disarm();
        crash_point!("sdk.disarmed");
        disarmed
    }

    /// What rings, for waiting or for an event loop: the descriptor is readable from a ring to the next
    /// [`Attached::disarm`]. It may also ring for nothing.
    pub fn bell(&self) -> &Bell {
        self.worker.bell()
    }

    /// Whether the server stops, or another worker is to take this one's place. Then take and finish what there is, and leave.
    pub fn is_stopping(&self) -> bool {
        let is_stopping = self.is_over();
        if is_stopping {
            crash_point!("sdk.stopping");
        }
        self.knows_the_end.set(is_stopping);
        is_stopping
    }

    fn is_over(&self) -> bool {
        self.segment.stage() == Stage::Stopping || self.is_retiring()
    }

    fn is_retiring(&self) -> bool {
        self.segment.is_retiring(Slot::Worker(self.worker.number()))
    }
}

/// An item that is open beside others of its worker, until it is completed. If it is dropped before that, it fails with
/// `INTERNAL`, reason `ITEM_DROPPED`. All stay in one thread; if the process dies, each is given to another worker.
#[derive(Debug)]
pub struct OpenItem {
    open: Open<'static>,
    /// Behind it, so that the item is completed first.
    _running: Option<Running>,
}

impl OpenItem {
    /// The item.
    pub fn item(&self) -> Item<'_> {
        self.open.item()
    }

    /// Its result, to be written. What is sent of it before it is complete ([`Reply::try_send`]) must not make others wait.
    pub fn reply(&mut self) -> Reply<'_, 'static> {
        self.open.reply()
    }

    /// Completes it with what its reply has.
    pub fn complete(self) {
        self.open.complete();
    }

    /// Completes it with a failure.
    pub fn fail(self, failure: &Failure) {
        self.open.fail(failure);
    }
}
