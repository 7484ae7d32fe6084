//! The supervisor: the parent of all, one thread, no runtime. Forks, reaps, sweeps, restarts, drains.
//!
//! # What it promises
//!
//! - It sleeps in one `poll` over pidfds and a signalfd, with a timer only while a restart or a drain is due.
//! - On a death: the pidfd is readable (the proof) → sweep → only then `waitid`, so that the pid cannot be reused while
//!   the sweep relies on it.
//! - A process that dies is replaced; one that keeps dying soon after its start is replaced ever more slowly.
//! - SIGTERM and SIGINT drain: the front takes nothing new, what was accepted is finished and sent, then the workers end,
//!   then the segment is removed. A second signal, or the end of the grace period, kills what is left.
//!
//! Children block both signals: a Ctrl-C goes to the whole process group, and only the supervisor may decide.

use std::{
    io,
    net::TcpListener,
    os::fd::{AsFd, BorrowedFd},
    os::unix::process::ExitStatusExt,
    process::ExitStatus,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::sys::{
    signal::{SigSet, SigmaskHow, Signal},
    signalfd::{SfdFlags, SignalFd},
};
use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
};
use tonic::Code;

use crate::{
    config::Config,
    crash_point::crash_point,
    dispatch::{self, Bells, DeadLetters, Death, Failure, Front, Left, Topology, Worker, sweep_front, sweep_worker},
    front,
    handler::Handler,
    process::{self, Child, ForkError},
    segment::{Liveness, Segment, SegmentError, SegmentOwner, Slot, Stage},
    worker,
};

/// A process that lived this long was not killed by its own start.
const SETTLED: Duration = Duration::from_secs(1);
const BACKOFF: Duration = Duration::from_millis(50);
const FORK_AGAIN: Duration = Duration::from_secs(1);
const MAX_BACKOFF: Duration = Duration::from_secs(10);

/// A child's exit code for a failure that a restart cannot mend.
pub const EXIT_HOPELESS: u8 = 78;

/// Why a server ended other than by a drain.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum SupervisorError {
    #[error(transparent)]
    Segment(#[from] SegmentError),
    #[error(transparent)]
    Fork(#[from] ForkError),
    #[error("cannot supervise: {0}")]
    Io(#[from] io::Error),
    #[error("the front cannot start; its reason is in the line above")]
    Front,
    #[error("stopped before the drain was over: {left} processes were killed, and calls that were in work are lost")]
    Killed { left: usize },
}

/// A pool as the supervisor runs it.
pub struct PoolPlan {
    /// Its name.
    pub name: String,
    /// Workers.
    pub workers: u16,
    /// What they run; each worker gets its copy by fork.
    pub handler: Box<dyn Handler>,
}

/// SIGTERM and SIGINT, which from now on wait to be read instead of ending the process. Dropping it gives them back
/// their effect.
pub struct Signals {
    fd: SignalFd,
    before: SigSet,
}

impl Signals {
    /// Blocks both. To be done before there is anything to clean up.
    pub fn block() -> io::Result<Self> {
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGTERM);
        mask.add(Signal::SIGINT);
        let before = mask.thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
        let fd = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Signals { fd, before })
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // Fails only for a mask that is none.
        let _ = self.before.thread_set_mask();
    }
}

/// One participant slot and who is in it.
struct Seat {
    slot: Slot,
    name: String,
    child: Option<Child>,
    started: Instant,
    restart_at: Option<Instant>,
    quick_deaths: u32,
}

/// A server that is ready to be started.
pub struct Supervisor {
    config: Arc<Config>,
    owner: SegmentOwner,
    segment: Segment,
    topology: Topology,
    bells: Arc<Bells>,
    listener: TcpListener,
    pools: Vec<PoolPlan>,
    seats: Vec<Seat>,
    letters: DeadLetters,
}

