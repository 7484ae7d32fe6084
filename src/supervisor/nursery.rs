//! Nurseries: programs that have loaded what the workers of a pool need, and fork them when they are asked.
//!
//! # What it promises
//!
//! - A worker from a nursery is this process's child, and in no way another than one that it has forked.
//! - It is known before it can do anything, so it is neither swept too late nor reaped unknown.
//! - A nursery that dies is replaced like a worker. The workers that it has forked live on, and one that was ordered and
//!   not born is ordered again.
//!
//! Why that holds is said in [`sdk::Nursery`](crate::sdk::Nursery). One order is under way at a time, so that news need not
//! say what they are about.

use std::{
    collections::VecDeque,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::net::UnixDatagram,
    },
    time::Instant,
};

use super::{
    EXIT_HOPELESS, Event, FORK_AGAIN, Supervisor, SupervisorError, Work,
    crash_loop::{Record, Use},
    death,
    death::Cause,
    reload::Reload,
    spawn::Role,
};
use crate::{
    contract::{
        self,
        nursery::{News, Order},
    },
    crash_point::crash_point,
    dispatch::Topology,
    process::{self, Child},
    program::Program,
    segment::Slot,
};

/// The longest news.
const LONGEST: usize = 1 << 14;

/// The nursery of a pool.
#[derive(Debug)]
pub(super) struct Nursery {
    pool: u16,
    process: Option<Process>,
    pub(super) restart_at: Option<Instant>,
    record: Record,
    /// Seats that wait for a worker, in order.
    asked: VecDeque<usize>,
    /// The seat whose worker is on its way.
    ordered: Option<usize>,
    /// It was ended for one that imports what has changed.
    is_renewed: bool,
}

#[derive(Debug)]
struct Process {
    child: Child,
    socket: UnixDatagram,
}

impl Nursery {
    pub(super) fn new(pool: u16) -> Self {
        let restart_at = Some(Instant::now());
        let (asked, ordered, is_renewed) = (VecDeque::new(), None, false);
        Nursery { pool, process: None, restart_at, record: Record::new(), asked, ordered, is_renewed }
    }

    pub(super) fn pool(&self) -> u16 {
        self.pool
    }

    /// Whether a seat's worker comes from here.
    pub(super) fn is_of(&self, seat: usize, topology: &Topology) -> bool {
        // Seats of workers have their numbers.
        u16::try_from(seat).ok().and_then(|number| topology.pool_of(number)) == Some(self.pool)
    }

    /// Whether it can fork now.
    pub(super) fn is_ready(&self) -> bool {
        self.process.is_some() && self.record.has_arrived() && !self.is_renewed
    }

    pub(super) fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(|process| process.child.pid())
    }

    /// Asks for a worker.
    pub(super) fn ask(&mut self, seat: usize) {
        self.asked.push_back(seat);
    }

    /// Ends it for another, which imports everything anew.
    pub(super) fn renew(&mut self) {
        match &self.process {
            None => self.restart_at = Some(Instant::now()),
            Some(process) => match process.child.kill() {
                Ok(()) => {
                    crash_point!("nursery.renewed");
                    self.is_renewed = true;
                }
                Err(error) => tracing::error!(%error, "cannot end a zygote"),
            },
        }
    }

    /// Whether a seat's worker has been asked for and is not there yet.
    pub(super) fn owes(&self, seat: usize) -> bool {
        self.ordered == Some(seat) || self.asked.contains(&seat)
    }

    /// What tells of the nursery with this number.
    pub(super) fn fds(&self, number: usize) -> impl Iterator<Item = (Event, BorrowedFd<'_>)> {
        self.process.iter().flat_map(move |process| {
            let (socket, pidfd) = (process.socket.as_fd(), process.child.pidfd.as_fd());
            [(Event::News(number), socket), (Event::NurseryDeath(number), pidfd)]
        })
    }

    /// What it has told and nobody has heard. An error if it is no news.
    fn news(&self) -> io::Result<Option<News>> {
        let Some(process) = &self.process else { return Ok(None) };
        let mut text = [0; LONGEST];
        loop {
            return match process.socket.recv(&mut text) {
                Ok(len) => Ok(Some(serde_json::from_slice(&text[..len])?)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
                Err(error) => Err(error),
            };
        }
    }
}

