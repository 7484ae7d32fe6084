//! The dispatch: offer → claim → complete → collect, in one thread and between two processes that spin.
//!
//! The summary at the end measures in turns, between the same two processes on the same two cores: a cache line there
//! and back and nothing else, and an item with 64 bytes of payload through item table, lane and return ring, read and
//! written on both sides. Throughput is compared to one hop of crossbeam's `ArrayQueue<u64>` between two threads.

mod rig;

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use criterion::{BenchmarkId, Criterion, Throughput};
use crossbeam_queue::ArrayQueue;
use forkring::{
    dispatch::{Bells, Front, Kind, Offer, Topology, Worker},
    process::now,
    segment::{Segment, SegmentOwner, Slot},
};
use rig::{
    Run, Turns, at_least, at_most, cores,
    pair::{IN_FLIGHT, LARGEST, OFFER, Pair, Role, consume, echo, geometry, offer},
    pin, trips, until,
};

/// The most that a round trip may be, in cache lines there and back.
const LATENCY: f64 = 2.2;
/// The least that the items/s may be, in hops/s of an `ArrayQueue`.
const RATE: f64 = 1.0;

const SIZES: [(&str, usize); 5] =
    [("64 B", 64), ("1 KiB", 1 << 10), ("16 KiB", 16 << 10), ("256 KiB", 256 << 10), ("4 MiB", LARGEST)];

fn main() {
    let run = Run::of_arguments();
    let mut pair = Pair::fork(Role::Parked, LARGEST);
    let mut shipped = Pair::fork(Role::Shipped, 64);

    let mut criterion = rig::criterion().configure_from_args();
    one_thread(&mut criterion);
    two_processes(&mut criterion, &mut pair);
    criterion.final_summary();
    if run != Run::NoSummary {
        summary(run, &mut pair, &mut shipped);
    }
}

fn one_thread(criterion: &mut Criterion) {
    let name = format!("bench-one-thread-{}", std::process::id());
    let owner = SegmentOwner::create(&name, geometry(LARGEST)).unwrap_or_else(|error| panic!("{error}"));
    let attach = |slot| Segment::attach(owner.object(), &name, slot).unwrap_or_else(|error| panic!("{error}"));
    let (ours, theirs) = (attach(Slot::Front(0)), attach(Slot::Worker(0)));
    let topology = Topology::new([1]);
    let bells = Bells::new(1, 1).expect("eventfds");
    let mut worker = Worker::attach(&theirs, topology.clone(), bells.clone(), 0).expect("a pool");
    let (mut front, _) = Front::attach(&ours, topology, bells, 0);

    let mut group = criterion.benchmark_group("dispatch, one thread");
    for (name, size) in SIZES {
        let payload = vec![1; size];
        let mut into = vec![0; size];
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(BenchmarkId::new("offer, claim, complete, collect", name), |b| {
            b.iter(|| {
                offer(&mut front, &OFFER, black_box(&payload)).expect("there is room for one item");
                front.ring();
                assert!(echo(&mut worker));
                let completion = front.collect().expect("it is complete");
                consume(&mut front, &completion, &mut into);
            })
        });
    }
    group.finish();
}

fn two_processes(criterion: &mut Criterion, pair: &mut Pair) {
    let mut group = criterion.benchmark_group("dispatch, two processes spinning");
    pair.play(Role::Line);
    let mut n = 0;
    group.bench_function("a cache line there and back", |b| {
        b.iter(|| {
            n += 1;
            pair.line(n);
        })
    });
    pair.play(Role::Spinning);
    for (name, size) in SIZES {
        let payload = vec![1; size];
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(BenchmarkId::new("there and back", name), |b| b.iter(|| pair.item(black_box(&payload))));
    }
    const BATCH: usize = 10_000;
    group.throughput(Throughput::Elements(BATCH as u64));
    for in_flight in IN_FLIGHT {
        pair.play(Role::Spinning);
        group.bench_function(format!("{in_flight} in flight, 64 B, by {BATCH}"), |b| {
            b.iter(|| pair.items(BATCH, in_flight, black_box(&[1; 64])))
        });
        pair.play(Role::Parked);
        group.bench_function(format!("peer: a hop through ArrayQueue of {in_flight}, two threads, by {BATCH}"), |b| {
            b.iter_custom(|iterations| hops(iterations as usize * BATCH, in_flight))
        });
    }
    group.finish();
}

