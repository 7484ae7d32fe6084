//! The load generator against a server in this process that misbehaves as its pool's name says.

use std::{collections::VecDeque, pin::Pin, sync::Arc};

use clap::Parser as _;
use tokio::sync::{Mutex, Notify, mpsc, watch};
use tokio_stream::{Stream, StreamExt as _, wrappers::ReceiverStream};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Server, server::TcpIncoming},
};

use super::*;
use crate::proto::v1::{
    self, GetUpdatesRequest, Rejection, SubmitReceipt, WorkItem, WorkResult,
    dispatcher_server::{Dispatcher, DispatcherServer},
};

#[derive(clap::Parser)]
struct Cli {
    #[command(flatten)]
    bench: BenchArgs,
}

#[derive(Clone, Default)]
struct Fake {
    updates: Arc<Mutex<VecDeque<WorkResult>>>,
    news: Arc<Notify>,
    /// How many items it was sent.
    items: Arc<watch::Sender<u64>>,
}

type Results = Pin<Box<dyn Stream<Item = Result<WorkResult, Status>> + Send>>;

/// What the pool makes of its `n`th item: nothing, a result, or two.
fn answer(item: WorkItem, n: usize) -> Vec<WorkResult> {
    let failed =
        v1::Status { code: 13, message: "told to".into(), reason: "HANDLER_FAILED".into(), ..Default::default() };
    let mut result = WorkResult { id: item.id, payload: item.payload, ..Default::default() };
    match item.pool.as_str() {
        "odd-fail" if n % 2 == 1 => result.status = Some(failed),
        "corrupt" => result.payload = result.payload.slice(1..),
        "swap" => result.payload = vec![7; result.payload.len()].into(),
        "wrong-id" => result.id += 1_000_000,
        "silent" => return Vec::new(),
        "double" => return vec![result.clone(), result],
        _ => {}
    }
    vec![result]
}

#[tonic::async_trait]
impl Dispatcher for Fake {
    type ProcessStream = Results;
    type GetUpdatesStream = Results;

    async fn call(&self, request: Request<WorkItem>) -> Result<Response<WorkResult>, Status> {
        let item = request.into_inner();
        self.items.send_modify(|items| *items += 1);
        match item.pool.as_str() {
            "silent" => std::future::pending().await,
            "refuse" => Err(Status::resource_exhausted("LANE_FULL")),
            _ => Ok(Response::new(answer(item, 0).remove(0))),
        }
    }

    async fn process(&self, request: Request<Streaming<WorkItem>>) -> Result<Response<Results>, Status> {
        let mut items = request.into_inner();
        let (results, source) = mpsc::channel(16);
        let seen = self.items.clone();
        tokio::spawn(async move {
            let mut n = 0;
            while let Some(Ok(item)) = items.next().await {
                seen.send_modify(|items| *items += 1);
                if item.pool == "breaks" && n == 10 {
                    let _ = results.send(Err(Status::aborted("BROKE"))).await;
                    return;
                }
                for result in answer(item, n) {
                    let _ = results.send(Ok(result)).await;
                }
                n += 1;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(source))))
    }

    async fn submit(&self, request: Request<Streaming<WorkItem>>) -> Result<Response<SubmitReceipt>, Status> {
        let mut items = request.into_inner();
        let mut receipt = SubmitReceipt::default();
        let mut n = 0;
        while let Some(item) = items.next().await.transpose()? {
            self.items.send_modify(|items| *items += 1);
            if item.pool == "reject" {
                let status = v1::Status { code: 5, reason: "UNKNOWN_POOL".into(), ..Default::default() };
                receipt.rejected += 1;
                receipt.rejections.push(Rejection { id: item.id, status: Some(status) });
                continue;
            }
            self.updates.lock().await.extend(answer(item, n));
            self.news.notify_waiters();
            n += 1;
            receipt.accepted += 1;
        }
        Ok(Response::new(receipt))
    }