impl Supervisor {
    /// Starts the nurseries that are due, and hands on what was asked of those that are ready.
    pub(super) fn tend(&mut self, now: Instant) -> Result<(), SupervisorError> {
        for at in 0..self.nurseries.len() {
            if self.nurseries[at].restart_at.is_some_and(|due| due <= now) && !self.open_nursery(at)? {
                self.nurseries[at].restart_at = Some(now + FORK_AGAIN);
            }
            let nursery = &self.nurseries[at];
            let Some(&seat) = nursery.asked.front() else { continue };
            let Some(process) = nursery.process.as_ref().filter(|_| nursery.is_ready()) else { continue };
            if nursery.ordered.is_some() {
                continue;
            }
            let sent = self.order(seat).and_then(|order| process.socket.send(&order));
            crash_point!("nursery.ordered");
            let nursery = &mut self.nurseries[at];
            nursery.asked.pop_front();
            match sent {
                Ok(_) => nursery.ordered = Some(seat),
                Err(error) => {
                    // If it is dead, that is about to be seen.
                    tracing::warn!(%error, process = self.seats[seat].name, "cannot order a worker, trying again");
                    self.seats[seat].restart_at = Some(now + FORK_AGAIN);
                }
            }
        }
        Ok(())
    }

    /// Forks a nursery; false if that cannot be done now.
    fn open_nursery(&mut self, at: usize) -> Result<bool, SupervisorError> {
        let pair = UnixDatagram::pair().and_then(|(ours, theirs)| ours.set_nonblocking(true).map(|()| (ours, theirs)));
        let (ours, theirs) = match pair {
            // Of the moment, such as too few file descriptors: what was accepted must not be lost by that.
            Err(error) if self.is_open => {
                tracing::warn!(%error, "cannot start a zygote, trying again");
                return Ok(false);
            }
            pair => pair?,
        };
        let pool = self.nurseries[at].pool;
        let (name, supervisor) = (format!("forkring-n{pool}"), std::process::id());
        let child = self.try_fork(&name, Role::Zygote(pool), |us| {
            let plan = &us.pools[usize::from(pool)];
            let Work::Program(program) = &plan.work else { return EXIT_HOPELESS };
            let set = process::set_variables(&plan.place.constants());
            let error =
                set.map_or_else(|error| error, |()| us.become_nursery(program, pool, &name, supervisor, &theirs));
            tracing::error!(%error, program = %program.name().display(), "cannot run a zygote");
            EXIT_HOPELESS
        })?;
        let Some(child) = child else { return Ok(false) };
        crash_point!("nursery.forked");
        tracing::debug!(process = name, pid = child.pid(), "started");
        let nursery = &mut self.nurseries[at];
        nursery.restart_at = None;
        nursery.record.begin();
        nursery.process = Some(Process { child, socket: ours });
        Ok(true)
    }

    /// Returns only if it fails.
    fn become_nursery(
        &self,
        program: &Program,
        pool: u16,
        name: &str,
        supervisor: u32,
        socket: &UnixDatagram,
    ) -> io::Error {
        let (first, count) = self.topology.workers(pool);
        let inherited: Vec<_> = self.shared().chain((first..first + count).flat_map(|n| self.own(n))).collect();
        let contract = contract::nursery::Nursery {
            version: contract::VERSION,
            supervisor,
            name: name.to_owned(),
            pool: self.pools[usize::from(pool)].name.clone(),
            socket: socket.as_raw_fd(),
            inherited: inherited.iter().map(|fd| fd.as_fd().as_raw_fd()).collect(),
        };
        let inherited: Vec<_> = inherited.into_iter().chain([socket as &dyn AsFd]).collect();
        program.exec_nursery(&contract, &inherited)
    }

    /// The order of a seat's worker.
    fn order(&self, seat: usize) -> io::Result<Vec<u8>> {
        let missing = || io::Error::other("the seat is no worker's");
        let Slot::Worker(number) = self.seats[seat].slot else { return Err(missing()) };
        let pool = self.topology.pool_of(number).ok_or_else(missing)?;
        let (plan, number_in_pool) = (&self.pools[usize::from(pool)], number - self.topology.workers(pool).0);
        let order = Order {
            contract: self.contract(number, plan, std::process::id()),
            variables: plan.place.variables(number_in_pool),
            cpu: plan.place.cpu(number_in_pool),
            memory: plan.memory,
        };
        Ok(serde_json::to_vec(&order)?)
    }

