//! The commands as programs: what they print, how they end, and what they leave.

mod common;

use std::{
    fs,
    net::SocketAddr,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use common::{
    Files, Server,
    processes::{children, is_alive, signal},
    program::{self, Killed},
    run,
    server::{forkring, unique_name},
    soon, until,
};
use forkring::{client::Client, proto::v1::WorkItem};
use nix::sys::signal::Signal;
use sha2::{Digest as _, Sha256};
use socket2::{Domain, Socket, Type};

#[test]
fn call_prints_each_result_as_it_is() {
    run(async {
        let files = Files::new();
        let server = Server::serve(&["--pool", "up=exec:tr a-z A-Z", "--pool", "hash=sha256"]).await;
        let addr = ["--addr", &server.addr];
        let from_stdin = program::run(&[&["call", "up"], &addr[..]].concat(), b"hello\n").await;
        from_stdin.assert_succeeded();
        assert_eq!(from_stdin.text(), "HELLO\n");
        for (name, text) in [("a", "one"), ("b", "two")] {
            fs::write(files.path(name), text).expect("a file");
        }
        let (a, b) = (files.name("a"), files.name("b"));
        // Where `-` is among the files, it is stdin.
        let from_files = program::run(&[&["call", "up", &a, "-", &b], &addr[..]].concat(), b" and ").await;
        from_files.assert_succeeded();
        assert_eq!(from_files.text(), "ONE AND TWO");
        let digest = program::run(&[&["call", "hash", &a], &addr[..]].concat(), b"").await;
        digest.assert_succeeded();
        assert_eq!(digest.stdout, Sha256::digest("one").to_vec());

        let json = program::run(&[&["call", "hash", &a, &b, "--json"], &addr[..]].concat(), b"").await;
        json.assert_succeeded();
        let lines = json.json();
        assert_eq!(lines.len(), 2);
        assert_eq!((lines[0]["id"].as_u64(), lines[1]["id"].as_u64()), (Some(1), Some(2)));
        assert_eq!((lines[0]["ok"].as_bool(), lines[0]["file"].as_str()), (Some(true), Some(&*a)));
        let hex: String = Sha256::digest("one").iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(lines[0]["payload_hex"], hex);
        assert!(lines[0]["timing"]["worked_ns"].as_u64().is_some_and(|ns| ns > 0));
        server.drain().await;
    });
}

#[test]
fn call_says_which_item_failed_and_goes_on() {
    run(async {
        let files = Files::new();
        let server = Server::serve(&["--pool", "check=exec:grep -q good"]).await;
        for (name, text) in [("a", "good"), ("b", "bad"), ("c", "good too")] {
            fs::write(files.path(name), text).expect("a file");
        }
        let (a, b, c) = (files.name("a"), files.name("b"), files.name("c"));
        let args = ["call", "check", &a, &b, "/nonexistent/file", &c, "--json", "--addr", &server.addr];
        let outcome = program::run(&args, b"").await;
        assert_eq!(outcome.code, Some(1));
        let said: Vec<_> = outcome.stderr.lines().collect();
        assert_eq!(said.len(), 3, "{said:?}");
        assert!(said[0].contains(&b) && said[0].contains("INTERNAL (EXEC_FAILED): `grep` ended with"), "{said:?}");
        assert!(said[1].contains("cannot read /nonexistent/file"), "{said:?}");
        assert_eq!(said[2], "forkring: 2 of 4 items failed");
        let ok: Vec<_> = outcome.json().iter().map(|line| line["ok"].as_bool().expect("a verdict")).collect();
        assert_eq!(ok, [true, false, true]);
        let line = &outcome.json()[1];
        assert_eq!((&line["error"]["code"], &line["error"]["reason"]), (&"INTERNAL".into(), &"EXEC_FAILED".into()));
        server.drain().await;
    });
}

#[test]
fn options_of_an_item_reach_its_handler() {
    run(async {
        let server = Server::handlers(&["metadata", "remaining"], "").await;
        let args = ["call", "metadata", "--metadata", "a=1", "--metadata", "b=x=y", "--priority", "3"];
        let outcome = program::run(&[&args[..], &["--addr", &server.addr]].concat(), b"").await;
        outcome.assert_succeeded();
        assert_eq!(outcome.text(), "a=1\nb=x=y\n");
        let args = ["call", "remaining", "--timeout", "1h", "--addr", &server.addr];
        let left: u64 = program::run(&args, b"").await.text().parse().expect("milliseconds");
        assert!((3_500_000..3_600_000).contains(&left), "{left}");
        server.drain().await;
    });
}

#[test]
fn what_is_submitted_is_printed_by_updates() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo"]).await;
        let addr = ["--addr", &server.addr];
        let submit = ["submit", "echo", "--lines", "--first-id", "100", "--subscription", "s"];
        let submitted = program::run(&[&submit[..], &addr].concat(), b"one\ntwo\n\nfour").await;
        submitted.assert_succeeded();
        assert_eq!(submitted.text(), "accepted 4, rejected 0\n");
        let updates = ["updates", "--subscription", "s", "--limit", "2"];
        let first = program::run(&[&updates[..], &addr].concat(), b"").await;
        first.assert_succeeded();
        assert_eq!(first.text(), "100 ok one\n101 ok two\n");
        let second = program::run(&[&updates[..], &["--json"], &addr].concat(), b"").await;
        second.assert_succeeded();
        let lines = second.json();
        assert_eq!((lines[0]["id"].as_u64(), lines[0]["payload"].as_str()), (Some(102), Some("")));
        assert_eq!((lines[1]["id"].as_u64(), lines[1]["payload"].as_str()), (Some(103), Some("four")));

        let refused = program::run(&[&["submit", "nowhere", "--json"], &addr[..]].concat(), b"x").await;
        assert_eq!(refused.code, Some(1));
        let receipt = &refused.json()[0];
        assert_eq!((receipt["accepted"].as_u64(), receipt["rejected"].as_u64()), (Some(0), Some(1)));
        assert_eq!(receipt["rejections"][0]["error"]["reason"], "UNKNOWN_POOL");
        server.drain().await;
    });
}

