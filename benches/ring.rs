//! The rings alone, beside crossbeam's `ArrayQueue<u64>` in the same shapes.
//!
//! A lane's claim is a CAS in a table of words, as it is in the item table. Where there are more threads than cores
//! the kernel's scheduler is part of the figure, for the peer as well.

mod rig;

use std::{
    hint::black_box,
    sync::{
        Barrier,
        atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering::*},
    },
    thread,
    time::{Duration, Instant},
};

use criterion::{Criterion, Throughput};
use crossbeam_queue::ArrayQueue;
use forkring::ring::{Consumer, Hint, Lane, Producer};
use rig::{Run, Turns, cores, pin, until};

const CELLS: usize = 1024;
const ITEMS: u32 = 4096;
/// Elements of one iteration across threads.
const BATCH: usize = 10_000;
/// Pushers and takers.
const SHAPES: [(usize, usize); 3] = [(1, 1), (2, 1), (1, 2)];

fn main() {
    let run = Run::of_arguments();
    let mut criterion = rig::criterion().configure_from_args();
    same_thread(&mut criterion);
    across_threads(&mut criterion);
    criterion.final_summary();
    if run != Run::NoSummary {
        summary(run);
    }
}

fn same_thread(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ring, one thread, in and out");
    fn in_and_out(queue: &impl Queue) -> impl FnMut() -> Option<u32> {
        let mut n = 0;
        move || {
            n += 1;
            queue.push(n);
            queue.take()
        }
    }
    group.bench_function("lane", |b| {
        let memory = Memory::default();
        b.iter(in_and_out(&memory));
    });
    group.bench_function("peer: ArrayQueue", |b| {
        let queue = ArrayQueue::new(CELLS);
        b.iter(in_and_out(&queue));
    });
    group.bench_function("return ring", |b| {
        let memory = Memory::default();
        let (mut producer, mut consumer) = memory.returns();
        b.iter(|| (producer.push(black_box(7)), consumer.pop()));
    });
    group.finish();
}

fn across_threads(criterion: &mut Criterion) {
    for (pushers, takers) in SHAPES {
        let mut group = criterion.benchmark_group(format!("ring, {pushers} × {takers} threads, by {BATCH}"));
        group.throughput(Throughput::Elements(BATCH as u64));
        let n = |iterations: u64| iterations as usize * BATCH;
        group.bench_function("lane", |b| b.iter_custom(|i| through(&Memory::default(), pushers, takers, n(i))));
        group.bench_function("peer: ArrayQueue", |b| {
            b.iter_custom(|i| through(&ArrayQueue::new(CELLS), pushers, takers, n(i)))
        });
        if (pushers, takers) == (1, 1) {
            group.bench_function("return ring", |b| b.iter_custom(|i| through_returns(n(i))));
        }
        group.finish();
    }
}

/// What is compared.
trait Queue: Sync {
    fn push(&self, value: u32) -> Option<()>;
    fn take(&self) -> Option<u32>;
}

impl Queue for Memory {
    #[inline]
    fn push(&self, value: u32) -> Option<()> {
        let [index, generation] = [value % ITEMS, value / ITEMS];
        self.lane().push(Hint { index, generation }).ok()
    }

    #[inline]
    fn take(&self) -> Option<u32> {
        let claim = |hint: Hint| {
            let item = &self.items[hint.index as usize];
            item.compare_exchange(hint.generation, hint.generation + 1, AcqRel, Relaxed).is_ok()
        };
        self.lane().take(claim).map(|hint| hint.generation * ITEMS + hint.index)
    }
}

impl Queue for ArrayQueue<u64> {
    #[inline]
    fn push(&self, value: u32) -> Option<()> {
        ArrayQueue::push(self, value.into()).ok()
    }

    #[inline]
    fn take(&self) -> Option<u32> {
        self.pop().map(|value| value as u32)
    }
}

/// A counter alone on its two lines.
#[derive(Default)]
#[repr(align(128))]
struct Apart(AtomicU64);

/// Memory of a lane and of the items in it, or of a return ring.
struct Memory {
    head: Apart,
    tail: Apart,
    cells: Vec<AtomicU64>,
    items: Vec<AtomicU32>,
}