impl Supervisor {
    /// Puts everything together; nothing is forked yet.
    pub fn new(
        config: Config,
        pools: Vec<PoolPlan>,
        listener: TcpListener,
        owner: SegmentOwner,
    ) -> Result<Self, SupervisorError> {
        let segment = Segment::attach(owner.object(), owner.name(), Slot::Supervisor)?;
        if let Some(pid) = owner.left_by() {
            let Left { pending, done } = dispatch::adopt(&segment)?;
            tracing::warn!(name = owner.name(), pid, pending, done, "adopted what a dead server left behind");
        }
        let topology = Topology::new(pools.iter().map(|pool| pool.workers));
        let workers = segment.geometry().workers as u16;
        let bells = Bells::new(1, workers)?;
        let seat = |slot, name| Seat {
            slot,
            name,
            child: None,
            started: Instant::now(),
            restart_at: Some(Instant::now()),
            quick_deaths: 0,
        };
        // Workers first, so that the front finds them there.
        let mut seats: Vec<_> = (0..workers).map(|n| seat(Slot::Worker(n), format!("forkring-w{n}"))).collect();
        seats.push(seat(Slot::Front(0), "forkring-front".to_owned()));
        let letters = DeadLetters::new(pools.iter().map(|pool| pool.name.clone()).collect());
        Ok(Supervisor { config: Arc::new(config), owner, segment, topology, bells, listener, pools, seats, letters })
    }

    /// Forks everybody and supervises them until a drain is over.
    pub fn run(mut self, signals: &Signals) -> Result<(), SupervisorError> {
        let mut result = self.start();
        if result.is_ok() {
            // From now on there may be something in it that must outlive this process, however it ends.
            self.owner.disown();
            self.segment.open_gate();
            crash_point!("supervisor.opened");
            tracing::info!(name = self.owner.name(), workers = self.seats.len() - 1, "serving");
            result = self.supervise(signals);
        }
        // After a drain nobody is left; after an error or a second signal this is the end of them.
        let left = self.kill_all();
        crash_point!("supervisor.ended");
        let Left { pending, done } = Left::of(&self.segment);
        let letters = self.segment.letter_log().map_or(0, |log| log.count());
        // A drain has seen to all that was pending, and to the results for which there were subscribers.
        if pending > 0 || (done > 0 || letters > 0) && (result.is_err() || left > 0) {
            let name = self.owner.name();
            tracing::warn!(
                name,
                pending,
                done,
                letters,
                "submitted items stay in shared memory: serve this name again to finish them"
            );
        } else {
            if letters > 0 {
                tracing::warn!(letters, "dead letters that were neither requeued nor dropped are gone");
            }
            self.owner.own();
        }
        result?;
        if left > 0 { Err(SupervisorError::Killed { left }) } else { Ok(()) }
    }

    fn start(&mut self) -> Result<(), SupervisorError> {
        (0..self.seats.len()).try_for_each(|seat| self.spawn(seat))
    }

    /// Forks the participant of a seat.
    fn spawn(&mut self, at: usize) -> Result<(), SupervisorError> {
        let Supervisor { config, owner, topology, bells, listener, pools, seats, .. } = self;
        let seat = &mut seats[at];
        seat.restart_at = None;
        let slot = seat.slot;
        let child = process::fork(&seat.name, || {
            owner.disown();
            let segment = match Segment::attach(owner.object(), owner.name(), slot) {
                // For as long as the process lives.
                Ok(segment) => &*Box::leak(Box::new(segment)),
                Err(error) => {
                    tracing::error!(%error, "cannot attach to the segment");
                    return EXIT_HOPELESS;
                }
            };
            segment.pass_gate();
            let (topology, bells) = (topology.clone(), bells.clone());
            let ended = match slot {
                Slot::Worker(number) => {
                    let Some(mut worker) = Worker::attach(segment, topology.clone(), bells, number) else {
                        return EXIT_HOPELESS;
                    };
                    crash_point!("worker.attached");
                    let pool = topology.pool_of(number).map_or(0, usize::from);
                    worker::run(
                        &mut worker,
                        &mut *pools[pool].handler,
                        config.spin,
                        config.max_message.bytes() as usize,
                    )
                }
                Slot::Front(number) => {
                    let names = pools.iter().map(|pool| pool.name.clone()).collect();
                    let (front, adopted) = Front::attach(segment, topology, bells.clone(), number);
                    crash_point!("front.attached");
                    front::run(front, adopted, bells.front(number), listener, names, config)
                }
                Slot::Supervisor => Ok(()),
            };
            match ended {
                Ok(()) => 0,
                Err(error) => {
                    tracing::error!(%error, "cannot go on");
                    EXIT_HOPELESS
                }
            }
        })?;
        crash_point!("supervisor.forked");
        seat.started = Instant::now();
        self.segment.set_liveness(slot, Liveness::Live(child.pid()));
        crash_point!("supervisor.registered");
        tracing::debug!(process = seat.name, pid = child.pid(), "started");
        seat.child = Some(child);
        if let Slot::Worker(_) = slot {
            // The front computes the pools' health from the registry.
            self.ring_fronts();
        }
        Ok(())
    }

