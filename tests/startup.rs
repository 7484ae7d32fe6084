//! The start of a server: what cannot work is said in one line on stderr with exit code 2, and leaves nothing behind.

mod common;

use std::{fs, net::TcpListener, path::Path, process::Command};

use common::{
    Files, Server, assert_serves,
    processes::is_alive,
    program::{Outcome, finish},
    run,
    server::{forkring, serve_command, unique_name},
    until,
};
use nix::sys::signal::Signal;

/// A host name that cannot be resolved, and for which no lookup uses the network: its label has more than 63 letters.
const NO_HOST: &str = "a234567890b234567890c234567890d234567890e234567890f234567890g234567890";

/// Starts a server that must refuse to start; no segment is left.
async fn refused(command: Command, name: &str, says: &str) -> Outcome {
    let outcome = finish(command, b"").await;
    outcome.assert_failed(2, says);
    assert_eq!(outcome.text(), "", "it never listened");
    assert!(!segment(name).exists());
    outcome
}

fn segment(name: &str) -> std::path::PathBuf {
    Path::new("/dev/shm").join(format!("forkring-{name}"))
}

#[test]
fn a_flag_that_means_nothing_is_refused() {
    run(async {
        let echo = "echo=echo";
        for (args, says) in [
            (&["--pool", echo, "--capacitty", "1"][..], "--capacity"),
            (&["--pool", echo, "--capacity", "many"], "`many` is not a whole number from 1 to 1048576"),
            (&["--pool", echo, "--capacity", "0"], "`0` is not a whole number from 1 to 1048576"),
            (&["--pool", echo, "--capacity", "-1"], "`-1` is not a whole number from 1 to 1048576"),
            (&["--pool", echo, "--capacity", "4294967296"], "`4294967296` is not a whole number from 1 to 1048576"),
            (&["--pool", echo, "--workers", "x"], "`x` is not a whole number from 1 to 1024"),
            (&["--pool", echo, "--max-attempts", "256"], "`256` is not a whole number from 1 to 255"),
            (&["--pool", echo, "--outbox", "1.5"], "`1.5` is not a whole number from 1 to 1048576"),
            (&["--pool", echo, "--max-connections", "0"], "`0` is not a whole number from 1 to 4294967295"),
            (&["--pool", echo, "--arena", "1x"], "`1x` is not a size"),
            (&["--pool", echo, "--arena", "256KiB"], "raise arena to 576KiB or lower max_message to"),
            (&["--pool", echo, "--listen", "localhost"], "give HOST:PORT"),
            (&["--pool", echo, "--listen", "localhost:99999"], "give HOST:PORT"),
            (&["--pool", echo, "--listen", &format!("{NO_HOST}:1")], &format!("the host `{NO_HOST}` has no address")),
            (&["--pool", echo, "--spin", "on"], "give auto, off, or a duration"),
            (&["--pool", echo, "--grace", "soon"], "`soon` is not a duration"),
            (&["--pool", echo, "--grace", "-5s"], "`-5s` is not a duration"),
            (&["--pool", echo, "--arena", "-1g"], "`-1g` is not a size"),
            (&["--pool", echo, "--fresh=maybe"], "`maybe` is not true or false"),
            (&["--pool", echo, "--listen", "1.2.3:5"], "`1.2.3:5` is not an address to listen on"),
            (&["--pool", echo, "--item-timeout", "b=5s"], "there is no pool `b`; the pools are echo"),
            (&["--pool", echo, "--config", "/dev/zero"], "the configuration /dev/zero is not text in UTF-8"),
            (&["--pool", "é=echo"], "`é` is not a pool's name: use 1 to 64 of"),
            (&["--pool", echo, "--workers", "0"], "`0` is not a whole number from 1 to 1024"),
            (&["--pool", echo, "--name", "a/b"], "`a/b` is not a server name"),
            (&["--pool", echo, "extra"], "`extra` is no handler in Python"),
            (&["--pool", "echo"], "give NAME[:WORKERS]=HANDLER"),
            (&["--pool", "echo:many=echo"], "give NAME[:WORKERS]=HANDLER"),
            (&["--pool", "echo:0=echo"], "`0` is not a pool's number of workers: choose from 1 to 1024"),
            (&["--pool", "echo:99999=echo"], "`99999` is not a pool's number of workers: choose from 1 to 1024"),
            (&["--pool", "a:1025=echo"], "`1025` is not a pool's number of workers: choose from 1 to 1024"),
            (&["--pool", "a:600=echo", "--pool", "b:600=echo"], "have 1200 workers together: choose from 1 to 1024"),
            (&["dir/app.py"], "`dir/app.py` names no function: write dir/app.py:FUNCTION"),
            (&["--pool", "a=app.py"], "`app.py` names no function: write app.py:FUNCTION"),
            (&["--pool", "a=exec:nosuchprogram -x"], "there is no program `nosuchprogram` that can be run"),
            (&["--pool", "a=echo", "--pool", "a=sha256"], "pool a is there twice"),
            (&["--pool", "a=echoo"], "pool `a`: unknown handler `echoo`"),
            (&["--pool", "a=sleep:soon"], "`soon` is no duration"),
            (&["--pool", "a=exec:"], "exec: names no command"),
            (&["--pool", "a=exec:sh -c 'x"], "quote that is not closed"),
            (&[], "there is no pool"),
            (&["--config", "/nonexistent/file.toml"], "cannot read the configuration /nonexistent/file.toml"),
        ] {
            let name = unique_name();
            let mut command = match args.contains(&"--name") {
                false => serve_command(&name, args),
                true => serve_command("unused", &[]),
            };
            if args.contains(&"--name") {
                command = forkring();
                command.arg("serve").args(args);
            }
            refused(command, &name, says).await;
        }
    });
}

