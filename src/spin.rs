//! How long to spin before sleeping.
//!
//! To be woken costs tens of microseconds when the core has halted; to spin costs a core. Ski rental: spin for about
//! as long as a wake costs, and the sum is at most a small multiple of the best possible. What has been seen lately
//! decides whether to spin at all:
//!
//! - not if work has been coming in gaps of more than a few times a wake (an average over the last few gaps);
//! - not for a while after this process was kept from its core while spinning: there are more runnable processes than
//!   cores.
//!
//! A spin is polite: each turn offers the core to whoever else is runnable on it. A scheduler that lets the running task
//! finish its slice (EEVDF does) would otherwise keep the very client waiting whose next request is spun for.

use crate::{
    config::Spin as Policy,
    process::{cores, now},
};

/// A wake as it is assumed until one has been measured, and the bounds of what is believed.
const WAKE: u64 = 50_000;
const WAKE_BOUNDS: (u64, u64) = (5_000, 200_000);
/// Gaps of up to so many wakes are spun through.
const PATIENCE: u64 = 4;
/// A turn of a spin takes a microsecond or so, and a little longer if somebody else used the core for a moment. One
/// that took this many nanoseconds means that the core is wanted.
const PREEMPTED: u64 = 200_000;
const PENALTY_BOUNDS: (u64, u64) = (2_000_000, 100_000_000);

/// Decides for one process.
#[derive(Debug)]
pub struct Spinner {
    policy: Policy,
    /// What a wake costs, averaged.
    wake: u64,
    /// Time between work, averaged.
    gap: u64,
    /// No spinning before this time, and by how much it will be put off the next time.
    banned_until: u64,
    penalty: u64,
    idle_since: u64,
}

impl Spinner {
    /// A spinner that has seen nothing yet, and hopes for the best.
    pub fn new(policy: Policy) -> Self {
        // With one core, whoever has work for us cannot run while we spin.
        let policy = if policy == Policy::Auto && cores() == 1 { Policy::Off } else { policy };
        Spinner { policy, wake: WAKE, gap: 0, banned_until: 0, penalty: PENALTY_BOUNDS.0, idle_since: 0 }
    }

    /// There is nothing to do from now on. Returns until when to spin, if at all.
    pub fn idle(&mut self) -> Option<Spin> {
        let now = now();
        self.idle_since = now;
        let budget = match self.policy {
            Policy::Off => return None,
            Policy::For(time) => return Some(Spin { until: now + time.as_nanos() as u64, seen: now }),
            Policy::Auto => self.wake,
        };
        let longest = PATIENCE * budget;
        if now < self.banned_until || self.gap > longest {
            return None;
        }
        Some(Spin { until: now + (2 * self.gap).clamp(budget, longest), seen: now })
    }

    /// There is something to do, which has been there since `arrived`; `slept` if it took a wake to see it.
    pub fn busy(&mut self, arrived: u64, slept: bool) {
        // A gap that is long is long: how long does not matter, and must not be remembered for long.
        let gap = arrived.saturating_sub(self.idle_since).min(8 * WAKE_BOUNDS.1);
        self.gap = (self.gap * 7 + gap) / 8;
        if slept {
            let wake = now().saturating_sub(arrived).clamp(WAKE_BOUNDS.0, WAKE_BOUNDS.1);
            self.wake = (self.wake * 7 + wake) / 8;
        } else {
            self.penalty = (self.penalty - self.penalty / 8).max(PENALTY_BOUNDS.0);
        }
    }

    /// The spin ended because of a preemption.
    fn preempted(&mut self, now: u64) {
        self.banned_until = now + self.penalty;
        self.penalty = (self.penalty * 2).min(PENALTY_BOUNDS.1);
    }
}

/// One spin: ask [`Spin::goes_on`] every microsecond or so.
#[derive(Debug)]
pub struct Spin {
    until: u64,
    seen: u64,
}

impl Spin {
    /// Whether to look once more. Lets others have the core first.
    pub fn goes_on(&mut self, spinner: &mut Spinner) -> bool {
        std::thread::yield_now();
        let now = now();
        let preempted = now - self.seen > PREEMPTED;
        self.seen = now;
        if preempted && spinner.policy == Policy::Auto {
            spinner.preempted(now);
            return false;
        }
        now < self.until
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn off_never_spins_and_a_duration_always_does() {
        let mut off = Spinner::new(Policy::Off);
        assert!(off.idle().is_none());
        let mut always = Spinner::new(Policy::For(Duration::from_secs(1000)));
        for _ in 0..20 {
            let mut spin = always.idle().unwrap();
            assert!(spin.goes_on(&mut always));
            always.busy(now() + 1_000_000_000, false);
        }
    }

    #[test]
    fn long_gaps_stop_the_spinning_and_short_ones_start_it() {
        let mut spinner = Spinner { policy: Policy::Auto, ..Spinner::new(Policy::Off) };
        assert!(spinner.idle().is_some());
        for _ in 0..20 {
            spinner.idle();
            spinner.busy(spinner.idle_since + 1_000_000_000, false);
        }
        assert!(spinner.idle().is_none());
        for _ in 0..40 {
            spinner.idle();
            spinner.busy(spinner.idle_since + 1000, false);
        }
        assert!(spinner.idle().is_some());
    }

    #[test]
    fn a_preemption_bans_spinning_for_a_while() {
        let mut spinner = Spinner { policy: Policy::Auto, ..Spinner::new(Policy::Off) };
        let mut spin = spinner.idle().unwrap();
        spin.seen -= PREEMPTED + 1;
        assert!(!spin.goes_on(&mut spinner));
        assert!(spinner.idle().is_none());
        spinner.banned_until = 0;
        assert!(spinner.idle().is_some());
    }
}
