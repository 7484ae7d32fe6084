//! Too little of everything: shared memory, file descriptors, disk for logs. An error that says so at the start, and after
//! that nothing worse than waiting.
//!
//! A `/dev/shm` of a test's own takes a mount namespace: root has them, others by a user namespace where that is allowed.
//! Where neither can be had those tests say SKIPPED.

mod common;

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{self, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use common::{
    Files, Server, assert_serves,
    processes::signal,
    program::{Killed, behind, finish},
    run,
    server::{serve_command, unique_name},
    skip, soon, until,
};
use forkring::{client::Client, proto::v1::WorkItem};
use nix::sys::signal::Signal;
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use tokio::task::JoinSet;

/// A command that runs as this shell script has it, `"$@"` being the command.
fn within(wrapper: &[&str], script: &str, command: &Command) -> Command {
    behind(&[wrapper, &["sh", "-c", script, "sh"]].concat(), command)
}

/// A command for which `/dev/shm` has so many bytes, and what follows in the script; none where that cannot be.
fn with_shm(bytes: u64, script: &str, command: &Command) -> Option<Command> {
    const ROOT: &[&str] = &["unshare", "--mount"];
    const USER: &[&str] = &["unshare", "--user", "--map-root-user", "--mount"];
    let mount = |bytes| format!("mount -t tmpfs -o size={bytes} forkring-test /dev/shm");
    let works = |wrapper: &&&[&str]| {
        let mut probe = within(wrapper, &mount(4096), &Command::new("true"));
        probe.stderr(Stdio::null()).status().is_ok_and(|status| status.success())
    };
    let Some(wrapper) = [ROOT, USER].iter().find(works) else {
        skip("no mount namespaces here, so no /dev/shm of a test's own");
        return None;
    };
    Some(within(wrapper, &format!("{} && {script}", mount(bytes)), command))
}

/// What a server with the tests' settings and these takes of `/dev/shm`.
async fn segment_size(args: &[&str]) -> u64 {
    let server = Server::serve(args).await;
    let size = fs::metadata(server.segment()).expect("the segment").len();
    server.drain().await;
    size
}

#[test]
fn a_shm_that_is_too_small_is_an_error_at_the_start() {
    run(async {
        let size = segment_size(&["--pool", "echo=echo"]).await;
        for bytes in [4096, size / 2, size - 4096] {
            let command = serve_command(&unique_name(), &["--pool", "echo=echo"]);
            let Some(command) = with_shm(bytes, "{ \"$@\"; code=$?; ls -A /dev/shm; exit $code; }", &command) else {
                return;
            };
            let outcome = finish(command, b"").await;
            outcome.assert_failed(2, "/dev/shm is too small: the server needs ");
            let needs = format!(
                "needs {} MiB of shared memory and {} of {} MiB are free",
                size.div_ceil(1 << 20),
                bytes >> 20,
                bytes >> 20
            );
            assert!(outcome.stderr.contains(&needs), "{needs}: {}", outcome.stderr);
            assert_eq!(outcome.text(), "", "nothing is left in it, and it never listened");
        }
    });
}

/// A server's command without the sizes that tests set.
fn with_default_sizes(mut command: Command) -> Command {
    ["FORKRING_ARENA", "FORKRING_MAX_MESSAGE"].iter().for_each(|variable| _ = command.env_remove(variable));
    command
}

#[test]
fn default_sizes_follow_the_shm_that_there_is() {
    run(async {
        let args = ["--pool", "echo:20=echo", "--parent", &std::process::id().to_string()];
        let (name, shm) = (unique_name(), 512 << 20);
        let command = with_default_sizes(serve_command(&name, &args));
        let Some(command) = with_shm(shm, "exec \"$@\"", &command) else { return };
        let server = Server::start(name, command, Files::new()).await;
        let segment = format!("/proc/{}/root{}", server.pid(), server.segment().display());
        let size = fs::metadata(segment).expect("the segment").len();
        assert!((shm / 8..=shm / 4).contains(&size), "{size}");
        let client = server.client().await;
        assert_serves(&client, "echo").await;
        // A message of almost 4 MiB, the default limit of gRPC clients, fits.
        let item = WorkItem::new("echo", vec![1; (4 << 20) - 1024]);
        assert_eq!(soon("an answer", client.call(item)).await.expect("a result").payload.len(), (4 << 20) - 1024);
        let log = server.drain().await;
        assert!(!log.contains("more than half"), "{log}");
    });
}

#[test]
fn a_reservation_that_leaves_little_is_told() {
    run(async {
        let args = ["--pool", "echo=echo"];
        let size = segment_size(&args).await;
        let name = unique_name();
        let command = serve_command(&name, &[&args[..], &["--parent", &std::process::id().to_string()]].concat());
        let Some(command) = with_shm(size * 3 / 2, "exec \"$@\"", &command) else { return };
        let server = Server::start(name, command, Files::new()).await;
        let line = server.logged("reserved more than half of the shared memory that was free").await;
        let bytes = |field: &str| line.split(field).nth(1).and_then(|rest| rest.split(' ').next()).map(str::to_owned);
        assert!(line.contains("WARN") && line.contains("--arena"), "{line}");
        assert_eq!(bytes("reserved_mib="), Some(size.div_ceil(1 << 20).to_string()), "{line}");
        server.drain().await;
    });
}

#[test]
fn a_shm_that_just_fits_is_enough_whatever_else_fills_it() {
    run(async {
        let args = ["--pool", "echo:3=echo", "--parent", &std::process::id().to_string()];
        let (name, room) = (unique_name(), 1 << 16);
        let command = serve_command(&name, &args);
        let size = segment_size(&args[..2]).await;
        let Some(command) = with_shm(size + room, "exec \"$@\"", &command) else { return };
        let server = Server::start(name, command, Files::new()).await;
        // Somebody else takes the rest.
        let shm = PathBuf::from(format!("/proc/{}/root/dev/shm", server.pid()));
        let mut other = File::create(shm.join("other")).expect("a file");
        let full = loop {
            if let Err(error) = other.write(&[1; 4096]) {
                break error;
            }
        };
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);
        assert!(fs::metadata(shm.join("other")).expect("a file").len() <= room);

        // Now all of the segment is used: records, and both arenas from end to end, those of the results by each worker.
        let client = server.client().await;
        let mut calls = JoinSet::new();
        for id in 0..60 {
            let client = client.clone();
            calls.spawn(async move {
                let item = WorkItem::new("echo", vec![id as u8; 500_000]).with_id(id);
                // There is room for two of them at a time: the others come again.
                loop {
                    match client.call(item.clone()).await {
                        Ok(result) => break assert!(result.payload == item.payload),
                        Err(status) => assert_eq!(status.code(), tonic::Code::ResourceExhausted, "{status}"),
                    }
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            });
        }
        soon("all answers", calls.join_all()).await;
        let items = (0..5000).map(|id| WorkItem::new("echo", vec![7; id as usize % 3000]).with_id(id));
        let mut results = client.process(tokio_stream::iter(items)).await.expect("a stream");
        let mut count = 0;
        while let Some(result) = soon("a result", results.message()).await.expect("a stream") {
            assert_eq!(result.payload.len(), result.id as usize % 3000);
            count += 1;
        }
        assert_eq!(count, 5000);
        let worker = server.child("w0").await;
        signal(worker, Signal::SIGKILL);
        server.successor("w0", worker).await;
        assert_serves(&client, "echo").await;
        let log = server.drain().await;
        assert_eq!(log.matches(") died: ").count(), 1, "only the one that was killed\n{log}");
    });
}

/// The time that a process has spent on a processor.
fn cpu_time(pid: i32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("a living process");
    let fields: Vec<_> = stat.rsplit_once(')').expect("a name").1.split_whitespace().collect();
    // utime and stime are the 14th and 15th of all, in hundredths of a second.
    let ticks: u64 = fields[11..13].iter().map(|field| field.parse::<u64>().expect("a number")).sum();
    Duration::from_millis(ticks * 10)
}

#[test]
fn without_file_descriptors_it_waits_for_some() {
    run(async {
        let name = unique_name();
        let command = serve_command(&name, &["--pool", "echo=echo", "--parent", &std::process::id().to_string()]);
        let command = within(&["env"], "ulimit -n 48 && exec \"$@\"", &command);
        let server = Server::start(name, command, Files::new()).await;
        let client = server.client().await;
        assert_serves(&client, "echo").await;
        let mut idle: Vec<_> =
            (0..60).map(|_| TcpStream::connect(&server.addr).expect("a place in the queue")).collect();
        server.logged("cannot accept connections").await;
        let front = server.child("front").await;
        let before = cpu_time(front);
        // Those that are there are served while nobody else comes in, and it does not turn in circles.
        let mut late = Box::pin(async {
            let late = Client::connect(&server.addr).await.expect("a place in the queue");
            assert_serves(&late, "echo").await;
        });
        let since = Instant::now();
        while since.elapsed() < Duration::from_secs(1) {
            assert_serves(&client, "echo").await;
            assert!(
                tokio::time::timeout(Duration::from_millis(50), &mut late).await.is_err(),
                "there was room after all"
            );
        }
        let (busy, took) = (cpu_time(front) - before, since.elapsed());
        assert!(busy < took / 2, "busy for {busy:?} of {took:?}");

        idle.clear();
        soon("an answer to who waited", late).await;
        assert_serves(&client, "echo").await;
        assert_eq!(server.child("front").await, front, "it is the same all the time");
        // One line for all the tries of a second and more, and one for their end.
        let line = server.logged("connections are accepted again").await;
        let lasted = line.split("lasted=").nth(1).expect("how long it lasted");
        assert!(lasted.trim_end().ends_with('s') && !lasted.contains("ms"), "{line}");
        let log = server.drain().await;
        for once in ["cannot accept connections", "connections are accepted again"] {
            assert_eq!(log.matches(once).count(), 1, "{log}");
        }
    });
}

/// Lets a process open so many more files than it has.
fn leave_numbers(pid: i32, more: usize) {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).expect("a living process");
    let number = |entry: io::Result<fs::DirEntry>| entry.expect("a file").file_name().to_str()?.parse::<u64>().ok();
    // The pidfd of the front is closed when it dies.
    let is_pidfd = |entry: &io::Result<fs::DirEntry>| {
        entry.as_ref().is_ok_and(|entry| fs::read_link(entry.path()).is_ok_and(|to| to.ends_with("anon_inode:[pidfd]")))
    };
    let entries = entries.filter(|entry| !is_pidfd(entry));
    let open: HashSet<_> = entries.map(|entry| number(entry).expect("a number")).collect();
    limit_numbers(pid, (0..).filter(|number| !open.contains(number)).nth(more));
}