#[test]
fn a_variable_that_means_nothing_is_refused_by_its_name() {
    run(async {
        for (variable, value, says) in [
            ("FORKRING_CAPACITY", "many", "(from FORKRING_CAPACITY)"),
            ("FORKRING_CAPACITY", "0", "`0` is not a whole number from 1 to 1048576 (from FORKRING_CAPACITY)"),
            ("FORKRING_ARENA", "1x", "(from FORKRING_ARENA)"),
            ("FORKRING_LISTEN", &format!("{NO_HOST}:1"), "has no address that this machine knows"),
            (
                "FORKRING_CAPACTY",
                "1",
                "FORKRING_CAPACTY is not a variable of forkring: did you mean FORKRING_CAPACITY?",
            ),
            ("FORKRING_XYZZY", "1", "FORKRING_XYZZY is not a variable of forkring: `forkring help serve` lists them"),
            ("FORKRING_POOLS", "what", "FORKRING_POOLS: `what` is not a pool"),
            ("FORKRING_LOG", "info=what=", "FORKRING_LOG: "),
            ("FORKRING_LOG", "verbose", "FORKRING_LOG: `verbose` is no level: give error, warn, info"),
        ] {
            let name = unique_name();
            let pool = if variable == "FORKRING_POOLS" { &[][..] } else { &["--pool", "echo=echo"] };
            let mut command = serve_command(&name, pool);
            command.env(variable, value);
            refused(command, &name, says).await;
        }
    });
}

#[test]
fn a_variable_that_is_empty_is_not_set() {
    run(async {
        let name = unique_name();
        let mut command = serve_command(&name, &["--pool", "echo=echo"]);
        for variable in
            ["CAPACITY", "CONFIG", "FRESH", "GRACE", "ITEM_TIMEOUT", "LOG", "NAME", "POOLS", "PYTHON", "WORKERS"]
        {
            command.env(format!("FORKRING_{variable}"), "");
        }
        let server = Server::start(name, command, Files::new()).await;
        assert_serves(&server.client().await, "echo").await;
        server.drain().await;
    });
}

#[test]
fn a_file_that_means_nothing_is_refused_with_the_place() {
    run(async {
        let files = Files::new();
        for (text, says) in [
            ("capacity = 100\n  capactiy = 1", "settings.toml:2:3: unknown key `capactiy`: did you mean `capacity`?"),
            ("capacity = 'x'", "settings.toml:1:12: capacity: `x` is not a whole number from 1 to 1048576"),
            ("arena = '1x'", "settings.toml:1:9: arena: `1x` is not a size"),
            ("[[pool]]\nname = 'a'", "settings.toml:1:1: missing field `handler`"),
            ("[[pool]]\nname = 'a'\nhandler = 'echoo'", "unknown handler `echoo`"),
            ("not toml", "settings.toml:1:"),
        ] {
            fs::write(files.path("settings.toml"), text).expect("a file");
            let name = unique_name();
            refused(serve_command(&name, &["--config", &files.name("settings.toml")]), &name, says).await;
        }
    });
}

