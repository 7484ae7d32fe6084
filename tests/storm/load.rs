//! Clients of every shape, each in a loop, until the storm is over.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use forkring::proto::v1::WorkItem;
use tokio::{task::JoinSet, time};
use tonic::{Code, Status};

use super::{
    chance::Chance,
    common::soon,
    link::{Caller, Link, Ticket},
    tally::{Shape, Tally, payload},
};

const CALLERS: usize = 6;
const STREAMS: usize = 2;
/// Two of them share one.
const SUBSCRIPTIONS: [&str; 3] = ["", "one", "two"];
const SUBSCRIBERS: [&str; 4] = ["", "one", "two", "two"];
/// The most items of a stream.
const ITEMS: u64 = 150;
/// Until a client whose server is not there tries again.
const AGAIN: Duration = Duration::from_millis(5);

/// What all of them share.
#[derive(Debug, Default)]
pub struct Storm {
    pub link: Arc<Link>,
    pub tally: RefCell<Tally>,
    /// Nobody begins anything any more.
    pub calm: Cell<bool>,
    /// Nor are there updates.
    pub over: Cell<bool>,
    /// Subscribers stay, from now on.
    pub lasting: Cell<bool>,
    /// How often the link had been cut when each subscriber came, of those that stay.
    pub attached: RefCell<HashMap<usize, u64>>,
}

impl Storm {
    fn failed(&self, caller: &Caller, ticket: Ticket, what: &str, status: &Status) {
        let mut tally = self.tally.borrow_mut();
        if caller.is_excused(ticket) {
            tally.broken += 1;
        } else {
            tally.violation(format!("{what} failed and nobody had cut it off: {status}"));
        }
    }

    /// Whether all subscribers are there to stay, on connections that hold.
    pub fn is_attached(&self) -> bool {
        let attached = self.attached.borrow();
        attached.len() == SUBSCRIBERS.len() && attached.values().all(|cuts| *cuts == self.link.cuts())
    }

    pub fn item(&self, shape: Shape, chance: &mut Chance) -> WorkItem {
        let id = self.tally.borrow_mut().begin(shape);
        let item = WorkItem::new("trace", payload(id)).with_id(id).with_priority(chance.below(4) as u32);
        // So that somebody is always at work, however fast the machine is.
        if chance.percent(10) { item.with_metadata("millis", chance.below(30).to_string()) } else { item }
    }

    fn items(&self, shape: Shape, chance: &mut Chance) -> Vec<WorkItem> {
        (0..=chance.below(ITEMS)).map(|_| self.item(shape, chance)).collect()
    }
}

/// Starts those that work.
pub fn begin(storm: &Rc<Storm>, chance: &mut Chance) -> JoinSet<()> {
    let mut all = JoinSet::new();
    (0..CALLERS).for_each(|_| drop(all.spawn_local(call(storm.clone(), chance.split()))));
    (0..STREAMS).for_each(|_| drop(all.spawn_local(process(storm.clone(), chance.split()))));
    SUBSCRIPTIONS.iter().for_each(|name| drop(all.spawn_local(submit(storm.clone(), name, chance.split()))));
    all
}

/// Starts those that wait for updates.
pub fn subscribe(storm: &Rc<Storm>, chance: &mut Chance) -> JoinSet<()> {
    let mut all = JoinSet::new();
    for (at, name) in SUBSCRIBERS.iter().enumerate() {
        all.spawn_local(updates(storm.clone(), at, name, chance.split()));
    }
    all
}

async fn call(storm: Rc<Storm>, mut chance: Chance) {
    let caller = Caller::new(&storm.link);
    while !storm.calm.get() {
        let mut item = storm.item(Shape::Call, &mut chance);
        let expires = chance.percent(2);
        if expires {
            item = item.with_timeout(chance.millis(1, 10));
        }
        let ticket = caller.ticket();
        let call = caller.client.call(item);
        let answer = if chance.percent(2) {
            match time::timeout(chance.millis(0, 5), call).await {
                Ok(answer) => answer,
                Err(_) => {
                    storm.tally.borrow_mut().abandoned += 1;
                    continue;
                }
            }
        } else {
            soon("an answer", call).await
        };
        match answer {
            Ok(result) => storm.tally.borrow_mut().result(Shape::Call, &result, caller.cuts()),
            Err(status) if expires && status.code() == Code::DeadlineExceeded => storm.tally.borrow_mut().expired += 1,
            Err(status) if status.code() == Code::ResourceExhausted => storm.tally.borrow_mut().refused += 1,
            Err(status) => {
                storm.failed(&caller, ticket, "a call", &status);
                time::sleep(AGAIN).await;
            }
        }
    }
}

