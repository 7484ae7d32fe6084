//! Where workers run and with what environment: the CPU that each keeps to, and the variables that each is given.
//!
//! A variable may contain the worker's number *in its pool*, from 0: `CUDA_VISIBLE_DEVICES={worker}` gives each worker of a
//! pool a device of its own, and what one pool's workers have does not change when another pool grows. Pools that share
//! devices use the worker's *slot*, its number over all pools: `CUDA_VISIBLE_DEVICES={slot}`. CPUs are dealt out in turn to
//! the workers of all pools that have the same affinity.

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Deserializer};

use super::{ConfigError, InvalidValue, units};
use crate::process;

/// What stands for the worker's number in a variable's value.
const NUMBER: &str = "{worker}";
/// What stands for its number over all pools.
const SLOT: &str = "{slot}";

/// Which CPU each worker of a pool keeps to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Affinity {
    /// The kernel decides.
    #[default]
    Off,
    /// Each worker keeps to the next CPU that the server may use, over all pools that have this; and from the first again
    /// when there are more workers.
    Auto,
    /// The same with these CPUs.
    Cpus(Vec<u16>),
}

impl FromStr for Affinity {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        let error = || units::invalid(text, "an affinity: give auto, off, or CPUs such as 0-3,8");
        match text.trim() {
            "auto" => return Ok(Affinity::Auto),
            "off" => return Ok(Affinity::Off),
            _ => {}
        }
        let number = |text: &str| {
            let text = text.trim();
            let digits = text.bytes().all(|b| b.is_ascii_digit());
            text.parse().ok().filter(|cpu| digits && *cpu < process::MAX_CPUS).ok_or_else(error)
        };
        let mut cpus: Vec<u16> = Vec::new();
        for part in text.split(',') {
            match part.split_once('-') {
                None => cpus.push(number(part)?),
                Some((first, last)) => {
                    let (first, last) = (number(first)?, number(last)?);
                    if first > last {
                        return Err(error());
                    }
                    cpus.extend(first..=last);
                }
            }
        }
        Ok(Affinity::Cpus(cpus))
    }
}

impl fmt::Display for Affinity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Affinity::Off => f.write_str("off"),
            Affinity::Auto => f.write_str("auto"),
            Affinity::Cpus(cpus) => f.write_str(&ranges(cpus)),
        }
    }
}

/// CPUs as a list is written: `0-3,8`.
fn ranges(cpus: &[u16]) -> String {
    let runs = cpus.chunk_by(|a, b| a.checked_add(1) == Some(*b)).map(|run| match run {
        [first, .., last] => format!("{first}-{last}"),
        one => one.iter().map(u16::to_string).collect(),
    });
    runs.collect::<Vec<_>>().join(",")
}

impl<'de> Deserialize<'de> for Affinity {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
        units::from_text(source, str::parse)
    }
}

/// A variable as it is given on the command line: `[POOL:]NAME=VALUE`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Variable {
    /// The pool whose workers have it; `None`: all.
    pub pool: Option<String>,
    /// Its name.
    pub name: String,
    /// Its value, in which `{worker}` is the worker's number in its pool and `{slot}` its number over all pools.
    pub value: String,
}

impl FromStr for Variable {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        let error =
            || units::invalid(text, "a variable: give [POOL:]NAME=VALUE, such as CUDA_VISIBLE_DEVICES={worker}");
        let (head, value) = text.split_once('=').ok_or_else(error)?;
        let (pool, name) = match head.split_once(':') {
            Some((pool, name)) => (Some(pool.to_owned()), name),
            None => (None, head),
        };
        if !is_variable(name, value) || pool.as_ref().is_some_and(String::is_empty) {
            return Err(error());
        }
        Ok(Variable { pool, name: name.to_owned(), value: value.to_owned() })
    }
}

/// Whether the C library will have it.
fn is_variable(name: &str, value: &str) -> bool {
    !name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0')
}

/// Where the workers of one pool run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    variables: BTreeMap<String, String>,
    /// In turn; none: the kernel decides.
    cpus: Vec<u16>,
    /// Workers of the pools before this one.
    first_slot: u16,
    /// The number of workers in earlier pools with the same affinity.
    first_cpu: u16,
}

impl Place {
    /// With these variables and this affinity.
    pub fn new(variables: BTreeMap<String, String>, affinity: &Affinity) -> Self {
        let cpus = match affinity {
            Affinity::Off => Vec::new(),
            Affinity::Auto => process::allowed_cpus(),
            Affinity::Cpus(cpus) => cpus.clone(),
        };
        Place { variables, cpus, first_slot: 0, first_cpu: 0 }
    }

    /// The same for a pool that comes after others: after so many workers in all, and after so many that the same CPUs are
    /// dealt out to.
    pub fn after(self, workers: u16, on_these_cpus: u16) -> Self {
        Place { first_slot: workers, first_cpu: on_these_cpus, ..self }
    }

