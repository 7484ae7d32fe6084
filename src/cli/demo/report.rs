//! What a run of the demo found out, for people and for programs.

use std::{fmt::Write as _, path::Path, time::Duration};

use hdrhistogram::Histogram;
use indicatif::HumanCount;
use serde_json::{Map, Value, json};

use crate::{cli::show::nanos, proto::v1::WorkResult};

/// A day; longer counts as that.
const LONGEST: u64 = 86_400_000_000_000;
const QUANTILES: [(&str, f64); 4] = [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)];

/// See the module.
#[derive(Debug)]
pub struct Report {
    /// From the first item until the last result.
    pub elapsed: Duration,
    /// Digests that are right.
    pub matched: u64,
    /// Digests that are wrong.
    pub mismatched: u64,
    /// Items whose result is an error.
    pub failed: u64,
    /// Items that have no result.
    pub missing: u64,
    /// Items that the server did not accept.
    pub rejected: u64,
    /// Results of items that had one already.
    pub unexpected: u64,
    /// Files that could not be read.
    pub unreadable: u64,
    /// Files that are larger than a message.
    pub too_large: u64,
    answered: u64,
    retried: u64,
    bytes: u64,
    latencies: [(&'static str, Histogram<u64>); 4],
    workers: Vec<Worker>,
}

/// What one worker did.
#[derive(Debug, Clone, Default)]
struct Worker {
    items: u64,
    busy_ns: u64,
}

impl Report {
    /// Of a run with so many workers, before its first result.
    pub fn new(workers: u16) -> anyhow::Result<Self> {
        let latency = Histogram::new_with_bounds(1, LONGEST, 3)?;
        Ok(Self {
            elapsed: Duration::ZERO,
            matched: 0,
            mismatched: 0,
            failed: 0,
            missing: 0,
            rejected: 0,
            unexpected: 0,
            unreadable: 0,
            too_large: 0,
            answered: 0,
            retried: 0,
            bytes: 0,
            latencies: ["queued", "worked", "returned", "total"].map(|part| (part, latency.clone())),
            workers: vec![Worker::default(); workers.into()],
        })
    }

    /// Adds a result, of an item of so many bytes, that came so long after the item was sent.
    pub fn record(&mut self, result: &WorkResult, bytes: u64, total: Duration) {
        self.answered += 1;
        self.bytes += bytes;
        self.retried += u64::from(result.attempts > 1);
        let timing = result.timing.unwrap_or_default();
        let total = u64::try_from(total.as_nanos()).unwrap_or(u64::MAX);
        let parts = [timing.queued_ns, timing.worked_ns, timing.returned_ns, total];
        for ((_, latency), nanos) in self.latencies.iter_mut().zip(parts) {
            latency.saturating_record(nanos);
        }
        // A number that no worker of ours has is the server's fault, and shows as a share that is missing.
        if let Some(worker) = self.workers.get_mut(result.worker as usize) {
            worker.items += 1;
            worker.busy_ns = worker.busy_ns.saturating_add(timing.worked_ns);
        }
    }

    /// Items that have a result, good or bad.
    pub fn answered(&self) -> u64 {
        self.answered
    }

    /// How much went wrong, of whatever kind.
    pub fn wrong(&self) -> u64 {
        self.mismatched + self.failed + self.missing + self.rejected + self.unexpected
    }

    /// For people.
    pub fn text(&self, dir: &Path) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = self.write(&mut text, dir);
        text
    }

    fn write(&self, out: &mut String, dir: &Path) -> std::fmt::Result {
        let megabytes = self.bytes as f64 / 1e6;
        let seconds = self.seconds();
        writeln!(out, "{} files, {megabytes:.1} MB, under {}", HumanCount(self.answered), dir.display())?;
        let rate = self.answered as f64 / seconds;
        writeln!(out, "{rate:.0} items/s, {:.1} MB/s: {seconds:.2} s in all, checking included", megabytes / seconds)?;
        match self.wrong() {
            0 => writeln!(out, "every digest is right")?,
            _ => self.write_wrong(out)?,
        }
        if self.retried > 0 {
            writeln!(out, "{} items were given to a second worker", HumanCount(self.retried))?;
        }
        if self.unreadable + self.too_large > 0 {
            writeln!(out, "left out: {} unreadable, {} too large", self.unreadable, self.too_large)?;
        }

        write!(out, "\n{:<10}", "latency")?;
        QUANTILES.iter().try_for_each(|(name, _)| write!(out, "{name:>10}"))?;
        for (part, latency) in &self.latencies {
            write!(out, "\n{part:<10}")?;
            QUANTILES.iter().try_for_each(|(_, q)| write!(out, "{:>10}", nanos(latency.value_at_quantile(*q))))?;
        }

        writeln!(out, "\n\n{:<10}{:>10}{:>10}{:>10}{:>10}", "worker", "items", "share", "busy", "of time")?;
        for (at, worker) in self.workers.iter().enumerate() {
            let share = 100.0 * worker.items as f64 / self.answered.max(1) as f64;
            let of_time = 100.0 * worker.busy_ns as f64 / 1e9 / seconds;
            let items = HumanCount(worker.items).to_string();
            writeln!(out, "{at:<10}{items:>10}{share:>9.1}%{:>10}{of_time:>9.1}%", nanos(worker.busy_ns))?;
        }
        Ok(())
    }

    fn write_wrong(&self, out: &mut String) -> std::fmt::Result {
        writeln!(
            out,
            "WRONG: {} digests differ, {} items failed, {} have no result, {} were rejected, {} results too many",
            self.mismatched, self.failed, self.missing, self.rejected, self.unexpected
        )
    }

    /// For programs.
    pub fn json(&self, dir: &Path) -> Value {
        let seconds = self.seconds();
        let latency: Map<String, Value> = self
            .latencies
            .iter()
            .map(|(part, latency)| {
                let of = |(name, q): &(&str, f64)| ((*name).to_owned(), json!(latency.value_at_quantile(*q)));
                ((*part).to_owned(), Value::Object(QUANTILES.iter().map(of).collect()))
            })
            .collect();
        let worker =
            |(at, worker): (usize, &Worker)| json!({ "worker": at, "items": worker.items, "busy_ns": worker.busy_ns });
        json!({
            "dir": dir.display().to_string(),
            "ok": self.wrong() == 0,
            "items": self.answered,
            "bytes": self.bytes,
            "seconds": seconds,
            "items_per_second": self.answered as f64 / seconds,
            "bytes_per_second": self.bytes as f64 / seconds,
            "matched": self.matched,
            "mismatched": self.mismatched,
            "failed": self.failed,
            "missing": self.missing,
            "rejected": self.rejected,
            "unexpected": self.unexpected,
            "retried": self.retried,
            "unreadable": self.unreadable,
            "too_large": self.too_large,
            "latency_ns": latency,
            "workers": self.workers.iter().enumerate().map(worker).collect::<Vec<_>>(),
        })
    }

    /// Never zero: it divides.
    fn seconds(&self) -> f64 {
        self.elapsed.as_secs_f64().max(1e-9)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::v1::Timing;

    fn report() -> Report {
        let mut report = Report::new(2).expect("three digits");
        for (worker, attempts) in [(0, 1), (1, 2), (1, 1), (9, 1)] {
            let timing = Timing { queued_ns: 1_000, worked_ns: 250_000_000, returned_ns: 3_000 };
            let result = WorkResult { worker, attempts, timing: Some(timing), ..Default::default() };
            report.record(&result, 1_000_000, Duration::from_millis(1));
            report.matched += 1;
        }
        report.elapsed = Duration::from_secs(1);
        report
    }

    #[test]
    fn rates_shares_and_latencies_are_told() {
        let text = report().text(Path::new("/dir"));
        for wanted in [
            "4 files, 4.0 MB, under /dir\n4 items/s, 4.0 MB/s: 1.00 s",
            "every digest is right",
            "1 items were given to a second worker",
            "latency          p50       p90       p99       max\nqueued       1.00 µs",
            "\n1                  2     50.0%    500 ms     50.0%",
        ] {
            assert!(text.contains(wanted), "{wanted:?} is not in\n{text}");
        }
        assert!(!text.contains("WRONG") && !text.contains("left out"));
    }

    #[test]
    fn anything_wrong_is_told() {
        let kinds: [fn(&mut Report) -> &mut u64; 5] =
            [|r| &mut r.mismatched, |r| &mut r.failed, |r| &mut r.missing, |r| &mut r.rejected, |r| &mut r.unexpected];
        for kind in kinds {
            let mut report = report();
            *kind(&mut report) += 1;
            assert_eq!((report.wrong(), report.json(Path::new("d"))["ok"].as_bool()), (1, Some(false)));
            let text = report.text(Path::new("d"));
            assert!(text.contains("WRONG") && !text.contains("every digest"), "{text}");
        }
    }

    #[test]
    fn a_program_reads_the_same() {
        let json = report().json(Path::new("/dir"));
        assert_eq!(json["items_per_second"], 4.0);
        assert_eq!(json["latency_ns"]["total"]["p50"].as_u64().map(|ns| ns / 10_000), Some(100), "a millisecond");
        assert_eq!(json["workers"][1]["busy_ns"], 500_000_000);
        assert_eq!(json["ok"], true);
    }
}