#[test]
fn a_file_that_is_too_large_is_named_and_keeps_no_other_back() {
    run(async {
        let files = Files::new();
        let server = Server::serve(&["--pool", "hash=sha256", "--max-message", "128KiB"]).await;
        for (name, size) in [("a", 1), ("b", 200_000), ("c", 100_000), ("d", 2), ("e", 3)] {
            fs::write(files.path(name), vec![b'x'; size]).expect("a file");
        }
        let names = ["a", "b", "c", "d", "e"].map(|name| files.name(name));
        let args = ["submit", "hash", &names[0], &names[1], &names[2], &names[3], &names[4], "--json"];
        let outcome = program::run(&[&args[..], &["--addr", &server.addr]].concat(), b"").await;
        assert_eq!(outcome.code, Some(1), "{}", outcome.stderr);
        let receipt = &outcome.json()[0];
        assert_eq!((receipt["accepted"].as_u64(), receipt["rejected"].as_u64()), (Some(4), Some(1)), "{receipt}");
        let rejection = &receipt["rejections"][0];
        assert_eq!((rejection["id"].as_u64(), rejection["file"].as_str()), (Some(2), Some(&*names[1])));
        assert_eq!(rejection["error"]["reason"], "MESSAGE_TOO_LARGE");
        let said: Vec<_> = outcome.stderr.lines().collect();
        assert!(said[0].starts_with(&format!("forkring: item 2 ({}): RESOURCE_EXHAUSTED", names[1])), "{said:?}");
        assert_eq!(said[1], "forkring: rejected: 1 of 5 items");
        let updates = program::run(&["updates", "--limit", "4", "--addr", &server.addr], b"").await;
        updates.assert_succeeded();
        server.drain().await;
    });
}

#[test]
fn of_a_failed_item_the_unknown_is_null() {
    run(async {
        let server = Server::serve(&["--pool", "fail=exec:false"]).await;
        let called = program::run(&["call", "fail", "--json", "--addr", &server.addr], b"").await;
        program::run(&["submit", "fail", "--addr", &server.addr], b"").await.assert_succeeded();
        let updates = program::run(&["updates", "--limit", "1", "--json", "--addr", &server.addr], b"").await;
        let (called, pushed) = (&called.json()[0], &updates.json()[0]);
        for field in ["payload", "payload_hex"] {
            assert!(called[field].is_null() && pushed[field].is_null(), "{called} {pushed}");
        }
        assert!(called["attempts"].is_null() && called["worker"].is_null(), "a call does not tell: {called}");
        assert_eq!((pushed["attempts"].as_u64(), pushed["worker"].as_u64()), (Some(1), Some(0)));
        server.drain().await;
    });
}