    /// Refuses variables that cannot be set, and CPUs that this process may not use.
    pub(super) fn validate(&self, pool: &str) -> Result<(), ConfigError> {
        let pool = || pool.to_owned();
        if let Some((name, _)) = self.variables.iter().find(|(name, value)| !is_variable(name, value)) {
            return Err(ConfigError::Variable { pool: pool(), name: name.clone() });
        }
        let allowed = process::allowed_cpus();
        match self.cpus.iter().find(|cpu| !allowed.contains(cpu)) {
            Some(&cpu) => Err(ConfigError::Cpu { pool: pool(), cpu, allowed: ranges(&allowed) }),
            None => Ok(()),
        }
    }

    /// The variables of the worker with this number in the pool.
    pub fn variables(&self, worker: u16) -> Vec<(String, String)> {
        let slot = self.first_slot.saturating_add(worker);
        let value = |value: &String| value.replace(NUMBER, &worker.to_string()).replace(SLOT, &slot.to_string());
        self.variables.iter().map(|(name, text)| (name.clone(), value(text))).collect()
    }

    /// Those that all workers have alike.
    pub fn constants(&self) -> Vec<(String, String)> {
        let constant =
            self.variables.iter().filter(|(_, value)| ![NUMBER, SLOT].iter().any(|name| value.contains(name)));
        constant.map(|(name, value)| (name.clone(), value.clone())).collect()
    }

    /// The CPU that it keeps to, if to one.
    pub fn cpu(&self, worker: u16) -> Option<u16> {
        let turn = usize::from(self.first_cpu) + usize::from(worker);
        self.cpus.get(turn % self.cpus.len().max(1)).copied()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn affinities_are_read() {
        let cpus = |cpus: &[u16]| Ok(Affinity::Cpus(cpus.to_vec()));
        assert_eq!("auto".parse(), Ok(Affinity::Auto));
        assert_eq!("off".parse(), Ok(Affinity::Off));
        assert_eq!("3".parse(), cpus(&[3]));
        assert_eq!("0-3,8, 5".parse(), cpus(&[0, 1, 2, 3, 8, 5]));
        assert_eq!("1023".parse(), cpus(&[1023]));
        for text in ["", ",", "1,", "-1", "1-", "3-1", "+1", "a", "1024", "99999", "0-1-2", "on"] {
            assert!(text.parse::<Affinity>().is_err(), "{text}");
        }
    }

    #[test]
    fn variables_are_read() {
        let variable = |pool: Option<&str>, name: &str, value: &str| {
            Ok(Variable { pool: pool.map(str::to_owned), name: name.to_owned(), value: value.to_owned() })
        };
        assert_eq!("A=".parse(), variable(None, "A", ""));
        assert_eq!("A=b=c:d,e".parse(), variable(None, "A", "b=c:d,e"));
        assert_eq!("gpu:A={worker}".parse(), variable(Some("gpu"), "A", "{worker}"));
        for text in ["", "A", "=b", ":A=b", "p:=b", "A=\0"] {
            assert!(text.parse::<Variable>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_place_goes_by_the_workers_number() {
        let variables = BTreeMap::from([("A".to_owned(), "{worker}/{worker} {other}".to_owned())]);
        let variables = variables.into_iter().chain([("B".to_owned(), "b".to_owned())]).collect();
        let place = Place::new(variables, &Affinity::Cpus(vec![4, 2]));
        let b = ("B".to_owned(), "b".to_owned());
        assert_eq!(place.constants(), std::slice::from_ref(&b));
        assert_eq!(place.variables(7), [("A".to_owned(), "7/7 {other}".to_owned()), b]);
        assert_eq!([0, 1, 2].map(|worker| place.cpu(worker)), [Some(4), Some(2), Some(4)]);
        let next = place.after(5, 1);
        assert_eq!(next.variables(7)[0].1, "7/7 {other}", "in its pool");
        assert_eq!([0, 1, 2].map(|worker| next.cpu(worker)), [Some(2), Some(4), Some(2)]);
        assert_eq!(Place::new(BTreeMap::new(), &Affinity::Off).cpu(1), None);
        let auto = Place::new(BTreeMap::new(), &Affinity::Auto);
        assert_eq!(auto.cpu(0), process::allowed_cpus().first().copied());
    }

    #[test]
    fn a_slot_counts_over_all_pools() {
        let variables = BTreeMap::from([("A".to_owned(), "gpu{slot}.{worker}".to_owned())]);
        let place = Place::new(variables, &Affinity::Off);
        assert_eq!(place.constants(), []);
        assert_eq!(place.variables(2)[0].1, "gpu2.2");
        assert_eq!(place.after(5, 0).variables(2)[0].1, "gpu7.2");
    }

    proptest! {
        #[test]
        fn what_an_affinity_prints_is_read_back(cpus in proptest::collection::vec(0_u16..1024, 1..20)) {
            let affinity = Affinity::Cpus(cpus);
            prop_assert_eq!(affinity.to_string().parse(), Ok(affinity));
        }
    }
}
