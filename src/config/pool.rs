//! What a configuration says of a pool.

use std::{collections::BTreeMap, fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Deserializer, de};

#[cfg(doc)]
use super::Config;
use super::{Affinity, ByteSize, ConfigError, InvalidValue, WORKERS, is_name, units};

/// A pool with a built-in or a Python handler, written `NAME[:WORKERS]=HANDLER`. The handler is verbatim what follows the `=`.
///
/// ```
/// # use forkring::config::PoolSpec;
/// let pool: PoolSpec = "count:4=exec:wc -c".parse()?;
/// assert_eq!((pool.name.as_str(), pool.workers, pool.handler.as_str()), ("count", Some(4), "exec:wc -c"));
/// # Ok::<(), forkring::config::InvalidValue>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, expecting = "each pool is a table of its own that begins with [[pool]]")]
pub struct PoolSpec {
    /// What clients call it: up to 64 of `A-Z a-z 0-9 . _ -`.
    #[serde(deserialize_with = "units::text")]
    pub name: String,
    /// How many workers it has; `None`: [`Config::workers`].
    #[serde(default, deserialize_with = "some_workers")]
    pub workers: Option<u16>,
    /// What its workers run: `echo`, `echo:SIZE`, `sha256`, `sleep:DURATION`, `exec:COMMAND…`, or `MODULE:FUNCTION` in Python.
    #[serde(deserialize_with = "units::text")]
    pub handler: String,
    /// How long its workers may take for an item, 0 for as long as they like; `None`: [`Config::item_timeout`].
    #[serde(default, deserialize_with = "units::some_duration")]
    pub item_timeout: Option<Duration>,
    /// How much memory each of its workers may have, 0 for no limit; `None`: [`Config::worker_memory`].
    #[serde(default)]
    pub worker_memory: Option<ByteSize>,
    /// Environment variables of its workers, over those in [`Config::worker_env`].
    #[serde(default, deserialize_with = "units::variables")]
    pub worker_env: BTreeMap<String, String>,
    /// Which CPU each of its workers keeps to; `None`: [`Config::affinity`].
    #[serde(default)]
    pub affinity: Option<Affinity>,
    /// Whether one process imports its handler in Python and forks its workers; `None`: [`Config::preload`].
    #[serde(default, deserialize_with = "units::some_flag")]
    pub preload: Option<bool>,
}

impl PoolSpec {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        if !is_name(&self.name, |b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) {
            return Err(ConfigError::PoolName(self.name.clone()));
        }
        if self.handler.is_empty() {
            return Err(ConfigError::NoHandler(self.name.clone()));
        }
        match self.workers {
            Some(workers) if !WORKERS.contains(&workers) => {
                Err(ConfigError::PoolWorkers { pool: self.name.clone(), workers })
            }
            _ => Ok(()),
        }
    }
}

fn some_workers<'de, D: Deserializer<'de>>(source: D) -> Result<Option<u16>, D::Error> {
    units::from_text(source, units::whole_number(WORKERS)).map(Some)
}

/// Reads the pools of a file, for `#[serde(deserialize_with)]`.
pub(super) fn list<'de, D: Deserializer<'de>>(source: D) -> Result<Vec<PoolSpec>, D::Error> {
    struct Pools;

    impl<'de> de::Visitor<'de> for Pools {
        type Value = Vec<PoolSpec>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("each pool is a table of its own that begins with [[pool]]")
        }

        fn visit_seq<A: de::SeqAccess<'de>>(self, mut pools: A) -> Result<Self::Value, A::Error> {
            std::iter::from_fn(|| pools.next_element().transpose()).collect()
        }
    }

    source.deserialize_any(Pools)
}

impl FromStr for PoolSpec {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        let error = || units::invalid(text, "a pool: give NAME[:WORKERS]=HANDLER, such as hash:4=sha256");
        let workers = |count: &str| match count.parse() {
            Ok(workers) if WORKERS.contains(&workers) => Ok(workers),
            _ if count.is_empty() || !count.bytes().all(|b| b.is_ascii_digit()) => Err(error()),
            _ => Err(units::invalid(
                count,
                "a pool's number of workers: choose from 1 to 1024, the most that all pools may have together",
            )),
        };
        const { assert!(*WORKERS.end() == 1024, "the line above says so") };
        let (head, handler) = text.split_once('=').ok_or_else(error)?;
        let (name, workers) = match head.split_once(':') {
            Some((name, count)) => (name, Some(workers(count)?)),
            None => (head, None),
        };
        let pool = Self { name: name.to_owned(), workers, handler: handler.to_owned(), ..Self::default() };
        pool.validate().map_err(|refusal| match refusal {
            ConfigError::PoolName(_) if !name.is_empty() => {
                units::invalid(name, "a pool's name: use 1 to 64 of A-Z, a-z, 0-9, ., _ and -")
            }
            _ => error(),
        })?;
        Ok(pool)
    }
}

impl fmt::Display for PoolSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        if let Some(workers) = self.workers {
            write!(f, ":{workers}")?;
        }
        write!(f, "={}", self.handler)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_pool_is_name_workers_and_a_verbatim_handler() {
        for (text, name, workers, handler) in [
            ("hash=sha256", "hash", None, "sha256"),
            ("hash:4=sha256", "hash", Some(4), "sha256"),
            ("a.b_C-9=exec:sh -c 'x=1; echo \"$x:\"'", "a.b_C-9", None, "exec:sh -c 'x=1; echo \"$x:\"'"),
            ("x:1= echo ", "x", Some(1), " echo "),
        ] {
            let pool = PoolSpec { name: name.into(), workers, handler: handler.into(), ..PoolSpec::default() };
            assert_eq!(text.parse(), Ok(pool), "{text}");
        }
        let error = "é=echo".parse::<PoolSpec>().expect_err("no name").to_string();
        assert!(error.starts_with("`é` is not a pool's name: use 1 to 64 of A-Z"), "{error}");
        for text in
            ["", "hash", "=echo", "hash=", "hash:=echo", "hash:x=echo", "hash:0=echo", "hash:1025=echo", "a b=echo"]
        {
            assert!(text.parse::<PoolSpec>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_a_pool_prints_is_read_back(
            name in "[A-Za-z0-9._-]{1,64}",
            workers in proptest::option::of(1_u16..=1024),
            handler in "\\PC{1,40}",
        ) {
            let pool = PoolSpec { name, workers, handler, ..PoolSpec::default() };
            prop_assert_eq!(pool.to_string().parse::<PoolSpec>(), Ok(pool));
        }
    }
}
