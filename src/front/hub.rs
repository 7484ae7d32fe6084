//! The hub: what the tasks of a front share.
//!
//! RPCs offer items and get their results in a [`Mailbox`]; the collector puts them there. An item belongs to one
//! mailbox; when an RPC ends before its items do, it abandons its mailbox, and what it left is cancelled. Everything
//! is a plain cell: there is one thread, and no borrow is held across an await.

use std::{
    cell::{Cell, RefCell},
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, VecDeque},
    rc::Rc,
    sync::{Arc, Mutex, PoisonError},
    task::Waker,
    time::{Duration, Instant},
};

use tokio::{
    sync::{Notify, watch},
    time::sleep_until,
};

use crate::{
    config::Config,
    crash_point::crash_point,
    dispatch::{Adopted, Completion, Failure, Front, Kind, Offer, OfferError, Outcome, Request},
    process::now,
    segment::{INLINE, PRIORITIES},
};

use super::{
    failure_log::FailureLog,
    mailbox::{Ending, Mailbox},
    status::Refusal,
    wire::ItemHead,
};

/// Of the item table and the arena, what streams leave to calls, which cannot wait: one part in so many.
const RESERVE: usize = 16;
/// When so many tasks were woken by their results, or by so many bytes of them, others have their turn before the next: among
/// them the connection, which sends what there is. Else a client with many calls under way gets all its results at once and
/// sends as many calls at once: both would take turns, and each leave the other's core idle.
const BURST: usize = 8;
const BURST_BYTES: usize = 128 << 10;
/// Of the item table, what one stream may have: one part in so many.
const STREAM_SHARE: usize = 4;

/// The results of one subscription that wait for a subscriber: a part of the outbox.
#[derive(Debug, Default)]
pub struct Subscription {
    ready: RefCell<VecDeque<Completion>>,
    wakers: RefCell<Vec<Waker>>,
    /// Items that were accepted and are not completed.
    pub pending: Cell<usize>,
}

impl Subscription {
    /// The oldest result.
    pub fn take(&self) -> Option<Completion> {
        self.ready.borrow_mut().pop_front()
    }

    /// Puts results back that were not written to their subscriber, before all others and in their order.
    pub fn put_back(&self, results: impl DoubleEndedIterator<Item = Completion>) {
        let mut ready = self.ready.borrow_mut();
        results.rev().for_each(|result| ready.push_front(result));
        drop(ready);
        self.wake();
    }

    /// Wakes this subscriber when there is a result.
    pub fn keep(&self, waker: &Waker) {
        let mut wakers = self.wakers.borrow_mut();
        if !wakers.iter().any(|kept| kept.will_wake(waker)) {
            wakers.push(waker.clone());
        }
    }

    /// Whether nothing waits here and nothing will come.
    pub fn is_done(&self) -> bool {
        self.pending.get() == 0 && self.ready.borrow().is_empty()
    }

    /// Wakes all: who is woken first is likely to take what there is, and another is the next time.
    fn wake(&self) {
        let mut wakers = self.wakers.borrow_mut();
        let first = wakers.len().min(1);
        wakers.rotate_left(first);
        wakers.drain(..).for_each(Waker::wake);
    }
}

/// Whose an item is.
#[derive(Clone, Debug)]
enum Owner {
    Rpc(Rc<Mailbox>),
    Subscription(Rc<Subscription>),
}

/// Items whose results hyper has sent or thrown away: their guards may be dropped anywhere, so this is the one thing
/// behind a lock. Nobody ever waits for it, there being one thread.
#[derive(Debug, Default)]
pub struct Released {
    items: Mutex<Vec<u32>>,
    notify: Arc<Notify>,
}

impl Released {
    /// The item's result is not looked at any more.
    pub fn push(&self, index: u32) {
        self.items.lock().unwrap_or_else(PoisonError::into_inner).push(index);
        self.notify.notify_one();
    }
}

