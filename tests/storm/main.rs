//! The storm: clients of every shape, and a killer. Nothing accepted is lost, nothing is done twice, nothing wedges.
//!
//! FORKRING_TEST_STORM makes it longer, in rounds that are each checked, and FORKRING_TEST_SEED repeats one. What it
//! did and found is printed: `cargo test --test storm -- --nocapture`.

mod chance;
#[path = "../common/mod.rs"]
mod common;
mod killer;
mod link;
mod load;
mod tally;

use std::{
    rc::Rc,
    time::{Duration, Instant},
};

use chance::Chance;
use common::{soon, variable};
use killer::Killer;
use load::Storm;
use tally::{Shape, Tally, journal};
use tokio::task::{JoinSet, LocalSet};

const ROUND: Duration = Duration::from_secs(12);
/// Of the servers' items, as the tests' settings have it.
const CAPACITY: usize = 256;

#[test]
fn nothing_is_lost_or_done_twice_in_a_storm() {
    let length = variable("FORKRING_TEST_STORM").map_or(ROUND, Duration::from_secs);
    let seed =
        variable("FORKRING_TEST_SEED").unwrap_or_else(|| forkring::process::now() ^ u64::from(std::process::id()));
    println!("storm: FORKRING_TEST_SEED={seed}");
    let (begin, mut chance, mut tally) = (Instant::now(), Chance::new(seed), Tally::default());
    let mut rounds = 0;
    while tally.violations.is_empty() && (rounds == 0 || begin.elapsed() + ROUND <= length) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        tally = LocalSet::new().block_on(&runtime, round(chance.split(), length.min(ROUND), tally));
        rounds += 1;
    }
    report(&tally, rounds, begin.elapsed());
    assert!(tally.violations.is_empty(), "{:#?}", &tally.violations[..tally.violations.len().min(30)]);
}

async fn round(mut chance: Chance, length: Duration, tally: Tally) -> Tally {
    let storm = Rc::<Storm>::default();
    storm.tally.replace(tally);
    let mut killer = Killer::start(storm.clone(), chance.split()).await;
    killer.server.family(killer::WORKERS).await;
    let subscribers = load::subscribe(&storm, &mut chance);
    let workers = load::begin(&storm, &mut chance);
    killer.rage(length).await;

    storm.calm.set(true);
    join("the last answers", workers).await;
    killer.settle().await;
    killer.assert_capacity(CAPACITY).await;
    let (journal_file, killed) = (killer.journal(), killer.killed.clone());
    let executions = journal(&journal_file);
    storm.link.cut();
    storm.over.set(true);
    killer.end().await;
    join("the end of the updates", subscribers).await;
    let mut tally = storm.tally.take();
    tally.balance(executions, &killed);
    tally
}

async fn join(what: &str, mut tasks: JoinSet<()>) {
    while let Some(ended) = soon(what, tasks.join_next()).await {
        ended.expect("a task");
    }
}

/// One screen.
fn report(tally: &Tally, rounds: u32, took: Duration) {
    let [calls, processed, submitted] =
        [Shape::Call, Shape::Process, Shape::Submit].map(|n| tally.answered[n as usize]);
    let kills = |whom: &str| tally.kills.get(whom).copied().unwrap_or(0);
    println!("storm: {:.0} s in {rounds} rounds", took.as_secs_f64());
    println!("  killed      {} workers, {} fronts, {} servers", kills("worker"), kills("front"), kills("server"));
    println!("  stopped     {} processes; {} servers drained and restarted", kills("stopped"), kills("drained"));
    println!(
        "  items       {} answered: {calls} calls, {processed} of streams, {submitted} updates",
        calls + processed + submitted
    );
    println!("  executed    {} times, {} after a death", tally.executions, tally.retries);
    println!("  cut off     {} calls and streams; {} updates sent again", tally.broken, tally.sent_again);
    println!("  no receipt  {} of them came all the same, {} did not", tally.unknown[0], tally.unknown[1]);
    println!("  clients     {} gave up, {} expired, {} were refused", tally.abandoned, tally.expired, tally.refused);
    println!("  lost        {}", tally.lost);
    println!("  doubled     {}", tally.doubled);
    for (whom, recovery) in &tally.recoveries {
        let mut times = recovery.times.clone();
        times.sort_unstable();
        if let (Some(median), Some(worst)) = (times.get(times.len() / 2), times.last()) {
            println!("  answer after the kill of a {whom}: median {median:.1?}, worst {worst:.1?}");
        }
    }
}
