//! What the control group of this process lets it use, version 2 or 1.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The fewest cores that any group above this process allows it; `None`: no limit.
pub fn cpu_quota() -> Option<f64> {
    let v2 = folders("", "/sys/fs/cgroup").filter_map(|folder| quota_v2(&text(&folder, "cpu.max")?));
    let v1 = folders("cpu", "/sys/fs/cgroup/cpu").filter_map(|folder| {
        let (quota, period) = (text(&folder, "cpu.cfs_quota_us")?, text(&folder, "cpu.cfs_period_us")?);
        quota_v2(&format!("{} {}", quota.trim(), period.trim()))
    });
    v2.chain(v1).min_by(f64::total_cmp)
}

/// The least memory that any group above this process has left; `None`: no limit.
pub fn memory_left() -> Option<u64> {
    let v2 = folders("", "/sys/fs/cgroup").filter_map(|folder| left(&folder, "memory.max", "memory.current"));
    let v1 = folders("memory", "/sys/fs/cgroup/memory")
        .filter_map(|folder| left(&folder, "memory.limit_in_bytes", "memory.usage_in_bytes"));
    v2.chain(v1).min()
}

/// `QUOTA PERIOD`, where a quota of `max` (version 2) or -1 (version 1) is none.
fn quota_v2(text: &str) -> Option<f64> {
    let (quota, period) = text.trim().split_once(' ')?;
    let (quota, period): (u32, u32) = (quota.parse().ok()?, period.parse().ok()?);
    (period > 0).then(|| f64::from(quota) / f64::from(period))
}

fn left(folder: &Path, limit: &str, used: &str) -> Option<u64> {
    let limit: u64 = text(folder, limit)?.trim().parse().ok()?;
    let used: u64 = text(folder, used)?.trim().parse().ok()?;
    Some(limit.saturating_sub(used))
}

fn text(folder: &Path, file: &str) -> Option<String> {
    fs::read_to_string(folder.join(file)).ok()
}

/// The folder of this process's group under `mount`, and of each group above it.
fn folders(controller: &str, mount: &'static str) -> impl Iterator<Item = PathBuf> {
    let membership = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let path = group(&membership, controller).unwrap_or_default();
    let inner = Path::new(mount).join(path.trim_start_matches('/'));
    let groups: Vec<PathBuf> = inner.ancestors().take_while(|f| f.starts_with(mount)).map(Path::to_owned).collect();
    groups.into_iter()
}

/// The path in the line `N:CONTROLLERS:PATH` of the controller; version 2 is the line with none.
fn group(membership: &str, controller: &str) -> Option<String> {
    membership.lines().find_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        controllers.split(',').any(|c| c == controller).then(|| path.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotas_are_cores() {
        assert_eq!(quota_v2("150000 100000\n"), Some(1.5));
        assert_eq!(quota_v2("max 100000\n"), None);
        assert_eq!(quota_v2("-1 100000"), None);
        assert_eq!(quota_v2("1 0"), None);
        assert_eq!(quota_v2(""), None);
    }

    #[test]
    fn the_group_of_a_controller_is_found() {
        let membership = "4:memory:/box/inner\n2:cpuacct,cpu:/\n0::/user.slice\n";
        assert_eq!(group(membership, "memory").as_deref(), Some("/box/inner"));
        assert_eq!(group(membership, "cpu").as_deref(), Some("/"));
        assert_eq!(group(membership, "").as_deref(), Some("/user.slice"));
        assert_eq!(group(membership, "pids"), None);
    }

    #[test]
    fn what_is_left_of_a_limit() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).expect("a temporary file");
        write("used", "300\n");
        for (limit, wanted) in [("1000\n", Some(700)), ("100\n", Some(0)), ("max\n", None)] {
            write("limit", limit);
            assert_eq!(left(folder.path(), "limit", "used"), wanted);
        }
        assert_eq!(left(folder.path(), "absent", "used"), None);
    }
}