#[test]
fn updates_end_with_the_server_and_say_if_that_was_too_soon() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo"]).await;
        let outputs = Files::new();
        let mut watching = Vec::new();
        for (name, limit) in [("all", "0"), ("some", "5")] {
            let mut command = forkring();
            command.args(["updates", "--subscription", name, "--limit", limit, "--addr", &server.addr]);
            let output = |name| fs::File::create(outputs.path(name)).expect("a file");
            let errors = format!("{name} errors");
            watching.push(Killed::start(command.stdout(output(name)).stderr(output(&errors))));
            let submit = ["submit", "echo", "--subscription", name, "--addr", &server.addr];
            program::run(&submit, b"x").await.assert_succeeded();
            assert_eq!(outputs.lines_of(name, 1).await, ["1 ok x"]);
        }
        server.drain().await;
        let mut codes = Vec::new();
        for program in &mut watching {
            codes.push(until("its end", || program.0.try_wait().expect("our child")).await.code());
        }
        assert_eq!(codes, [Some(0), Some(1)]);
        assert_eq!(outputs.lines("some errors"), ["forkring: the stream ended after 1 of 5 results"]);
    });
}

#[test]
fn a_reader_that_has_enough_is_no_error() {
    run(async {
        let files = Files::new();
        let server = Server::serve(&["--pool", "echo=echo"]).await;
        let submit = ["submit", "echo", "--lines", "--addr", &server.addr];
        program::run(&submit, &b"a line of some length\n".repeat(100)).await.assert_succeeded();
        let mut command = Command::new("sh");
        let script = "{ \"$@\" 2> \"$ERR\"; echo $? > \"$CODE\"; } | head -n 1";
        command.args(["-c", script, "sh", env!("CARGO_BIN_EXE_forkring")]);
        command.args(["updates", "--limit", "100", "--addr", &server.addr]);
        command.env("CODE", files.path("code")).env("ERR", files.path("err"));
        let outcome = program::finish(command, b"").await;
        assert_eq!(outcome.text(), "1 ok a line of some length\n");
        assert_eq!((files.lines("code"), files.lines("err")), (vec!["0".to_owned()], vec![]));
        server.drain().await;
    });
}

#[test]
fn a_server_that_is_not_there_is_one_line() {
    run(async {
        // A port that nobody else can have meanwhile, and on which nobody listens.
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a port");
        let addr = socket.local_addr().expect("a port").as_socket().expect("an address").to_string();
        for command in ["call x", "submit x", "updates", "bench --count 1"] {
            let args: Vec<_> = command.split(' ').chain(["--addr", &addr, "--connect-timeout", "0"]).collect();
            program::run(&args, b"").await.assert_failed(1, &format!("cannot reach {addr}: Connection refused"));
            let args: Vec<_> = command.split(' ').chain(["--addr", "nonsense"]).collect();
            program::run(&args, b"").await.assert_failed(2, "`nonsense` is not an address");
        }
    });
}

#[test]
fn help_is_on_stdout_and_bad_usage_on_stderr() {
    run(async {
        for args in [&["--help"][..], &["help", "serve"], &["bench", "--help"], &["--version"]] {
            let outcome = program::run(args, b"").await;
            outcome.assert_succeeded();
            assert!(!outcome.text().is_empty());
        }
        for (args, says) in [
            (&["nonsense"][..], "unrecognized subcommand 'nonsense'"),
            (&["call"], "<POOL>"),
            (&["call", "x", "--priority", "4"], "`4` is not a whole number from 0 to 3"),
            (&["call", "x", "--metadata", "x"], "give KEY=VALUE"),
            (&["updates", "--limit", "x"], "`x` is not a whole number"),
            (&["updates", "--limit", "-1"], "`-1` is not a whole number"),
            (&["submit", "x", "--first-id", "1k"], "`1k` is not a whole number"),
            (&["bench", "--connections", "0"], "`0` is not a whole number from 1 to 10000"),
            (&["bench", "--in-flight", "x"], "`x` is not a whole number from 1 to 1000000"),
            (&["bench", "--count", "x"], "`x` is not a whole number from 1"),
            (&["demo", "--workers", "0"], "`0` is not a whole number from 1 to 1024"),
            (&["demo", "--in-flight", "x"], "`x` is not a whole number from 1"),
            (&["dead", "show", "x"], "`x` is not a whole number"),
            (&["dead", "requeue"], "see `forkring dead requeue --help`"),
            (&["dead", "drop", "--al"], "see `forkring dead drop --help`"),
            (&["dead", "sho"], "see `forkring dead --help`"),
            (&["bench", "--rate", "0"], "above zero"),
            (&["demo", "/nonexistent"], "cannot read /nonexistent"),
        ] {
            program::run(args, b"").await.assert_failed(2, says);
        }
        assert_eq!(program::run(&[], b"").await.code, Some(2));
    });
}