impl Default for Memory {
    fn default() -> Self {
        Memory {
            head: Apart::default(),
            tail: Apart::default(),
            cells: (0..CELLS).map(|_| AtomicU64::new(0)).collect(),
            items: (0..ITEMS).map(|_| AtomicU32::new(0)).collect(),
        }
    }
}

impl Memory {
    #[inline]
    fn lane(&self) -> Lane<'_> {
        Lane::new(&self.head.0, &self.tail.0, &self.cells)
    }

    fn returns(&self) -> (Producer<'_>, Consumer<'_>) {
        (Producer::resume(&self.head.0, &self.cells), Consumer::resume(&self.head.0, &self.cells))
    }
}

/// The time from the first to the last of some threads, which start together. Two stay on a core each.
fn time<'a>(roles: Vec<Box<dyn FnOnce() + Send + 'a>>) -> Duration {
    let count = roles.len();
    let gate = &Barrier::new(count);
    let (starts, ends): (Vec<_>, Vec<_>) = thread::scope(|scope| {
        let start = |(i, role): (usize, Box<dyn FnOnce() + Send + 'a>)| {
            scope.spawn(move || {
                if count == 2 {
                    pin(cores()[i]);
                }
                gate.wait();
                let start = Instant::now();
                role();
                (start, Instant::now())
            })
        };
        let threads: Vec<_> = roles.into_iter().enumerate().map(start).collect();
        threads.into_iter().map(|thread| thread.join().expect("it does not panic")).unzip()
    });
    ends.into_iter().max().zip(starts.into_iter().min()).map(|(end, start)| end - start).unwrap_or_default()
}

/// The time that `n` elements take from pushers to takers.
fn through(queue: &impl Queue, pushers: usize, takers: usize, n: usize) -> Duration {
    let taken = &AtomicUsize::new(0);
    let push = |first| move || (first..n).step_by(pushers).for_each(|i| until(|| queue.push(i as u32)));
    let take = || {
        // One taker counts for itself, so that it is the queue that is measured.
        let mut own = 0;
        until(|| {
            while let Some(value) = queue.take() {
                black_box(value);
                own += 1;
                if takers > 1 {
                    taken.fetch_add(1, Relaxed);
                }
            }
            (own == n || takers > 1 && taken.load(Relaxed) == n).then_some(())
        });
    };
    let mut roles: Vec<Box<dyn FnOnce() + Send>> = Vec::new();
    roles.extend((0..pushers).map(|first| Box::new(push(first)) as _));
    roles.extend((0..takers).map(|_| Box::new(take) as _));
    time(roles)
}

/// As [`through`], by the return ring.
fn through_returns(n: usize) -> Duration {
    let memory = Memory::default();
    let (mut producer, mut consumer) = memory.returns();
    let push = move || (0..n).for_each(|i| until(|| producer.push(i as u32 % ITEMS).then_some(())));
    let pop = move || (0..n).for_each(|_| _ = black_box(until(|| consumer.pop())));
    time(vec![Box::new(push), Box::new(pop)])
}

fn summary(run: Run) {
    let (rounds, n) = (run.times(11), run.times(100_000));
    println!();
    for (pushers, takers) in SHAPES {
        let mut turns = Turns::<3>::default();
        for _ in 0..rounds {
            let per_second = |time: Duration| n as f64 / time.as_secs_f64() / 1e6;
            turns.add([
                per_second(through(&ArrayQueue::new(CELLS), pushers, takers, n)),
                per_second(through(&Memory::default(), pushers, takers, n)),
                if (pushers, takers) == (1, 1) { per_second(through_returns(n)) } else { f64::NAN },
            ]);
        }
        if run == Run::Once {
            continue;
        }
        println!("ring, {pushers} × {takers} threads, medians of {rounds} rounds in turns");
        println!("  ArrayQueue   {:6.2} M/s", turns.median(0));
        println!("  lane         {:6.2} M/s   {:.2} × ArrayQueue", turns.median(1), turns.ratio(1, 0));
        if (pushers, takers) == (1, 1) {
            println!("  return ring  {:6.2} M/s   {:.2} × ArrayQueue", turns.median(2), turns.ratio(2, 0));
        }
    }
}
