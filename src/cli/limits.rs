//! Options of a pool's workers on the command line: `--item-timeout 30s` for all pools, `--item-timeout hash=5s` for one.
//! A pool's name has neither `=` nor `:` nor `,`, and no value has a line's end: so several fit in one environment variable.

use crate::config::{Config, InvalidValue, PoolSpec, Variable};

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
        *one(pool_of(config, &name, || format!("{option} {name}=…"))?) = Some(value);
    }
    Ok(())
}

/// Lays variables over those of a configuration that has its pools.
pub fn lay_variables(variables: Vec<Variable>, config: &mut Config) -> Result<(), BadUsage> {
    for Variable { pool, name, value } in variables {
        let to = match pool {
            None => &mut config.worker_env,
            Some(pool) => &mut pool_of(config, &pool, || format!("--worker-env {pool}:{name}=…"))?.worker_env,
        };
        to.insert(name, value);
    }
    Ok(())
}

/// The pool of this name; `option` is what named it.
fn pool_of<'c>(config: &'c mut Config, name: &str, option: impl Fn() -> String) -> Result<&'c mut PoolSpec, BadUsage> {
    let names: Vec<_> = config.pools.iter().map(|pool| pool.name.as_str()).collect();
    let unknown = BadUsage(format!("{}: there is no pool `{name}`; the pools are {}", option(), names.join(", ")));
    config.pools.iter_mut().find(|pool| pool.name == name).ok_or(unknown)
}