#[test]
fn doctor_looks_at_this_machine() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo"]).await;
        let outcome = program::run(&["doctor", "--json", "--name", &server.name], b"").await;
        let report = &outcome.json()[0];
        let checks = report["checks"].as_array().expect("checks");
        let failed = checks.iter().filter(|check| check["verdict"] == "fail").count();
        assert_eq!((outcome.code, report["ok"].as_bool()), (Some(i32::from(failed > 0)), Some(failed == 0)));
        let names: Vec<_> = checks.iter().map(|check| check["name"].as_str().expect("a name")).collect();
        assert_eq!(names, ["kernel", "pidfd", "cores", "/dev/shm", "memory", "files", "segments"]);
        // What is not well says how to mend it.
        assert!(checks.iter().all(|check| check["verdict"] == "ok" || check["fix"].is_string()), "{report}");
        assert_eq!(checks[6]["detail"], "1 in use, none left behind");
        let text = program::run(&["doctor", "--name", &server.name], b"").await;
        assert_eq!(text.text().lines().filter(|line| !line.starts_with(' ')).count(), 7);
        server.drain().await;
    });
}

#[test]
fn doctor_says_that_a_server_has_no_segment() {
    run(async {
        let name = unique_name();
        let outcome = program::run(&["doctor", "--name", &name], b"").await;
        assert_eq!(outcome.code, Some(1), "{}", outcome.text());
        let says = format!("there is no segment /dev/shm/forkring-{name}");
        assert!(
            outcome.text().lines().any(|line| line.starts_with("FAIL") && line.contains(&says)),
            "{}",
            outcome.text()
        );
        program::run(&["doctor", "--name", "a/b"], b"").await.assert_failed(2, "`a/b` is not a server name");
    });
}

/// Reserves an address: it is bound here, so that no other test gets it, and a server may listen there, too.
fn reserved_address() -> (Socket, String) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket.set_reuse_address(true).expect("a socket");
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a port");
    let addr = socket.local_addr().expect("a port").as_socket().expect("an address").to_string();
    (socket, addr)
}

#[test]
fn a_client_that_is_early_says_that_it_waits_and_goes_on_when_there_is_a_server() {
    run(async {
        for command in ["call echo", "submit echo", "updates --limit 1", "bench --count 1 --warmup 0", "dead list"] {
            let (_socket, addr) = reserved_address();
            let output = Files::new();
            let file = |name| fs::File::create(output.path(name)).expect("a file");
            let mut early = forkring();
            early.args(command.split(' ')).args(["--addr", &addr, "--connect-timeout", "1m"]);
            let mut early = Killed::start(early.stdout(file("stdout")).stderr(file("stderr")));
            let said = output.lines_of("stderr", 1).await;
            assert_eq!(said, [format!("forkring: waiting for a server at {addr} (--connect-timeout 1m)")], "{command}");
            let server = Server::serve(&["--pool", "echo=echo", "--listen", &addr]).await;
            if command.starts_with("updates") {
                program::run(&["submit", "echo", "--addr", &addr], b"x").await.assert_succeeded();
            }
            let status = until("its end", || early.0.try_wait().expect("our child")).await;
            assert_eq!(status.code(), Some(0), "{command}: {:?}", output.lines("stderr"));
            server.drain().await;
        }
    });
}

#[test]
fn a_lazy_client_reaches_its_server_with_the_first_call_after_that_has_come() {
    run(async {
        let (_socket, addr) = reserved_address();
        let client = Client::connect_lazy(&addr).expect("an address");
        for _ in 0..3 {
            let early = soon("an error", client.call(WorkItem::new("echo", "x"))).await.expect_err("no server");
            assert_eq!(early.code(), tonic::Code::Unavailable);
        }
        let server = Server::serve(&["--pool", "echo=echo", "--listen", &addr]).await;
        let result = soon("an answer", client.call(WorkItem::new("echo", "x"))).await;
        assert_eq!(result.expect("a result").payload, "x");
        server.drain().await;
    });
}

