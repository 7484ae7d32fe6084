//! A segment with a front and two workers: one that is killed, and one in this process that goes on.

use std::{os::unix::process::ExitStatusExt as _, path::PathBuf, process::ExitStatus, sync::Arc};

use forkring::{
    dispatch::{Bells, DeadLetters, Death, Failure, Front, Kind, Offer, Outcome, Topology, Worker, sweep_worker},
    process,
    ring::Hint,
    segment::{Geometry, INLINE, PRIORITIES, Segment, SegmentOwner, Slot},
};

use crate::{
    common::audit::Copy,
    stepped::{Stepped, Trace},
};

/// Which worker is killed.
const VICTIM: u16 = 0;
const OTHER: u16 = 1;
const MAX_ATTEMPTS: u32 = 3;
/// Bytes of a large payload, and more than any result has.
const LARGE: usize = 1000;
const MOST: usize = 4096;

/// What is done step by step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A worker and an item that fits its record, of a front that sleeps.
    Small,
    /// A worker and a submitted item in the arena, with metadata and an equal result.
    Large,
    /// The supervisor that gives back what a dead worker held: an item that is wanted and one that was cancelled.
    Sweep,
}

impl Role {
    fn payload(self, id: u64) -> Vec<u8> {
        let len = if self == Role::Small { 24 } else { LARGE };
        (0..len).map(|at| (at as u64 + id) as u8).collect()
    }

    /// What the deaths of all instructions must lead to.
    pub fn outcomes(self) -> &'static [&'static str] {
        match self {
            Role::Small | Role::Large => &["it had done nothing", "it had claimed", "it had completed"],
            Role::Sweep => &["it had given back"],
        }
    }
}

/// What a worker does with an item: an echo.
fn work(worker: &mut Worker<'_>) -> bool {
    let Some(claimed) = worker.take() else { return false };
    let (item, mut reply) = worker.open(&claimed, MOST).expect("the front wrote a request");
    reply.write(item.payload()).expect("there is room");
    drop(item);
    reply.complete(claimed, 0, 1, 1);
    drop(reply);
    worker.ring();
    true
}

/// See the module.
pub struct Rig {
    owner: SegmentOwner,
    topology: Topology,
    bells: Arc<Bells>,
    front: Front<'static>,
    other: Worker<'static>,
    supervisor: &'static Segment,
    ids: u64,
}

impl Rig {
    pub fn new() -> Self {
        let geometry = Geometry {
            items: 4,
            fronts: 1,
            workers: 2,
            pools: 1,
            request_bytes: 32 << 10,
            result_bytes: 32 << 10,
            letter_bytes: 0,
        };
        let owner = SegmentOwner::create(&format!("instructions-{}", std::process::id()), geometry)
            .unwrap_or_else(|error| panic!("{error}"));
        let topology = Topology::new([2]);
        let bells = Bells::new(1, 2).expect("eventfds");
        let (front, _) = Front::attach(attach(&owner, Slot::Front(0)), topology.clone(), bells.clone(), 0);
        let other = Worker::attach(attach(&owner, Slot::Worker(OTHER)), topology.clone(), bells.clone(), OTHER);
        let supervisor = attach(&owner, Slot::Supervisor);
        Rig { front, other: other.expect("a pool"), supervisor, owner, topology, bells, ids: 0 }
    }

    /// The instructions of a role.
    pub fn trace(&mut self, role: Role) -> Trace {
        // What is only done the first time, in this process, is not in it.
        self.end_well(role, "nothing", |_| {});
        let mut trace = None;
        self.end_well(role, "its last instruction", |stepped| trace = Some(stepped.trace()));
        trace.expect("it was traced")
    }

