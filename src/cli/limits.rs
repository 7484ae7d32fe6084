//! Limits of a pool's workers on the command line: `--item-timeout 30s` for all pools, `--item-timeout hash=5s` for one.
//! A pool's name has neither `=` nor `,`, so several fit in one environment variable.

use crate::config::{Config, InvalidValue, PoolSpec};

use super::BadUsage;

/// A value for one pool, or for all that have none of their own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limit<T> {
    pool: Option<String>,
    value: T,
}

impl<T> Limit<T> {
    /// Reads `[POOL=]VALUE`.
    pub fn parse(text: &str, value: impl Fn(&str) -> Result<T, InvalidValue>) -> Result<Self, InvalidValue> {
        let (pool, text) = match text.split_once('=') {
            Some((pool, text)) => (Some(pool.to_owned()), text),
            None => (None, text),
        };
        Ok(Limit { pool, value: value(text)? })
    }
}

/// Lays limits over a configuration that has its pools. `all` and `one` are where they belong.
pub fn lay<T>(
    option: &str,
    limits: Vec<Limit<T>>,
    config: &mut Config,
    all: impl Fn(&mut Config) -> &mut T,
    one: impl Fn(&mut PoolSpec) -> &mut Option<T>,
) -> Result<(), BadUsage> {
    for Limit { pool, value } in limits {
        let Some(name) = pool else {
            *all(config) = value;
            continue;
        };
        let Some(pool) = config.pools.iter_mut().find(|pool| pool.name == name) else {
            return Err(BadUsage(format!("{option} {name}=…: there is no pool `{name}`; name one that is there")));
        };
        *one(pool) = Some(value);
    }
    Ok(())
}
