//! Each role in turn, killed after one instruction after the other.

use std::{collections::BTreeMap, env};

use crate::rig::{Rig, Role};

/// Kills of a role in a run that does not take every n.
const KILLS: usize = 1000;

pub fn every_one() {
    let all = match env::var("FORKRING_TEST_INSTRUCTIONS").as_deref() {
        Err(_) => false,
        Ok("all") => true,
        Ok(other) => panic!("FORKRING_TEST_INSTRUCTIONS is `{other}`: give `all`"),
    };
    let mut rig = Rig::new();
    for role in [Role::Small, Role::Large, Role::Sweep] {
        let trace = rig.trace(role);
        let stride = if all { 1 } else { trace.len().div_ceil(KILLS) };
        let first = std::process::id() as usize % stride;
        let (mut outcomes, mut strayed) = (BTreeMap::new(), 0);
        for n in (first..trace.len()).step_by(stride) {
            match rig.kill(role, &trace, n) {
                Some(outcome) => *outcomes.entry(outcome).or_insert(0) += 1,
                None => strayed += 1,
            }
        }
        let kills: usize = outcomes.values().sum();
        println!(
            "{role:?}: {kills} kills in {} instructions, one in {stride} from {first}, {strayed} strayed: {outcomes:?}",
            trace.len()
        );
        assert!(strayed <= kills / 20, "too many went another way than the trace");
        for outcome in role.outcomes() {
            assert!(outcomes.contains_key(outcome), "{role:?} was never killed so that {outcome}");
        }
    }
}