/// The time that so many hops take, from one thread to another, on the two cores of the pair, with as many in flight
/// as there are items.
fn hops(n: usize, in_flight: usize) -> Duration {
    let queue = ArrayQueue::new(in_flight);
    let [_, theirs] = cores();
    std::thread::scope(|scope| {
        let taker = scope.spawn(|| {
            pin(theirs);
            // The first says that both are there.
            until(|| queue.pop());
            (0..n).fold(0u64, |sum, _| sum.wrapping_add(until(|| queue.pop())))
        });
        until(|| queue.push(0).ok());
        until(|| queue.is_empty().then_some(()));
        let start = Instant::now();
        (0..n as u64).for_each(|i| until(|| queue.push(i).ok()));
        black_box(taker.join().expect("it does not panic"));
        start.elapsed()
    })
}

fn summary(run: Run, pair: &mut Pair, shipped: &mut Pair) {
    let (rounds, n, rate_n) = (run.times(21), run.times(10_000), run.times(100_000));
    let payload = black_box([1; 64]);
    let mut latency = Turns::<3>::default();
    let mut tail = Turns::<1>::default();
    let mut rates = IN_FLIGHT.map(|in_flight| (in_flight, Turns::<3>::default()));
    for _ in 0..rounds {
        pair.play(Role::Line);
        let mut i = 0;
        let line = trips(n, || {
            i += 1;
            pair.line(i);
        });
        pair.play(Role::Spinning);
        let item = trips(n, || pair.item(&payload));
        // The loop that ships looks at the clock: when an item was offered, claimed and done.
        pair.play(Role::Parked);
        shipped.item(&payload);
        let with_clock = trips(n, || shipped.item_with(&Offer { offered: now(), kind: Kind::Call, ..OFFER }, &payload));
        shipped.until_asleep();
        for (in_flight, rate) in &mut rates {
            let timed = |pair: &mut Pair| {
                let start = Instant::now();
                pair.items(rate_n, *in_flight, &payload);
                start.elapsed()
            };
            pair.play(Role::Spinning);
            let items = timed(pair);
            pair.play(Role::Parked);
            let hop = hops(rate_n, *in_flight);
            shipped.item(&payload);
            let with_clock = timed(shipped);
            shipped.until_asleep();
            rate.add([hop, items, with_clock].map(|time| rate_n as f64 / time.as_secs_f64()));
        }

        let p50 = |of: &hdrhistogram::Histogram<u64>| of.value_at_quantile(0.5) as f64;
        latency.add([p50(&line), p50(&item), p50(&with_clock)]);
        tail.add([item.value_at_quantile(0.99) as f64]);
    }
    if run == Run::Once {
        return;
    }
    let micros = |column| latency.median(column) / 1e6;
    println!("\ndispatch, two processes spinning, 64 B, medians of {rounds} rounds in turns");
    println!("  line there and back       p50 {:6.3} µs", micros(0));
    println!(
        "  item there and back       p50 {:6.3} µs, p99 {:.3} µs   {}",
        micros(1),
        tail.median(0) / 1e6,
        at_most(latency.ratio(1, 0), LATENCY, "line")
    );
    println!("    by the loop that ships  p50 {:6.3} µs   {:.2} × line", micros(2), latency.ratio(2, 0));
    for (in_flight, rate) in &rates {
        let millions = |column| rate.median(column) / 1e6;
        println!("  ArrayQueue<u64> of {in_flight:3}, one hop {:5.2} M/s", millions(0));
        println!(
            "  items, {in_flight:3} in flight         {:6.2} M/s   {}",
            millions(1),
            at_least(rate.ratio(1, 0), RATE, "ArrayQueue")
        );
        println!("    by the loop that ships      {:6.2} M/s   {:.2} × ArrayQueue", millions(2), rate.ratio(2, 0));
    }
}
