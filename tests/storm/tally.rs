//! What became of each id, and everything that must not have.
//!
//! | claim | how it shows |
//! |---|---|
//! | accepted is never lost | each id that a receipt counted comes as an update |
//! | one worker at a time | no two executions of an id with the same attempt, in the journal that the handlers write |
//! | nothing is taken from a process that is not dead | who had an attempt that was not the last was killed |
//! | completed once | an update that comes twice is byte for byte the same execution, and nothing was executed after it |
//! | sent twice only when it must be | between the two the connection was cut |
//! | results of streams and calls come once | an id of these never comes again |
//! | the right result | it ends with the payload that was sent, and the journal knows the execution it begins with |

use std::{
    collections::{BTreeMap, HashSet},
    fs, iter,
    path::Path,
    time::{Duration, Instant},
};

use bytes::Bytes;
use forkring::proto::v1::WorkResult;

use super::chance::mix;

/// Bytes of a line of the journal.
const LINE: usize = 64;
/// From none to half of what the server takes, with all that lies on an edge.
const SIZES: [usize; 10] = [0, 1, 10, 63, 64, 65, 500, 5_000, 20_000, 60_000];

/// By which RPC an id went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    Call,
    Process,
    Submit,
}

/// What became of an id.
#[derive(Clone, Copy, Debug)]
struct Fate {
    shape: Shape,
    /// The client knows that it was accepted.
    accepted: bool,
    /// What the result began with, and how often the link had been cut when that connection was made.
    result: Option<(Execution, u64)>,
}

/// A line of the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Execution {
    pub id: u64,
    pub attempt: u64,
    pub pid: u64,
    /// On the clock of [`forkring::process::now`].
    pub at: u64,
}

impl Execution {
    pub fn parse(line: &[u8]) -> Option<Self> {
        let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace().map(|word| word.parse().ok());
        let mut next = || words.next()?;
        Some(Execution { id: next()?, attempt: next()?, pid: next()?, at: next()? })
    }
}

/// The whole of a journal.
pub fn journal(path: &Path) -> impl Iterator<Item = Execution> {
    let bytes = fs::read(path).unwrap_or_default();
    let lines = bytes.chunks(LINE).map(|line| Execution::parse(line).expect("a whole line of the handler's"));
    lines.collect::<Vec<_>>().into_iter()
}

