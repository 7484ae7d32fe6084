//! What a run adds up to: latencies, rates and every failure by code and reason.
//!
//! Latency and failures are those of the items that were *due* in the measured time, whenever they were answered: a
//! stall at the end is seen. The rate is that of the answers that *came* in the measured time.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

use super::{BenchArgs, Mode, in_flight, pace::Pace};
use crate::{cli::show::nanos as nanos_text, proto::v1};

/// Kinds of failure that are told apart; those beyond are counted together, so that a server that puts an id into each
/// message cannot fill the generator's memory.
const MAX_KINDS: usize = 32;
/// Latencies above an hour are recorded as an hour.
const MAX_LATENCY_NS: u64 = 3_600_000_000_000;

/// Failures by code and reason.
type Errors = BTreeMap<(&'static str, String), u64>;

/// Counts and distributions, growing while a run lasts.
pub struct Tally {
    from: Instant,
    until: Option<Instant>,
    latency: Latency,
    /// How late items were sent, in an open loop.
    lateness: Latency,
    /// Answers that came in the measured time.
    answered_in_time: u64,
    last_answer: Instant,
    failed: u64,
    failed_in_warmup: u64,
    errors: Errors,
    connection_errors: Errors,
    interrupted: bool,
    /// Updates that no item waits for: doubled, late, or left over from another client.
    stray: u64,
}

impl Tally {
    /// Empty, for a run that is measured from `from`.
    pub fn new(from: Instant, until: Option<Instant>) -> Self {
        Self {
            from,
            until,
            latency: Latency::new(),
            lateness: Latency::new(),
            answered_in_time: 0,
            last_answer: from,
            failed: 0,
            failed_in_warmup: 0,
            errors: BTreeMap::new(),
            connection_errors: BTreeMap::new(),
            interrupted: false,
            stray: 0,
        }
    }

    /// An item that was due at `due` has its result.
    pub fn succeeded(&mut self, due: Instant, measured: bool, now: Instant) {
        self.last_answer = self.last_answer.max(now);
        if now >= self.from && self.until.is_none_or(|until| now < until) {
            self.answered_in_time += 1;
        }
        if measured {
            self.latency.record(now - due);
        }
    }

    /// An item failed.
    pub fn failed(&mut self, measured: bool, status: &v1::Status) {
        if measured {
            self.failed += 1;
        } else {
            self.failed_in_warmup += 1;
        }
        count(&mut self.errors, status);
    }

    /// Something went wrong that is no item's failure, such as a connection that was refused.
    pub fn connection_failed(&mut self, status: &v1::Status) {
        count(&mut self.connection_errors, status);
    }

    /// The measured time ends now.
    pub fn interrupt(&mut self, now: Instant) {
        self.interrupted = true;
        self.until = Some(self.until.map_or(now, |until| until.min(now)));
    }

    /// An item was sent so long after it was due.
    pub fn sent_late(&mut self, by: Duration) {
        self.lateness.record(by);
    }

    /// An update came that no item waits for.
    pub fn stray(&mut self) {
        self.stray += 1;
    }

    /// Takes stock at the end of a run.
    pub fn report(&self, pace: &Pace, cpu: f64) -> Report {
        let items = self.latency.len();
        let end = match self.until {
            Some(until) if !pace.is_counted_out() => until,
            _ => self.last_answer,
        };
        let seconds = (end - self.from).as_secs_f64();
        Report {
            items,
            failed: self.failed,
            failed_in_warmup: self.failed_in_warmup,
            unanswered: pace.measured().saturating_sub(items + self.failed),
            unsent: pace.unsent(),
            stray: self.stray,
            seconds,
            items_per_s: if seconds > 0.0 { self.answered_in_time as f64 / seconds } else { 0.0 },
            cpu,
            latency: self.latency.clone(),
            lateness: self.lateness.clone(),
            errors: self.errors.clone(),
            connection_errors: self.connection_errors.clone(),
            interrupted: self.interrupted,
        }
    }
}

fn count(errors: &mut Errors, status: &v1::Status) {
    let reason = if status.reason.is_empty() { &status.message } else { &status.reason };
    let mut key = (status.code_name(), first_line(reason));
    if errors.len() >= MAX_KINDS && !errors.contains_key(&key) {
        key.1 = "(further reasons)".to_owned();
    }
    *errors.entry(key).or_default() += 1;
}

/// The first line of a message, shortened.
fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().chars().take(120).collect()
}