/// What the tasks of a front share.
pub struct Hub {
    front: RefCell<Front<'static>>,
    owners: RefCell<Vec<Option<Owner>>>,
    subscriptions: RefCell<HashMap<String, Rc<Subscription>>>,
    /// Of items whose deadlines are to be watched, the next first.
    deadlines: RefCell<BinaryHeap<Reverse<(u64, u32, u64)>>>,
    /// The mailboxes of open streams, which wait for their clients too.
    streams: RefCell<Vec<Rc<Mailbox>>>,
    /// Tasks that wait for room, and what there was of it when they were told last.
    room: RefCell<Vec<Waker>>,
    freed: Cell<u64>,
    lane_full: Cell<bool>,
    /// Pools whose workers are all in a crash loop, a bit each.
    failing: Cell<u64>,
    /// Submitted items that are not delivered yet, and the bytes of their results; of those that are not done, of their
    /// payloads, for want of better.
    submitted: Cell<usize>,
    outbox_used: Cell<u64>,
    /// Tells offers apart that used the same record.
    offers: Cell<u64>,
    serials: RefCell<Vec<u64>>,
    pub released: Arc<Released>,
    /// Wakes the collector.
    pub notify: Arc<Notify>,
    /// Notified when an item may wait for a worker from now on.
    waits: Notify,
    /// The task `waiting` looks after items that wait, and need not be notified.
    is_watched: Cell<bool>,
    /// Told of each collection.
    pub progress: Notify,
    /// Counts what the sockets brought: the collector's spinning goes by it.
    pub activity: Cell<u64>,
    /// True once the server drains.
    pub draining: watch::Sender<bool>,
    pub pools: Vec<String>,
    pub max_message: usize,
    pub body_timeout: Duration,
    /// Logs failed items, if `--log-failures` is set.
    failures: Option<Rc<FailureLog>>,
    outbox: usize,
    outbox_bytes: u64,
    reserve: usize,
    reserve_bytes: u64,
    /// How many items of one stream may be in work.
    pub stream_items: usize,
}

/// An item that could not be offered.
#[derive(Debug)]
pub enum NotOffered {
    /// It may be later: wait for room, or refuse.
    Later(OfferError),
    /// Its own fault.
    Never(Refusal),
}

impl Hub {
    pub fn new(front: Front<'static>, adopted: Vec<Adopted>, pools: Vec<String>, config: &Config) -> Self {
        let items = front.segment().geometry().items as usize;
        let notify = Arc::new(Notify::new());
        let hub = Hub {
            owners: RefCell::new(vec![None; items]),
            subscriptions: RefCell::default(),
            deadlines: RefCell::default(),
            streams: RefCell::default(),
            room: RefCell::default(),
            freed: Cell::new(0),
            lane_full: Cell::new(false),
            submitted: Cell::new(0),
            outbox_used: Cell::new(0),
            offers: Cell::new(0),
            serials: RefCell::new(vec![0; items]),
            released: Arc::new(Released { items: Mutex::default(), notify: notify.clone() }),
            notify,
            failing: Cell::new(0),
            waits: Notify::new(),
            is_watched: Cell::new(false),
            progress: Notify::new(),
            activity: Cell::new(0),
            draining: watch::Sender::new(false),
            pools,
            max_message: config.max_message().bytes().min(front.largest_request()) as usize,
            body_timeout: config.body_timeout,
            failures: config.log_failures.then(Rc::default),
            outbox: config.outbox() as usize,
            // Half of a worker's result arena: the rest is for those who wait.
            outbox_bytes: front.segment().geometry().result_bytes / 2,
            reserve: items / RESERVE,
            reserve_bytes: front.segment().geometry().request_bytes / RESERVE as u64,
            stream_items: (items / STREAM_SHARE).max(1),
            front: RefCell::new(front),
        };
        if !adopted.is_empty() {
            // The front before may have died before it asked the supervisor to look at workers that do not respond.
            hub.watch_waiting();
        }
        for Adopted { index, subscription, deadline } in adopted {
            let subscription = hub.subscription(&String::from_utf8_lossy(&subscription));
            hub.own_submitted(index, subscription);
            hub.watch(deadline, index, 0);
        }
        hub
    }