async fn process(storm: Rc<Storm>, mut chance: Chance) {
    let caller = Caller::new(&storm.link);
    while !storm.calm.get() {
        let items = storm.items(Shape::Process, &mut chance);
        let mut missing = items.len();
        let ticket = caller.ticket();
        let ended = async {
            let mut results = soon("a stream", caller.client.process(tokio_stream::iter(items))).await?;
            while let Some(result) = soon("a result", results.message()).await? {
                match &result.status {
                    // As it is while the server drains.
                    Some(status) if caller.is_excused(ticket) => return Err(Status::unavailable(status.to_string())),
                    _ => storm.tally.borrow_mut().result(Shape::Process, &result, caller.cuts()),
                }
                missing -= 1;
            }
            Ok(())
        };
        match ended.await {
            Ok(()) if missing == 0 => {}
            Ok(()) => storm.tally.borrow_mut().violation(format!("a stream ended with {missing} results missing")),
            Err(status) => {
                storm.failed(&caller, ticket, "a stream", &status);
                time::sleep(AGAIN).await;
            }
        }
    }
}

async fn submit(storm: Rc<Storm>, subscription: &str, mut chance: Chance) {
    let caller = Caller::new(&storm.link);
    while !storm.calm.get() {
        let items = storm.items(Shape::Submit, &mut chance);
        let ids: Vec<_> = items.iter().map(|item| item.id).collect();
        let name = subscription.to_owned();
        let items = tokio_stream::iter(items.into_iter().map(move |item| item.with_subscription(&name)));
        let ticket = caller.ticket();
        match soon("a receipt", caller.client.submit(items)).await {
            Ok(receipt) => {
                let mut tally = storm.tally.borrow_mut();
                if receipt.accepted != ids.len() as u64 {
                    tally.violation(format!("{receipt:?} for {} items", ids.len()));
                }
                tally.accepted(ids);
            }
            Err(status) => {
                // In order: so these are the first of them.
                let accepted = accepted_before(&status);
                storm.tally.borrow_mut().accepted(ids.into_iter().take(accepted));
                storm.failed(&caller, ticket, "a submission", &status);
                time::sleep(AGAIN).await;
            }
        }
    }
}

/// What a refusal in the middle of a stream says of those before it: `… (items accepted before: 7)`.
fn accepted_before(status: &Status) -> usize {
    let number = || status.message().strip_suffix(')')?.rsplit_once("(items accepted before: ")?.1.parse().ok();
    number().unwrap_or(0)
}

async fn updates(storm: Rc<Storm>, number: usize, subscription: &str, mut chance: Chance) {
    let caller = Caller::new(&storm.link);
    while !storm.over.get() {
        let limit = if storm.lasting.get() || chance.percent(50) { 0 } else { 1 + chance.below(200) };
        let mut count = 0;
        let ticket = caller.ticket();
        let ended = async {
            let mut results = caller.client.updates(subscription, limit).await?;
            if limit == 0 {
                storm.attached.borrow_mut().insert(number, storm.link.cuts());
            }
            // There may be none for long.
            while let Some(result) = results.message().await? {
                storm.tally.borrow_mut().result(Shape::Submit, &result, caller.cuts());
                count += 1;
            }
            Ok(())
        };
        let ended = ended.await;
        storm.attached.borrow_mut().remove(&number);
        match ended {
            // Others' results wait meanwhile.
            Ok(()) if limit > 0 && count == limit => time::sleep(chance.millis(0, 100)).await,
            Ok(()) if caller.is_excused(ticket) => {}
            Ok(()) => storm.tally.borrow_mut().violation(format!("updates ended after {count}, limit {limit}")),
            Err(status) => storm.failed(&caller, ticket, "a subscription", &status),
        }
        time::sleep(AGAIN).await;
    }
}
