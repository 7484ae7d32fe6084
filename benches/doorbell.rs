//! The doorbell: an item there and back when both sides sleep, and what a waker pays when nobody does.
//!
//! The summary at the end measures in turns, between the same two processes on the same two cores: an eventfd there
//! and another one back, both blocking, and an item with 64 bytes of payload, for which the worker sleeps with
//! [`Worker::sleep`] and the front in a `poll` of its bell.
//!
//! [`Worker::sleep`]: forkring::dispatch::Worker::sleep

mod rig;

use std::{
    hint::black_box,
    sync::atomic::{AtomicU64, Ordering::SeqCst, fence},
};

use criterion::Criterion;
use forkring::doorbell::{Bell, Sleepers};
use rig::{
    Run, Turns, at_most,
    pair::{Pair, Role},
    trips,
};

/// The most that a round trip asleep may be, in eventfds there and back.
const ASLEEP: f64 = 1.1;

fn main() {
    let run = Run::of_arguments();
    let mut pair = Pair::fork(Role::Parked, 64);
    let mut criterion = rig::criterion().configure_from_args();
    asleep(&mut criterion, &mut pair);
    pair.play(Role::Parked);
    awake(&mut criterion);
    criterion.final_summary();
    if run != Run::NoSummary {
        summary(run, &mut pair);
    }
}

fn asleep(criterion: &mut Criterion, pair: &mut Pair) {
    let mut group = criterion.benchmark_group("doorbell, two processes asleep");
    pair.play(Role::Eventfd);
    group.bench_function("an eventfd there and back", |b| b.iter(|| pair.eventfd()));
    pair.play(Role::Asleep);
    group.bench_function("an item there and back, 64 B", |b| b.iter(|| pair.item_asleep(black_box(&[1; 64]))));
    group.finish();
}

fn awake(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("doorbell, nobody asleep");
    let words = [const { AtomicU64::new(0) }; 4];
    group.bench_function("a fence alone", |b| b.iter(|| fence(SeqCst)));
    for (of, words) in [("one sleeper", &words[..1]), ("256 sleepers", &words[..])] {
        let sleepers = Sleepers::new(words);
        group.bench_function(format!("wake_one of {of}"), |b| b.iter(|| black_box(sleepers).wake_one()));
    }
    let bell = Bell::blocking().expect("an eventfd");
    group.bench_function("peer: ringing all the same", |b| b.iter(|| bell.ring()));
    group.finish();
}

fn summary(run: Run, pair: &mut Pair) {
    let (rounds, n) = (run.times(21), run.times(800));
    let mut turns = Turns::<2>::default();
    for _ in 0..rounds {
        pair.play(Role::Eventfd);
        let eventfd = trips(n, || pair.eventfd());
        pair.play(Role::Asleep);
        let item = trips(n, || pair.item_asleep(black_box(&[1; 64])));
        turns.add([eventfd, item].map(|trips| trips.value_at_quantile(0.5) as f64));
    }
    if run == Run::Once {
        return;
    }
    println!("\ndoorbell, two processes asleep, medians of {rounds} rounds in turns");
    println!("  eventfd there and back  p50 {:7.2} µs", turns.median(0) / 1e6);
    println!(
        "  item there and back     p50 {:7.2} µs   {}",
        turns.median(1) / 1e6,
        at_most(turns.ratio(1, 0), ASLEEP, "eventfd")
    );
}