#[test]
fn a_file_and_the_environment_serve_as_well_as_flags() {
    run(async {
        let files = Files::new();
        let toml = "body_timeout = '5s'\n[[pool]]\nname = 'a'\nhandler = 'echo'\nworkers = 2\n";
        fs::write(files.path("settings.toml"), toml).expect("a file");
        let server = Server::serve(&["--config", &files.name("settings.toml")]).await;
        assert_serves(&server.client().await, "a").await;
        server.family(2).await;
        server.drain().await;

        let name = unique_name();
        let mut command = serve_command(&name, &["--log", "json"]);
        command.env("FORKRING_POOLS", "b=echo\nc:2=echo");
        let server = Server::start(name, command, Files::new()).await;
        let client = server.client().await;
        assert_serves(&client, "b").await;
        assert_serves(&client, "c").await;
        server.family(3).await;
        let log = server.drain().await;
        for line in log.lines() {
            let line: serde_json::Value = serde_json::from_str(line).expect("a line of JSON");
            assert!(line["level"].is_string() && line["message"].is_string(), "{line}");
        }
    });
}

#[test]
fn a_host_name_is_resolved_wherever_it_stands() {
    run(async {
        let files = Files::new();
        let pool = "[[pool]]\nname = 'echo'\nhandler = 'echo'\n";
        fs::write(files.path("settings.toml"), format!("listen = 'localhost:0'\n{pool}")).expect("a file");
        let (flag, file) = (["--listen", "localhost:0"], ["--config", &files.name("settings.toml")]);
        for (args, variable) in [(&flag[..], None), (&[], Some("localhost:0")), (&file[..], None)] {
            let name = unique_name();
            let mut command = serve_command(&name, args);
            command.env_remove("FORKRING_LISTEN").env("FORKRING_POOLS", "echo=echo");
            command.envs(variable.map(|value| ("FORKRING_LISTEN", value)));
            let server = Server::start(name, command, Files::new()).await;
            assert!(server.addr.starts_with("127.0.0.1:"), "{}", server.addr);
            assert_serves(&server.client().await, "echo").await;
            let line = server.logged("resolved the host").await;
            assert!(line.contains("host=localhost") && line.contains("address=127.0.0.1:0"), "{line}");
            server.drain().await;
        }
    });
}

#[test]
fn variables_that_others_set_are_no_mistakes() {
    run(async {
        let name = unique_name();
        let mut command = serve_command(&name, &["--pool", "echo=echo"]);
        // Variables of other commands, of the tests, and those that Kubernetes sets for a service named `forkring`.
        for variable in [
            "FORKRING_ADDR",
            "FORKRING_BIN",
            "FORKRING_LOG_FORMAT",
            "FORKRING_SERVICE_HOST",
            "FORKRING_SERVICE_PORT_GRPC",
            "FORKRING_PORT",
            "FORKRING_PORT_50051_TCP_ADDR",
            "FORKRING_TEST_SEED",
        ] {
            command.env(variable, "text");
        }
        command.env("FORKRING_PORT", "tcp://10.0.0.1:50051");
        let server = Server::start(name, command, Files::new()).await;
        assert_serves(&server.client().await, "echo").await;
        server.drain().await;
    });
}

#[test]
fn a_busy_port_is_refused() {
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let name = unique_name();
        let command = serve_command(&name, &["--pool", "echo=echo", "--listen", &address]);
        refused(command, &name, &format!("cannot listen on {address}: Address already in use")).await;
        // And one that no interface has.
        let command = serve_command(&name, &["--pool", "echo=echo", "--listen", "192.0.2.1:1"]);
        refused(command, &name, "this machine has no such address: choose one of its own").await;
    });
}

#[test]
fn the_name_of_a_live_server_is_refused_and_does_it_no_harm() {
    run(async {
        let server = Server::serve(&["--pool", "echo=echo"]).await;
        let outcome = finish(serve_command(&server.name, &["--pool", "echo=echo"]), b"").await;
        outcome
            .assert_failed(2, &format!("the name `{}` is in use by a live server (pid {})", server.name, server.pid()));
        assert!(server.segment().exists());
        assert_serves(&server.client().await, "echo").await;
        server.drain().await;
    });
}

