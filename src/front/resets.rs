//! The budget of premature resets, which tells a flood of resets from a client that cancels calls.
//!
//! Cancelling is legitimate at any rate: a client whose deadlines are short cancels every call. A flood (CVE-2023-44487) differs in
//! that it resets streams before the server could begin with them, so that the limit of concurrent streams never holds. Such
//! a reset is called *premature*. A correct client causes them when its deadlines are shorter than the time that the front needs to look
//! at a request, because the front is stalled or the machine is overloaded. Therefore the budget is generous: it is a rate
//! that only a flood reaches, the resets of [`BURST`] may come at once, and each answered request gives one back.
//!
//! The mechanism is the generic cell rate algorithm (ITU-T I.371), which needs one number for each connection.

use std::time::Duration;

/// How long the rate may be saved up.
const BURST: Duration = Duration::from_secs(10);

/// The budget of one connection.
#[derive(Clone, Copy, Debug)]
pub struct ResetBudget {
    /// Nanoseconds that one reset uses up.
    cost: u64,
    /// When the budget is whole again, in nanoseconds of the caller's clock.
    whole_at: u64,
}

impl ResetBudget {
    /// A whole budget of `limit` resets a second.
    pub fn new(limit: u32) -> Self {
        ResetBudget { cost: 1_000_000_000 / u64::from(limit.clamp(1, 1_000_000_000)), whole_at: 0 }
    }

    /// Takes one reset from the budget. Returns false if none is left.
    pub fn spend(&mut self, now: u64) -> bool {
        self.whole_at = self.whole_at.max(now) + self.cost;
        self.whole_at - now <= BURST.as_nanos() as u64
    }

    /// Gives one reset back.
    pub fn refund(&mut self) {
        self.whole_at = self.whole_at.saturating_sub(self.cost);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    /// How many resets at once a budget allows.
    fn burst(budget: &mut ResetBudget, now: u64) -> u32 {
        (0..10_000).take_while(|_| budget.spend(now)).count() as u32
    }

    #[test]
    fn a_burst_has_its_limit() {
        for limit in [1, 7, 600] {
            let mut budget = ResetBudget::new(limit);
            let limit = 10 * limit;
            assert_eq!(burst(&mut budget, SECOND), limit, "at once");
            assert!(!budget.spend(SECOND), "one more");
            assert_eq!(
                burst(&mut budget, 1000 * SECOND),
                limit,
                "a long time later it is whole, and not more than that"
            );
        }
    }

    #[test]
    fn a_rate_within_the_limit_goes_on_for_ever() {
        let mut budget = ResetBudget::new(10);
        assert!((0..100_000).all(|n| budget.spend(n * SECOND / 10)));
        let mut budget = ResetBudget::new(10);
        assert!(!(0..100_000).all(|n| budget.spend(n * SECOND / 11)), "a rate over the limit does not");
    }

    #[test]
    fn an_answer_gives_one_back() {
        let mut budget = ResetBudget::new(1);
        let spend_and_answer = |budget: &mut ResetBudget| {
            let spent = budget.spend(SECOND);
            budget.refund();
            spent
        };
        assert!((0..1000).all(|_| spend_and_answer(&mut budget)));
        (0..1000).for_each(|_| budget.refund());
        assert_eq!(burst(&mut budget, SECOND), 10, "answers are not saved up");
    }
}