/// A distribution of times, exact to three digits.
#[derive(Clone)]
pub struct Latency(Option<Histogram<u64>>);

impl Latency {
    fn new() -> Self {
        // The bounds are constants that the histogram accepts; were they not, the report would say `items 0`.
        Self(Histogram::new_with_bounds(1, MAX_LATENCY_NS, 3).ok())
    }

    fn record(&mut self, time: Duration) {
        if let Some(histogram) = &mut self.0 {
            histogram.saturating_record(u64::try_from(time.as_nanos()).unwrap_or(MAX_LATENCY_NS));
        }
    }

    fn len(&self) -> u64 {
        self.0.as_ref().map_or(0, Histogram::len)
    }

    /// The quantiles that are reported, in nanoseconds.
    fn quantiles(&self) -> [(&'static str, u64); 5] {
        let at = |q: f64| self.0.as_ref().map_or(0, |histogram| histogram.value_at_quantile(q));
        let max = self.0.as_ref().map_or(0, Histogram::max);
        // The bucket's upper edge may lie above the largest value that was seen.
        [
            ("p50", at(0.5).min(max)),
            ("p90", at(0.9).min(max)),
            ("p99", at(0.99).min(max)),
            ("p99.9", at(0.999).min(max)),
            ("max", max),
        ]
    }

    fn json(&self) -> Value {
        if self.len() == 0 {
            return Value::Null;
        }
        let mean = self.0.as_ref().map_or(0.0, Histogram::mean);
        let mut object = json!({ "mean": mean.round() });
        for (name, nanos) in self.quantiles() {
            object[name] = nanos.into();
        }
        object
    }

    fn text(&self) -> String {
        let mut line = String::new();
        for (name, nanos) in self.quantiles() {
            let _ = write!(line, "{name} {:<10} ", nanos_text(nanos));
        }
        line.trim_end().to_string()
    }
}

/// How much of a core the generator itself took: near 100 % it, and not the server, may be the limit.
pub struct CpuClock {
    at: Instant,
    used: Duration,
}

impl CpuClock {
    /// Starts to measure.
    pub fn start() -> Self {
        Self { at: Instant::now(), used: cpu_time() }
    }

    /// The share of one core since then.
    pub fn busy(&self) -> f64 {
        let wall = self.at.elapsed().as_secs_f64();
        if wall > 0.0 { (cpu_time() - self.used).as_secs_f64() / wall } else { 0.0 }
    }
}

fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or_default())
}

/// The outcome of a run.
pub struct Report {
    /// Items that succeeded, of those due in the measured time.
    pub items: u64,
    failed: u64,
    failed_in_warmup: u64,
    unanswered: u64,
    unsent: u64,
    stray: u64,
    seconds: f64,
    items_per_s: f64,
    cpu: f64,
    latency: Latency,
    lateness: Latency,
    errors: Errors,
    connection_errors: Errors,
    interrupted: bool,
}

impl Report {
    /// One object, for programs.
    pub fn json(&self, args: &BenchArgs) -> Value {
        let list = |errors: &Errors| -> Vec<Value> {
            let each = errors.iter();
            each.map(|((code, reason), count)| json!({ "code": code, "reason": reason, "count": count })).collect()
        };
        json!({
            "addr": args.addr.addr,
            "pool": args.pool,
            "mode": mode_name(args.mode),
            "connections": args.connections,
            "in_flight": in_flight(args),
            "payload": args.payload.bytes(),
            "rate": args.rate,
            "seconds": self.seconds,
            "items": self.items,
            "failed": self.failed,
            "failed_in_warmup": self.failed_in_warmup,
            "unanswered": self.unanswered,
            "unsent": self.unsent,
            "stray": self.stray,
            "items_per_s": self.items_per_s,
            "mb_per_s": self.mb_per_s(args),
            "latency_ns": self.latency.json(),
            "lateness_ns": self.lateness.json(),
            "generator_cpu": self.cpu,
            "errors": list(&self.errors),
            "connection_errors": list(&self.connection_errors),
            "interrupted": self.interrupted,
        })
    }