/// The limit of a process that has inherited ours, or ours again.
fn limit_numbers(pid: i32, limit: Option<u64>) {
    let ours = getrlimit(Resource::Nofile);
    let limit = Rlimit { current: limit.or(ours.current), ..ours };
    prlimit(Pid::from_raw(pid), Resource::Nofile, limit).expect("a living process");
}

#[test]
fn a_front_that_cannot_be_replaced_for_now_is_replaced_later() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo"]).await;
        let client = server.client().await;
        let receipt = client.submit(tokio_stream::iter([WorkItem::new("echo", "kept").with_id(1)])).await;
        assert_eq!(receipt.expect("a receipt").accepted, 1);
        // A worker that comes back only later: a front closes its pidfd, and so would have a number more.
        let mut worker = 0;
        while !server.log().contains("restart_in=3.2s") {
            worker = server.successor("w0", worker).await;
            signal(worker, Signal::SIGKILL);
            server.logged(&format!("pid {worker}) died: ")).await;
        }
        // Enough for the supervisor, and not for a front.
        leave_numbers(server.pid(), 2);
        signal(server.child("front").await, Signal::SIGKILL);
        server.logged("cannot go on error=Too many open files").await;
        server.logged("exit code 78").await;
        limit_numbers(server.pid(), None);
        server.logged("the pool serves again").await;
        let client = soon("a connection", Client::connect(&server.addr)).await.expect("a connection");
        assert_serves(&client, "echo").await;
        let mut updates = soon("a stream", client.updates("", 1)).await.expect("a stream");
        let result = soon("an update", updates.message()).await.expect("a stream").expect("an update");
        assert_eq!(&result.payload[..], b"kept");
        server.drain().await;
    });
}