/// How long it took after a kill until an item was answered.
#[derive(Debug, Default)]
pub struct Recovery {
    waiting: Option<Instant>,
    pub times: Vec<Duration>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Tally {
    fates: Vec<Fate>,
    pub answered: [u64; 3],
    /// Submitted ids that no receipt counts: those that came all the same, and those that did not.
    pub unknown: [u64; 2],
    pub refused: u64,
    pub expired: u64,
    pub abandoned: u64,
    /// Calls and streams that failed while they might.
    pub broken: u64,
    pub sent_again: u64,
    pub kills: BTreeMap<&'static str, u64>,
    pub recoveries: BTreeMap<&'static str, Recovery>,
    pub violations: Vec<String>,
    pub executions: u64,
    pub retries: u64,
    pub lost: u64,
    pub doubled: u64,
}

/// Of each id another, and no kibibyte of it like the next.
pub fn payload(id: u64) -> Bytes {
    let size = SIZES[mix(id) as usize % SIZES.len()];
    let mut block: Vec<u8> =
        iter::successors(Some(id), |n| Some(mix(*n))).take(128).flat_map(u64::to_le_bytes).collect();
    let mut bytes = Vec::with_capacity(size);
    while bytes.len() < size {
        block[..8].copy_from_slice(&(id + bytes.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&block[..block.len().min(size - bytes.len())]);
    }
    bytes.into()
}

impl Tally {
    /// A new id.
    pub fn begin(&mut self, shape: Shape) -> u64 {
        self.fates.push(Fate { shape, accepted: false, result: None });
        self.fates.len() as u64 - 1
    }

    pub fn violation(&mut self, what: String) {
        self.violations.push(what);
    }

    /// A receipt counted these.
    pub fn accepted(&mut self, ids: impl IntoIterator<Item = u64>) {
        ids.into_iter().for_each(|id| self.fates[id as usize].accepted = true);
    }

    /// Accepted, and not delivered yet.
    pub fn owed(&self) -> usize {
        self.fates.iter().filter(|fate| fate.accepted && fate.result.is_none()).count()
    }

    /// Somebody was killed: how long until an item is answered?
    pub fn killed(&mut self, whom: &'static str) {
        *self.kills.entry(whom).or_default() += 1;
        self.recoveries.entry(whom).or_default().waiting.get_or_insert_with(Instant::now);
    }

    /// A result came. `cuts`: how often the link has been cut, and had been when this connection was made.
    pub fn result(&mut self, shape: Shape, result: &WorkResult, cuts: [u64; 2]) {
        for (whom, recovery) in &mut self.recoveries {
            // What was on its way before a front was killed does not count.
            if *whom == "worker" || cuts[0] == cuts[1] {
                recovery.times.extend(recovery.waiting.take().map(|since| since.elapsed()));
            }
        }
        if let Err(wrong) = self.check(shape, result, cuts) {
            self.violation(format!("{shape:?} {}: {wrong}", result.id));
        }
    }

    fn check(&mut self, shape: Shape, result: &WorkResult, [cuts, connected]: [u64; 2]) -> Result<(), String> {
        if let Some(status) = &result.status {
            return Err(format!("it failed: {status}"));
        }
        let fate = self.fates.get_mut(result.id as usize).ok_or("nobody sent it")?;
        let (line, rest) = result.payload.split_at_checked(LINE).ok_or("its result is cut short")?;
        let execution = Execution::parse(line).ok_or("its result does not begin with an execution")?;
        if fate.shape != shape || execution.id != result.id || *rest != *payload(result.id) {
            return Err(format!("it got the result of another: {execution:?}"));
        }
        if execution.attempt != u64::from(result.attempts) {
            return Err(format!("{execution:?} is said to be attempt {}", result.attempts));
        }
        match &mut fate.result {
            None => {
                fate.result = Some((execution, connected));
                self.answered[shape as usize] += 1;
            }
            Some((first, _)) if *first != execution => {
                self.doubled += 1;
                return Err(format!("completed twice: {first:?}, {execution:?}"));
            }
            Some((_, before)) => {
                self.sent_again += 1;
                if shape != Shape::Submit || *before == cuts {
                    return Err("it was sent twice on connections that held".to_owned());
                }
                *before = connected;
            }
        }
        Ok(())
    }

    /// When nothing is under way any more: the books must balance, and new ones are begun. `killed` are all that were.
    pub fn balance(&mut self, executions: impl Iterator<Item = Execution>, killed: &HashSet<i32>) {
        let mut attempts = HashSet::new();
        let mut known = HashSet::new();
        let mut last = vec![0; self.fates.len()];
        for execution in executions {
            self.executions += 1;
            known.insert(execution);
            let Some(last) = last.get_mut(execution.id as usize) else {
                self.violations.push(format!("nobody sent {execution:?}"));
                continue;
            };
            *last = execution.attempt.max(*last);
            if !attempts.insert((execution.id, execution.attempt)) {
                self.doubled += 1;
                self.violations.push(format!("{execution:?} is one of two with that attempt"));
            }
        }
        for (id, (fate, last)) in self.fates.iter().zip(&last).enumerate() {
            if fate.shape == Shape::Submit && !fate.accepted {
                self.unknown[usize::from(fate.result.is_none())] += 1;
            }
            if fate.accepted && fate.result.is_none() {
                self.lost += 1;
                self.violations.push(format!("{id} was accepted, and is lost; {last} attempts"));
            }
            if let Some((execution, _)) = fate.result {
                if !known.contains(&execution) {
                    self.violations.push(format!("{execution:?} is not in the journal"));
                }
                if *last > execution.attempt {
                    self.doubled += 1;
                    self.violations.push(format!("{execution:?} was executed again, attempt {last}"));
                }
            }
        }
        for execution in known {
            let was_last = last.get(execution.id as usize).is_none_or(|last| *last == execution.attempt);
            if !was_last && !killed.contains(&(execution.pid as i32)) {
                self.violations.push(format!("{execution:?} was taken from a process that nobody killed"));
            }
        }
        self.retries += last.iter().map(|last| last.saturating_sub(1)).sum::<u64>();
        self.fates.clear();
    }
}
