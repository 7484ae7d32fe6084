//! Places where a test may kill this process: between any two shared steps.
//!
//! Without the feature `crash-points` a `crash_point!` is nothing. With it, `FORKRING_CRASH=point:n` (several are
//! separated by commas) sends SIGKILL to the process that passes the point for the n-th time, counted from 1 in each
//! process.

/// Passes a named point. The name is `module.step`, the step being the one that was just made.
macro_rules! crash_point {
    ($name:literal) => {
        #[cfg(feature = "crash-points")]
        $crate::crash_point::pass($name);
    };
}
pub(crate) use crash_point;

#[cfg(feature = "crash-points")]
pub(crate) fn pass(name: &'static str) {
    use std::{
        collections::HashMap,
        sync::{Mutex, OnceLock},
    };

    /// What is left to pass of each armed point.
    static ARMED: OnceLock<Mutex<HashMap<String, u64>>> = OnceLock::new();
    let armed = ARMED.get_or_init(|| {
        let spec = std::env::var("FORKRING_CRASH").unwrap_or_default();
        let points = spec.split(',').filter_map(|one| {
            let (point, n) = one.rsplit_once(':')?;
            Some((point.to_owned(), n.parse().ok()?))
        });
        Mutex::new(points.collect())
    });
    let mut armed = armed.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(left) = armed.get_mut(name) {
        *left = left.saturating_sub(1);
        if *left == 0 {
            crate::process::die();
        }
    }
}