    fn ring_fronts(&self) {
        for front in 0..self.segment.geometry().fronts {
            if let Err(error) = self.bells.front(front as u16).ring() {
                tracing::error!(%error, "cannot ring a front");
            }
        }
    }

    /// The loop. Ends when the server has drained, is told to stop at once, or cannot go on.
    fn supervise(&mut self, signals: &Signals) -> Result<(), SupervisorError> {
        let mut stage = Stage::Serving;
        let mut give_up_at = None;
        loop {
            if stage == Stage::Draining && self.is_empty(|slot| matches!(slot, Slot::Front(_))) {
                stage = Stage::Stopping;
                self.enter(stage);
                // Nobody is replaced any more.
                self.seats.iter_mut().for_each(|seat| seat.restart_at = None);
            }
            if stage == Stage::Stopping && self.is_empty(|_| true) {
                return Ok(());
            }
            let now = Instant::now();
            if give_up_at.is_some_and(|at| at <= now) {
                tracing::warn!("the grace period is over");
                return Ok(());
            }
            for at in 0..self.seats.len() {
                if self.seats[at].restart_at.is_some_and(|due| due <= now) {
                    match self.spawn(at) {
                        // No memory or too many processes, for now: what was accepted must not be lost by that.
                        Err(SupervisorError::Fork(ForkError::Io(error))) => {
                            tracing::warn!(%error, "cannot fork, trying again");
                            self.seats[at].restart_at = Some(now + FORK_AGAIN);
                        }
                        spawned => spawned?,
                    }
                }
            }

            let next = self.seats.iter().filter_map(|seat| seat.restart_at).chain(give_up_at).min();
            let (signalled, dead) = self.sleep(signals, next)?;
            if signalled {
                if stage != Stage::Serving {
                    tracing::warn!("a second signal: stopping at once");
                    return Ok(());
                }
                tracing::info!(grace = ?self.config.grace, "draining");
                stage = Stage::Draining;
                give_up_at = Instant::now().checked_add(self.config.grace);
                self.enter(stage);
            }
            for at in dead {
                self.bury(at, stage)?;
            }
        }
    }

    fn enter(&self, stage: Stage) {
        self.segment.set_stage(stage);
        self.bells.ring_all();
    }

    fn is_empty(&self, of: impl Fn(Slot) -> bool) -> bool {
        self.seats.iter().filter(|seat| of(seat.slot)).all(|seat| seat.child.is_none() && seat.restart_at.is_none())
    }

