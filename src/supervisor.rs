//! The supervisor: the parent of all, one thread, no runtime. Forks, reaps, sweeps, restarts, drains.
//!
//! # What it promises
//!
//! - It sleeps in one `poll` over pidfds and a signalfd, with a timer only while a restart or a drain is due.
//! - On a death: the pidfd is readable (the proof) → sweep → only then `waitid`, so that the pid cannot be reused while
//!   the sweep relies on it.
//! - A worker that is a program counts as one that serves once it has attached, and says so by its own bell: while it
//!   imports what it needs, its pool may not be ready.
//! - A process that dies is replaced; one that keeps dying soon after its start is replaced ever more slowly, and a pool of
//!   such workers does not serve (`crash_loop`).
//! - A worker that takes too long for an item is ended (`overdue`).
//! - SIGTERM and SIGINT drain: the front takes nothing new, what was accepted is finished and sent, then the workers end,
//!   then the segment is removed. A second signal, or the end of the grace period, kills what is left. Those that come
//!   at once are one: `timeout` sends its signal to the process and to its group.
//!
//! Children block both signals: a Ctrl-C goes to the whole process group, and only the supervisor may decide.

mod crash_loop;
mod death;
mod nursery;
mod orphans;
pub(crate) mod overdue;
mod reload;
mod signals;
mod silence;
mod spawn;

use std::{
    io,
    mem::take,
    net::TcpListener,
    ops::Range,
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
};

use crate::{
    config::{Config, Place},
    crash_point::crash_point,
    dispatch::{self, Bells, DeadLetters, Death, Left, Swept, Topology, sweep_front, sweep_worker},
    doorbell::Bell,
    handler::Handler,
    process::{Child, ForkError},
    program::Program,
    segment::{Liveness, Segment, SegmentError, SegmentOwner, Slot, Stage},
};
use crash_loop::{DiedOf, Record, Suspects, Use, Verdicts};
use death::{Cause, Held, Items, Process};
use nursery::Nursery;
use orphans::Orphans;
use overdue::Watch;
use reload::Reload;
use silence::{Call, News, PAUSE, Seen, Silence};

pub(crate) use reload::App;
pub use signals::Signals;

const FORK_AGAIN: Duration = Duration::from_secs(1);
/// Nobody means two things in so short a time.
const AT_ONCE: Duration = Duration::from_millis(200);

/// A child's exit code for a failure that it could not go on with. Of the first front it is the server's own: nothing was
/// served. Later it is of the moment, such as too few file descriptors, and a successor may do better.
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
    #[error(
        "stopped before the drain was over: {left} {} killed, and {}",
        if *left == 1 { "process was" } else { "processes were" },
        lost(*calls, *pending)
    )]
    Killed { left: usize, calls: u32, pending: u32 },
}

/// What was lost when a drain was cut short, in words.
fn lost(calls: u32, pending: u32) -> String {
    let calls = match calls {
        0 => "no call was lost".to_owned(),
        1 => "1 call was not answered".to_owned(),
        calls => format!("{calls} calls were not answered"),
    };
    match pending {
        0 => calls,
        1 => format!("{calls}; 1 submitted item is not done and stays in shared memory"),
        pending => format!("{calls}; {pending} submitted items are not done and stay in shared memory"),
    }
}

/// A pool as the supervisor runs it.
pub struct PoolPlan {
    /// Its name.
    pub name: String,
    /// Workers.
    pub workers: u16,
    /// What they run.
    pub work: Work,
    /// How long a worker may take for an item.
    pub item_timeout: Option<Duration>,
    /// How many bytes of memory a worker may have.
    pub memory: Option<u64>,
    /// Where they run.
    pub place: Place,
}

/// What the workers of a pool run.
pub enum Work {
    /// A closure of this program; each worker gets its copy by fork.
    Handler(Box<dyn Handler>),
    /// Another program; each worker is replaced by it.
    Program(Program),
}

