//! Places where a test may kill or stop a process: between any two shared steps.
//!
//! Without the feature `crash-points` a `crash_point!` is nothing. With it the environment says what happens there:
//!
//! | variable | |
//! |---|---|
//! | `FORKRING_CRASH=WHO/POINT:N` | SIGKILL for the process WHO when it passes the point for the N-th time, counted from 1 in each process; several are separated by commas |
//! | `FORKRING_STOP=WHO/POINT:N` | the same with SIGSTOP: it goes on when it is sent SIGCONT |
//! | `FORKRING_CRASHED=FILE` | only the first such process dies: it makes the file, and whoever finds it there lives on. Without it each successor dies as well |
//! | `FORKRING_PASSES=FILE` | each pass appends a line `WHO PID POINT` |
//! | `FORKRING_SINCE=FILE` | no pass counts before there is such a file: for who comes later, and finds something there |
//!
//! WHO is the name of the process without `forkring-`: `front`, `w0`, `w1`, `n0` for the first pool's nursery, and `supervisor`
//! for the parent of all.

/// Passes a named point. The name is `module.step`, the step being the one that was just made.
macro_rules! crash_point {
    ($name:literal) => {
        #[cfg(feature = "crash-points")]
        $crate::crash_point::pass($name);
    };
}
pub(crate) use crash_point;

#[cfg(feature = "crash-points")]
pub(crate) use armed::pass;

#[cfg(feature = "crash-points")]
mod armed {
    use std::{
        collections::HashMap,
        env,
        ffi::OsString,
        fs::{self, File, OpenOptions},
        io::Write,
        path::PathBuf,
        sync::{Mutex, PoisonError},
    };

    use crate::process;

    /// What one process knows of its points.
    struct Armed {
        pid: u32,
        who: String,
        /// What is left to pass of each point at which this process dies.
        left: HashMap<String, u64>,
        /// The same of those at which it stops.
        stops: HashMap<String, u64>,
        crashed: Option<OsString>,
        passes: Option<File>,
        /// What must be there first.
        since: Option<PathBuf>,
    }

    impl Armed {
        fn new() -> Self {
            let comm = fs::read_to_string("/proc/self/comm").unwrap_or_default();
            let who = comm.trim_end().strip_prefix("forkring-").unwrap_or("supervisor").to_owned();
            let points = |variable| {
                let spec = env::var(variable).unwrap_or_default();
                let points = spec.split(',').filter_map(|one| {
                    let (point, n) = one.strip_prefix(&who)?.strip_prefix('/')?.rsplit_once(':')?;
                    Some((point.to_owned(), n.parse().ok()?))
                });
                points.collect()
            };
            let passes = env::var_os("FORKRING_PASSES").map(|file| {
                OpenOptions::new()
                    .append(true)
                    .create(true)
                    .open(&file)
                    .unwrap_or_else(|error| panic!("{file:?}: {error}"))
            });
            Armed {
                pid: std::process::id(),
                left: points("FORKRING_CRASH"),
                stops: points("FORKRING_STOP"),
                crashed: env::var_os("FORKRING_CRASHED"),
                passes,
                since: env::var_os("FORKRING_SINCE").map(PathBuf::from),
                who,
            }
        }

        fn pass(&mut self, name: &str) {
            if self.since.as_ref().is_some_and(|file| !file.exists()) {
                return;
            }
            self.since = None;
            if let Some(passes) = &mut self.passes {
                // One write, so that the lines of several processes do not mix.
                let line = format!("{} {} {name}\n", self.who, self.pid);
                passes.write_all(line.as_bytes()).unwrap_or_else(|error| panic!("FORKRING_PASSES: {error}"));
            }
            if is_due(&mut self.left, name) && self.crashed.as_ref().is_none_or(|file| File::create_new(file).is_ok()) {
                process::die();
            }
            if is_due(&mut self.stops, name) {
                process::stop();
            }
        }
    }

    /// Counts a pass of a point; whether it is one that something happens at.
    fn is_due(left: &mut HashMap<String, u64>, name: &str) -> bool {
        let Some(to_go) = left.get_mut(name) else { return false };
        *to_go = to_go.saturating_sub(1);
        // Once: who was stopped there has gone on.
        *to_go == 0 && left.remove(name).is_some()
    }

    pub(crate) fn pass(name: &'static str) {
        static ARMED: Mutex<Option<Armed>> = Mutex::new(None);
        let mut armed = ARMED.lock().unwrap_or_else(PoisonError::into_inner);
        // A forked child starts to count anew.
        let mine = armed.take().filter(|armed| armed.pid == std::process::id());
        armed.insert(mine.unwrap_or_else(Armed::new)).pass(name);
    }
}
