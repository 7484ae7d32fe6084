//! What a supervisor and a nursery tell each other: a nursery is a program that has loaded what workers need, and forks
//! them when it is asked.
//!
//! It starts with one environment variable, [`VARIABLE`], as a worker does. From then on both speak JSON over a pair of
//! datagram sockets: an [`Order`] at a time, its [`News`], and after a birth `true` or `false`, for whether the worker is known.

use std::os::fd::RawFd;

use serde::{Deserialize, Serialize};

use super::{Contract, ContractError};

/// The environment variable.
pub const VARIABLE: &str = "FORKRING_NURSERY";

/// The contract between a server and a nursery.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Nursery {
    pub version: u32,
    /// The supervisor: the workers' parent, and this program's.
    pub supervisor: u32,
    /// Which one it is, for people.
    pub name: String,
    /// Its pool's name.
    pub pool: String,
    /// The nursery's end of the sockets.
    pub socket: RawFd,
    /// What workers inherit.
    pub inherited: Vec<RawFd>,
}

impl Nursery {
    /// What the variable is set to.
    pub fn to_text(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string(self)
    }

    /// What it says.
    pub fn from_text(text: &str) -> Result<Self, ContractError> {
        super::parse(VARIABLE, text)
    }
}

/// A worker is wanted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Order {
    pub contract: Contract,
    /// For its environment.
    pub variables: Vec<(String, String)>,
    /// Which CPU it keeps to.
    pub cpu: Option<u16>,
    /// How many bytes of memory it may have.
    pub memory: Option<u64>,
}

/// What a nursery has to tell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum News {
    /// All is loaded: orders may come.
    Ready,
    /// The worker that was ordered: a child of the supervisor by now, which does nothing before it is known.
    Born(u32),
    /// There is no such worker, and this is why.
    Stillborn(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nursery_reads_its_contract_back_and_nothing_else() {
        let contract = Nursery {
            version: super::super::VERSION,
            supervisor: 7,
            name: "forkring-n0".to_owned(),
            pool: "hash".to_owned(),
            socket: 3,
            inherited: vec![4, 5],
        };
        let text = contract.to_text().expect("JSON");
        assert_eq!(Nursery::from_text(&text).expect("the same"), contract);
        let error = |from: &str, to: &str| {
            assert!(text.contains(from), "{text}");
            Nursery::from_text(&text.replacen(from, to, 1)).expect_err("not a contract").to_string()
        };
        assert!(error("\"version\":2", "\"version\":3").contains("version 3"));
        assert!(error("\"socket\"", "\"sockets\"").starts_with("FORKRING_NURSERY is not what"));
    }
}