#[test]
fn a_full_disk_for_logs_is_no_reason_to_stop() {
    run(async {
        let name = unique_name();
        let command = serve_command(&name, &["--pool", "echo:2=echo", "--parent", &std::process::id().to_string()]);
        let command = within(&["env"], "exec \"$@\" 2>/dev/full", &command);
        let server = Server::start(name, command, Files::new()).await;
        let client = server.client().await;
        assert_serves(&client, "echo").await;
        // Each of these is logged, in vain.
        for process in ["w0", "w1", "front"] {
            let pid = server.child(process).await;
            signal(pid, Signal::SIGKILL);
            server.successor(process, pid).await;
        }
        assert_serves(&server.client().await, "echo").await;
        server.drain().await;
    });
}

#[test]
fn nobody_need_hear_where_it_listens() {
    run(async {
        // An address of this test's own, as nobody is told of a free port.
        let pid = std::process::id();
        let addr = format!("127.{}.{}.{}:50051", 64 + (pid >> 16) % 64, pid >> 8 & 255, pid & 255);
        let name = unique_name();
        let command = serve_command(&name, &["--pool", "echo=echo", "--listen", &addr]);
        let mut command = within(&["env"], "exec \"$@\" >/dev/full 2>/dev/full", &command);
        let mut server = Killed::start(&mut command);
        until("a server that listens", || TcpStream::connect(&addr).ok()).await;
        let client = soon("a connection", Client::connect(&addr)).await.expect("a connection");
        assert_serves(&client, "echo").await;
        signal(server.0.id() as i32, Signal::SIGTERM);
        let status = until("its end", || server.0.try_wait().expect("our child")).await;
        assert_eq!(status.code(), Some(0));
        assert!(!Path::new(&format!("/dev/shm/forkring-{name}")).exists());
    });
}
