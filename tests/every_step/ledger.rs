//! What was sent, what was accepted, and what came of it.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
};

use forkring::proto::v1::WorkResult;

/// What must come of an item.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Success with these bytes.
    Bytes(Vec<u8>),
    /// The failure of an item that no worker survives.
    Crashed,
    /// The failure of an item that comes too late.
    Expired,
}

/// The submitted items of one case.
#[derive(Debug, Default)]
pub struct Ledger {
    ids: Cell<u64>,
    wanted: RefCell<BTreeMap<u64, Wanted>>,
    accepted: RefCell<BTreeSet<u64>>,
    results: RefCell<BTreeMap<u64, WorkResult>>,
}

impl Ledger {
    /// The id of an item that is about to be sent.
    pub fn issue(&self, wanted: Wanted) -> u64 {
        let id = self.ids.get() + 1;
        self.ids.set(id);
        self.wanted.borrow_mut().insert(id, wanted);
        id
    }

    /// There is a receipt for these.
    pub fn accept(&self, ids: impl IntoIterator<Item = u64>) {
        self.accepted.borrow_mut().extend(ids);
    }

    /// A result came over a subscription. It may come again if its connection broke, and must be the same then: an item
    /// completes once.
    pub fn receive(&self, result: WorkResult) {
        self.check(&result);
        let mut results = self.results.borrow_mut();
        if let Some(before) = results.get(&result.id) {
            let facts = |result: &WorkResult| {
                let timing = result.timing.unwrap_or_default();
                (result.attempts, result.worker, timing.queued_ns, timing.worked_ns)
            };
            assert_eq!(facts(before), facts(&result), "item {} completed twice", result.id);
        }
        results.insert(result.id, result);
    }

    /// It is what must come of its item.
    pub fn check(&self, result: &WorkResult) {
        let wanted = self.wanted.borrow();
        let wanted = wanted.get(&result.id).unwrap_or_else(|| panic!("nobody sent item {}", result.id));
        match (wanted, result.clone().outcome()) {
            (Wanted::Bytes(bytes), Ok(payload)) if *bytes == payload[..] => {}
            (Wanted::Crashed, Err(status)) if status.reason == "WORKER_CRASHED" => {}
            (Wanted::Expired, Err(status)) if status.reason == "DEADLINE_EXCEEDED" => {}
            (_, outcome) => panic!("item {} ended with {outcome:?}", result.id),
        }
    }

    /// Accepted items of which nothing came yet.
    pub fn missing(&self) -> Vec<u64> {
        let results = self.results.borrow();
        self.accepted.borrow().iter().copied().filter(|id| !results.contains_key(id)).collect()
    }
}
