//! A memory cgroup of a test's own, of version 1 or 2, for a server that shall meet the OOM killer.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

/// See the module. Removed when dropped, once those in it are gone.
#[derive(Debug)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// One whose processes may have so many bytes of memory; none where this test may not make such.
    pub fn with_memory(name: &str, bytes: u64) -> Option<Self> {
        let own = fs::read_to_string("/proc/self/cgroup").ok()?;
        // NUMBER:CONTROLLERS:PATH
        let paths = own.lines().filter_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            let root = match controllers {
                "" => "/sys/fs/cgroup",
                "memory" => "/sys/fs/cgroup/memory",
                _ => return None,
            };
            Some(Path::new(root).join(path.trim_start_matches('/')))
        });
        paths.filter_map(|parent| Self::make(&parent, name, bytes).ok()).next()
    }

    fn make(parent: &Path, name: &str, bytes: u64) -> io::Result<Self> {
        // Of version 2, and refused if it is not the root and has processes of its own.
        let _ = fs::write(parent.join("cgroup.subtree_control"), "+memory");
        let group = Cgroup(parent.join(name));
        fs::create_dir(&group.0)?;
        let set = |file, value: u64| fs::write(group.0.join(file), value.to_string());
        set("memory.max", bytes).or_else(|_| set("memory.limit_in_bytes", bytes))?;
        // Nothing is to be swapped out instead.
        let _ = set("memory.swap.max", 0).or_else(|_| set("memory.swappiness", 0));
        Ok(group)
    }

    /// Puts a process into it, with all of its threads.
    pub fn add(&self, pid: i32) -> io::Result<()> {
        fs::write(self.0.join("cgroup.procs"), pid.to_string())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let begin = Instant::now();
        // The files in it go with it. It is busy as long as a killed process is on its way out.
        while fs::remove_dir(&self.0).is_err() && self.0.exists() && begin.elapsed() < super::PATIENCE {
            thread::sleep(Duration::from_millis(2));
        }
    }
}