#[test]
fn what_a_dead_server_left_is_found_and_taken_over() {
    run(async {
        let mut dead = Server::serve(&["--pool", "echo:2=echo"]).await;
        let family = dead.family(2).await;
        dead.signal(Signal::SIGKILL);
        dead.ended().await;
        until("the end of all", || family.iter().all(|process| !is_alive(process.pid)).then_some(())).await;
        assert!(dead.segment().exists());

        let mut command = forkring();
        command.args(["doctor", "--name", &dead.name]);
        let outcome = finish(command, b"").await;
        assert!(outcome.text().contains("1 left behind by servers that are gone"), "{}", outcome.text());
        assert!(outcome.text().contains(&format!("rm /dev/shm/forkring-{}", dead.name)), "{}", outcome.text());

        let command = serve_command(&dead.name, &["--pool", "echo:2=echo"]);
        let server = Server::start(dead.name.clone(), command, Files::new()).await;
        server.logged("adopted what a dead server left behind").await;
        assert_serves(&server.client().await, "echo").await;
        server.drain().await;
    });
}

#[test]
fn a_name_lives_for_as_long_as_any_of_its_server() {
    run(async {
        let files = Files::new();
        // A program that a worker runs does not count: it has nothing of the segment.
        let pool = format!("run=exec:sh -c 'echo > {}; exec sleep 1000'", files.name("began"));
        let mut dead = Server::serve(&["--pool", &pool]).await;
        let client = dead.client().await;
        let call = tokio::spawn(async move { client.call(forkring::proto::v1::WorkItem::new("run", "")).await });
        files.lines_of("began", 1).await;
        let family = dead.family(1).await;
        for process in &family {
            common::processes::signal(process.pid, Signal::SIGSTOP);
        }
        // Killed, they are gone although they had been stopped.
        dead.signal(Signal::SIGKILL);
        dead.ended().await;
        until("the end of all", || family.iter().all(|process| !is_alive(process.pid)).then_some(())).await;
        call.await.expect("a task").expect_err("nobody is there");
        let command = serve_command(&dead.name, &["--pool", &pool]);
        Server::start(dead.name.clone(), command, Files::new()).await.drain().await;
    });
}

#[test]
fn a_file_of_somebody_elses_is_left_alone() {
    run(async {
        let name = unique_name();
        fs::write(segment(&name), [7; 8192]).expect("a file in /dev/shm");
        let outcome = finish(serve_command(&name, &["--pool", "echo=echo"]), b"").await;
        let kept = fs::read(segment(&name));
        let _ = fs::remove_file(segment(&name));
        outcome.assert_failed(2, "is not a segment of this program");
        assert_eq!(kept.expect("the file is there still"), [7; 8192]);
    });
}

#[test]
fn more_memory_than_there_is_is_refused_with_how_much_there_is() {
    run(async {
        let name = unique_name();
        // 16 TiB and more, at once, so that no machine has it.
        let command = serve_command(&name, &["--pool", "echo:256=echo", "--arena", "64GiB"]);
        let outcome = refused(command, &name, "/dev/shm is too small: the server needs ").await;
        for says in [" MiB are free", "--shm-size=", "--arena"] {
            assert!(outcome.stderr.contains(says), "{}", outcome.stderr);
        }
    });
}

#[test]
fn nobody_need_read_what_it_says() {
    run(async {
        let name = unique_name();
        let mut command = Command::new("sh");
        // Closed before it starts, as by a shell's `>&-`.
        command.args(["-c", "exec \"$@\" >&- 2>&-", "sh", env!("CARGO_BIN_EXE_forkring")]);
        command.args(["serve", "--name", &name, "--pool", "echo=echo", "--listen", "127.0.0.1:0"]);
        command.args(["--arena", "1MiB", "--max-message", "512KiB", "--workers", "1"]);
        let mut server = common::program::Killed::start(&mut command);
        let pid = server.0.id() as i32;
        until("front and worker", || (common::processes::children(pid).len() == 2).then_some(())).await;
        common::processes::signal(pid, Signal::SIGTERM);
        let status = until("its end", || server.0.try_wait().expect("our child")).await;
        assert_eq!(status.code(), Some(0));
        assert!(!segment(&name).exists());
    });
}