/// One participant slot and who is in it.
struct Seat {
    slot: Slot,
    name: String,
    child: Option<Child>,
    restart_at: Option<Instant>,
    record: Record,
    /// How far the worker's returns were when it was started.
    returned: u64,
    /// The worker was told to end, for another.
    is_retiring: bool,
    /// Whether the worker comes when it is rung.
    silence: Silence,
    /// The pool's zygote dies soon after each start and has forked no worker since: without a process the seat is failing.
    zygote_fails: bool,
    /// Its nursery was ended, perhaps before it said that the worker may begin: then the worker ends.
    may_not_begin: bool,
    /// What a worker that is a program rings when it has attached.
    arrival: Option<Bell>,
}

/// What the supervisor was woken by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    Signal,
    /// In this seat.
    Death(usize),
    /// The same.
    Arrival(usize),
    /// The front has items that wait.
    Complaint,
    /// An item is over its time.
    Overdue,
    /// Of this nursery.
    News(usize),
    /// The same.
    NurseryDeath(usize),
    /// Somebody died.
    Orphans,
    /// Some were written.
    Files,
    /// The look at this app is over.
    Checked(usize),
}

impl Seat {
    /// What the registry should say of it.
    fn liveness(&self) -> Liveness {
        match &self.child {
            Some(child) if self.is_retiring => Liveness::Retiring(child.pid()),
            Some(child) if self.record.is_failing() => Liveness::Failing(child.pid()),
            Some(child) if !self.record.has_arrived() => Liveness::Starting(child.pid()),
            Some(child) => Liveness::Live(child.pid()),
            None if matches!(self.slot, Slot::Worker(_)) && (self.record.is_failing() || self.zygote_fails) => {
                Liveness::Failing(0)
            }
            None => Liveness::Free,
        }
    }

    /// Returns whether fronts are told not to count on it.
    fn is_failing(&self) -> bool {
        matches!(self.liveness(), Liveness::Failing(_))
    }

    /// When its process will have stayed up, if that is doubted.
    fn settles_at(&self) -> Option<Instant> {
        (self.child.is_some() && self.record.is_failing()).then(|| self.record.settles_at())?
    }
}

/// Returns the words for the process in a slot of a server with these pools.
fn process_in<'a>(topology: &Topology, pools: &'a [PoolPlan], slot: Slot, pid: u32) -> Process<'a> {
    match slot {
        Slot::Worker(number) => {
            let pool = topology.pool_of(number).and_then(|pool| pools.get(usize::from(pool)));
            Process::Worker { number, pool: pool.map_or("", |pool| &pool.name), pid }
        }
        Slot::Front(number) => Process::Front { number, pid },
        // The supervisor never dies before itself.
        Slot::Supervisor => Process::Front { number: 0, pid },
    }
}

/// A server that is ready to be started.
pub struct Supervisor {
    config: Arc<Config>,
    owner: SegmentOwner,
    segment: Segment,
    topology: Topology,
    bells: Arc<Bells>,
    /// `None` in children other than the front.
    listener: Option<TcpListener>,
    pools: Vec<PoolPlan>,
    seats: Vec<Seat>,
    letters: DeadLetters,
    watch: Watch,
    verdicts: Verdicts,
    /// The items that workers died of, for each pool.
    suspects: Vec<Suspects>,
    nurseries: Vec<Nursery>,
    /// If there are nurseries.
    orphans: Option<Orphans>,
    /// If files are watched.
    reload: Option<Reload>,
    /// Whether the gate is.
    is_open: bool,
    /// What is in the segment that nobody changes from then on.
    constants: Vec<u64>,
    /// The front rings it while items wait. `None` in other children.
    complaint: Option<Bell>,
    /// When to look at the workers again that were rung.
    look_at: Option<Instant>,
    /// When the drain began, and how many items had been completed by then.
    draining: Option<(Instant, u64)>,
    /// When the workers were told to end.
    stopping: Option<Instant>,
    /// No front has ended yet.
    is_first_front: bool,
    /// `None` in children. The last field: a signal that comes while the others are dropped must not interrupt that.
    signals: Option<Signals>,
}

