//! Forking, and what the children do: each becomes the participant of its seat.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
    time::Instant,
};

use super::{
    EXIT_HOPELESS, FORK_AGAIN, PoolPlan, Seat, Supervisor, SupervisorError, Work,
    overdue::{ItemTimer, Timed},
};
use crate::{
    contract::Contract,
    crash_point::crash_point,
    dispatch::{Front, Worker},
    doorbell::Bell,
    front,
    process::{self, Child, ForkError, Title},
    program::Program,
    segment::{Segment, Slot},
    worker,
};

/// What a forked child is to become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Front,
    /// With this number.
    Worker(u16),
    /// Of this pool.
    Zygote(u16),
}

impl Supervisor {
    /// Sees to it that a seat has a participant: by a fork, or by asking the pool's nursery for it.
    pub(super) fn spawn(&mut self, at: usize) -> Result<(), SupervisorError> {
        self.seats[at].restart_at = None;
        if let Slot::Worker(worker) = self.seats[at].slot {
            self.seats[at].returned = self.segment.returned(worker);
        }
        let Seat { slot, ref name, ref arrival, .. } = self.seats[at];
        if let Some(bell) = arrival {
            // The one before may have rung it and died.
            bell.drain()?;
        }
        if let Some(nursery) = self.nurseries.iter_mut().find(|nursery| nursery.is_of(at, &self.topology)) {
            nursery.ask(at);
            return Ok(());
        }
        let supervisor = std::process::id();
        let role = match slot {
            Slot::Worker(number) => Role::Worker(number),
            Slot::Front(_) | Slot::Supervisor => Role::Front,
        };
        match self.try_fork(&name.clone(), role, |us| us.participate(slot, supervisor))? {
            Some(child) => {
                crash_point!("supervisor.forked");
                self.seated(at, child);
            }
            None => self.seats[at].restart_at = Some(Instant::now() + FORK_AGAIN),
        }
        Ok(())
    }

