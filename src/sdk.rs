//! The worker SDK: how a program of one's own becomes a worker of a server that started it.
//!
//! ```no_run
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
//! ```
//!
//! # What it promises
//!
//! - The process is killed when its supervisor dies, and does not attach to a server that is not its parent, so a variable
//!   that was inherited by accident does no harm.
//! - What it has inherited is not inherited by the programs that it starts.
//!
//! SIGTERM and SIGINT are blocked at the start: they go to the whole process group, and only the supervisor may decide.

use std::{
    env, fs, io,
    os::fd::{OwnedFd, RawFd},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::Duration,
};

use crate::{
    config::Spin,
    contract::{Contract, ContractError, VARIABLE},
    dispatch::{Bells, Topology, Worker},
    handler::Handler,
    process,
    segment::{Segment, SegmentError, Slot},
    supervisor::overdue::{ItemTimer, Timed},
    worker,
};

/// Why a program cannot be a worker.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum AttachError {
    #[error("{VARIABLE} is not set: a worker is started by `forkring serve`, not by hand")]
    NoServer,
    #[error(transparent)]
    Contract(#[from] ContractError),
    #[error("this process was not started by the server that {VARIABLE} names: start workers by `forkring serve`")]
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

/// A process that is a worker.
pub struct Attached {
    worker: Worker<'static>,
    item_timer: Option<ItemTimer>,
    segment: &'static Segment,
    pool: String,
    spin: Spin,
    max_message: usize,
}

impl Attached {
    /// Attaches to the server that started this process, once.
    pub fn from_env() -> Result<Self, AttachError> {
        let text = env::var(VARIABLE).map_err(|_| AttachError::NoServer)?;
        let contract = Contract::from_text(&text)?;
        if !process::die_with_supervisor(contract.supervisor)? {
            return Err(AttachError::NotItsChild);
        }
        static ATTACHED: AtomicBool = AtomicBool::new(false);
        // Relaxed: it decides who goes on, and publishes nothing.
        if ATTACHED.swap(true, Relaxed) {
            return Err(AttachError::Twice);
        }
        let name = format!("forkring-w{}", contract.worker);
        let _ = fs::write("/proc/self/comm", name);

        let inherited = |fds: &[RawFd]| fds.iter().map(|fd| process::inherited(*fd)).collect::<io::Result<Vec<_>>>();
        let object: OwnedFd = process::inherited(contract.segment)?;
        let end = process::inherited(contract.end_bell)?;
        let bells = Bells::of(inherited(&contract.front_bells)?, inherited(&contract.worker_bells)?, end);
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
            .map(|(fd, limit)| Ok::<_, io::Error>(ItemTimer::of(process::inherited(fd)?, Duration::from_nanos(limit))));
        let item_timer = item_timer.transpose()?;
        if !contract.is_open {
            segment.pass_gate();
        }
        let worker = Worker::attach(segment, topology, bells, contract.worker).ok_or(AttachError::Mismatch)?;
        let max_message = usize::try_from(contract.max_message).map_err(|_| AttachError::Mismatch)?;
        Ok(Attached { worker, item_timer, segment, pool: contract.pool, spin, max_message })
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
        match &self.item_timer {
            None => worker::run(&mut self.worker, handler, self.spin, self.max_message),
            Some(timer) => {
                let mut timed = Timed::new(handler, timer);
                worker::run(&mut self.worker, &mut timed, self.spin, self.max_message)
            }
        }
    }
}