    /// A few lines, for people.
    pub fn text(&self, args: &BenchArgs) -> String {
        let loop_kind = match args.rate {
            Some(rate) => format!("open loop at {rate}/s"),
            None => "closed loop".to_string(),
        };
        let mut text = format!(
            "{} at {}: {} connection{} × {} in flight, {} B, {loop_kind}, {:.1} s{}\n",
            mode_name(args.mode),
            args.addr.addr,
            args.connections,
            if args.connections == 1 { "" } else { "s" },
            in_flight(args),
            args.payload.bytes(),
            self.seconds,
            if self.interrupted { " (interrupted)" } else { "" },
        );
        let mut row = |name: &str, value: String| {
            let _ = writeln!(text, "  {name:<11} {value}");
        };
        row("items", format!("{}   {:.0}/s   {:.1} MB/s each way", self.items, self.items_per_s, self.mb_per_s(args)));
        if self.items > 0 {
            row("latency", self.latency.text());
        }
        if self.lateness.len() > 0 {
            row("sent late", self.lateness.text());
        }
        row(
            "generator",
            format!(
                "{:.0} % of a core{}",
                self.cpu * 100.0,
                if self.cpu > 0.95 { ": it may be the limit" } else { "" }
            ),
        );
        row("failed", self.failed.to_string());
        let counts = [
            ("failed", self.failed_in_warmup, "in the warm-up"),
            ("unanswered", self.unanswered, "still out when the drain time was up"),
            ("unsent", self.unsent, "due, but the window was full to the end"),
            ("stray", self.stray, "updates that no item waits for: doubled, late, or from before this run"),
        ];
        for (name, count, meaning) in counts {
            if count > 0 {
                row(name, format!("{count} ({meaning})"));
            }
        }
        for ((code, reason), count) in &self.errors {
            row("error", format!("{count} × {code}: {reason}"));
        }
        for ((code, reason), count) in &self.connection_errors {
            row("connection", format!("{count} × {code}: {reason}"));
        }
        text
    }

    fn mb_per_s(&self, args: &BenchArgs) -> f64 {
        self.items_per_s * args.payload.bytes() as f64 / 1e6
    }
}

fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Call => "call",
        Mode::Process => "process",
        Mode::Submit => "submit",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(reason: String) -> v1::Status {
        v1::Status { code: 13, reason, ..Default::default() }
    }

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn latency_counts_by_due_time_and_rate_by_answer_time() {
        let from = Instant::now();
        let until = from + 1000 * MS;
        let pace = Pace::new(from, from, Some(until), None, None, 0);
        let mut tally = Tally::new(from, Some(until));
        tally.succeeded(from - 10 * MS, false, from + MS); // of the warm-up, answered in time
        tally.succeeded(from, true, from + 2 * MS);
        tally.succeeded(until - MS, true, until + 500 * MS); // answered after the end: its latency counts
        let report = tally.report(&pace, 0.0);
        assert_eq!(report.items, 2);
        assert_eq!(report.items_per_s, 2.0);
        let max = report.latency.quantiles()[4].1;
        assert!((500_000_000..502_000_000).contains(&max), "{max}");
    }

    #[tokio::test]
    async fn what_was_begun_and_never_answered_is_reported() {
        let from = Instant::now();
        let pace = Pace::new(from, from, None, Some(3), None, 0);
        for _ in 0..3 {
            assert!(pace.next().await.is_some());
        }
        let mut tally = Tally::new(from, None);
        tally.succeeded(from, true, from + MS);
        tally.failed(true, &failure("HANDLER_FAILED".into()));
        let report = tally.report(&pace, 0.0);
        assert_eq!((report.items, report.failed, report.unanswered), (1, 1, 1));
    }

    #[test]
    fn kinds_of_failure_are_bounded_and_none_is_dropped() {
        let mut tally = Tally::new(Instant::now(), None);
        for n in 0..1000 {
            tally.failed(true, &failure(format!("REQUEST_{n}")));
        }
        assert!(tally.errors.len() <= MAX_KINDS + 1);
        assert_eq!(tally.errors.values().sum::<u64>(), 1000);
    }
}
