//! Where workers run: environment and CPU by the worker's number in its pool.

mod common;

use std::fs;

use common::{Files, Server, run, soon};
use forkring::{client::Client, process, proto::v1::WorkItem};

/// What a program prints of its worker.
const TELL: &str = r#""$DEVICE|$MODE|$(grep Cpus_allowed_list: /proc/self/status | cut -f 2)""#;

async fn ask(client: &Client, pool: &str) -> String {
    let result = soon("an answer", client.call(WorkItem::new(pool, ""))).await.expect("a result");
    String::from_utf8(result.payload.into()).expect("text").trim().to_owned()
}

#[test]
fn each_worker_has_its_own_environment_and_cpu() {
    run(async {
        let cpus = process::allowed_cpus();
        let (first, second) = (cpus[0], cpus[1 % cpus.len()]);
        let files = Files::new();
        // Each waits until there are three, so that they are three workers'.
        let begun = files.name("begun");
        let all = format!(
            "all:3=exec:sh -c 'echo >>{begun}; until [ $(wc -l <{begun}) -ge 3 ]; do sleep 0.01; done; echo {TELL}'"
        );
        let (one, off) = (format!("one:1=exec:sh -c 'echo {TELL}'"), format!("off:1=exec:sh -c 'echo {TELL}'"));
        let list = format!("one={second}");
        let args = [
            ["--pool", &all],
            ["--pool", &one],
            ["--pool", &off],
            ["--worker-env", "DEVICE=gpu{worker}"],
            ["--worker-env", "one:MODE=a,b c"],
            ["--affinity", "auto"],
            ["--affinity", &list],
            ["--affinity", "off=off"],
        ];
        let server = Server::serve(args.as_flattened()).await;
        let client = server.client().await;
        let (a, b, c) = tokio::join!(ask(&client, "all"), ask(&client, "all"), ask(&client, "all"));
        let mut told = [a, b, c];
        told.sort();
        let third = cpus[2 % cpus.len()];
        assert_eq!(told, [format!("gpu0||{first}"), format!("gpu1||{second}"), format!("gpu2||{third}")]);
        assert_eq!(ask(&client, "one").await, format!("gpu0|a,b c|{second}"));
        let status = fs::read_to_string("/proc/self/status").expect("our own");
        let ours = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).expect("a line").trim();
        assert_eq!(ask(&client, "off").await, format!("gpu0||{ours}"));
        server.drain().await;
    });
}

#[test]
fn pools_share_devices_and_cpus_by_turns() {
    run(async {
        let cpus = process::allowed_cpus();
        let pools = ["a", "b", "c"].map(|pool| format!("{pool}:1=exec:sh -c 'echo {TELL}'"));
        let mut args: Vec<&str> = pools.iter().flat_map(|pool| ["--pool", pool.as_str()]).collect();
        args.extend(["--worker-env", "DEVICE=gpu{slot}", "--worker-env", "c:MODE={worker}", "--affinity", "auto"]);
        let server = Server::serve(&args).await;
        let client = server.client().await;
        for (slot, (pool, mode)) in [("a", ""), ("b", ""), ("c", "0")].into_iter().enumerate() {
            let cpu = cpus[slot % cpus.len()];
            assert_eq!(ask(&client, pool).await, format!("gpu{slot}|{mode}|{cpu}"));
        }
        server.drain().await;
    });
}