    pub fn with_front<R>(&self, f: impl FnOnce(&mut Front<'static>) -> R) -> R {
        f(&mut self.front.borrow_mut())
    }

    pub fn is_draining(&self) -> bool {
        *self.draining.borrow()
    }

    /// The pool of that name; the only one, if the name is empty.
    fn pool(&self, name: &str) -> Result<u16, Refusal> {
        match (name, &self.pools[..]) {
            ("", [_]) => Ok(0),
            ("", _) => Err(Refusal::no_pool(&self.pools)),
            _ => match self.pools.iter().position(|pool| pool == name) {
                Some(pool) => Ok(pool as u16),
                None => Err(Refusal::unknown_pool(name, &self.pools)),
            },
        }
    }

    /// Offers an item for an RPC that waits for it in its mailbox; its index. `deadline` is the RPC's own, 0 for none.
    pub fn offer_call(
        &self,
        head: &ItemHead,
        request: &mut Request,
        deadline: u64,
        mailbox: &Rc<Mailbox>,
        is_stream: bool,
    ) -> Result<u32, NotOffered> {
        let kind = if is_stream { Kind::Stream } else { Kind::Call };
        let index = self.offer(head, request, deadline, kind, is_stream)?;
        self.owners.borrow_mut()[index as usize] = Some(Owner::Rpc(mailbox.clone()));
        Ok(index)
    }

    /// Offers an item for its subscription.
    pub fn offer_submitted(&self, head: &ItemHead, request: &mut Request) -> Result<(), NotOffered> {
        let used = self.outbox_used.get();
        let is_full = used > 0 && used + request.len() as u64 > self.outbox_bytes;
        if is_full || self.submitted.get() >= self.outbox {
            return Err(NotOffered::Later(OfferError::Items));
        }
        let index = self.offer(head, request, 0, Kind::Submit, true)?;
        self.own_submitted(index, self.subscription(&head.subscription));
        Ok(())
    }

    fn own_submitted(&self, index: u32, subscription: Rc<Subscription>) {
        self.submitted.set(self.submitted.get() + 1);
        self.outbox_used.set(self.outbox_used.get() + self.front.borrow().payload_len(index));
        subscription.pending.set(subscription.pending.get() + 1);
        self.owners.borrow_mut()[index as usize] = Some(Owner::Subscription(subscription));
    }

    fn offer(
        &self,
        head: &ItemHead,
        request: &mut Request,
        deadline: u64,
        kind: Kind,
        is_stream: bool,
    ) -> Result<u32, NotOffered> {
        if self.is_draining() {
            return Err(NotOffered::Never(Refusal::draining()));
        }
        let pool = self.pool(&head.pool).map_err(NotOffered::Never)?;
        if head.priority >= PRIORITIES {
            return Err(NotOffered::Never(Refusal::priority(head.priority)));
        }
        if kind != Kind::Submit && self.failing.get() & 1 << pool != 0 {
            return Err(NotOffered::Never(Failure::pool_failing(&self.pools[usize::from(pool)]).into()));
        }
        let mut front = self.front.borrow_mut();
        if is_stream && front.free_items() <= self.reserve {
            return Err(NotOffered::Later(OfferError::Items));
        }
        let offered = now();
        let own = head.timeout.map_or(0, |timeout| deadline_after(offered, timeout));
        let deadline = match (deadline, own) {
            (0, one) | (one, 0) => one,
            (a, b) => a.min(b),
        };
        let offer = Offer {
            pool,
            priority: head.priority,
            id: head.id,
            offered,
            deadline,
            kind,
            subscription: if kind == Kind::Submit { head.subscription.as_bytes() } else { &[] },
            metadata: &head.metadata,
        };
        let index = front.offer(&offer, request).map_err(|error| {
            if error == OfferError::Lane {
                self.lane_full.set(true);
                // For the timer, as workers do not tell.
                self.notify.notify_one();
            }
            NotOffered::Later(error)
        })?;
        drop(front);
        self.activity.set(self.activity.get() + 1);
        let serial = self.offers.get() + 1;
        self.offers.set(serial);
        self.serials.borrow_mut()[index as usize] = serial;
        self.watch(deadline, index, serial);
        self.watch_waiting();
        // It rings the workers, once for all that is offered before its turn comes.
        self.notify.notify_one();
        Ok(index)
    }

    /// Notes that an item may wait for a worker from now on, so that the task `waiting` looks after it.
    pub fn watch_waiting(&self) {
        if !self.is_watched.replace(true) {
            self.waits.notify_one();
        }
    }

    /// Completes when an item may wait for a worker.
    pub async fn something_may_wait(&self) {
        self.is_watched.set(false);
        self.waits.notified().await;
    }

    /// Looks which pools are in a crash loop. The items of calls and streams that wait for one of them fail; submitted items wait
    /// on, for they must not be lost.
    pub fn note_failing(&self) {
        let pools = 0..self.pools.len() as u16;
        let failing = pools.fold(0, |bits, pool| bits | u64::from(self.front.borrow().is_failing(pool)) << pool);
        self.failing.set(failing);
        if failing == 0 {
            return;
        }
        for (index, owner) in (0..).zip(self.owners.borrow_mut().iter_mut()) {
            let Some(Owner::Rpc(mailbox)) = owner else { continue };
            let mut front = self.front.borrow_mut();
            let id = front.id(index);
            let Some(pool) = front.take_back(index, failing) else { continue };
            let failure = Failure::pool_failing(&self.pools[usize::from(pool)]);
            mailbox.deliver(Ending::Failed { id, failure });
            *owner = None;
            self.activity.set(self.activity.get() + 1);
        }
    }

    /// Watches a deadline, unless it is none. Those of items that have ended stay until they are due, or until there are many of them.
    fn watch(&self, deadline: u64, index: u32, serial: u64) {
        if deadline == 0 {
            return;
        }
        let mut deadlines = self.deadlines.borrow_mut();
        let serials = self.serials.borrow();
        if deadlines.len() >= 2 * serials.len() {
            // Each item has one deadline at most, so this at least halves them.
            deadlines.retain(|Reverse((_, index, serial))| serials[*index as usize] == *serial);
        }
        deadlines.push(Reverse((deadline, index, serial)));
    }

    /// Memory for a payload.
    pub fn request(&self, len: usize, is_stream: bool) -> Result<Request, OfferError> {
        let mut front = self.front.borrow_mut();
        if is_stream && len > INLINE && front.free_request_bytes() < self.reserve_bytes + len as u64 {
            return Err(OfferError::Arena);
        }
        front.request(len)
    }

    pub fn write(&self, request: &mut Request, bytes: &[u8]) {
        self.front.borrow().write(request, bytes);
    }

    pub fn discard(&self, request: Request) {
        if self.front.borrow_mut().discard(request) {
            self.wake_room();
        }
    }

    /// Wakes this task when there may be room again.
    pub fn wait_for_room(&self, waker: &Waker) {
        let mut room = self.room.borrow_mut();
        if !room.iter().any(|kept| kept.will_wake(waker)) {
            room.push(waker.clone());
        }
    }

    pub fn wake_room(&self) {
        // They may come back at once.
        let room = std::mem::take(&mut *self.room.borrow_mut());
        room.into_iter().for_each(Waker::wake);
    }

    /// Wakes everybody who waits for anything here: the drain has begun.
    pub fn wake_all(&self) {
        self.wake_room();
        self.subscriptions.borrow().values().for_each(|subscription| subscription.wake());
        self.streams.borrow().iter().for_each(|mailbox| _ = mailbox.wake());
    }

    /// The mailbox of a stream, until [`Hub::close_stream`].
    pub fn open_stream(&self) -> Rc<Mailbox> {
        let mailbox = Rc::<Mailbox>::default();
        self.streams.borrow_mut().push(mailbox.clone());
        mailbox
    }

    /// A stream has ended: what it left is abandoned, if it left anything.
    pub fn close_stream(&self, mailbox: &Rc<Mailbox>, in_flight: usize) {
        self.streams.borrow_mut().retain(|other| !Rc::ptr_eq(other, mailbox));
        if in_flight > 0 {
            self.abandon(mailbox, None);
        }
    }

    /// The results of a subscription, from the past and to come.
    pub fn subscription(&self, name: &str) -> Rc<Subscription> {
        if let Some(subscription) = self.subscriptions.borrow().get(name) {
            return subscription.clone();
        }
        let subscription = Rc::<Subscription>::default();
        self.subscriptions.borrow_mut().insert(name.to_owned(), subscription.clone());
        subscription
    }

    /// A subscription that nobody subscribes to and that has nothing need not be remembered.
    pub fn forget_if_unused(&self, name: &str) {
        let mut subscriptions = self.subscriptions.borrow_mut();
        if subscriptions.get(name).is_some_and(|one| one.is_done() && Rc::strong_count(one) <= 2) {
            subscriptions.remove(name);
        }
    }

    /// Submitted items whose results nobody has fetched: those in work, and those that wait.
    pub fn undelivered(&self) -> (usize, usize) {
        let pending = self.subscriptions.borrow().values().map(|subscription| subscription.pending.get()).sum();
        (pending, self.submitted.get() - pending)
    }

    /// Waits until a draining server has nothing accepted that is not completed.
    pub async fn drained(&self) {
        while self.undelivered().0 > 0 {
            self.progress.notified().await;
        }
    }

    /// Hands completed items to their owners, as many as a [burst](BURST) has; how many, and since when the first was done.
    pub fn collect(&self) -> (usize, u64) {
        let (mut count, mut first) = (0, u64::MAX);
        let (mut woken, mut bytes) = (0, 0);
        while woken < BURST && bytes < BURST_BYTES {
            let Some(completion) = self.front.borrow_mut().collect() else { break };
            count += 1;
            // It was over at its deadline, and is seen when somebody looks.
            let is_expired = completion.outcome == Outcome::Expired;
            first = first.min(if is_expired { now() } else { completion.times[2] });
            let owner = self.owners.borrow_mut()[completion.index as usize].take();
            crash_point!("hub.collected");
            if let Some(failures) = &self.failures {
                failures.log(&completion, &self.front.borrow(), &self.pools);
            }
            match owner {
                Some(Owner::Rpc(mailbox)) => {
                    bytes += completion.len;
                    woken += usize::from(mailbox.deliver(Ending::Completed(completion)));
                }
                Some(Owner::Subscription(subscription)) => {
                    subscription.pending.set(subscription.pending.get() - 1);
                    let payload = self.front.borrow().payload_len(completion.index);
                    let others = self.outbox_used.get().saturating_sub(payload);
                    self.outbox_used.set(others + completion.len as u64);
                    if (completion.len as u64) < payload {
                        self.wake_room();
                    }
                    subscription.ready.borrow_mut().push_back(completion);
                    subscription.wake();
                }
                None => self.release(completion.index),
            }
        }
        loop {
            let Some(index) = self.front.borrow_mut().noticed() else { break };
            if let Some(Owner::Rpc(mailbox)) = &self.owners.borrow()[index as usize] {
                count += 1;
                first = first.min(now());
                mailbox.deliver(Ending::Partial(index));
            }
        }
        (count, first)
    }

    /// Whether an item is in work for this mailbox.
    pub fn is_in_work(&self, index: u32, mailbox: &Rc<Mailbox>) -> bool {
        matches!(&self.owners.borrow()[index as usize], Some(Owner::Rpc(owner)) if Rc::ptr_eq(owner, mailbox))
    }

    /// Gives up one item that is in work for this mailbox.
    pub fn give_up(&self, index: u32) {
        self.owners.borrow_mut()[index as usize] = None;
        self.front.borrow_mut().cancel(index);
        // Others may wait for the room.
        self.notify.notify_one();
    }

    /// The result has been copied and the record may be used again.
    pub fn release(&self, index: u32) {
        self.front.borrow_mut().release(index);
        if !self.room.borrow().is_empty() {
            // The collector tells them.
            self.notify.notify_one();
        }
    }

    /// Wakes those who wait for room if there has come to be some. `anyway`: also if it cannot be known, because workers
    /// may have cleared a lane.
    pub fn tell_of_room(&self, anyway: bool) {
        let freed = self.front.borrow().freed();
        if freed != self.freed.replace(freed) || anyway && self.lane_full.replace(false) {
            self.wake_room();
        }
    }

    /// Whether somebody waits for workers to clear a lane.
    pub fn waits_for_lane(&self) -> bool {
        self.lane_full.get()
    }

    /// The result of a submitted item has been written to its subscriber.
    pub fn release_submitted(&self, completion: &Completion) {
        self.submitted.set(self.submitted.get() - 1);
        self.outbox_used.set(self.outbox_used.get().saturating_sub(completion.len as u64));
        self.release(completion.index);
    }

    /// Releases the items whose results have been sent straight from the arena.
    pub fn release_sent(&self) {
        let items = std::mem::take(&mut *self.released.items.lock().unwrap_or_else(PoisonError::into_inner));
        for index in items {
            self.release(index);
        }
    }

    /// An RPC has ended before its items: cancels those in work and releases those that are done. `only` is its one
    /// item, if it has no more.
    pub fn abandon(&self, mailbox: &Rc<Mailbox>, only: Option<u32>) {
        let mut owners = self.owners.borrow_mut();
        let all = owners.len() as u32;
        for index in only.map_or(0..all, |index| index..index + 1) {
            let owner = &mut owners[index as usize];
            if matches!(owner, Some(Owner::Rpc(other)) if Rc::ptr_eq(other, mailbox)) {
                *owner = None;
                self.front.borrow_mut().cancel(index);
            }
        }
        drop(owners);
        while let Some(ending) = mailbox.take() {
            if let Ending::Completed(completion) = ending {
                self.release(completion.index);
            }
        }
        // Others may wait for the room.
        self.notify.notify_one();
    }

    /// Fails the items whose deadlines have passed: those of calls at once, whoever has them. A submitted item fails if no
    /// worker has it; if one has, what it makes of the item is the update, late as it is, for there must be one and not two.
    /// Returns the next deadline.
    pub fn expire(&self) -> Option<u64> {
        let now = now();
        loop {
            let &Reverse((deadline, index, serial)) = self.deadlines.borrow().peek()?;
            let is_over =
                self.serials.borrow()[index as usize] != serial || self.owners.borrow()[index as usize].is_none();
            if !is_over && deadline > now {
                return Some(deadline);
            }
            self.deadlines.borrow_mut().pop();
            if is_over {
                continue;
            }
            let owner = &mut self.owners.borrow_mut()[index as usize];
            let mut front = self.front.borrow_mut();
            if let Some(Owner::Rpc(mailbox)) = owner {
                front.cancel(index);
                mailbox.deliver(Ending::Failed { id: front.id(index), failure: Failure::deadline() });
                *owner = None;
            } else if front.expire(index) {
                // To be collected.
                self.activity.set(self.activity.get() + 1);
            }
        }
    }
}

/// Waits for a time on the clock of [`now`]; for ever, if it is 0.
pub async fn until(deadline: u64) {
    let left = Duration::from_nanos(deadline.saturating_sub(now()));
    match Instant::now().checked_add(left).filter(|_| deadline != 0) {
        Some(at) => sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// A time that much after another, on the clock of [`now`]; never 0, which means none.
pub fn deadline_after(now: u64, timeout: Duration) -> u64 {
    now.saturating_add(u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX)).max(1)
}

#[cfg(test)]
mod tests {
    use std::{
        pin::pin,
        task::{Context, Poll},
    };

    use super::*;
    use crate::{
        dispatch::{Bells, Topology},
        segment::{Geometry, Segment, SegmentOwner, Slot},
    };

    #[test]
    fn a_front_watches_over_the_items_that_it_takes_over() {
        let geometry = Geometry {
            items: 4,
            fronts: 1,
            workers: 1,
            pools: 1,
            request_bytes: 4096,
            result_bytes: 4096,
            letter_bytes: 0,
        };
        let name = format!("unit-hub-{}", std::process::id());
        let owner = SegmentOwner::create(&name, geometry).unwrap();
        let (topology, bells) = (Topology::new([1]), Bells::new(1, 1).unwrap());
        for adopts in [false, true] {
            let attach = || {
                let segment = Segment::attach(owner.object(), &name, Slot::Front(0)).unwrap();
                Front::attach(Box::leak(Box::new(segment)), topology.clone(), bells.clone(), 0)
            };
            if adopts {
                let offer = Offer {
                    pool: 0,
                    priority: 0,
                    id: 1,
                    offered: 1,
                    deadline: 0,
                    kind: Kind::Submit,
                    subscription: &[],
                    metadata: &[],
                };
                attach().0.offer(&offer, &mut Request::default()).unwrap();
            }
            let (front, adopted) = attach();
            assert_eq!(adopted.len(), usize::from(adopts));
            let hub = Hub::new(front, adopted, vec!["pool".to_owned()], &Config::default());
            let waits = pin!(hub.something_may_wait()).poll(&mut Context::from_waker(Waker::noop()));
            assert_eq!(waits, if adopts { Poll::Ready(()) } else { Poll::Pending });
        }
    }
}
