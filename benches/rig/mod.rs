//! What the benches share: how they are run, two pinned cores, ratios of what was measured in turns, and a pair of
//! processes that talk through a segment.
//!
//! A figure of one process talking to another depends on where the machine has its cores at the moment, so that each
//! is measured in turns with what it is compared to, and it is the ratio of each turn that counts.
#![allow(dead_code)] // each bench uses a part

pub mod pair;

use std::{
    env,
    hint::{black_box, spin_loop},
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use criterion::Criterion;
use hdrhistogram::Histogram;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Trips between two looks at the clock.
pub const TOGETHER: usize = 8;

/// What the program was started for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Run {
    /// `cargo bench`: measure.
    Measure,
    /// `cargo test`: does everything once, measures nothing.
    Once,
    /// A test runner asks for names, or a profiler for one benchmark: no summary.
    NoSummary,
}

impl Run {
    /// From the arguments, as criterion reads them.
    pub fn of_arguments() -> Self {
        let has = |argument: &str| env::args().any(|a| a == argument);
        match () {
            () if has("--list") || has("--profile-time") => Run::NoSummary,
            () if has("--bench") && !has("--test") => Run::Measure,
            () => Run::Once,
        }
    }

    /// So many rounds or trips when measuring, else one.
    pub fn times(self, n: usize) -> usize {
        if self == Run::Measure { n } else { 1 }
    }
}

/// A criterion that needs seconds and not minutes: most benchmarks here run for well under a microsecond.
pub fn criterion() -> Criterion {
    Criterion::default().warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2))
}

/// Two cores of those that this process might run on at first; one twice if there is only one.
pub fn cores() -> [usize; 2] {
    static CORES: OnceLock<[usize; 2]> = OnceLock::new();
    *CORES.get_or_init(|| {
        let allowed = sched_getaffinity(None).unwrap_or_else(|_| CpuSet::new());
        let mut cores = (0..CpuSet::MAX_CPU).filter(|&core| allowed.is_set(core));
        let first = cores.next().unwrap_or(0);
        [first, cores.next().unwrap_or(first)]
    })
}

/// Keeps the calling thread on one core.
pub fn pin(core: usize) {
    let mut set = CpuSet::new();
    set.set(core);
    if let Err(error) = sched_setaffinity(None, &set) {
        eprintln!("cannot stay on core {core}, so the figures may jump: {error}");
    }
}

/// Polls until there is something. The core is left to others now and then: there may be only one, or others may be
/// busy on it.
#[inline]
pub fn until<T>(mut look: impl FnMut() -> Option<T>) -> T {
    loop {
        for _ in 0..100_000 {
            if let Some(found) = look() {
                return found;
            }
            spin_loop();
        }
        thread::yield_now();
    }
}

/// Percentiles of a trip, in picoseconds: of the mean of [`TOGETHER`] trips, because the clock is too coarse for one.
pub fn trips(n: usize, mut trip: impl FnMut()) -> Histogram<u64> {
    let clock = clock();
    let mut times = Histogram::new(3).expect("3 digits are possible");
    let mut before = Instant::now();
    for _ in 0..n.div_ceil(TOGETHER) {
        (0..TOGETHER).for_each(|_| trip());
        let now = Instant::now();
        let picos = ((now - before).as_nanos() as f64 - clock) * 1e3 / TOGETHER as f64;
        times.record(picos.max(1.0) as u64).expect("the histogram grows");
        before = now;
    }
    times
}

/// What it costs to look at the clock, in nanoseconds.
fn clock() -> f64 {
    const LOOKS: u32 = 64;
    let of_many = || {
        let start = Instant::now();
        (1..LOOKS).for_each(|_| _ = black_box(Instant::now()));
        (Instant::now() - start).as_nanos() as f64 / f64::from(LOOKS)
    };
    median(&mut [(); 15].map(|()| of_many()))
}

/// The median of a fraction of values.
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Things measured in turns: a row of figures for each round.
#[derive(Default)]
pub struct Turns<const N: usize>(Vec<[f64; N]>);

impl<const N: usize> Turns<N> {
    /// Adds a round.
    pub fn add(&mut self, figures: [f64; N]) {
        self.0.push(figures);
    }

    /// The median of one column.
    pub fn median(&self, column: usize) -> f64 {
        median(&mut self.0.iter().map(|row| row[column]).collect::<Vec<_>>())
    }

    /// The median of the ratio of two columns in the same round.
    pub fn ratio(&self, of: usize, to: usize) -> f64 {
        median(&mut self.0.iter().map(|row| row[of] / row[to]).collect::<Vec<_>>())
    }
}

/// The end of a line of the summary: a ratio and its target.
pub fn at_most(ratio: f64, target: f64, unit: &str) -> String {
    let verdict = if ratio <= target { "met" } else { "MISSED" };
    format!("{ratio:.2} × {unit}, target ≤ {target}: {verdict}")
}

/// As [`at_most`], the other way round.
pub fn at_least(ratio: f64, target: f64, unit: &str) -> String {
    let verdict = if ratio >= target { "met" } else { "MISSED" };
    format!("{ratio:.2} × {unit}, target ≥ {target}: {verdict}")
}
