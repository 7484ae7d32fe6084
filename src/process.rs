//! Processes: fork while it is safe, children that die with their parent, pidfds, and facts from `/proc`.
//!
//! # What it promises
//!
//! - [`fork`] happens only while this process has one thread, so that no lock of any library can be held by a thread
//!   that the child does not have. That is why gRPC and fork cannot hurt each other here.
//! - A child never runs a destructor or an exit handler of its parent's: it ends in `_exit`, also when it panics.
//! - A child is killed when its parent dies, even if the parent died before the child could ask for that.
//! - A [`Title`] is shown by `ps` instead of the command line, which stays as it is for whoever reads it in this process.
//! - While there is a [`DeadChildren`], a child that died is there until it is reaped, whatever this process was started with.
#![allow(unsafe_code)]

use std::{
    env, fs, io,
    os::{
        fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::process::{CommandExt, ExitStatusExt},
    },
    panic::{self, AssertUnwindSafe},
    process::{Command, ExitStatus},
};

use nix::{
    sys::signal::{self, SaFlags, SigAction, SigHandler, SigSet},
    unistd::ForkResult,
};
use rustix::{
    event::{EventfdFlags, eventfd},
    io::{Errno, FdFlags, fcntl_getfd, fcntl_setfd, read, retry_on_intr, write},
    process::{
        Pid, PidfdFlags, PrctlMmMap, Resource, Rlimit, Signal, WaitId, WaitIdOptions, WaitOptions,
        configure_virtual_memory_map,
    },
    thread::{CpuSet, sched_getaffinity, sched_setaffinity},
};

/// Nanoseconds of CLOCK_MONOTONIC, which all processes of a machine share.
#[inline]
pub fn now() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// A child, known by a pidfd: its pid is not reused before it is reaped.
#[derive(Debug)]
pub struct Child {
    pid: Pid,
    /// Readable once the child is dead.
    pub pidfd: OwnedFd,
}

/// While it lives, dead children wait to be reaped. That is what SIGCHLD does by itself, but who ignores it loses them, and so
/// do the programs that it starts.
#[derive(Debug)]
pub struct DeadChildren {
    before: SigAction,
}

impl DeadChildren {
    /// Keeps them.
    pub fn keep() -> io::Result<Self> {
        let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
        // SAFETY: no handler is installed that could do what a handler may not.
        let before = unsafe { signal::sigaction(signal::Signal::SIGCHLD, &default) }?;
        Ok(DeadChildren { before })
    }
}

impl Drop for DeadChildren {
    fn drop(&mut self) {
        // SAFETY: what was installed before is as good as it was. It cannot fail: it is the action of a signal that has one.
        let _ = unsafe { signal::sigaction(signal::Signal::SIGCHLD, &self.before) };
    }
}

/// Why a process was not forked.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum ForkError {
    #[error(
        "cannot fork: this process has {} threads ({}). Start the server before anything that starts threads: a tokio \
         runtime, a gRPC channel, a logger or a library's thread pool",
        names.len(),
        names.join(", ")
    )]
    Threads { names: Vec<String> },
    #[error("cannot fork: {0}")]
    Io(#[from] io::Error),
}

/// The names of this process's threads.
pub fn threads() -> io::Result<Vec<String>> {
    fs::read_dir("/proc/self/task")?
        .map(|task| Ok(fs::read_to_string(task?.path().join("comm"))?.trim_end().to_owned()))
        .collect()
}