    /// Sleeps until a signal, a death or a time; whether there was a signal, and the seats of the dead.
    fn sleep(&self, signals: &Signals, until: Option<Instant>) -> io::Result<(bool, Vec<usize>)> {
        let alive = self.seats.iter().enumerate().filter_map(|(at, seat)| Some((at, seat.child.as_ref()?)));
        let (at, fds): (Vec<_>, Vec<BorrowedFd<'_>>) = alive.map(|(at, child)| (at, child.pidfd.as_fd())).unzip();
        let mut polls: Vec<_> =
            fds.iter().chain([&signals.fd.as_fd()]).map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
        // Rounded up, so that what is due is due.
        let timeout = until.map(|until| until.saturating_duration_since(Instant::now()) + Duration::from_millis(1));
        let timeout = timeout.and_then(|timeout| timeout.try_into().ok());
        match poll(&mut polls, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let dead = at.iter().zip(&polls).filter(|(_, poll)| !poll.revents().is_empty()).map(|(&at, _)| at).collect();
        let signalled = signals.fd.read_signal().map_err(io::Error::from)?.is_some();
        Ok((signalled, dead))
    }

    /// After the proof of death: sweep, reap, and see to a successor.
    fn bury(&mut self, at: usize, stage: Stage) -> Result<(), SupervisorError> {
        let Some(child) = self.seats[at].child.take() else { return Ok(()) };
        let slot = self.seats[at].slot;
        self.segment.set_liveness(slot, Liveness::Dead);
        crash_point!("supervisor.dead");
        // How it died is known before it is reaped, and the failure of its items should say so.
        let status = child.peek()?;
        let swept = match slot {
            Slot::Worker(worker) => {
                let death = Death { worker, pid: child.pid(), status, failure: crashed(status) };
                let max_attempts = self.config.max_attempts.into();
                sweep_worker(&self.segment, &self.topology, &self.bells, &death, max_attempts, &mut self.letters)
            }
            Slot::Front(number) => {
                sweep_front(&self.segment, &self.bells, number);
                Default::default()
            }
            Slot::Supervisor => Default::default(),
        };
        crash_point!("supervisor.swept");
        let pid = child.pid();
        child.reap()?;
        crash_point!("supervisor.reaped");
        self.segment.set_liveness(slot, Liveness::Free);
        crash_point!("supervisor.freed");
        self.ring_fronts();

        let seat = &mut self.seats[at];
        let process = seat.name.as_str();
        let is_front = matches!(slot, Slot::Front(_));
        if stage == Stage::Stopping || stage == Stage::Draining && is_front && status.success() {
            tracing::debug!(process, pid, cause = %cause(status), "ended");
            return Ok(());
        }
        if is_front && status.code() == Some(EXIT_HOPELESS.into()) {
            return Err(SupervisorError::Front);
        }
        seat.quick_deaths = if seat.started.elapsed() < SETTLED { seat.quick_deaths + 1 } else { 0 };
        let delay = match seat.quick_deaths {
            0 => Duration::ZERO,
            n => BACKOFF.saturating_mul(1 << (n - 1).min(16)).min(MAX_BACKOFF),
        };
        seat.restart_at = Some(Instant::now() + delay);
        tracing::warn!(
            process,
            pid,
            cause = %cause(status),
            requeued = swept.requeued,
            failed = swept.failed,
            restart_in = ?delay,
            "a process died"
        );
        Ok(())
    }

    /// Kills and reaps whoever is left.
    fn kill_all(&mut self) -> usize {
        let mut left = 0;
        for seat in &mut self.seats {
            if let Some(child) = seat.child.take() {
                left += 1;
                if let Err(error) = child.kill().and_then(|()| child.reap().map(|_| ())) {
                    tracing::error!(process = seat.name, %error, "cannot end a process");
                }
            }
        }
        left
    }
}

/// What becomes of an item that was in work for the last time when its worker died.
fn crashed(status: ExitStatus) -> Failure {
    Failure::new(Code::Aborted, "WORKER_CRASHED", format_args!("the worker {}", cause(status)))
}

/// How a process ended, in words.
fn cause(status: ExitStatus) -> String {
    match status.signal() {
        Some(number) => {
            let name = Signal::try_from(number).map_or("?", Signal::as_str);
            format!("was killed by {name} ({number})")
        }
        None => format!("exited with {}", status.code().unwrap_or(0)),
    }
}
