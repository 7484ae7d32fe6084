//! A front in this process and an echo worker in a forked one, each on its own core.
//!
//! The other process plays one role at a time, so that what is compared runs between the same two processes on the
//! same two cores. It is forked before anything else, because only a process with one thread may fork.

use std::{
    cell::Cell,
    hint::black_box,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::*},
    },
    thread,
};

use forkring::{
    config::Spin,
    dispatch::{Bells, Completion, Front, Kind, Offer, OfferError, Topology, Worker},
    doorbell::Bell,
    process::{self, Child},
    segment::{Geometry, INLINE, Segment, SegmentOwner, Slot, Stage},
    worker,
};
use rustix::event::{PollFd, PollFlags, poll};

use super::{cores, pin, until};

/// Items in flight when it is throughput that counts.
pub const IN_FLIGHT: [usize; 2] = [64, 256];
/// Results that are collected before more is offered, as many as by the front that ships and for its reason: who takes back all that
/// is in flight before it offers again leaves the worker without work.
const BURST: usize = 8;
/// The largest payload.
pub const LARGEST: usize = 4 << 20;

/// What the other process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Role {
    /// Sleeps, out of the way of whoever else is measured.
    Parked,
    /// Answers in a cache line with what it sees in another.
    Line,
    /// Takes, reads the payload, writes the result, completes; spins for the next.
    Spinning,
    /// The same, and sleeps for the next.
    Asleep,
    /// Answers one eventfd by another, blocking.
    Eventfd,
    /// [`worker::run`], the loop that ships, as long as the process lives.
    Shipped,
}

const ROLES: [Role; 6] = [Role::Parked, Role::Line, Role::Spinning, Role::Asleep, Role::Eventfd, Role::Shipped];

/// In the cache line: the end of the game.
const OVER: u64 = u64::MAX;

/// The words that the two processes share beside the dispatch, each in a block of its own: the ids of the records of
/// a segment that is used for nothing else.
struct Board(&'static Segment);

impl Board {
    fn ping(&self) -> &AtomicU64 {
        &self.0.item(0).id
    }

    fn pong(&self) -> &AtomicU64 {
        &self.0.item(1).id
    }

    /// The role that is asked for.
    fn asked(&self) -> &AtomicU64 {
        &self.0.item(2).id
    }

    /// The role that is played.
    fn played(&self) -> &AtomicU64 {
        &self.0.item(3).id
    }
}

/// A segment, and where both ends find it.
struct Shared {
    owner: SegmentOwner,
    name: String,
}

impl Shared {
    fn create(what: &str, geometry: Geometry) -> Self {
        let name = format!("bench-{what}-{}", std::process::id());
        let owner = SegmentOwner::create(&name, geometry).unwrap_or_else(|error| panic!("{error}"));
        Shared { owner, name }
    }

    fn attach(&self, slot: Slot) -> &'static Segment {
        let segment = Segment::attach(self.owner.object(), &self.name, slot).unwrap_or_else(|error| panic!("{error}"));
        Box::leak(Box::new(segment))
    }
}

/// One item table with one front and one worker, for payloads up to `largest`.
pub fn geometry(largest: usize) -> Geometry {
    let arena = (4 * largest as u64).max(1 << 20);
    Geometry {
        items: 1024,
        fronts: 1,
        workers: 1,
        pools: 1,
        request_bytes: arena,
        result_bytes: arena,
        letter_bytes: 0,
    }
}

/// What an item is offered with. The times are not what is measured, so that nobody looks at the clock for them.
pub const OFFER: Offer<'static> =
    Offer { pool: 0, priority: 0, id: 7, offered: 1, deadline: 0, kind: Kind::Call, subscription: &[], metadata: &[] };

/// Offers an item: the payload is copied to where the worker will read it.
#[inline]
pub fn offer(front: &mut Front<'_>, offer: &Offer<'_>, payload: &[u8]) -> Result<(), OfferError> {
    let mut request = front.request(payload.len())?;
    front.write(&mut request, payload);
    front.offer(offer, &mut request).map(|_| ())
}