/// Forks a child that runs `main` under the name that `ps` and `top` show, and exits with what it returns. After an error there
/// is no child, and none has begun with `main`: that waits until its pidfd is there.
pub fn fork(name: &str, main: impl FnOnce() -> u8) -> Result<Child, ForkError> {
    let names = threads()?;
    if names.len() != 1 {
        return Err(ForkError::Threads { names });
    }
    let parent = rustix::process::getpid();
    let known = eventfd(0, EventfdFlags::CLOEXEC).map_err(io::Error::from)?;
    // SAFETY: there is one thread, as just checked, so the child may do all that the parent may. It never returns
    // into the parent's frames: it ends in `_exit` below.
    let pid = match unsafe { nix::unistd::fork() }.map_err(io::Error::from)? {
        ForkResult::Child => {
            let code = panic::catch_unwind(AssertUnwindSafe(|| {
                if let Err(error) = die_with(parent) {
                    eprintln!("forkring: cannot tie a child to its parent: {error}");
                    return 1;
                }
                let _ = fs::write("/proc/self/comm", name);
                // It ends with what it was told, or with a SIGKILL.
                let _ = retry_on_intr(|| read(&known, &mut [0_u8; 8]));
                drop(known);
                main()
            }));
            exit(code.unwrap_or(101));
        }
        ForkResult::Parent { child } => Pid::from_raw(child.as_raw()).ok_or(io::Error::from(Errno::SRCH))?,
    };
    // The child is ours and not reaped, so the pid is its own.
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty());
    match pidfd.and_then(|pidfd| write(&known, &1_u64.to_ne_bytes()).map(|_| pidfd)) {
        Ok(pidfd) => Ok(Child { pid, pidfd }),
        Err(error) => {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
            let _ = retry_on_intr(|| rustix::process::waitpid(Some(pid), WaitOptions::empty()));
            Err(io::Error::from(error).into())
        }
    }
}

/// SIGKILL when the parent dies; at once if it already has.
fn die_with(parent: Pid) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    if rustix::process::getppid() != Some(parent) {
        die();
    }
    Ok(())
}

/// The same for a program that a supervisor has started: false if its parent is another.
pub fn die_with_supervisor(supervisor: u32) -> io::Result<bool> {
    let parent = rustix::process::getppid();
    match parent.filter(|parent| parent.as_raw_nonzero().get().unsigned_abs() == supervisor) {
        Some(parent) => die_with(parent).map(|()| true),
        None => Ok(false),
    }
}

/// SIGKILL to ourselves.
pub fn die() -> ! {
    let _ = rustix::process::kill_process(rustix::process::getpid(), Signal::KILL);
    // SIGKILL of oneself is delivered before the call returns; this is for the compiler.
    std::process::abort()
}

/// SIGSTOP to ourselves.
#[cfg(feature = "crash-points")]
pub fn stop() {
    let _ = rustix::process::kill_process(rustix::process::getpid(), Signal::STOP);
}

/// Ends this process with no destructors and no exit handlers: they are the parent's.
pub fn exit(code: u8) -> ! {
    // SAFETY: `_exit` has no preconditions.
    unsafe { nix::libc::_exit(code.into()) }
}

/// The title of this process, which `ps -o args` shows instead of its command line for as long as this lives.
#[derive(Debug)]
pub struct Title {
    /// Where the command line was before.
    before: (u64, u64),
}

impl Title {
    /// Sets it. Refused unless this process has one thread; and the kernel may lack what it takes
    /// (`CONFIG_CHECKPOINT_RESTORE`).
    ///
    /// The kernel is told to look for the command line elsewhere. The command line itself is not written over, because
    /// `std::env::args` reads it whenever it is asked.
    pub fn set(text: &str) -> io::Result<Self> {
        let mut line: Vec<u8> = text.bytes().filter(|byte| *byte != 0).collect();
        line.push(0);
        // For as long as the process lives: anybody may ask the kernel for it at any time.
        let line: &'static [u8] = line.leak();
        let start = line.as_ptr().expose_provenance() as u64;
        Ok(Title { before: move_command_line((start, start + line.len() as u64))? })
    }

