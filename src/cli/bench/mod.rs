//! `forkring bench`: a load generator for any server that speaks `forkring.v1.Dispatcher`.
//!
//! It promises three things. Nothing is hidden: every item that was begun is counted as answered, failed (by code and
//! reason) or unanswered. An open loop measures from the moment an item *should* have been sent, so a server that
//! stalls cannot slow the generator down and look good. And every server gets the same client with the same settings,
//! which are wide, so that the server's own settings are what is measured.
//!
//! One thread: on a small machine the generator competes with the server, and hand-offs between threads of its own
//! would be charged to the server.

mod connection;
mod flow;
mod pace;
mod tally;
#[cfg(test)]
mod tests;

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, bail};
use clap::ValueEnum;

use connection::Target;
use flow::Load;
use pace::{Pace, Pacer};
use tally::{CpuClock, Report, Tally};

use super::{Addr, BadUsage, interrupt::on_interrupt, print, print_json};
use crate::{
    client::until_connected,
    config::{ByteSize, parse_duration, whole_number},
};

/// How long a run takes when neither `--duration` nor `--count` says.
const DEFAULT_DURATION: Duration = Duration::from_secs(10);
/// How long the answers that are still out may take after Ctrl-C.
const LAST_ANSWERS: Duration = Duration::from_secs(1);
/// How many items may be outstanding on a connection in an open loop when `--in-flight` does not say.
const OPEN_LOOP_IN_FLIGHT: u32 = 1024;

/// The largest payload: what protobuf allows one message, less some room for the rest of it.
const MAX_PAYLOAD: ByteSize = ByteSize::mib(2000);

/// Which of the service's shapes carries the items.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Unary: one `Call` per item
    Call,
    /// One `Process` stream per connection: items and results pipelined
    Process,
    /// One `Submit` and one `GetUpdates` stream per connection; latency is from submission until the update
    Submit,
}

/// Put a server under load and measure it.
///
/// A closed loop (the default) keeps `--in-flight` items outstanding on each connection and begins the next when one
/// is answered: it measures capacity. An open loop (`--rate`) begins items on a schedule whatever the server does and
/// measures from the scheduled time: it measures what users at that rate would see.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  forkring bench --in-flight 64
  forkring bench --mode process --in-flight 256 --payload 4k
  forkring bench --rate 20000 --duration 30s --json

An item that was begun is answered, failed (counted by code and reason) or unanswered; none is left out.
Ctrl-C ends the measurement early, with a report of what there is.
Exit code 1 when not one item succeeded.")]
pub struct BenchArgs {
    #[command(flatten)]
    addr: Addr,

    /// The pool that is to handle the items; not needed when the server has one
    #[arg(long, value_name = "NAME", default_value = "")]
    pool: String,

    /// Which RPC carries the items
    #[arg(long, value_enum, default_value = "call")]
    mode: Mode,

    /// How many connections to open
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = whole_number(1..=10_000_u32))]
    connections: u32,

    /// Items outstanding on each connection at most [default: 1; with --rate 1024]
    #[arg(long, value_name = "N", value_parser = whole_number(1..=1_000_000_u32))]
    in_flight: Option<u32>,

    /// Bytes in each item, such as 64, 4k or 1m
    #[arg(long, value_name = "SIZE", default_value = "64")]
    payload: ByteSize,

    /// Open loop: begin so many items a second, over all connections, such as 5000 or 5000/s
    #[arg(long, value_name = "N/s", value_parser = parse_rate)]
    rate: Option<f64>,

    /// How long to measure, such as 10s or 500ms [default: 10s; with --count no limit]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    duration: Option<Duration>,

    /// How long to load the server before measuring
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = parse_duration)]
    warmup: Duration,

    /// End after so many measured items
    #[arg(long, value_name = "N", value_parser = whole_number(1..=u64::MAX))]
    count: Option<u64>,

    /// How long to wait for the answers that are still out at the end
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = parse_duration)]
    drain: Duration,

    /// Check that every result is the item's own payload (for pools that echo); costs a copy per item
    #[arg(long)]
    check: bool,

    /// Print one JSON object instead of text; times in nanoseconds
    #[arg(long)]
    json: bool,
}

