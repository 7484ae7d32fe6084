//! What the supervisor tells a worker program at its start: one environment variable, [`VARIABLE`], and the descriptors
//! that it names.
//!
//! It is JSON and parsed strictly: a program of another version than the server's must say so rather than guess. The
//! descriptors are inherited by number over exec; everything else is in the segment.

pub(crate) mod nursery;

use std::os::fd::RawFd;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::segment::{ABI, Geometry, Layout};

/// The environment variable.
pub const VARIABLE: &str = "FORKRING_WORKER";
/// Changes when the meaning of anything in it does.
pub(crate) const VERSION: u32 = 2;

/// The contract between a server and a worker program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Contract {
    pub version: u32,
    /// The supervisor: whoever else starts the program does not start a worker.
    pub supervisor: u32,
    /// The segment's name, for messages.
    pub name: String,
    /// The worker's number, over all pools.
    pub worker: u16,
    /// Its pool's name.
    pub pool: String,
    /// How many workers each pool has.
    pub pools: Vec<u16>,
    /// Of the segment: neither its header nor anything else in it is believed, for it may have been written over.
    pub abi: u32,
    pub layout: u64,
    pub geometry: Geometry,
    pub segment: RawFd,
    pub front_bells: Vec<RawFd>,
    pub worker_bells: Vec<RawFd>,
    pub end_bell: RawFd,
    /// The bell, an eventfd, that the worker rings when it has attached: from then on its pool may count on it.
    pub arrival: RawFd,
    /// The timer of an item's timeout and its nanoseconds, if there is one.
    pub item_timer: Option<(RawFd, u64)>,
    /// Whether the start gate was opened before: it is not looked at again.
    pub is_open: bool,
    /// As in a configuration.
    pub spin: String,
    /// The most bytes of a result.
    pub max_message: u64,
}

/// Why there is no contract.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum ContractError {
    #[error("{variable} is not what a forkring server writes: {error}")]
    Malformed { variable: &'static str, error: serde_json::Error },
    #[error(
        "the server speaks version {0} of the worker protocol, this program version {VERSION}: install the same version of both"
    )]
    Version(u64),
}

impl Contract {
    /// With no pool and no descriptors yet.
    pub fn new(supervisor: u32, name: &str, worker: u16, pools: Vec<u16>, layout: &Layout) -> Self {
        Contract {
            version: VERSION,
            supervisor,
            name: name.to_owned(),
            worker,
            pool: String::new(),
            pools,
            abi: ABI,
            layout: layout.hash(),
            geometry: *layout.geometry(),
            segment: -1,
            front_bells: Vec::new(),
            worker_bells: Vec::new(),
            end_bell: -1,
            arrival: -1,
            item_timer: None,
            is_open: false,
            spin: String::new(),
            max_message: 0,
        }
    }

    /// The segment's layout, if this program knows it.
    pub fn layout(&self) -> Option<Layout> {
        Layout::of(self.geometry).ok().filter(|layout| self.abi == ABI && layout.hash() == self.layout)
    }

    /// The numbers of all descriptors.
    pub fn fds(&self) -> impl Iterator<Item = RawFd> {
        let bells = self.front_bells.iter().chain(&self.worker_bells).copied();
        bells.chain([self.segment, self.end_bell, self.arrival]).chain(self.item_timer.map(|(fd, _)| fd))
    }

    /// What the variable is set to.
    pub fn to_text(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string(self)
    }

    /// What it says.
    pub fn from_text(text: &str) -> Result<Self, ContractError> {
        parse(VARIABLE, text)
    }
}

/// Reads what has a version in it.
fn parse<T: DeserializeOwned>(variable: &'static str, text: &str) -> Result<T, ContractError> {
    let malformed = |error| ContractError::Malformed { variable, error };
    let value: serde_json::Value = serde_json::from_str(text).map_err(malformed)?;
    // Before all else: another version may have other fields.
    match value.get("version").and_then(serde_json::Value::as_u64) {
        Some(version) if version != u64::from(VERSION) => Err(ContractError::Version(version)),
        _ => serde_json::from_value(value).map_err(malformed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contract() -> Contract {
        let geometry = Geometry {
            items: 8,
            fronts: 1,
            workers: 2,
            pools: 2,
            request_bytes: 1 << 16,
            result_bytes: 1 << 16,
            letter_bytes: 0,
        };
        let layout = Layout::of(geometry).expect("a layout");
        Contract {
            pool: "hash".to_owned(),
            segment: 3,
            front_bells: vec![4],
            worker_bells: vec![5, 6],
            end_bell: 7,
            arrival: 8,
            spin: "auto".to_owned(),
            max_message: 1 << 20,
            ..Contract::new(7, "forkring", 1, vec![1, 1], &layout)
        }
    }

    #[test]
    fn it_is_read_back() {
        let text = contract().to_text().expect("JSON");
        let read = Contract::from_text(&text).expect("the same");
        assert_eq!(read, contract());
        assert_eq!(read.layout().map(|layout| *layout.geometry()), Some(contract().geometry));
    }

    #[test]
    fn a_segment_of_another_kind_is_not_known() {
        for other in [Contract { abi: ABI + 1, ..contract() }, Contract { layout: 0, ..contract() }] {
            assert!(other.layout().is_none());
        }
    }

    #[test]
    fn anything_else_is_refused() {
        let text = contract().to_text().expect("JSON");
        let error = |from: &str, to: &str| {
            assert!(text.contains(from), "{text}");
            Contract::from_text(&text.replacen(from, to, 1)).expect_err("not a contract").to_string()
        };
        assert!(error("\"version\":2", "\"version\":3").contains("version 3"));
        // Another version may have any other fields.
        assert!(error("\"version\":2", "\"version\":3,\"more\":0").contains("version 3"));
        for (from, to) in [
            ("\"version\":2,", ""),
            ("\"worker\":1", "\"worker\":70000"),
            ("\"worker\":1", "\"worker\":1,\"more\":0"),
            ("[5,6]", "5"),
            ("{", ""),
        ] {
            assert!(error(from, to).starts_with("FORKRING_WORKER is not what"), "{from} → {to}");
        }
    }
}
