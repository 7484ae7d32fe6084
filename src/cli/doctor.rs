//! `forkring doctor`: what a server needs of this machine, whether it is there, and how to get it.
//!
//! It changes nothing. What it needs for "enough" it takes from the default configuration.

mod cgroup;

use std::{
    fs::{self, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::PathBuf,
    thread,
};

use anyhow::bail;
use rustix::{
    fs::OFlags,
    process::{PidfdFlags, Resource},
};
use serde::Serialize;

use super::{print, print_json};
use crate::{
    config::Config,
    segment::{self, Layout, PREFIX, SegmentError},
    server,
};

const SHM: &str = "/dev/shm";
/// Descriptors of a server beside its connections, with room: segment, doorbells, pidfds, logs.
const FILES: u64 = 64;

/// Check that this machine is set up for a server, and say how to fix what is not
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  forkring doctor
  forkring doctor --json
  forkring doctor --name myserver           look at that server's segment only

Exit code 1 when a check failed, also when the server that was named has no segment; a warning is not a failure.")]
pub struct DoctorArgs {
    /// Look at the segment of this server only
    #[arg(long)]
    name: Option<String>,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    verdict: Verdict,
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<String>,
}

impl Check {
    fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Ok, detail: detail.into(), fix: None }
    }

    fn warn(name: &'static str, detail: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Warn, detail: detail.into(), fix: Some(fix.into()) }
    }

    fn fail(name: &'static str, detail: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Fail, detail: detail.into(), fix: Some(fix.into()) }
    }
}

#[derive(Serialize)]
struct Report {
    ok: bool,
    checks: Vec<Check>,
}

/// Prints all checks.
pub fn run(args: DoctorArgs) -> anyhow::Result<()> {
    let mut config = Config { pools: vec!["echo=echo".parse()?], ..Config::default() };
    if let Some(name) = &args.name {
        config.name.clone_from(name);
        config.validate()?;
    }
    let need = Layout::of(server::geometry(&config)?)?.total();
    let checks =
        vec![kernel(), pidfd(), cores(), shm(need), memory(need), files(&config), segments(args.name.as_deref())];
    let failed = checks.iter().filter(|check| check.verdict == Verdict::Fail).count();
    if args.json {
        print_json(&Report { ok: failed == 0, checks })?;
    } else {
        print(checks.iter().map(lines).collect::<String>())?;
    }
    match failed {
        0 => Ok(()),
        1 => bail!("1 check failed"),
        _ => bail!("{failed} checks failed"),
    }
}

fn lines(check: &Check) -> String {
    let verdict = match check.verdict {
        Verdict::Ok => "ok  ",
        Verdict::Warn => "warn",
        Verdict::Fail => "FAIL",
    };
    let fix = check.fix.as_ref().map(|fix| format!("{:16}fix: {fix}\n", "")).unwrap_or_default();
    format!("{verdict}  {:<10}{}\n{fix}", check.name, check.detail)
}

fn kernel() -> Check {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    match version(&release) {
        Some(version) if version >= (5, 4) => Check::ok("kernel", format!("{release} (5.4 or newer is needed)")),
        Some(_) => Check::fail("kernel", format!("{release}, but 5.4 is needed, for pidfds"), "run on a newer kernel"),
        None => Check::warn("kernel", format!("`{release}` says no version"), "make sure that it is 5.4 or newer"),
    }
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// A kernel that has pidfds may sit behind a seccomp filter that has not.
fn pidfd() -> Check {
    match rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty()) {
        Ok(_) => Check::ok("pidfd", "pidfd_open works"),
        Err(error) => Check::fail(
            "pidfd",
            format!("pidfd_open: {error}"),
            "allow pidfd_open in the container's seccomp profile (Docker does since 20.10)",
        ),
    }
}

fn cores() -> Check {
    let name = "cores";
    let online = thread_count("/sys/devices/system/cpu/online");
    // The affinity mask and the cgroup's quota, whichever is less.
    let usable = thread::available_parallelism().map_or(1, |cores| cores.get());
    let of = online.filter(|online| *online > usable).map(|online| format!(" of {online}")).unwrap_or_default();
    let few = "with one core a front and its worker take turns: give the process a second one";
    match cgroup::cpu_quota() {
        Some(quota) if online.is_some_and(|online| quota < online as f64) => Check::warn(
            name,
            format!("{usable}{of} usable; the cgroup's quota is {quota:.2} cores, and who uses it up is halted"),
            "raise the quota (docker run --cpus), or keep --workers below it and --spin off",
        ),
        _ if usable == 1 => Check::warn(name, format!("1{of} usable"), few),
        _ => Check::ok(name, format!("{usable}{of} usable, no quota")),
    }
}