/// Runs the load, prints the report, and fails when not one item succeeded.
pub fn run(args: BenchArgs) -> anyhow::Result<()> {
    let target = Target::parse(&args.addr.addr)?;
    if args.payload > MAX_PAYLOAD {
        return Err(BadUsage(format!("--payload {}: a message holds at most {MAX_PAYLOAD}", args.payload)).into());
    }
    // As the servers do: the load generator should not be what is measured.
    crate::process::keep_freed_memory(64);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the load generator's event loop")?;
    let interrupted = on_interrupt()?;
    // It is the signal, or its thread has gone, which it does not.
    let report = runtime.block_on(load(&args, target, async move { drop(interrupted.await) }))?;
    // Nothing of the load outlives its report: a call that hangs must not hold up the exit.
    runtime.shutdown_background();
    if args.json {
        print_json(&report.json(&args))?;
    } else {
        print(report.text(&args))?;
    }
    if report.items == 0 {
        bail!("not one item succeeded; the report above says why");
    }
    Ok(())
}

/// Connects, drives all connections until the pace ends, waits for what is still out, and takes stock.
async fn load(args: &BenchArgs, target: Target, interrupted: impl Future<Output = ()>) -> anyhow::Result<Report> {
    let in_flight = in_flight(args);
    let mut connections = Vec::new();
    tokio::pin!(interrupted);
    for _ in 0..args.connections {
        let Addr { addr, connect_timeout } = &args.addr;
        let connect =
            until_connected(addr, *connect_timeout, async || target.connect().await, || args.addr.say_waiting());
        connections.push(tokio::select! {
            connection = connect => connection?,
            () = &mut interrupted => bail!("interrupted while waiting for the server: nothing was measured"),
        });
    }

    let begin = Instant::now();
    let from = begin + args.warmup;
    let duration = match (args.duration, args.count) {
        (None, None) => Some(DEFAULT_DURATION),
        (duration, _) => duration,
    };
    let until = duration.map(|duration| from + duration);
    // Ids differ from run to run, so that an update left over by an earlier client is told from one of ours.
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let pace = Arc::new(Pace::new(begin, from, until, args.count, args.rate, since_epoch.as_nanos() as u64));
    let load = Arc::new(Load::new(args, in_flight, target, pace.clone(), Tally::new(from, until)));

    let mut drivers = tokio::task::JoinSet::new();
    for (owner, connection) in connections.into_iter().enumerate() {
        drivers.spawn(load.clone().drive(owner, connection));
    }
    let pacer = args.rate.map(|rate| Pacer::start(pace.clone(), rate)).transpose()?;

    tokio::select! {
        () = tokio::time::sleep_until(from.into()) => {}
        () = &mut interrupted => bail!("interrupted in the warm-up: nothing was measured"),
    }
    let cpu = CpuClock::start();
    let all_done = async { while drivers.join_next().await.is_some() {} };
    tokio::pin!(all_done);
    // How long to wait for what is still out.
    let drain = tokio::select! {
        () = &mut all_done => None,
        () = pace.time_is_up() => Some(args.drain),
        () = &mut interrupted => {
            load.interrupt();
            Some(args.drain.min(LAST_ANSWERS))
        }
    };
    let cpu = cpu.busy();
    if let Some(drain) = drain {
        // Whatever is out when this ends is reported as unanswered.
        let _ = tokio::time::timeout(drain, all_done).await;
    }
    drop(pacer);
    Ok(load.report(cpu))
}

/// The window of each connection.
fn in_flight(args: &BenchArgs) -> u32 {
    let default = if args.rate.is_some() { OPEN_LOOP_IN_FLIGHT } else { 1 };
    args.in_flight.unwrap_or(default)
}

/// Reads `5000` or `5000/s`.
fn parse_rate(text: &str) -> Result<f64, String> {
    let wrong = "give items per second above zero, such as 5000 or 5000/s";
    let rate: f64 = text.trim_end_matches("/s").parse().map_err(|_| wrong)?;
    // Below 1e-3 or above 1e8 the schedule's arithmetic would say nothing useful.
    if (1e-3..=1e8).contains(&rate) { Ok(rate) } else { Err(wrong.into()) }
}