impl Supervisor {
    /// Puts everything together; nothing is forked yet. The files of `apps` are watched, if there are any.
    pub(crate) fn new(
        config: Config,
        pools: Vec<PoolPlan>,
        listener: TcpListener,
        owner: SegmentOwner,
        apps: Vec<App>,
        signals: Signals,
    ) -> Result<Self, SupervisorError> {
        let segment = Segment::attach(owner.object(), owner.name(), Slot::Supervisor)?;
        if let Some(pid) = owner.left_by() {
            let Left { pending, done } = dispatch::adopt(&segment)?;
            tracing::warn!(name = owner.name(), pid, pending, done, "adopted what a dead server left behind");
        }
        dispatch::begin_lanes(&segment);
        let topology = Topology::new(pools.iter().map(|pool| pool.workers));
        let workers = segment.geometry().workers as u16;
        let bells = Bells::new(1, workers)?;
        let seat = |slot, name, arrival| Seat {
            slot,
            name,
            child: None,
            restart_at: Some(Instant::now()),
            record: Record::new(),
            returned: 0,
            is_retiring: false,
            silence: Silence::default(),
            zygote_fails: false,
            may_not_begin: false,
            arrival,
        };
        // Workers first, so that the front finds them there.
        let mut seats = Vec::new();
        for n in 0..workers {
            let pool = topology.pool_of(n).and_then(|pool| pools.get(usize::from(pool)));
            let is_program = pool.is_some_and(|pool| matches!(pool.work, Work::Program(_)));
            let arrival = is_program.then(Bell::pollable).transpose()?;
            seats.push(seat(Slot::Worker(n), format!("forkring-w{n}"), arrival));
        }
        seats.push(seat(Slot::Front(0), "forkring-front".to_owned(), None));
        let letters = DeadLetters::new(pools.iter().map(|pool| pool.name.clone()).collect());
        let timeouts = pools.iter().flat_map(|pool| (0..pool.workers).map(|_| pool.item_timeout));
        let watch = Watch::new(timeouts)?;
        let (config, verdicts) = (Arc::new(config), Verdicts::default());
        let suspects = pools.iter().map(|_| Suspects::default()).collect();
        let reload = if apps.is_empty() { None } else { Some(Reload::new(apps)?) };
        let has_nursery = |pool: &PoolPlan| matches!(&pool.work, Work::Program(program) if program.has_nursery());
        let nurseries = (0_u16..).zip(&pools).filter(|(_, pool)| has_nursery(pool));
        let nurseries: Vec<_> = nurseries.map(|(number, _)| Nursery::new(number)).collect();
        Ok(Supervisor {
            config,
            owner,
            segment,
            topology,
            bells,
            listener: Some(listener),
            pools,
            seats,
            letters,
            watch,
            verdicts,
            suspects,
            nurseries,
            orphans: None,
            reload,
            is_open: false,
            constants: Vec::new(),
            complaint: Some(Bell::pollable()?),
            look_at: None,
            draining: None,
            stopping: None,
            is_first_front: true,
            signals: Some(signals),
        })
    }

    /// Forks everybody and supervises them until a drain is over.
    pub fn run(mut self) -> Result<(), SupervisorError> {
        let _title = spawn::set_title(&format!("forkring: supervisor ({})", self.owner.name()));
        let mut result = self.start();
        if result.is_ok() {
            // From now on there may be something in it that must outlive this process, however it ends.
            self.owner.disown();
            self.segment.open_gate();
            self.constants = self.segment.constants();
            self.is_open = true;
            crash_point!("supervisor.opened");
            self.tell_serving();
            result = self.supervise();
        }
        // After a drain nobody is left; after an error or a second signal this is the end of them.
        let left = self.kill_all();
        crash_point!("supervisor.ended");
        let (Left { pending, done }, calls) = (Left::of(&self.segment), dispatch::unanswered(&self.segment));
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
        if let (0, Some((began, completed))) = (left, self.draining) {
            let items = self.completed().wrapping_sub(completed);
            tracing::info!(items, took = ?began.elapsed(), "drained: what was accepted is finished");
        }
        if left > 0 { Err(SupervisorError::Killed { left, calls, pending }) } else { Ok(()) }
    }