    /// Leaves it for good.
    pub fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for Title {
    fn drop(&mut self) {
        // If there are more threads by now, or a filter of system calls, the title stays.
        let _ = move_command_line(self.before);
    }
}

/// Returns the title of a worker.
pub fn worker_title(number: u16, pool: &str) -> String {
    format!("forkring: worker {number} {pool}")
}

/// Tells the kernel where this process's command line is. Returns where it was.
fn move_command_line((arg_start, arg_end): (u64, u64)) -> io::Result<(u64, u64)> {
    if threads()?.len() != 1 {
        return Err(io::Error::other("a title is not set beside threads that may allocate memory meanwhile"));
    }
    let stat = fs::read_to_string("/proc/self/stat")?;
    let malformed = || io::Error::from(io::ErrorKind::InvalidData);
    let fields = stat.rsplit_once(") ").ok_or_else(malformed)?.1;
    let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
    // As proc_pid_stat(5) numbers them; the third comes first here.
    let field = |number: usize| fields.get(number - 3).and_then(|text| text.parse().ok()).ok_or_else(malformed);
    let before = (field(48)?, field(49)?);
    let mut map = PrctlMmMap {
        start_code: field(26)?,
        end_code: field(27)?,
        start_data: field(45)?,
        end_data: field(46)?,
        start_brk: field(47)?,
        brk: 0,
        start_stack: field(28)?,
        arg_start,
        arg_end,
        env_start: field(50)?,
        env_end: field(51)?,
        // Left as they are.
        auxv: std::ptr::null_mut(),
        auxv_size: 0,
        exe_fd: -1,
    };
    // SAFETY: the kernel gets back what it has just told, but for the command line, of which it only reads. The end of the heap
    // is asked for last: nobody can move it until it is set to the same again, for there is no other thread, as just checked, and
    // nothing is allocated in between.
    unsafe {
        map.brk = nix::libc::sbrk(0).expose_provenance() as u64;
        configure_virtual_memory_map(&map)?;
    }
    Ok(before)
}

/// Whether the orphans of this process's descendants become its children, and not those of a process above it.
pub fn adopt_orphans(adopt: bool) -> io::Result<()> {
    Ok(rustix::process::set_child_subreaper(adopt.then(rustix::process::getpid))?)
}

/// The pids of this process's children; none, if the kernel is one that does not tell. Right only while there is one thread.
pub fn children() -> io::Result<Vec<u32>> {
    let pid = std::process::id();
    let list = match fs::read_to_string(format!("/proc/self/task/{pid}/children")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        list => list?,
    };
    Ok(list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect())
}

/// Whether a child is dead and not reaped. False for what is no child.
pub fn is_dead_child(pid: u32) -> bool {
    look_after(pid, WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT)
}

/// Reaps a child if it is dead.
pub fn reap_dead_child(pid: u32) {
    look_after(pid, WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
}

fn look_after(pid: u32, options: WaitIdOptions) -> bool {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    pid.is_some_and(|pid| matches!(rustix::process::waitid(WaitId::Pid(pid), options), Ok(Some(_))))
}

impl Child {
    /// A child that another process has forked for us, and that became ours. An error if it is not: a pid that was told
    /// may be anybody's.
    pub fn adopted(pid: u32) -> io::Result<Self> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::Error::from(Errno::SRCH))?;
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
        // ECHILD if it is another's. Ours is not reaped, as nobody else can, and so the pid is its own.
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), options)?;
        Ok(Child { pid, pidfd })
    }

    /// The child's pid.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Sends SIGKILL. A child that is dead already is no error.
    pub fn kill(&self) -> io::Result<()> {
        self.signal(Signal::KILL)
    }

    /// Sends a signal. A child that is dead already is no error.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        match rustix::process::pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// How the child died, waiting for its death if need be; it stays a zombie, and its pid its own.
    pub fn peek(&self) -> io::Result<ExitStatus> {
        self.wait(WaitIdOptions::EXITED | WaitIdOptions::NOWAIT)
    }

    /// Reaps the child, waiting for its death if need be. Only now may its pid be reused.
    pub fn reap(self) -> io::Result<ExitStatus> {
        self.wait(WaitIdOptions::EXITED)
    }

    fn wait(&self, options: WaitIdOptions) -> io::Result<ExitStatus> {
        loop {
            match rustix::process::waitid(WaitId::Pid(self.pid), options) {
                Ok(Some(status)) => {
                    let raw = match (status.exit_status(), status.terminating_signal()) {
                        (Some(code), _) => code << 8,
                        (None, Some(signal)) => signal,
                        (None, None) => 0,
                    };
                    return Ok(ExitStatus::from_raw(raw));
                }
                Ok(None) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// A command that is killed when this process dies, and that gets signals: a worker's program must not outlive the
/// worker, nor inherit what the supervisor's children block.
pub fn dies_with_us(command: &mut Command) -> &mut Command {
    let parent = rustix::process::getpid();
    // SAFETY: between fork and exec only async-signal-safe calls may be made; these are prctl, getppid, kill and
    // pthread_sigmask.
    unsafe {
        command.pre_exec(move || {
            die_with(parent)?;
            SigSet::empty().thread_set_mask().map_err(io::Error::from)
        })
    }
}

/// Holds Ctrl-C back from a command until the command lets it in. A Python that is interrupted while it starts shows a
/// traceback of its own; its program can choose what an interrupt does, and then lets in what has come meanwhile.
pub fn holds_interrupts(command: &mut Command) -> &mut Command {
    // SAFETY: between fork and exec only async-signal-safe calls may be made; this is pthread_sigmask.
    unsafe {
        command.pre_exec(|| {
            let mut interrupts = SigSet::empty();
            interrupts.add(signal::Signal::SIGINT);
            interrupts.thread_block().map_err(io::Error::from)
        })
    }
}

/// Limits the memory of this process and of each that it starts: what it has for writing and for itself alone, which is heap
/// and threads' stacks. Not the whole address space, which would count the segment, and not what is resident, which the
/// kernel has no limit for. An allocation beyond it fails.
pub fn limit_memory(bytes: u64) -> io::Result<()> {
    // What the hard limit forbids anyway need not be allowed.
    let most = |other: Option<u64>| Some(other.map_or(bytes, |other| other.min(bytes)));
    let before = rustix::process::getrlimit(Resource::Data);
    let limit = Rlimit { current: most(before.maximum), maximum: most(before.maximum) };
    Ok(rustix::process::setrlimit(Resource::Data, limit)?)
}

/// CPUs have numbers below this.
pub const MAX_CPUS: u16 = CpuSet::MAX_CPU as u16;

/// The CPUs that this process may use, in order.
pub fn allowed_cpus() -> Vec<u16> {
    // Fails only if there are more CPUs than a set has room for, and then none can be chosen.
    let set = sched_getaffinity(None).unwrap_or_else(|_| CpuSet::new());
    (0..MAX_CPUS).filter(|cpu| set.is_set(usize::from(*cpu))).collect()
}

/// Keeps this process, and each that it starts, to one CPU.
pub fn keep_to(cpu: u16) -> io::Result<()> {
    let mut set = CpuSet::new();
    if cpu >= MAX_CPUS {
        return Err(Errno::INVAL.into());
    }
    set.set(usize::from(cpu));
    Ok(sched_setaffinity(None, &set)?)
}

/// Sets environment variables. Refused unless this process has one thread.
pub fn set_variables(variables: &[(String, String)]) -> io::Result<()> {
    if variables.is_empty() {
        return Ok(());
    }
    if threads()?.len() != 1 {
        return Err(io::Error::other("an environment is not changed under threads that may read it"));
    }
    for (name, value) in variables {
        // SAFETY: nobody reads the environment meanwhile, for there is no other thread, as just checked.
        unsafe { env::set_var(name, value) };
    }
    Ok(())
}

/// Replaces this process by a command, in which these descriptors are open under the numbers that they have here. Returns
/// only if that fails.
pub fn exec(command: &mut Command, inherited: &[&dyn AsFd]) -> io::Error {
    let set = inherited.iter().try_for_each(|fd| fcntl_setfd(fd, FdFlags::empty()));
    match set {
        Ok(()) => command.exec(),
        Err(error) => error.into(),
    }
}

/// Takes a descriptor that [`exec`] has left open, and keeps it from being inherited further.
pub fn inherited(fd: RawFd) -> io::Result<OwnedFd> {
    // The standard ones belong to the program.
    if fd <= 2 {
        return Err(Errno::BADF.into());
    }
    // SAFETY: a number above 2 is never the reserved one, and one that is not open is an error of the call.
    let flags = fcntl_getfd(unsafe { BorrowedFd::borrow_raw(fd) })?;
    // What this program has opened itself, or has taken here before, is CLOEXEC.
    if flags.contains(FdFlags::CLOEXEC) {
        return Err(Errno::BADF.into());
    }
    // SAFETY: it is open, and was inherited and not taken yet, as just checked, so nobody owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    fcntl_setfd(&fd, FdFlags::CLOEXEC)?;
    Ok(fd)
}

/// Makes the allocator keep up to so many MiB of what was freed, in buffers of up to half of that. By default glibc returns
/// those of more than 128 KiB to the kernel one by one, and HTTP/2 frames of that size then cost more in page faults than in
/// copies.
pub fn keep_freed_memory(mib: u8) {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt may be called at any time; a value it does not like it ignores.
    unsafe {
        nix::libc::mallopt(nix::libc::M_MMAP_THRESHOLD, i32::from(mib) << 19);
        nix::libc::mallopt(nix::libc::M_TRIM_THRESHOLD, i32::from(mib) << 20);
    }
}

/// When a process started, in clock ticks since boot: with the pid, its identity.
pub fn start_time(pid: u32) -> io::Result<u64> {
    state_and_start(pid).map(|(_, start)| start)
}

/// Whether the process with this pid and start time can still run.
pub fn lives(pid: u32, start: u64) -> bool {
    matches!(state_and_start(pid), Ok((state, of)) if of == start && !['Z', 'X'].contains(&state))
}

fn state_and_start(pid: u32) -> io::Result<(char, u64)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, field 2, may contain anything, also `)`: count from the last one. The state is field 3, the start time 22.
    let fields = stat.rsplit_once(')').and_then(|(_, rest)| {
        let mut fields = rest.split_whitespace();
        let state = fields.next()?.chars().next()?;
        Some((state, fields.nth(18)?.parse().ok()?))
    });
    fields.ok_or_else(|| io::Error::other("unreadable /proc/PID/stat"))
}

/// Differs after each boot: pids and start times of another boot mean nothing.
pub fn boot_id() -> io::Result<[u64; 2]> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let id = u128::from_str_radix(&digits, 16).map_err(io::Error::other)?;
    Ok([(id >> 64) as u64, id as u64])
}

/// How many cores this process may run on.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_of_our_own() {
        let me = std::process::id();
        assert!(start_time(me).unwrap() > 0);
        assert_eq!(start_time(me).unwrap(), start_time(me).unwrap());
        assert_ne!(boot_id().unwrap(), [0, 0]);
        assert!(cores() > 0);
        assert!(start_time(u32::MAX).is_err());
        let start = start_time(me).unwrap();
        assert!(lives(me, start) && !lives(me, start + 1) && !lives(u32::MAX, start));
    }

    #[test]
    fn only_what_was_inherited_is_taken_and_once() {
        let file = fs::File::open("/proc/self/stat").unwrap();
        let fd = rustix::io::fcntl_dupfd_cloexec(&file, 3).unwrap();
        let number = std::os::fd::AsRawFd::as_raw_fd(&fd);
        assert!(inherited(number).is_err(), "it is our own");
        fcntl_setfd(&fd, FdFlags::empty()).unwrap();
        std::mem::forget(fd);
        let taken = inherited(number).unwrap();
        assert!(inherited(number).is_err(), "it was taken");
        drop(taken);
        assert!(inherited(number).is_err(), "it is closed");
        assert!(inherited(1).is_err() && inherited(-1).is_err());
    }

    #[test]
    fn a_thread_keeps_to_its_cpu() {
        let last = *allowed_cpus().last().unwrap();
        // In a thread of its own, whose end it is.
        let allowed = std::thread::spawn(move || keep_to(last).map(|()| allowed_cpus())).join().unwrap();
        assert_eq!(allowed.unwrap(), [last]);
        assert!(keep_to(MAX_CPUS).is_err());
    }

    #[test]
    fn only_a_child_is_adopted() {
        assert!(Child::adopted(std::process::id()).is_err(), "ourselves");
        assert!(Child::adopted(1).is_err() && Child::adopted(0).is_err() && Child::adopted(u32::MAX).is_err());
        let mut child = Command::new("sh").args(["-c", "read x"]).stdin(std::process::Stdio::piped()).spawn().unwrap();
        let adopted = Child::adopted(child.id()).unwrap();
        assert!(!is_dead_child(adopted.pid()));
        drop(child.stdin.take());
        assert_eq!(adopted.peek().unwrap().code(), Some(1), "there was nothing to read");
        assert!(is_dead_child(adopted.pid()));
        reap_dead_child(adopted.pid());
        assert!(!is_dead_child(adopted.pid()) && Child::adopted(child.id()).is_err());
        assert!(child.wait().is_err(), "it was reaped");
    }

    #[test]
    fn another_parent_is_no_supervisor() {
        assert!(!die_with_supervisor(std::process::id()).unwrap());
    }

    #[test]
    fn refuses_to_fork_with_threads_and_names_them() {
        // The test runner's own threads are reason enough.
        let error = std::thread::Builder::new()
            .name("grpc-lookalike".into())
            .spawn(|| fork("never", || 0).map(|_| ()).unwrap_err().to_string())
            .unwrap()
            .join()
            .unwrap();
        assert!(error.contains("grpc-lookalike"), "{error}");
    }
}