/// Looks at all bytes of a result, as someone who sends it does, and releases it.
#[inline(always)]
pub fn consume(front: &mut Front<'_>, completion: &Completion, into: &mut [u8]) {
    if completion.len <= INLINE {
        let line = into.first_chunk_mut().expect("room for a line");
        front.inline_result(completion, line).expect("an echo has a result");
    } else {
        let result = front.arena_result(completion).expect("an echo has a result");
        into[..result.len()].copy_from_slice(result);
    }
    front.release(completion.index);
    black_box(&into);
}

/// Takes one item and completes it with its own payload; whether there was one.
#[inline]
pub fn echo(worker: &mut Worker<'_>) -> bool {
    let Some(claimed) = worker.take() else { return false };
    let (item, mut reply) = worker.open(&claimed, LARGEST).expect("the front wrote a request");
    reply.write(black_box(item.payload())).expect("there is room for an echo");
    drop(item);
    reply.complete(claimed, 0, 1, 1);
    true
}

/// This process's end.
pub struct Pair {
    /// The front's side of the dispatch.
    pub front: Front<'static>,
    bells: Arc<Bells>,
    board: Board,
    /// Of the raw game, and of the parked process.
    raw: Arc<[Bell; 2]>,
    child: Option<Child>,
    role: Cell<Role>,
    into: Vec<u8>,
}

impl Pair {
    /// Forks the other process and keeps both to their cores. It plays `role` from the start.
    pub fn fork(role: Role, largest: usize) -> Self {
        let mut dispatch = Shared::create("items", geometry(largest));
        let mut board = Shared::create("board", Geometry { items: 4, ..geometry(0) });
        let topology = Topology::new([1]);
        let bells = Bells::new(1, 1).expect("eventfds");
        let raw = Arc::new([(); 2].map(|()| Bell::blocking().expect("an eventfd")));
        let [ours, theirs] = cores();

        let child = process::fork("forkring-bench", || {
            dispatch.owner.disown();
            board.owner.disown();
            pin(theirs);
            let segment = dispatch.attach(Slot::Worker(0));
            let board = Board(board.attach(Slot::Worker(0)));
            let mut worker = Worker::attach(segment, topology.clone(), bells.clone(), 0).expect("a pool");
            board.asked().store(role as u64, Relaxed);
            play(&board, &mut worker, &raw);
            0
        });
        let child = child.unwrap_or_else(|error| panic!("{error}"));
        pin(ours);
        let segment = dispatch.attach(Slot::Front(0));
        let board = Board(board.attach(Slot::Front(0)));
        let (front, _) = Front::attach(segment, topology, bells.clone(), 0);
        // Both are attached before the names go.
        until(|| (board.played().load(Acquire) == role as u64 + 1).then_some(()));
        Pair { front, bells, board, raw, child: Some(child), role: Cell::new(role), into: vec![0; largest.max(INLINE)] }
    }

    /// Has the other process play another role. Not from [`Role::Shipped`].
    pub fn play(&self, role: Role) {
        self.board.asked().store(role as u64, Release);
        self.disturb();
        self.role.set(role);
        until(|| (self.board.played().load(Acquire) == role as u64 + 1).then_some(()));
        self.board.ping().store(0, Relaxed);
    }

    /// Lets the other process look at what is asked of it, whatever its role waits for. Nothing else is rung, because
    /// a ring that nobody waits for would be an answer too many in a later game.
    fn disturb(&self) {
        match self.role.get() {
            Role::Line => self.board.ping().store(OVER, Release),
            Role::Spinning => {}
            Role::Asleep | Role::Shipped => self.bells.worker(0).ring().expect("an eventfd"),
            Role::Parked | Role::Eventfd => self.raw[0].ring().expect("an eventfd"),
        }
    }

    /// A cache line there and another one back, and nothing else.
    #[inline]
    pub fn line(&self, n: u64) {
        self.board.ping().store(n, Release);
        until(|| (self.board.pong().load(Acquire) == n).then_some(()));
    }

    /// Waits until the other process has given up spinning, so that it is not in the way of others.
    pub fn until_asleep(&self) {
        let idle = self.front.segment().idle(0);
        until(|| idle.any().then_some(()));
    }