/// A folder with files of many kinds.
fn folder() -> Files {
    let files = Files::new();
    fs::create_dir_all(files.path("deep/er")).expect("a folder");
    fs::write(files.path("empty"), "").expect("a file");
    for at in 0..50 {
        fs::write(files.path(&format!("deep/{at}")), vec![at; 100 * usize::from(at)]).expect("a file");
    }
    fs::write(files.path("deep/er/ü \n odd"), [0xff; 60_000]).expect("a file");
    fs::write(files.path("too large"), [0; 100_000]).expect("a file");
    std::os::unix::fs::symlink("..", files.path("deep/loop")).expect("a link");
    files
}

fn demo_segment(pid: u32) -> PathBuf {
    Path::new("/dev/shm").join(format!("forkring-forkring-demo-{pid}"))
}

#[test]
fn the_demo_checks_every_digest() {
    run(async {
        let files = folder();
        let dir = files.name("");
        let args = ["demo", &dir, "--workers", "2", "--max-message", "64KiB"];
        let outcome = program::run(&[&args[..], &["--json"]].concat(), b"").await;
        assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
        assert_eq!(outcome.stderr.lines().count(), 1, "one file was left out: {}", outcome.stderr);
        let report = &outcome.json()[0];
        let bytes: u64 = (0..50).map(|at| at * 100).sum::<u64>() + 60_000;
        for (key, value) in [("items", 52), ("matched", 52), ("mismatched", 0), ("missing", 0), ("too_large", 1)] {
            assert_eq!(report[key], value, "{report}");
        }
        assert_eq!((report["ok"].as_bool(), report["bytes"].as_u64()), (Some(true), Some(bytes)));
        let text = program::run(&args, b"").await;
        assert!(text.text().contains("every digest is right"), "{}", text.text());
    });
}

#[test]
fn a_demo_that_is_ended_leaves_nothing() {
    run(async {
        // Some 40 GB of zeros, which take longer than anything here may, where it looks if no folder is named.
        let files = Files::new();
        let sources = files.path("registry/src");
        fs::create_dir_all(&sources).expect("a folder");
        fs::File::create(sources.join("0")).and_then(|file| file.set_len(4 << 20)).expect("a file");
        for n in 1..10_000 {
            fs::hard_link(sources.join("0"), sources.join(n.to_string())).expect("a link");
        }
        for by in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGKILL] {
            let mut command = forkring();
            command.args(["demo", "--workers", "1", "--max-message", "5MiB"]);
            command.env("CARGO_HOME", files.path("")).process_group(0);
            let mut demo = Killed::start(command.stdout(Stdio::null()).stderr(Stdio::null()));
            let pid = demo.0.id();
            let server = until("its server", || children(pid as i32).into_iter().next()).await.pid;
            let family = until("the server's children", || Some(children(server)).filter(|them| them.len() == 2)).await;
            signal(pid as i32, by);
            let status = until("its end", || demo.0.try_wait().expect("our child")).await;
            assert_ne!(status.code(), Some(0));
            let pids: Vec<_> = family.iter().map(|process| process.pid).chain([server]).collect();
            until("the end of all", || pids.iter().all(|pid| !is_alive(*pid)).then_some(())).await;
            assert!(!demo_segment(pid).exists(), "{by}");
        }
    });
}

#[test]
fn bench_counts_what_it_sent() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo"]).await;
        let bench = ["bench", "--count", "200", "--warmup", "0", "--check", "--json", "--addr", &server.addr];
        for more in [
            &["--mode", "call", "--in-flight", "4"][..],
            &["--mode", "process", "--in-flight", "16", "--payload", "4k"],
            &["--mode", "submit", "--in-flight", "16", "--connections", "2"],
            &["--mode", "call", "--rate", "2000"],
        ] {
            let outcome = program::run(&[&bench[..], more].concat(), b"").await;
            outcome.assert_succeeded();
            let report = &outcome.json()[0];
            assert_eq!((report["items"].as_u64(), report["failed"].as_u64()), (Some(200), Some(0)), "{report}");
            assert!(report["latency_ns"]["p50"].as_u64().is_some_and(|ns| ns > 0), "{report}");
        }
        // Failures are counted by code and reason, and when there is nothing else that is a failure.
        let args = ["bench", "--count", "10", "--warmup", "0", "--pool", "nowhere", "--json", "--addr", &server.addr];
        let outcome = program::run(&args, b"").await;
        outcome.assert_failed(1, "not one item succeeded");
        let report = &outcome.json()[0];
        assert_eq!((report["items"].as_u64(), &report["errors"][0]["reason"]), (Some(0), &"UNKNOWN_POOL".into()));
        server.drain().await;
    });
}
