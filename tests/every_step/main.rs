//! Kill at every step: whoever is killed between whichever two shared steps, every accepted item completes exactly
//! once, nothing is stuck, nothing is left.
//!
//! It takes the feature `crash-points`. A first run writes down which process passes which point how often, from the
//! start to the end of a server that does a bit of everything ([`house`]); then the same is done once for each (process,
//! point, n) with that process killed when it passes that point for the n-th time.
//!
//! `FORKRING_TEST_STEPS=N` is the most n of a point; by default it is 1, and `all` is as often as it is passed.
//! With 0 nobody is killed, and it is only seen that each point of the source is passed or known ([`points`]).
//! `FORKRING_TEST_STEP=WHO/POINT:N` is that one only, as the list of what went wrong has it; `WHO/` is all of one.
//!
//! It has a `main` of its own, because it is also a program that forks: see [`program`].

#[path = "../common/mod.rs"]
mod common;
mod house;
mod ledger;
mod points;
mod program;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    env,
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    sync::Mutex,
    thread,
};

use common::Files;
use house::{FRONT_LOST, House, Kill, WORKER_LOST, Who};

/// Servers at a time: they wait much and work little.
const AT_ONCE: usize = 6;
/// How often a point is tried that was not reached: what is passed depends on who is faster.
const TRIES: usize = 5;

/// Who is killed, and what each of them passes in any case.
const PLAN: [(Who, &[&str]); 8] = [
    (
        Who { name: "supervisor", since: None },
        &[
            "segment.made",
            "supervisor.forked",
            "sweep.ready",
            "sweep.done",
            "sweep.cancelled",
            "nursery.forked",
            "nursery.ordered",
            "nursery.heard",
            "nursery.reaped",
            "nursery.ended",
            "arrival.drained",
            "arrival.registered",
            "reload.checked",
            "nursery.renewed",
            "reload.retiring",
            "reload.rung",
            "supervisor.ended",
        ],
    ),
    (
        Who { name: "front", since: None },
        &[
            "offer.ready",
            "collect.held",
            "returns.told",
            "updates.sent",
            "release.freed",
            "cancel.freed",
            "expire.done",
            "partial.copied",
            "partial.taken",
            "partial.credited",
        ],
    ),
    // It finds items in each phase.
    (
        Who { name: "front", since: Some(FRONT_LOST) },
        &["attach.cancelled", "attach.freed", "attach.scanned", "attach.told", "front.attached"],
    ),
    (
        Who { name: "w0", since: None },
        &[
            "take.claimed",
            "complete.written",
            "complete.done",
            "complete.told",
            "worker.stopped",
            "partial.written",
            "partial.put",
            "partial.told",
        ],
    ),
    // It finds results that nobody has fetched.
    (Who { name: "w0", since: Some(WORKER_LOST) }, &["worker.attached", "take.claimed", "complete.done"]),
    // It has many items in hand.
    (
        Who { name: "w6", since: None },
        &[
            "sdk.settled",
            "sdk.attached",
            "sdk.arrived",
            "sdk.taken",
            "sdk.armed",
            "sdk.disarmed",
            "sdk.stopping",
            "take.claimed",
            "complete.done",
        ],
    ),
    (Who { name: "w7", since: None }, &["sdk.settled", "sdk.arrived", "worker.retired", "complete.done"]),
    (Who { name: "n3", since: None }, &["sdk.ready", "sdk.ordered", "sdk.forked", "sdk.born"]),
];

/// Points that are passed in no such house, and the tests that kill at them.
const ELSEWHERE: [(&str, &[&str]); 2] = [
    (
        "tests/adopt.rs",
        &["adopt.closed", "adopt.owned", "adopt.requeued", "adopt.reset", "adopt.settled", "adopt.staged"],
    ),
    ("tests/dead_letters.rs", &["dead.gone", "dead.offered"]),
];

fn most() -> u64 {
    match env::var("FORKRING_TEST_STEPS").as_deref() {
        Err(_) => 1,
        Ok("all") => u64::MAX,
        Ok(n) => n.parse().expect("FORKRING_TEST_STEPS is a number or `all`"),
    }
}