    /// Says where it serves what.
    fn tell_serving(&self) {
        let workers = |count: u16| if count == 1 { "1 worker".to_owned() } else { format!("{count} workers") };
        let pools = self.pools.iter().map(|pool| format!("{} ({})", pool.name, workers(pool.workers)));
        let listen = self.listener.as_ref().and_then(|listener| listener.local_addr().ok());
        tracing::info!(
            name = self.owner.name(),
            listen = listen.map(tracing::field::display),
            workers = self.seats.len() - 1,
            "serving {}",
            pools.collect::<Vec<_>>().join(", ")
        );
    }

    /// Returns how many items the workers have completed, on a count that may begin anywhere.
    fn completed(&self) -> u64 {
        let workers = 0..self.segment.geometry().workers as u16;
        workers.fold(0, |sum, worker| sum.wrapping_add(self.segment.returned(worker)))
    }

    fn start(&mut self) -> Result<(), SupervisorError> {
        if !self.nurseries.is_empty() {
            self.orphans = Some(Orphans::adopt()?);
        }
        (0..self.seats.len()).try_for_each(|seat| self.spawn(seat))
    }

    fn ring_fronts(&self) {
        for front in 0..self.segment.geometry().fronts {
            if let Err(error) = self.bells.front(front as u16).ring() {
                tracing::error!(%error, "cannot ring a front");
            }
        }
    }