/// How many numbers a list such as `0-3,8` has.
fn thread_count(path: &str) -> Option<usize> {
    fs::read_to_string(path).ok()?.trim().split(',').try_fold(0, |count, range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        Some(count + last.checked_sub(first)? + 1)
    })
}

fn shm(need: u64) -> Check {
    let name = SHM;
    let stat = match rustix::fs::statvfs(SHM) {
        Ok(stat) => stat,
        Err(error) => return Check::fail(name, format!("{error}"), format!("mount -t tmpfs tmpfs {SHM}")),
    };
    // A file with no name: it shows that one can be made and leaves nothing.
    let flags = (OFlags::TMPFILE | OFlags::CLOEXEC).bits() as i32;
    if let Err(error) = OpenOptions::new().read(true).write(true).custom_flags(flags).open(SHM) {
        let fix = format!("make it writable: chmod 1777 {SHM}, or a writable tmpfs in the container");
        return Check::fail(name, format!("cannot make a file: {error}"), fix);
    }
    let (size, free) = (stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize);
    let detail = format!("{} free of {}; the default server needs {}", mib(free), mib(size), mib(need));
    if free >= need {
        return Check::ok(name, detail);
    }
    // To what it is now comes what is missing, in whole GiB and never less than one.
    let wanted = (size + (need - free)).div_ceil(1 << 30);
    let fix = format!(
        "docker run --shm-size={wanted}g, or mount -o remount,size={wanted}g {SHM}; or serve with a smaller --arena or fewer --workers"
    );
    Check::fail(name, detail, fix)
}

/// The segment is reserved at start: its memory is taken then, not when it is used.
fn memory(need: u64) -> Check {
    let name = "memory";
    let machine = fs::read_to_string("/proc/meminfo").ok().as_deref().and_then(available);
    let (left, whose) = match (machine, cgroup::memory_left()) {
        (Some(machine), Some(cgroup)) if cgroup < machine => (cgroup, "the cgroup"),
        (None, Some(cgroup)) => (cgroup, "the cgroup"),
        (Some(machine), _) => (machine, "the machine"),
        (None, None) => return Check::warn(name, "cannot tell how much is left", "mount /proc"),
    };
    let detail = format!("{} left on {whose}; the default server reserves {}", mib(left), mib(need));
    if left >= need {
        return Check::ok(name, detail);
    }
    Check::fail(name, detail, "give it more, or serve with a smaller --arena or fewer --workers")
}

/// `MemAvailable` of `/proc/meminfo`, in bytes.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn files(config: &Config) -> Check {
    let need = u64::from(config.max_connections) + 4 * u64::from(config.workers) + FILES;
    let limit = rustix::process::getrlimit(Resource::Nofile);
    match limit.current {
        Some(soft) if soft < need => Check::warn(
            "files",
            format!("{soft} may be open, but {} connections need {need}", config.max_connections),
            format!("ulimit -n {need} (LimitNOFILE={need} with systemd), or serve with fewer --max-connections"),
        ),
        Some(soft) => Check::ok("files", format!("{soft} may be open")),
        None => Check::ok("files", "any number may be open"),
    }
}

fn segments(only: Option<&str>) -> Check {
    let name = "segments";
    if let Some(missing) = only.and_then(missing) {
        return missing;
    }
    let (stale, alive) = match look(only) {
        Ok(found) => found,
        Err(error) => return Check::warn(name, format!("cannot look for them: {error}"), format!("ls {SHM}")),
    };
    let servers = format!("{alive} in use");
    if stale.is_empty() {
        return Check::ok(name, format!("{servers}, none left behind"));
    }
    let bytes = stale.iter().map(|segment| segment.bytes).sum();
    let paths = stale.iter().map(|segment| segment.path.display().to_string()).collect::<Vec<_>>().join(" ");
    let detail = format!("{servers}, {} left behind by servers that are gone ({})", stale.len(), mib(bytes));
    let fix = "start the server of that name as it was started to finish what it had accepted";
    Check::warn(name, detail, format!("{fix}, or with --fresh to throw that away; or rm {paths}"))
}

/// Returns a failed check if the named server has no segment, or one that cannot be inspected.
fn missing(server: &str) -> Option<Check> {
    let error = segment::inspect(server).err()?;
    let path = format!("{SHM}/{PREFIX}{server}");
    let is_absent = matches!(&error, SegmentError::Io { error, .. } if error.kind() == io::ErrorKind::NotFound);
    if !is_absent {
        return Some(Check::fail("segments", error.to_string(), format!("ls -l {path}")));
    }
    let detail = format!("there is no segment {path}: no server `{server}` runs or has left one behind");
    let others = servers().unwrap_or_default();
    let fix = match others.is_empty() {
        true => format!("start it: forkring serve --name {server}"),
        false => format!("start it, or name a server that has one: {}", others.join(", ")),
    };
    Some(Check::fail("segments", detail, fix))
}