    /// Kills who plays the role after `n` instructions, and sees to it that all ends well. How far it had come; none if
    /// it went another way than the trace.
    pub fn kill(&mut self, role: Role, trace: &Trace, n: usize) -> Option<&'static str> {
        let mut reached = false;
        let outcome = self.end_well(role, &format!("instruction {n}"), |stepped| reached = stepped.run(trace, n));
        reached.then_some(outcome)
    }

    fn end_well(&mut self, role: Role, after: &str, run: impl FnOnce(&Stepped)) -> &'static str {
        self.begin_lanes();
        let mut wanted = self.offer(role);
        let mut unwanted = None;
        if role == Role::Sweep {
            let other = self.offer(role);
            // Always in the same order, so that a sweep always goes the same way.
            (unwanted, wanted) = (Some(wanted.min(other).0), wanted.max(other));
        }
        if role == Role::Small {
            self.front.going_to_sleep();
        }
        let stepped = match role {
            Role::Small | Role::Large => self.fork_worker(),
            Role::Sweep => {
                self.die_with_all();
                unwanted.into_iter().for_each(|index| self.front.cancel(index));
                self.fork_sweep()
            }
        };
        run(&stepped);
        stepped.kill(|| self.sweep());
        // As the front does when it is rung after a death: a look through its items finds those that have no hint.
        let mut completion = self.front.collect();
        self.front.awake();
        self.front.ring();
        while work(&mut self.other) {}
        completion = completion.or_else(|| self.front.collect());

        let place = format!("{role:?}, killed after {after}");
        let (index, id) = wanted;
        let completion = completion.unwrap_or_else(|| {
            let in_use = Copy::read(&self.path()).map(|copy| copy.in_use());
            panic!("{place}: the item is lost; in use: {in_use:?}")
        });
        assert_eq!((completion.index, completion.id, completion.outcome), (index, id, Outcome::Success), "{place}");
        let mut line = [0; INLINE];
        let result = match role {
            Role::Small => self.front.inline_result(&completion, &mut line),
            _ => self.front.arena_result(&completion),
        };
        assert!(result == Some(&role.payload(id)), "{place}: the result is wrong");
        let outcome = match (role, completion.worker, completion.attempts) {
            (Role::Small | Role::Large, OTHER, 1) => "it had done nothing",
            (Role::Small | Role::Large, OTHER, 2) => "it had claimed",
            (Role::Small | Role::Large, VICTIM, 1) => "it had completed",
            (Role::Sweep, OTHER, 2) => "it had given back",
            odd => panic!("{place}: {odd:?}"),
        };
        self.front.release(index);
        assert!(self.front.collect().is_none(), "{place}: there is more than was offered");
        assert_eq!(self.front.free_items(), 4, "{place}: an item leaked");
        assert_eq!(self.front.free_request_bytes(), 32 << 10, "{place}: a request leaked");
        let faults = Copy::read(&self.path()).map_or_else(|fault| vec![fault], |copy| copy.faults_when_idle());
        assert!(faults.is_empty(), "{place}: {faults:#?}");
        outcome
    }

    /// Lanes with the same way to go each time: past what was used of a line to its last cell, and on to the next line.
    fn begin_lanes(&self) {
        for mut lane in (0..PRIORITIES).map(|lane| self.supervisor.lane(lane)) {
            lane.reset(process::now());
            for _ in 1..8 {
                lane.push(Hint { index: 0, generation: 0 }).expect("an empty lane");
            }
            assert_eq!(lane.take(|_| false), None);
        }
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/dev/shm/forkring-{}", self.owner.name()))
    }

    /// Its index and its id.
    fn offer(&mut self, role: Role) -> (u32, u64) {
        self.ids += 1;
        let payload = role.payload(self.ids);
        let mut request = self.front.request(payload.len()).expect("room for a payload");
        self.front.write(&mut request, &payload);
        let is_submitted = role != Role::Small;
        let offer = Offer {
            pool: 0,
            priority: 2,
            id: self.ids,
            offered: 1,
            deadline: 0,
            kind: if is_submitted { Kind::Submit } else { Kind::Call },
            subscription: if is_submitted { b"mine" } else { b"" },
            metadata: &[],
        };
        let index = self.front.offer(&offer, &mut request).expect("room for an item");
        (index, self.ids)
    }

    fn fork_worker(&mut self) -> Stepped {
        let Rig { owner, topology, bells, .. } = self;
        let prepare = || {
            owner.disown();
            let segment = attach(owner, Slot::Worker(VICTIM));
            Worker::attach(segment, topology.clone(), bells.clone(), VICTIM).expect("a pool")
        };
        Stepped::fork(prepare, |worker| assert!(work(worker), "the worker found nothing"))
    }

    /// The victim takes all there is and dies.
    fn die_with_all(&mut self) {
        let Rig { owner, topology, bells, .. } = self;
        let dead = process::fork("victim", || {
            owner.disown();
            let segment = attach(owner, Slot::Worker(VICTIM));
            let mut worker = Worker::attach(segment, topology.clone(), bells.clone(), VICTIM).expect("a pool");
            while worker.take().is_some() {}
            process::die()
        });
        dead.and_then(|child| Ok(child.reap()?)).unwrap_or_else(|error| panic!("{error}"));
    }

    fn fork_sweep(&mut self) -> Stepped {
        let Rig { owner, topology, bells, .. } = self;
        let prepare = || {
            owner.disown();
            (attach(owner, Slot::Supervisor), death(), DeadLetters::default())
        };
        Stepped::fork(prepare, |(segment, death, letters)| {
            sweep_worker(segment, topology, bells, death, MAX_ATTEMPTS, letters);
        })
    }

    fn sweep(&self) {
        let letters = &mut DeadLetters::default();
        sweep_worker(self.supervisor, &self.topology, &self.bells, &death(), MAX_ATTEMPTS, letters);
    }
}

fn death() -> Death {
    let failure = Failure::handler("the worker was killed");
    Death { worker: VICTIM, pid: 1, status: ExitStatus::from_raw(9), cause: String::new(), failure }
}

/// For as long as the process lives.
fn attach(owner: &SegmentOwner, slot: Slot) -> &'static Segment {
    let segment = Segment::attach(owner.object(), owner.name(), slot).unwrap_or_else(|error| panic!("{error}"));
    Box::leak(Box::new(segment))
}
