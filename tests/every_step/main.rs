//! Kill at every step: whoever is killed between whichever two shared steps, every accepted item completes exactly
//! once, nothing is stuck, nothing is left.
//!
//! It takes the feature `crash-points`. A first run writes down which process passes which point how often, from the
//! start to the end of a server that does a bit of everything ([`house`]); then the same is done once for each (process,
//! point, n) with that process killed when it passes that point for the n-th time.
//!
//! `FORKRING_TEST_STEPS=N` is the most n of a point; by default it is 1, and `all` is as often as it is passed.
//! `FORKRING_TEST_STEP=WHO/POINT:N` is that one only, as the list of what went wrong has it.

#[path = "../common/mod.rs"]
mod common;
mod house;
mod ledger;

use std::{
    collections::{BTreeMap, HashMap},
    env,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Mutex,
    thread,
};

use common::Files;
use house::{FRONT_LOST, House, Kill, WORKER_LOST, Who};

/// Servers at a time: they wait much and work little.
const AT_ONCE: usize = 3;

fn most() -> u64 {
    match env::var("FORKRING_TEST_STEPS").as_deref() {
        Err(_) => 1,
        Ok("all") => u64::MAX,
        Ok(n) => n.parse().expect("FORKRING_TEST_STEPS is a number or `all`"),
    }
}

/// How often a process passes each point, most of its incarnations.
fn passes(who: Who) -> BTreeMap<String, u64> {
    let files = Files::new();
    let passes = files.path("passes");
    common::run(House::list_passes(who, passes));
    let mut counts: HashMap<(String, String), u64> = HashMap::new();
    for line in files.lines("passes") {
        let words: Vec<_> = line.split(' ').collect();
        if words[0] == who.name {
            *counts.entry((words[1].to_owned(), words[2].to_owned())).or_default() += 1;
        }
    }
    let mut most = BTreeMap::new();
    for ((_, point), count) in counts {
        let entry = most.entry(point).or_insert(0);
        *entry = count.max(*entry);
    }
    most
}

fn kill_at_every_step(name: &'static str, since: Option<&'static str>, needed: &[&str]) {
    let who = Who { name, since };
    let passes = passes(who);
    for point in needed {
        assert!(passes.contains_key(*point), "{who} never passes {point}: {passes:?}");
    }
    let most = most();
    let kills =
        passes.iter().flat_map(|(point, &count)| (1..=count.min(most)).map(|n| Kill { who, point: point.clone(), n }));
    let only = env::var("FORKRING_TEST_STEP").ok();
    let kills: Vec<_> = kills.filter(|kill| only.as_ref().is_none_or(|only| *only == kill.to_string())).collect();
    let (total, waiting) = (kills.len(), Mutex::new(kills));
    let (missed, failed) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let Some(kill) = waiting.lock().unwrap().pop() else { break };
                    let case = || common::run(House::die_in(&kill));
                    match catch_unwind(AssertUnwindSafe(case)) {
                        Ok(true) => {}
                        Ok(false) => missed.lock().unwrap().push(kill),
                        Err(_) => failed.lock().unwrap().push(kill),
                    }
                }
            });
        }
    });
    let names =
        |kills: Mutex<Vec<Kill>>| -> Vec<_> { kills.into_inner().unwrap().iter().map(Kill::to_string).collect() };
    let (missed, failed) = (names(missed), names(failed));
    println!("{who}: {total} kills at {} points; not reached: {missed:?}", passes.len());
    // What depends on who is faster is not the same each time, but most of it is.
    assert!(missed.len() * 5 <= total, "too many were not reached");
    assert!(failed.is_empty(), "{} of {total} kills went wrong: {failed:#?}", failed.len());
}

#[test]
fn of_a_worker() {
    let needed = ["take.claimed", "complete.written", "complete.done", "complete.told", "worker.stopped"];
    kill_at_every_step("w0", None, &[&needed[..], &["partial.written", "partial.put", "partial.told"]].concat());
}

#[test]
fn of_the_front() {
    let needed = ["offer.ready", "collect.held", "returns.told", "updates.sent", "release.freed", "cancel.freed"];
    let others = ["expire.done", "partial.copied", "partial.taken", "partial.credited"];
    kill_at_every_step("front", None, &[&needed[..], &others].concat());
}

#[test]
fn of_the_supervisor() {
    kill_at_every_step(
        "supervisor",
        None,
        &["segment.made", "supervisor.forked", "sweep.ready", "sweep.done", "supervisor.ended"],
    );
}

/// It finds items in each phase.
#[test]
fn of_a_front_that_takes_over() {
    let needed = ["attach.cancelled", "attach.freed", "attach.scanned", "attach.told", "front.attached"];
    kill_at_every_step("front", Some(FRONT_LOST), &needed);
}

/// It finds results that nobody has fetched.
#[test]
fn of_a_worker_that_takes_over() {
    kill_at_every_step("w0", Some(WORKER_LOST), &["worker.attached", "take.claimed", "complete.done"]);
}