    async fn get_updates(&self, _: Request<GetUpdatesRequest>) -> Result<Response<Results>, Status> {
        let fake = self.clone();
        let (updates, source) = mpsc::channel(1);
        tokio::spawn(async move {
            while !updates.is_closed() {
                let news = fake.news.notified();
                let next = fake.updates.lock().await.pop_front();
                match next {
                    Some(update) => drop(updates.send(Ok(update)).await),
                    None => news.await,
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(source))))
    }
}

/// Runs `forkring bench` with these options and returns its report as JSON.
async fn bench(options: &str) -> serde_json::Value {
    let incoming = TcpIncoming::bind(([127, 0, 0, 1], 0).into()).unwrap().with_nodelay(Some(true));
    let addr = incoming.local_addr().unwrap().to_string();
    let server = Server::builder().add_service(DispatcherServer::new(Fake::default())).serve_with_incoming(incoming);
    let server = tokio::spawn(server);
    let warmup = if options.contains("--warmup") { "" } else { " --warmup 0s" };
    let line = format!("bench --addr {addr}{warmup} {options}");
    let args = Cli::try_parse_from(line.split(' ')).unwrap().bench;
    let report = load(&args, Target::parse(&addr).unwrap(), std::future::pending()).await.unwrap();
    server.abort();
    report.json(&args)
}

/// (succeeded, failed, unanswered)
fn outcome(report: &serde_json::Value) -> (u64, u64, u64) {
    let count = |name: &str| report[name].as_u64().unwrap();
    (count("items"), count("failed"), count("unanswered"))
}

#[tokio::test]
async fn every_shape_answers_every_item_once() {
    for mode in ["call", "process", "submit"] {
        for shape in ["--in-flight 1", "--in-flight 64", "--in-flight 7 --connections 3", "--rate 100000"] {
            for payload in ["0", "3", "64", "100k"] {
                let options = format!("--mode {mode} {shape} --payload {payload} --count 200 --check");
                let report = bench(&options).await;
                assert_eq!(outcome(&report), (200, 0, 0), "{options}: {report}");
                assert_eq!(report["stray"], 0, "{options}");
            }
        }
    }
}

#[tokio::test]
async fn check_finds_a_payload_or_an_id_that_is_not_the_items() {
    for pool in ["corrupt", "swap"] {
        for mode in ["call", "process", "submit"] {
            let report = bench(&format!("--pool {pool} --mode {mode} --in-flight 5 --count 50 --check")).await;
            assert_eq!(outcome(&report), (0, 50, 0), "{report}");
            assert_eq!(report["errors"][0]["code"], "DATA_LOSS");
        }
    }
    let report = bench("--pool wrong-id --count 20 --check").await;
    assert_eq!(outcome(&report), (0, 20, 0), "{report}");
}

#[tokio::test]
async fn failures_are_counted_by_code_and_reason() {
    let report = bench("--pool refuse --in-flight 3 --count 40").await;
    assert_eq!(outcome(&report), (0, 40, 0));
    assert_eq!(
        report["errors"],
        serde_json::json!([{ "code": "RESOURCE_EXHAUSTED", "reason": "LANE_FULL", "count": 40 }])
    );

    for mode in ["process", "submit"] {
        let report = bench(&format!("--pool odd-fail --mode {mode} --count 40")).await;
        assert_eq!(outcome(&report), (20, 20, 0));
        assert_eq!(
            report["errors"],
            serde_json::json!([{ "code": "INTERNAL", "reason": "HANDLER_FAILED", "count": 20 }])
        );
    }

    let report = bench("--pool reject --mode submit --in-flight 40 --count 40").await;
    assert_eq!(outcome(&report), (0, 40, 0));
    assert_eq!(report["errors"][0]["reason"], "UNKNOWN_POOL");

    // These fill the window before anything is measured, and their receipt comes at the end.
    let report = bench("--pool reject --mode submit --in-flight 4 --warmup 500ms --duration 1ms").await;
    assert_eq!(outcome(&report), (0, 0, 0));
    assert_eq!(report["failed_in_warmup"], 4);
    assert_eq!(report["errors"][0]["reason"], "UNKNOWN_POOL");
}

#[tokio::test]
async fn what_is_never_answered_is_not_hidden() {
    for mode in ["call", "submit"] {
        let report = bench(&format!("--pool silent --mode {mode} --in-flight 5 --count 5 --drain 10ms")).await;
        assert_eq!(outcome(&report), (0, 0, 5), "{mode}");
    }
    // This server ends the stream with OK when its client half-closes, whatever it still owes.
    let report = bench("--pool silent --mode process --in-flight 5 --count 5").await;
    assert_eq!(outcome(&report), (0, 5, 0));
    assert_eq!(report["errors"][0]["reason"], "the server ended the stream before its last result");
    // Of the hundred that an open loop wanted to begin, the window had room for five.
    let report = bench("--pool silent --rate 1000 --in-flight 5 --duration 100ms --drain 10ms").await;
    let unsent = report["unsent"].as_u64().unwrap();
    assert!(unsent >= 95, "{report}");
    assert_eq!(outcome(&report), (0, 0, 100 - unsent));
}

#[tokio::test]
async fn a_doubled_update_is_seen() {
    let report = bench("--pool double --mode submit --count 100").await;
    assert_eq!(outcome(&report), (100, 0, 0));
    // The last one's double may come after the end.
    assert!(report["stray"].as_u64() >= Some(99), "{report}");
}

#[tokio::test]
async fn a_stream_that_breaks_fails_its_items_and_the_load_goes_on() {
    let report = bench("--pool breaks --mode process --in-flight 4 --count 40").await;
    let (items, failed, unanswered) = outcome(&report);
    assert_eq!((items + failed, unanswered), (40, 0), "{report}");
    assert!(items >= 20 && failed >= 4, "{report}");
    assert!(report["errors"].to_string().contains("BROKE"), "{report}");
}

#[tokio::test]
async fn connections_that_fail_are_not_items_that_do() {
    // A server that goes as soon as somebody comes.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move { listener.accept().await.map(drop) });
    let line = format!("bench --addr {addr} --in-flight 3 --warmup 0s --duration 300ms");
    let args = Cli::try_parse_from(line.split(' ')).unwrap().bench;
    let report = load(&args, Target::parse(&addr).unwrap(), std::future::pending()).await.unwrap().json(&args);
    let sum = |list: &str| -> u64 {
        report[list].as_array().unwrap().iter().map(|error| error["count"].as_u64().unwrap()).sum()
    };
    assert_eq!(outcome(&report), (0, sum("errors"), 0), "{report}");
    assert!(sum("connection_errors") > 0, "{report}");
}

#[tokio::test]
async fn a_run_that_is_interrupted_reports_what_it_measured() {
    let incoming = TcpIncoming::bind(([127, 0, 0, 1], 0).into()).unwrap();
    let addr = incoming.local_addr().unwrap().to_string();
    let fake = Fake::default();
    let server = Server::builder().add_service(DispatcherServer::new(fake.clone())).serve_with_incoming(incoming);
    let server = tokio::spawn(server);
    for mode in ["call", "process", "submit"] {
        for shape in ["", " --rate 1000"] {
            let line = format!("bench --addr {addr} --mode {mode}{shape} --in-flight 3 --warmup 0s --duration 1h");
            let args = Cli::try_parse_from(line.split(' ')).unwrap().bench;
            let mut items = fake.items.subscribe();
            let enough = *items.borrow() + 100;
            // All but the few in flight have been answered by then.
            let interrupted = async move { drop(items.wait_for(|items| *items >= enough).await) };
            let report = load(&args, Target::parse(&addr).unwrap(), interrupted).await.unwrap();
            assert!(report.items > 0, "{line}");
            let json = report.json(&args);
            assert_eq!(json["interrupted"], true);
            assert!(json["seconds"].as_f64().is_some_and(|seconds| seconds < 1800.0), "{json}");
            assert!(json["items_per_s"].as_f64().is_some_and(|rate| rate > 0.0), "{json}");
            assert!(report.text(&args).lines().next().is_some_and(|line| line.ends_with("(interrupted)")));
        }
    }
    server.abort();
}

#[test]
fn a_server_that_is_not_there_is_an_error_that_says_what_to_do() {
    // Port 1 of this machine: nobody's.
    let args = Cli::try_parse_from(["bench", "--addr", "127.0.0.1:1", "--connect-timeout", "0"]).unwrap().bench;
    let message = format!("{:#}", run(args).unwrap_err());
    assert!(message.contains("cannot reach 127.0.0.1:1: Connection refused"), "{message}");
}

#[test]
fn rates_are_above_zero() {
    assert_eq!(parse_rate("5000/s"), Ok(5000.0));
    assert_eq!(parse_rate("0.5"), Ok(0.5));
    for wrong in ["", "0", "-1", "nan", "inf", "5000/m"] {
        assert!(parse_rate(wrong).is_err(), "{wrong}");
    }
}