    /// An eventfd there and another one back.
    pub fn eventfd(&self) {
        self.raw[0].ring().expect("an eventfd");
        self.raw[1].wait().expect("an eventfd");
    }

    /// An item there and back, spinning.
    #[inline]
    pub fn item(&mut self, payload: &[u8]) {
        self.item_with(&OFFER, payload);
    }

    /// The same, with an offer of the caller's.
    #[inline]
    pub fn item_with(&mut self, with: &Offer<'_>, payload: &[u8]) {
        offer(&mut self.front, with, payload).expect("there is room for one item");
        self.front.ring();
        let completion = until(|| self.front.collect());
        consume(&mut self.front, &completion, &mut self.into);
    }

    /// An item there and back, asleep in between.
    pub fn item_asleep(&mut self, payload: &[u8]) {
        offer(&mut self.front, &OFFER, payload).expect("there is room for one item");
        self.front.ring();
        let completion = loop {
            if let Some(completion) = self.front.collect() {
                break completion;
            }
            self.front.going_to_sleep();
            let seen = self.front.collect();
            if seen.is_none() {
                let bell = self.bells.front(0);
                poll(&mut [PollFd::new(bell, PollFlags::IN)], None).expect("an eventfd can be polled");
                bell.drain().expect("an eventfd");
            }
            self.front.awake();
            if let Some(completion) = seen {
                break completion;
            }
        };
        consume(&mut self.front, &completion, &mut self.into);
    }

    /// `n` items there and back, up to so many at a time.
    pub fn items(&mut self, n: usize, in_flight: usize, payload: &[u8]) {
        let (mut offered, mut done) = (0, 0);
        while done < n {
            while offered < n && offered - done < in_flight && offer(&mut self.front, &OFFER, payload).is_ok() {
                offered += 1;
            }
            self.front.ring();
            let mut next = Some(until(|| self.front.collect()));
            let mut burst = 0;
            while let Some(completion) = next {
                consume(&mut self.front, &completion, &mut self.into);
                done += 1;
                burst += 1;
                next = if burst < BURST { self.front.collect() } else { None };
            }
        }
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.front.segment().set_stage(Stage::Stopping);
        self.disturb();
        if let Some(Err(error)) = self.child.take().map(Child::reap) {
            eprintln!("cannot reap the other process: {error}");
        }
    }
}

/// The other process: plays what it is asked to until the stage says that it is over.
fn play(board: &Board, worker: &mut Worker<'_>, raw: &[Bell; 2]) {
    let over = |worker: &Worker<'_>| worker.segment().stage() == Stage::Stopping;
    while !over(worker) {
        let asked = board.asked().load(Acquire);
        let asked_else = || board.asked().load(Relaxed) != asked;
        board.pong().store(0, Relaxed);
        board.played().store(asked + 1, Release);
        let role = ROLES[asked as usize % ROLES.len()];
        match role {
            Role::Parked => raw[0].wait().expect("an eventfd"),
            Role::Line => line(board),
            Role::Spinning => until(|| {
                while echo(worker) {}
                (asked_else() || over(worker)).then_some(())
            }),
            Role::Asleep => {
                while !asked_else() && !over(worker) {
                    while echo(worker) {}
                    worker.sleep().expect("a worker can sleep");
                }
            }
            Role::Eventfd => loop {
                raw[0].wait().expect("an eventfd");
                if asked_else() || over(worker) {
                    break;
                }
                raw[1].ring().expect("an eventfd");
            },
            Role::Shipped => {
                let mut handler = |item: &forkring::Item<'_>, reply: &mut forkring::Reply<'_, '_>| {
                    reply.write(item.payload())?;
                    Ok(())
                };
                let spin = Spin::For(std::time::Duration::from_millis(20));
                worker::run(worker, &mut handler, spin, LARGEST).expect("a worker can sleep");
            }
        }
        thread::yield_now();
    }
}

/// The line's other end.
fn line(board: &Board) {
    let mut last = 0;
    loop {
        let seen = until(|| Some(board.ping().load(Acquire)).filter(|&seen| seen != last));
        if seen == OVER {
            return;
        }
        board.pong().store(seen, Release);
        last = seen;
    }
}