    /// The loop. Ends when the server has drained, is told to stop at once, or cannot go on.
    fn supervise(&mut self) -> Result<(), SupervisorError> {
        let mut stage = Stage::Serving;
        let (mut told_at, mut give_up_at): (Option<Instant>, _) = (None, None);
        loop {
            if stage == Stage::Draining && self.is_empty(|slot| matches!(slot, Slot::Front(_))) {
                stage = Stage::Stopping;
                self.enter(stage);
                (self.stopping, self.look_at) = (Some(Instant::now()), Some(Instant::now()));
                // Nobody is replaced any more.
                self.close_nurseries();
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
                    self.spawn(at)?;
                }
            }
            self.roll(now, stage);
            self.tend(now)?;
            if self.orphans.as_ref().and_then(|orphans| orphans.again_at).is_some_and(|due| due <= now) {
                self.reap_orphans();
            }

            if self.look_at.is_some_and(|due| due <= now) {
                self.look_for_silence(now, stage)?;
            }
            self.settle(now);
            let (segment, topology, pools) = (&self.segment, &self.topology, &self.pools);
            self.watch.enforce(
                now,
                |worker| self.seats.get(usize::from(worker))?.child.as_ref(),
                |worker, pid| {
                    let held = dispatch::held_by(segment, worker);
                    let process = process_in(topology, pools, Slot::Worker(worker), pid);
                    (process.to_string(), Held(&held).to_string())
                },
            )?;

            let next = self.seats.iter().filter_map(|seat| seat.restart_at.or_else(|| seat.settles_at()));
            let next = next.chain(self.nurseries.iter().filter_map(|nursery| nursery.restart_at));
            let next = next.chain(self.reload.iter().filter_map(|reload| reload.due));
            let next = next.chain(self.orphans.iter().filter_map(|orphans| orphans.again_at));
            let next = next.chain(self.look_at);
            let next = next.chain(give_up_at).chain(self.watch.due()).min();
            let events = self.sleep(next)?;
            if events.contains(&Event::Signal) && self.has_signal()? {
                match told_at {
                    None => {
                        tracing::info!(grace = ?self.config.grace, "draining");
                        self.draining = Some((Instant::now(), self.completed()));
                        stage = Stage::Draining;
                        told_at = Some(Instant::now());
                        give_up_at = Instant::now().checked_add(self.config.grace);
                        self.enter(stage);
                        self.look_at = Some(Instant::now());
                    }
                    Some(at) if at.elapsed() < AT_ONCE => {}
                    Some(_) => {
                        tracing::warn!("a second signal: stopping at once");
                        return Ok(());
                    }
                }
            }
            for event in events {
                match event {
                    Event::Death(at) => self.bury(at, stage)?,
                    Event::Arrival(at) => self.welcome(at)?,
                    Event::News(at) => self.hear(at),
                    Event::NurseryDeath(at) => self.bury_nursery(at)?,
                    Event::Complaint => {
                        self.complaint.as_ref().map_or(Ok(()), Bell::drain)?;
                        self.look_at = self.look_at.or(Some(now));
                    }
                    Event::Orphans => self.reap_orphans(),
                    Event::Files => self.reload.as_mut().map_or(Ok(()), |reload| reload.note_changes(now))?,
                    Event::Checked(at) => self.conclude(at)?,
                    // Seen to above, in each turn.
                    Event::Signal | Event::Overdue => {}
                }
            }
        }
    }

    /// Tells all others. What is true comes before what tells of it: a front that sees the new epoch, or is rung, asks at once
    /// whether this is the end, and perhaps never again.
    fn enter(&self, stage: Stage) {
        self.bells.end();
        crash_point!("supervisor.entering");
        self.segment.set_stage(stage);
        self.bells.ring_all();
    }

    /// Writes again what only the supervisor writes: the dead may have scribbled over it.
    fn restore(&self, stage: Stage) {
        self.segment.restore(&self.constants);
        if self.segment.stage() != stage {
            self.segment.set_stage(stage);
        }
        (0..self.seats.len()).for_each(|at| self.register(at));
        let lanes @ 1.. = dispatch::mend(&self.segment) else { return };
        tracing::error!(lanes, "lanes were written over by a worker, and are made anew");
    }

    fn is_empty(&self, of: impl Fn(Slot) -> bool) -> bool {
        let is_owed = |at| self.nurseries.iter().any(|nursery| nursery.owes(at));
        let mut seats = self.seats.iter().enumerate().filter(|(_, seat)| of(seat.slot));
        seats.all(|(at, seat)| seat.child.is_none() && seat.restart_at.is_none() && !is_owed(at))
    }

    /// Whether the server was told to end; takes note of one signal.
    fn has_signal(&self) -> io::Result<bool> {
        let Some(signals) = &self.signals else { return Ok(false) };
        Ok(signals.fd.read_signal()?.is_some())
    }

    /// Sleeps until something happens or it is time; what has happened.
    fn sleep(&self, until: Option<Instant>) -> io::Result<Vec<Event>> {
        let signals = self.signals.iter().map(|signals| (Event::Signal, signals.fd.as_fd()));
        let mut fds: Vec<(Event, BorrowedFd<'_>)> = signals.collect();
        for (at, seat) in self.seats.iter().enumerate() {
            let Some(child) = &seat.child else { continue };
            fds.push((Event::Death(at), child.pidfd.as_fd()));
            if let Some(bell) = seat.arrival.as_ref().filter(|_| !seat.record.has_arrived()) {
                fds.push((Event::Arrival(at), bell.as_fd()));
            }
        }
        fds.extend(self.nurseries.iter().enumerate().flat_map(|(at, nursery)| nursery.fds(at)));
        fds.extend(self.orphans.iter().map(|orphans| (Event::Orphans, orphans.as_fd())));
        fds.extend(self.reload.iter().flat_map(Reload::fds));
        fds.extend(self.complaint.iter().map(|complaint| (Event::Complaint, complaint.as_fd())));
        fds.extend(self.watch.fds().map(|fd| (Event::Overdue, fd)));
        let mut polls: Vec<_> = fds.iter().map(|(_, fd)| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
        // Rounded up, so that what is due is due.
        let timeout = until.map(|until| until.saturating_duration_since(Instant::now()) + Duration::from_millis(1));
        let timeout = timeout.and_then(|timeout| timeout.try_into().ok());
        match poll(&mut polls, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let happened = fds.iter().zip(&polls).filter(|(_, poll)| !poll.revents().is_empty());
        Ok(happened.map(|((event, _), _)| *event).collect())
    }

    /// Looks at the workers that were rung and do not come. In a drain it kills those that hold no item, so that nobody waits
    /// for them: while items are finished, those for which items wait, and then all.
    fn look_for_silence(&mut self, now: Instant, stage: Stage) -> io::Result<()> {
        self.look_at = None;
        let holders = dispatch::holders(&self.segment);
        for at in 0..self.seats.len() {
            let seat = &self.seats[at];
            let (Slot::Worker(number), Some(child)) = (seat.slot, &seat.child) else { continue };
            let Some(pool) = self.topology.pool_of(number) else { continue };
            let holds_item = holders.get(at).is_some_and(|holds| *holds);
            let is_wanted = stage == Stage::Stopping || dispatch::has_waiting(&self.segment, pool);
            let call = Call {
                is_wanted,
                has_arrived: seat.record.has_arrived(),
                is_rung: self.bells.worker(number).has_rung(),
                is_asleep: self.segment.idle(pool).has(at - self.seats_of(pool).start),
                is_serving: stage == Stage::Serving,
                is_retiring: seat.is_retiring,
            };
            let seen = Seen {
                pid: child.pid(),
                is_called: call.is_called(),
                is_rung: call.is_rung,
                is_asleep: call.is_asleep,
                holds_item,
                completed: self.segment.returned(number),
            };
            let seat = &mut self.seats[at];
            let news = seat.silence.look(seen, now);
            let is_silent = seat.silence.is_silent();
            let is_suspect = matches!(seat.silence, Silence::Suspect(..));
            if stage == Stage::Stopping || is_suspect {
                self.look_at = Some(now + PAUSE);
            }
            let process = self.process(self.seats[at].slot, seen.pid);
            let told = self.stopping.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
            match (stage, news) {
                (Stage::Serving, News::Silent) => tracing::warn!(
                    "{process} does not respond: it was woken for an item and has not taken one; it may be stopped or frozen"
                ),
                (Stage::Serving, News::Back) => tracing::info!("{process} responds again"),
                (Stage::Draining | Stage::Stopping, _)
                    if !holds_item && silence::must_end(is_silent, told) && is_wanted =>
                {
                    // The worker may have taken an item since `holders` was made.
                    if !dispatch::held_by(&self.segment, number).is_empty() {
                        continue;
                    }
                    tracing::warn!(
                        "{process} holds no item and does not end: it is killed, and nothing is lost by that"
                    );
                    if let Some(child) = &self.seats[at].child {
                        child.kill()?;
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// A program has attached: its pool may count on it.
    fn welcome(&mut self, at: usize) -> io::Result<()> {
        let seat = &mut self.seats[at];
        if let (Some(_), Some(bell)) = (&seat.child, &seat.arrival) {
            bell.drain()?;
            crash_point!("arrival.drained");
            seat.record.arrive(Instant::now());
            self.segment.set_liveness(seat.slot, seat.liveness());
            crash_point!("arrival.registered");
            self.ring_fronts();
            self.acquit(at);
        }
        Ok(())
    }

    /// After the proof of death: sweep, reap, and see to a successor.
    fn bury(&mut self, at: usize, stage: Stage) -> Result<(), SupervisorError> {
        let Some(child) = self.seats[at].child.take() else { return Ok(()) };
        let slot = self.seats[at].slot;
        self.segment.set_liveness(slot, Liveness::Dead);
        crash_point!("supervisor.dead");
        // How it died is known before it is reaped, and the failure of its items should say so.
        let (pid, status) = (child.pid(), child.peek()?);
        let item_timeout = match slot {
            Slot::Worker(worker) => self.watch.bury(worker),
            Slot::Front(_) | Slot::Supervisor => None,
        };
        let cause = Cause::new(status, item_timeout);
        let mut has_completed = false;
        let swept = match slot {
            Slot::Worker(worker) => {
                has_completed = self.segment.returned(worker) != self.seats[at].returned;
                let failure = cause.failure(worker);
                let death = Death { worker, pid, status, cause: cause.to_string(), failure };
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
        child.reap()?;
        crash_point!("supervisor.reaped");
        self.segment.set_liveness(slot, Liveness::Free);
        self.restore(stage);
        crash_point!("supervisor.freed");
        self.ring_fronts();

        let seat = &mut self.seats[at];
        let process = seat.name.as_str();
        let is_front = matches!(slot, Slot::Front(_));
        if stage == Stage::Stopping || stage == Stage::Draining && is_front && status.success() {
            tracing::debug!(process, pid, %cause, "ended");
            return Ok(());
        }
        if is_front && take(&mut self.is_first_front) && status.code() == Some(EXIT_HOPELESS.into()) {
            return Err(SupervisorError::Front);
        }
        let never_began = take(&mut seat.may_not_begin) && !seat.record.has_arrived();
        let has_retired = (take(&mut seat.is_retiring) || never_began) && status.success();
        if has_retired {
            tracing::debug!(process, pid, "ended, for another");
            seat.restart_at = Some(Instant::now());
            return Ok(());
        }
        let now = Instant::now();
        let when = match (swept.items.is_empty(), has_completed) {
            // A worker that was ended for its item was at work, even if it completed the item in that moment.
            _ if item_timeout.is_some() => Use::AtWork,
            (false, _) => Use::AtWork,
            (true, true) => Use::Idle,
            (true, false) => Use::Unused,
        };
        let (died_of, mut delay) = seat.record.end(now, when);
        // A worker that was ended for its item would have lived on.
        if item_timeout.is_none() && died_of == DiedOf::Item {
            delay = self.suspect(slot, &swept, now).unwrap_or(delay);
        }
        self.seats[at].restart_at = Some(now + delay);
        // A front that finds all workers of a pool failing refuses its calls.
        self.register(at);
        self.ring_fronts();
        let items = Items { items: &swept.items, max_attempts: self.config.max_attempts.into() };
        tracing::warn!(
            process = self.seats[at].name,
            pid,
            died_of = died_of.name(),
            requeued = swept.requeued(),
            failed = swept.failed(),
            restart_in = ?delay,
            "{} died: {cause}{items}",
            self.process(slot, pid),
        );
        self.judge(slot, cause, died_of, delay);
        Ok(())
    }

    /// Returns the words for the process in a slot.
    fn process(&self, slot: Slot, pid: u32) -> Process<'_> {
        process_in(&self.topology, &self.pools, slot, pid)
    }

    /// Notes that a worker died of its items. Returns the delay before the next start if it is the pool's handler that is to
    /// blame; then the pool's seats are failing in which no worker stays up.
    fn suspect(&mut self, slot: Slot, swept: &Swept, now: Instant) -> Option<Duration> {
        let Slot::Worker(number) = slot else { return None };
        let pool = self.topology.pool_of(number)?;
        let seats = self.seats_of(pool);
        // A worker that completes an item at this moment shows up now or at the next death.
        let completed = seats.clone().fold(0_u64, |sum, seat| sum.wrapping_add(self.segment.returned(seat as u16)));
        let items: Vec<_> = swept.items.iter().map(|item| item.key).collect();
        let delay = self.suspects.get_mut(usize::from(pool))?.add(&items, completed)?;
        for at in seats {
            let seat = &mut self.seats[at];
            if !seat.record.shares_blame(seat.child.is_some(), now) {
                continue;
            }
            seat.record.blame(now);
            self.register(at);
        }
        Some(delay)
    }

    /// Writes into the registry what has changed of a seat.
    fn register(&self, at: usize) {
        let seat = &self.seats[at];
        if self.segment.liveness(seat.slot) != seat.liveness() {
            self.segment.set_liveness(seat.slot, seat.liveness());
        }
    }

    /// Returns the seats of a pool's workers: they have the workers' numbers.
    fn seats_of(&self, pool: u16) -> Range<usize> {
        let (first, count) = self.topology.workers(pool);
        usize::from(first)..usize::from(first + count)
    }

    /// After a worker's death: says so if all of its pool are in a crash loop by now.
    fn judge(&mut self, slot: Slot, cause: Cause, died_of: DiedOf, delay: Duration) {
        let Slot::Worker(number) = slot else { return };
        let Some(pool) = self.topology.pool_of(number) else { return };
        if !self.seats[self.seats_of(pool)].iter().all(Seat::is_failing) || !self.verdicts.change(pool, true) {
            return;
        }
        let pool = self.pools[usize::from(pool)].name.as_str();
        let record = &self.seats[usize::from(number)].record;
        match died_of {
            _ if !record.is_failing() => tracing::error!(
                pool,
                %cause,
                died_of = died_of.name(),
                "the pool does not serve: its last worker died, and its zygote dies soon after it starts"
            ),
            DiedOf::Item => tracing::error!(
                pool,
                %cause,
                died_of = died_of.name(),
                next_try_in = ?delay,
                "the pool does not serve: its workers died of different items in a row and completed none in between"
            ),
            DiedOf::Start | DiedOf::Other => tracing::error!(
                pool,
                %cause,
                died_of = died_of.name(),
                deaths_in_a_row = record.quick_deaths(),
                next_try_in = ?delay,
                "the pool does not serve: its workers die soon after they start"
            ),
        }
    }

    /// Notes that the zygote of a pool has died, and whether it is in a crash loop: then the front refuses calls to the pool if
    /// the pool has no workers. Says so if that is the case.
    fn judge_zygote(&mut self, pool: u16, record: &Record, cause: Cause, delay: Duration) {
        let (seats, fails) = (self.seats_of(pool), record.is_failing());
        for at in seats.clone() {
            self.seats[at].zygote_fails = fails;
            self.register(at);
        }
        self.ring_fronts();
        if fails && self.seats[seats].iter().all(Seat::is_failing) && self.verdicts.change(pool, true) {
            tracing::error!(
                pool = self.pools[usize::from(pool)].name,
                %cause,
                deaths_in_a_row = record.quick_deaths(),
                next_try_in = ?delay,
                "the pool does not serve: its zygote dies soon after it starts, and it has no workers"
            );
        }
    }

    /// Takes the verdict on a pool back if the worker that has attached in a seat is in no crash loop.
    fn acquit(&mut self, at: usize) {
        let seat = &self.seats[at];
        let (Liveness::Live(_), Slot::Worker(number)) = (seat.liveness(), seat.slot) else { return };
        let Some(pool) = self.topology.pool_of(number) else { return };
        if self.verdicts.change(pool, false) {
            tracing::info!(pool = self.pools[usize::from(pool)].name, "the pool serves again: a worker has started");
        }
    }

    /// Believes in workers of a crash loop that have stayed up.
    fn settle(&mut self, now: Instant) {
        for at in 0..self.seats.len() {
            let seat = &mut self.seats[at];
            if seat.settles_at().is_none_or(|due| due > now) {
                continue;
            }
            seat.record.settle();
            self.segment.set_liveness(seat.slot, seat.liveness());
            let pool = match seat.slot {
                Slot::Worker(number) => self.topology.pool_of(number),
                Slot::Front(_) | Slot::Supervisor => None,
            };
            if let Some(suspects) = pool.and_then(|pool| self.suspects.get_mut(usize::from(pool))) {
                suspects.clear();
            }
            if let Some(pool) = pool
                && self.verdicts.change(pool, false)
            {
                tracing::info!(pool = self.pools[usize::from(pool)].name, "the pool serves again: a worker stays up");
            }
            self.ring_fronts();
        }
    }

    /// Kills and reaps whoever is left.
    fn kill_all(&mut self) -> usize {
        self.close_nurseries();
        self.reload = None;
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

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_seat_without_a_process_is_failing_if_its_zygote_is() {
        let now = Instant::now();
        let mut failing = Record::new();
        while !failing.is_failing() {
            failing.end(now, Use::Unused);
        }
        let mut process = Command::new("cat").stdin(Stdio::piped()).spawn().expect("a process");
        let (worker, pid) = (Slot::Worker(0), process.id());
        for (slot, record, zygote_fails, has_process, liveness) in [
            (worker, Record::new(), false, false, Liveness::Free),
            (worker, Record::new(), true, false, Liveness::Failing(0)),
            (worker, failing, false, false, Liveness::Failing(0)),
            (worker, Record::new(), true, true, Liveness::Starting(pid)),
            (worker, failing, false, true, Liveness::Failing(pid)),
            (Slot::Front(0), failing, false, false, Liveness::Free),
        ] {
            let seat = Seat {
                slot,
                name: String::new(),
                child: has_process.then(|| Child::adopted(pid).expect("its parent")),
                restart_at: None,
                record,
                returned: 0,
                is_retiring: false,
                silence: Silence::default(),
                zygote_fails,
                may_not_begin: false,
                arrival: None,
            };
            assert_eq!(seat.liveness(), liveness, "{slot:?} {record:?} {zygote_fails}");
            assert_eq!(seat.is_failing(), matches!(liveness, Liveness::Failing(_)));
        }
        process.kill().and_then(|()| process.wait()).expect("its end");
    }
}