    /// Takes up what a nursery has told.
    pub(super) fn hear(&mut self, at: usize) {
        loop {
            let now = Instant::now();
            match self.nurseries[at].news() {
                Ok(None) => return,
                Ok(Some(News::Ready)) => {
                    let nursery = &mut self.nurseries[at];
                    nursery.record.arrive(now);
                    tracing::debug!(pool = self.pools[usize::from(nursery.pool)].name, "a zygote is ready");
                }
                Ok(Some(News::Born(pid))) => {
                    crash_point!("nursery.heard");
                    let Some(seat) = self.nurseries[at].ordered.take() else { continue };
                    let ours =
                        if self.knows(pid) { Err(io::ErrorKind::AlreadyExists.into()) } else { Child::adopted(pid) };
                    let is_known = ours.is_ok();
                    match ours {
                        Ok(child) => self.seated(seat, child),
                        Err(error) => self.went_wrong(seat, now, &error),
                    }
                    // Who is not known never begins, or two would be in one seat. If the nursery cannot be told it is dead, and
                    // who is known ends, too.
                    let answer: &[u8] = if is_known { b"true" } else { b"false" };
                    let told = self.nurseries[at].process.as_ref().map(|process| process.socket.send(answer));
                    if let Some(Err(error)) = &told {
                        tracing::debug!(%error, "a zygote is gone");
                    }
                    self.seats[seat].may_not_begin = self.nurseries[at].is_renewed || !matches!(told, Some(Ok(_)));
                }
                Ok(Some(News::Stillborn(why))) => {
                    let Some(seat) = self.nurseries[at].ordered.take() else { continue };
                    self.went_wrong(seat, now, &why);
                }
                Err(error) => {
                    tracing::error!(%error, "a zygote has sent a message that cannot be understood, and is ended");
                    let child = self.nurseries[at].process.as_ref().map(|process| &process.child);
                    // Its death is seen as any other.
                    let _ = child.map(Child::kill);
                    return;
                }
            }
        }
    }

    fn went_wrong(&mut self, seat: usize, now: Instant, error: &dyn std::fmt::Display) {
        tracing::warn!(%error, process = self.seats[seat].name, "a zygote cannot fork, trying again");
        self.seats[seat].restart_at = Some(now + FORK_AGAIN);
    }

    /// After a nursery's death.
    pub(super) fn bury_nursery(&mut self, at: usize) -> io::Result<()> {
        // What it told last may be a birth.
        self.hear(at);
        let nursery = &mut self.nurseries[at];
        let Some(Process { child, .. }) = nursery.process.take() else { return Ok(()) };
        let pid = child.pid();
        let cause = Cause::new(child.reap()?, None);
        crash_point!("nursery.reaped");
        // The worker on its way has read that it has no nursery, and ends: it is nobody yet.
        if let Some(seat) = nursery.ordered.take() {
            nursery.asked.push_front(seat);
        }
        if std::mem::take(&mut nursery.is_renewed) {
            nursery.restart_at = Some(Instant::now());
            return Ok(());
        }
        let delay = nursery.record.end(Instant::now(), Use::Unused).1;
        nursery.restart_at = Some(Instant::now() + delay);
        let (number, record) = (nursery.pool, nursery.record);
        let pool = &self.pools[usize::from(number)].name;
        let process = death::Process::Zygote { pool, pid };
        tracing::warn!(pool, pid, restart_in = ?delay, "{process} died: {cause}; its workers live on");
        self.judge_zygote(number, &record, cause, delay);
        Ok(())
    }

    /// Ends the nurseries: nobody else is born.
    pub(super) fn close_nurseries(&mut self) {
        for at in 0..self.nurseries.len() {
            let child = self.nurseries[at].process.as_ref().map(|process| &process.child);
            if let Some(Err(error)) = child.map(|child| child.kill().and_then(|()| child.peek())) {
                tracing::error!(%error, "cannot end a zygote");
            }
            crash_point!("nursery.ended");
            // Whoever was born before that is known after this.
            self.hear(at);
            let nursery = &mut self.nurseries[at];
            if let Some(Err(error)) = nursery.process.take().map(|process| process.child.reap()) {
                tracing::error!(%error, "cannot reap a zygote");
            }
            nursery.asked.clear();
            (nursery.ordered, nursery.restart_at) = (None, None);
        }
    }

    /// Whether this is a process that is waited for elsewhere.
    pub(super) fn knows(&self, pid: u32) -> bool {
        let seated = self.seats.iter().filter_map(|seat| seat.child.as_ref().map(Child::pid));
        let seated = seated.chain(self.reload.iter().flat_map(Reload::pids));
        seated.chain(self.nurseries.iter().filter_map(Nursery::pid)).any(|known| known == pid)
    }

    /// Reaps who came to this process without being its business.
    pub(super) fn reap_orphans(&mut self) {
        let Some(orphans) = &self.orphans else { return };
        let (dead, again_at) = match orphans.dead(|pid| self.knows(pid)) {
            Ok(dead) => (dead, None),
            Err(error) => {
                tracing::debug!(%error, "cannot look for orphans, trying again");
                (Vec::new(), Some(Instant::now() + FORK_AGAIN))
            }
        };
        if let Some(orphans) = &mut self.orphans {
            orphans.again_at = again_at;
        }
        // A worker is born before it dies: whoever of the dead was one is known after this.
        (0..self.nurseries.len()).for_each(|at| self.hear(at));
        dead.into_iter().filter(|pid| !self.knows(*pid)).for_each(process::reap_dead_child);
    }
}
