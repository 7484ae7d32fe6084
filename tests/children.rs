//! What each kind of child has of its server: which descriptors, and under which title it runs.
//!
//! It has a main of its own, because the server takes this program for a Python interpreter (see `every_step/program.rs`):
//! so there are a zygote, workers that it forks, and workers that are executed, beside the front and the forked workers.
#![allow(unsafe_code)]

mod common;
#[allow(dead_code)]
#[path = "every_step/program.rs"]
mod program;

use std::{collections::BTreeMap, env, fs, process::ExitCode};

use common::{Files, PATIENCE, Server, assert_serves, run, server::serve_command, until};

/// Two workers each of a built-in handler, of a program, and of a program whose workers a zygote forks.
const POOLS: &str = "
    reload = true
    item_timeout = '1h'
    [[pool]]
    name = 'echo'
    handler = 'echo'
    workers = 2
    [[pool]]
    name = 'plain'
    handler = 'app:plain'
    workers = 2
    preload = false
    [[pool]]
    name = 'many'
    handler = 'app:many'
    workers = 2
    preload = true
";
/// A bell for each worker, for the front, and for the end.
const BELLS: usize = 6 + 1 + 1;

/// What a process has open, by kind: the word of an anonymous inode, or what a path is of.
fn descriptors(pid: i32, segment: &str) -> BTreeMap<String, usize> {
    let mut kinds = BTreeMap::new();
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).expect("a process");
    for target in entries.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok()) {
        let target = target.to_string_lossy().into_owned();
        let kind = match target.split_once(':') {
            Some(("anon_inode", kind)) => kind.trim_matches(['[', ']']).to_owned(),
            Some(("socket", _)) => "socket".to_owned(),
            _ if target.ends_with(segment) => "segment".to_owned(),
            _ if target.starts_with("/memfd:forkring-failures") => "failures".to_owned(),
            // The standard ones, and whatever the test was started with.
            _ => continue,
        };
        *kinds.entry(kind).or_default() += 1;
    }
    kinds
}

/// The inodes of a process's sockets.
fn sockets(pid: i32) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).expect("a process");
    let targets = entries.filter_map(|entry| Some(fs::read_link(entry.ok()?.path()).ok()?.to_str()?.to_owned()));
    targets.filter_map(|target| Some(target.strip_prefix("socket:[")?.trim_end_matches(']').to_owned())).collect()
}

/// The inode of the socket that listens at a port.
fn listener(port: &str) -> String {
    let port = format!(":{:04X}", port.parse::<u16>().expect("a port"));
    let table = fs::read_to_string("/proc/net/tcp").expect("a table");
    let rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let listens = |row: &Vec<&str>| row.len() > 9 && row[1].ends_with(&port) && row[3] == "0A";
    rows.into_iter().find(listens).expect("a listening socket")[9].to_owned()
}

async fn server() -> Server {
    let (files, name) = (Files::new(), common::server::unique_name());
    files.make("app.py");
    let config = files.name("settings.toml");
    fs::write(&config, POOLS).expect("a file");
    let mut command = serve_command(&name, &["--config", &config, "--parent", &std::process::id().to_string()]);
    command.arg("--python").arg(env::current_exe().expect("a program")).env("STEPS_APP", files.name("app.py"));
    let server = Server::start(name, command, files).await;
    let client = server.client().await;
    for pool in ["echo", "plain", "many"] {
        assert_serves(&client, pool).await;
    }
    // The zygote, too.
    server.family(7).await;
    server
}

/// A child has what it needs of its server, and nothing else of it.
async fn descriptors_are_what_a_child_needs() {
    let server = server().await;
    let port = server.addr.rsplit_once(':').expect("an address").1;
    let listener = listener(port);
    let segment = format!("/forkring-{}", server.name);
    let has = |pid| descriptors(pid, &segment);
    let wanted = |kinds: &[(&str, usize)]| -> BTreeMap<String, usize> {
        kinds.iter().map(|(kind, count)| ((*kind).to_owned(), *count)).collect()
    };
    // Any worker: the segment, the bells, and the timer of its items.
    let worker = wanted(&[("segment", 1), ("eventfd", BELLS), ("timerfd", 1)]);
    // The worker of a Python pool also has the memory of that pool's failures to start.
    let python = wanted(&[("segment", 1), ("eventfd", BELLS), ("timerfd", 1), ("failures", 1)]);
    // A zygote: what its workers need, the bells of their arrival, and the socket by which it is asked for them.
    let zygote = wanted(&[("segment", 1), ("eventfd", BELLS + 2), ("timerfd", 2), ("socket", 1), ("failures", 1)]);
    let workers = ["w0", "w1"].map(|name| (name, &worker));
    let pythons = ["w2", "w3", "w4", "w5"].map(|name| (name, &python));
    for (name, wanted) in workers.into_iter().chain(pythons).chain([("n2", &zygote)]) {
        let pid = server.child(name).await;
        // What is taken up at the start is closed soon after it.
        let has = || has(pid);
        let same = || (has() == *wanted).then_some(());
        let found = tokio::time::timeout(PATIENCE / 2, until(name, same)).await;
        assert!(found.is_ok(), "{name} has {:?} and not {wanted:?}", has());
        assert!(!sockets(pid).contains(&listener), "{name} has the listening socket");
    }
    let front = server.child("front").await;
    assert!(sockets(front).contains(&listener), "the front listens");
    let has = has(front);
    for kind in ["signalfd", "timerfd", "pidfd", "inotify", "failures"] {
        assert!(!has.contains_key(kind), "the front has {has:?}");
    }
    server.drain().await;
}

/// What `ps -o args` shows of a process.
fn title(pid: i32) -> String {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&line).trim_end_matches('\0').replace('\0', " ")
}

/// Each process says what it is; a program keeps its own title.
async fn titles_say_what_a_process_is() {
    let server = server().await;
    let program = env::current_exe().expect("a program").display().to_string();
    let (front, supervisor) =
        (format!("forkring: front 0 ({})", server.name), format!("forkring: supervisor ({})", server.name));
    assert_eq!(title(server.pid()), supervisor);
    for (name, wanted) in [
        ("front", front.as_str()),
        ("w0", "forkring: worker 0 echo"),
        ("w1", "forkring: worker 1 echo"),
        ("w2", &format!("{program} -m forkring._worker app:plain")),
        ("w4", "forkring: worker 4 many"),
        ("n2", "forkring: zygote many"),
    ] {
        assert_eq!(title(server.child(name).await), wanted, "{name}");
    }
    server.drain().await;
}

fn main() -> ExitCode {
    if program::is_it() {
        program::run();
        return ExitCode::SUCCESS;
    }
    // A test runner may only ask for names.
    if !env::args().any(|argument| argument == "--list") {
        run(descriptors_are_what_a_child_needs());
        run(titles_say_what_a_process_is());
    }
    ExitCode::SUCCESS
}