/// Lists the names of the servers that have a segment, in alphabetical order.
fn servers() -> io::Result<Vec<String>> {
    let mut servers = Vec::new();
    for entry in fs::read_dir(SHM)? {
        servers.extend(entry?.file_name().to_str().and_then(|file| file.strip_prefix(PREFIX)).map(str::to_owned));
    }
    servers.sort();
    Ok(servers)
}

/// A segment whose server is dead.
struct StaleSegment {
    path: PathBuf,
    bytes: u64,
}

/// The segments that dead servers left behind, and how many belong to live ones; of one server when it is named.
/// What cannot be opened is another user's, who should look after it.
fn look(only: Option<&str>) -> io::Result<(Vec<StaleSegment>, usize)> {
    let (mut stale, mut alive) = (Vec::new(), 0);
    for server in servers()?.iter().filter(|server| only.is_none_or(|only| only == *server)) {
        match segment::inspect(server) {
            Ok(info) if info.alive => alive += 1,
            Ok(info) => {
                let path = PathBuf::from(format!("{SHM}/{PREFIX}{server}"));
                stale.push(StaleSegment { path, bytes: info.size });
            }
            Err(_) => {}
        }
    }
    Ok((stale, alive))
}

/// In MiB, rounded down, so that what is missing is not rounded away.
fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segment::Geometry;

    #[test]
    fn a_kernels_release_is_read() {
        assert_eq!(version("6.18.44-fc-v669"), Some((6, 18)));
        assert_eq!(version("5.4"), Some((5, 4)));
        assert_eq!(version("4.19.0+"), Some((4, 19)));
        assert_eq!(version("what"), None);
        assert!(version("5.10.0") > Some((5, 4)));
    }

    #[test]
    fn lists_of_cores_and_available_memory_are_read() {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        let count = |text: &str| {
            fs::write(file.path(), text).expect("a temporary file");
            thread_count(file.path().to_str().expect("text"))
        };
        assert_eq!((count("0\n"), count("0-3,8\n"), count("3-0"), count("")), (Some(1), Some(5), None, None));
        assert_eq!(available("MemTotal: 9 kB\nMemAvailable:   12 kB\n"), Some(12 << 10));
        assert_eq!(available("MemTotal: 9 kB\n"), None);
    }

    #[test]
    fn too_little_memory_is_a_failure_that_says_how_much() {
        let check = shm(1 << 50);
        assert_eq!(check.verdict, Verdict::Fail);
        assert!(check.detail.ends_with("needs 1073741824 MiB"), "{}", check.detail);
        assert!(check.fix.is_some_and(|fix| fix.contains("--shm-size=")));
        assert_eq!(memory(1 << 50).verdict, Verdict::Fail);
        assert_eq!(memory(0).verdict, Verdict::Ok);
    }

    #[test]
    fn more_connections_than_files_is_a_warning() {
        let config = Config { max_connections: u32::MAX, ..Config::default() };
        let unlimited = rustix::process::getrlimit(Resource::Nofile).current.is_none_or(|soft| soft > u32::MAX.into());
        assert_eq!(files(&config).verdict, if unlimited { Verdict::Ok } else { Verdict::Warn });
    }

    #[test]
    fn a_segment_is_stale_when_its_server_is_dead() {
        let server = format!("doctor-{}", std::process::id());
        let geometry = Geometry {
            items: 8,
            fronts: 1,
            workers: 1,
            pools: 1,
            request_bytes: 4096,
            result_bytes: 4096,
            letter_bytes: 0,
        };
        let mut owner = segment::SegmentOwner::create(&server, geometry).expect("a segment");
        let (stale, alive) = look(Some(&server)).expect("a look");
        assert_eq!((stale.len(), alive), (0, 1));

        // Its name stays, as after a kill.
        owner.disown();
        drop(owner);
        let path = PathBuf::from(format!("{SHM}/{PREFIX}{server}"));
        let clean = tempfile::TempPath::try_from_path(path.clone()).expect("a path");
        let (stale, alive) = look(Some(&server)).expect("a look");
        assert_eq!(stale.iter().map(|segment| &segment.path).collect::<Vec<_>>(), [&path]);
        assert_eq!(alive, 0);
        let check = segments(Some(&server));
        assert!(check.verdict == Verdict::Warn && check.fix.is_some_and(|fix| fix.ends_with(&server)));

        drop(clean);
        let check = segments(Some(&server));
        assert!(check.verdict == Verdict::Fail && check.detail.contains("there is no segment"), "{}", check.detail);
    }
}