/// How often a process passes each point, most of its incarnations; listed again if it comes to something needed in no list.
fn passes(who: Who, needed: &[&str]) -> BTreeMap<String, u64> {
    let mut most = BTreeMap::new();
    for _ in 0..TRIES {
        let files = Files::new();
        common::run(House::list_passes(who, files.path("passes")));
        let mut counts: HashMap<(String, String), u64> = HashMap::new();
        for line in files.lines("passes") {
            let words: Vec<_> = line.split(' ').collect();
            if words[0] == who.name {
                *counts.entry((words[1].to_owned(), words[2].to_owned())).or_default() += 1;
            }
        }
        for ((_, point), count) in counts {
            let entry = most.entry(point).or_insert(0);
            *entry = count.max(*entry);
        }
        if needed.iter().all(|point| most.contains_key(*point)) {
            break;
        }
    }
    most
}

/// Does something with each, some at a time and in their order. A panic is none.
fn each<T: Send, R: Send>(all: Vec<T>, act: impl Fn(&T) -> R + Sync) -> Vec<(T, Option<R>)> {
    let (waiting, done) = (Mutex::new(all.into_iter()), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let Some(one) = waiting.lock().expect("no panic").next() else { break };
                    let result = catch_unwind(AssertUnwindSafe(|| act(&one))).ok();
                    done.lock().expect("no panic").push((one, result));
                }
            });
        }
    });
    done.into_inner().expect("no panic")
}

fn main() -> ExitCode {
    if program::is_it() {
        program::run();
        return ExitCode::SUCCESS;
    }
    // A test runner may only ask for names.
    if env::args().any(|argument| argument == "--list") || end_well() {
        return ExitCode::SUCCESS;
    }
    ExitCode::FAILURE
}

/// Whether all goes well, whoever is killed wherever.
fn end_well() -> bool {
    let only = env::var("FORKRING_TEST_STEP").unwrap_or_default();
    let plan = PLAN.iter().filter(|(who, _)| only.is_empty() || only.starts_with(&format!("{who}/"))).collect();
    let mut is_well = true;
    let mut kills = Vec::new();
    let mut passed = BTreeSet::new();
    for ((who, needed), passes) in each(plan, |(who, needed)| passes(*who, needed)) {
        let Some(passes) = passes else { return false };
        passed.extend(passes.keys().cloned());
        for point in needed.iter().filter(|point| !passes.contains_key(**point)) {
            println!("{who} never passes {point}");
            is_well = false;
        }
        for (point, count) in passes {
            kills.extend((1..=count.min(most())).map(|n| Kill { who: *who, point: point.clone(), n }));
        }
    }
    for fault in only.is_empty().then(|| points::faults(&passed, &ELSEWHERE)).into_iter().flatten() {
        println!("{fault}");
        is_well = false;
    }
    kills.retain(|kill| kill.to_string().starts_with(&only));
    let killed = each(kills, |kill| (0..TRIES).any(|_| common::run(House::die_in(kill))));
    let mut all_missed = 0;
    for (who, needed) in PLAN {
        let (kills, results): (Vec<_>, Vec<_>) = killed.iter().filter(|(kill, _)| kill.who == who).cloned().unzip();
        if kills.is_empty() {
            // Left out.
            continue;
        }
        let with =
            |wanted| kills.iter().zip(&results).filter(move |(_, result)| **result == wanted).map(|(kill, _)| kill);
        let names = |wanted| with(wanted).map(Kill::to_string).collect::<Vec<_>>();
        let (missed, failed) = (names(Some(false)), names(None));
        let points: BTreeSet<_> = kills.iter().map(|kill| &kill.point).collect();
        println!("{who}: {} kills at {} points; not reached: {missed:?}", kills.len(), points.len());
        if !failed.is_empty() {
            println!("{} of {} went wrong: {failed:#?}", failed.len(), kills.len());
        }
        let must = |kill: &&Kill| kill.n == 1 && needed.contains(&kill.point.as_str());
        for kill in with(Some(false)).filter(must) {
            println!("{kill} must be reached");
            is_well = false;
        }
        is_well &= failed.is_empty();
        all_missed += missed.len();
    }
    // Of one process alone it may be more, where the n-th pass is a matter of luck.
    if only.is_empty() && all_missed * 20 > killed.len() {
        println!("{all_missed} of {} were not reached: too many", killed.len());
        is_well = false;
    }
    is_well
}