    /// Forks a child that is none of a participant yet. None, if there is no memory or are too many processes for now: what
    /// was accepted must not be lost by that.
    pub(super) fn try_fork(
        &mut self,
        name: &str,
        role: Role,
        main: impl FnOnce(&mut Self) -> u8,
    ) -> Result<Option<Child>, SupervisorError> {
        let is_open = self.is_open;
        let forked = process::fork(name, || {
            self.leave(role);
            // Programs have titles of their own, or set one when they attach.
            if let Some(title) = set_title(&self.title(role)) {
                title.keep();
            }
            main(self)
        });
        match forked {
            Ok(child) => Ok(Some(child)),
            Err(ForkError::Io(error)) if is_open => {
                tracing::warn!(%error, process = name, "cannot fork, trying again");
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn title(&self, role: Role) -> String {
        match role {
            Role::Front => format!("forkring: front 0 ({})", self.owner.name()),
            Role::Worker(number) => {
                let pool = self.topology.pool_of(number).and_then(|pool| self.pools.get(usize::from(pool)));
                process::worker_title(number, pool.map_or("", |pool| &pool.name))
            }
            Role::Zygote(pool) => format!("forkring: zygote {}", self.pools[usize::from(pool)].name),
        }
    }

    /// In a child, before anything else: closes each descriptor of the supervisor that the child has no use for. One by one,
    /// because a range would take descriptors along that a handler's closure has captured.
    fn leave(&mut self, role: Role) {
        let is_kept = |worker: u16| match role {
            Role::Front => false,
            Role::Worker(number) => number == worker,
            Role::Zygote(pool) => self.topology.pool_of(worker) == Some(pool),
        };
        self.owner.leave();
        for seat in &mut self.seats {
            seat.child = None;
            if !matches!(seat.slot, Slot::Worker(worker) if is_kept(worker)) {
                seat.arrival = None;
            }
        }
        self.watch.keep(is_kept);
        let own_pool = match role {
            Role::Front => None,
            Role::Worker(number) => self.topology.pool_of(number),
            Role::Zygote(pool) => Some(pool),
        };
        for (pool, plan) in self.pools.iter_mut().enumerate() {
            if let Work::Program(program) = &mut plan.work
                && own_pool.map(usize::from) != Some(pool)
            {
                program.close_failures();
            }
        }
        self.nurseries.clear();
        // A child has children of its own to hear of.
        self.orphans = None;
        if let Some(reload) = self.reload.take() {
            reload.leave();
        }
        if let Some(signals) = self.signals.take() {
            signals.leave();
        }
        if role != Role::Front {
            (self.listener, self.complaint) = (None, None);
        }
    }

    /// A seat has a process now.
    pub(super) fn seated(&mut self, at: usize, child: Child) {
        let seat = &mut self.seats[at];
        tracing::debug!(process = seat.name, pid = child.pid(), "started");
        seat.record.begin();
        (seat.is_retiring, seat.may_not_begin) = (false, false);
        if seat.arrival.is_none() {
            seat.record.arrive(Instant::now());
        }
        seat.child = Some(child);
        self.segment.set_liveness(seat.slot, seat.liveness());
        crash_point!("supervisor.registered");
        if let Slot::Worker(number) = seat.slot {
            if let Some(pool) = self.topology.pool_of(number) {
                // A zygote that has forked a worker works.
                for at in self.seats_of(pool) {
                    self.seats[at].zygote_fails = false;
                    self.register(at);
                }
            }
            // The front computes the pools' health from the registry.
            self.ring_fronts();
            self.acquit(at);
        }
    }

    /// The child's life. The result is its exit code.
    fn participate(&mut self, slot: Slot, supervisor: u32) -> u8 {
        if let Slot::Worker(number) = slot {
            let pool = &self.pools[self.topology.pool_of(number).map_or(0, usize::from)];
            let first = self.topology.pool_of(number).map_or(0, |pool| self.topology.workers(pool).0);
            if let Err(error) = settle_in(pool, number - first) {
                tracing::error!(%error, pool = pool.name, "cannot set up a worker");
                return EXIT_HOPELESS;
            }
            if let Work::Program(program) = &pool.work {
                let error = self.become_program(program, &self.contract(number, pool, supervisor));
                tracing::error!(%error, program = %program.name().display(), "cannot run a worker's program");
                return EXIT_HOPELESS;
            }
        }
        let (layout, name) = (*self.owner.layout(), self.owner.name());
        let segment = match Segment::attach_by(layout, self.owner.object(), name, slot) {
            // For as long as the process lives.
            Ok(segment) => &*Box::leak(Box::new(segment)),
            Err(error) => {
                tracing::error!(%error, "cannot attach to the segment");
                return EXIT_HOPELESS;
            }
        };
        if !self.is_open {
            segment.pass_gate();
        }
        let ended = match slot {
            Slot::Worker(number) => self.work(segment, number),
            Slot::Front(number) => {
                let names = self.pools.iter().map(|pool| pool.name.clone()).collect();
                let (front, adopted) = Front::attach(segment, self.topology.clone(), self.bells.clone(), number);
                crash_point!("front.attached");
                match (&self.listener, &self.complaint) {
                    (Some(listener), Some(complaint)) => {
                        let bell = self.bells.front(number);
                        front::run(front, adopted, bell, listener, complaint, names, &self.config)
                    }
                    _ => Err(io::Error::other("the front has no listening socket")),
                }
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
    }

    /// What a worker's program is told.
    pub(super) fn contract(&self, number: u16, pool: &PoolPlan, supervisor: u32) -> Contract {
        let (front_bells, worker_bells, end_bell) = self.bells.numbers();
        let contract =
            Contract::new(supervisor, self.owner.name(), number, self.topology.counts(), self.owner.layout());
        Contract {
            segment: self.owner.object().as_raw_fd(),
            front_bells,
            worker_bells,
            end_bell,
            arrival: self.arrival(number).map_or(-1, AsRawFd::as_raw_fd),
            item_timer: self.watch.timer(number).map(ItemTimer::to_parts),
            is_open: self.is_open,
            spin: self.config.spin.to_string(),
            max_message: self.config.max_message().bytes(),
            pool: pool.name.clone(),
            ..contract
        }
    }

    fn arrival(&self, worker: u16) -> Option<&Bell> {
        self.seats.get(usize::from(worker))?.arrival.as_ref()
    }

    /// The descriptors that every worker's program inherits.
    pub(super) fn shared(&self) -> impl Iterator<Item = &dyn AsFd> {
        let object: &dyn AsFd = self.owner.object();
        self.bells.fds().chain([object])
    }

    /// Those of one worker alone.
    pub(super) fn own(&self, worker: u16) -> impl Iterator<Item = &dyn AsFd> {
        let timer = self.watch.timer(worker).map(|timer| timer as &dyn AsFd);
        timer.into_iter().chain(self.arrival(worker).map(|bell| bell as &dyn AsFd))
    }

    /// Returns only if it fails.
    fn become_program(&self, program: &Program, contract: &Contract) -> io::Error {
        let inherited: Vec<_> = self.shared().chain(self.own(contract.worker)).collect();
        program.exec(contract, &inherited)
    }

    /// A forked worker's life.
    fn work(&mut self, segment: &'static Segment, number: u16) -> io::Result<()> {
        let pool = self.topology.pool_of(number).map_or(0, usize::from);
        let worker = Worker::attach(segment, self.topology.clone(), self.bells.clone(), number);
        let Some(mut worker) = worker else { return Err(io::Error::other("there is no such worker")) };
        crash_point!("worker.attached");
        let Work::Handler(handler) = &mut self.pools[pool].work else {
            return Err(io::Error::other("the worker is a program's"));
        };
        let most = self.config.max_message().bytes() as usize;
        match self.watch.timer(number) {
            None => worker::run(&mut worker, &mut **handler, self.config.spin, most),
            Some(timer) => {
                let mut timed = Timed::new(&mut **handler, timer);
                worker::run(&mut worker, &mut timed, self.config.spin, most)
            }
        }
    }
}

/// Sets this process's title; one that cannot have one goes on without.
pub(super) fn set_title(text: &str) -> Option<Title> {
    Title::set(text).inspect_err(|error| tracing::debug!(%error, "cannot set the process title")).ok()
}

/// Environment, CPU and memory of the worker with this number in its pool.
fn settle_in(pool: &PoolPlan, number: u16) -> io::Result<()> {
    process::set_variables(&pool.place.variables(number))?;
    pool.place.cpu(number).map_or(Ok(()), process::keep_to)?;
    pool.memory.map_or(Ok(()), process::limit_memory)
}
