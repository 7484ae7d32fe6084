//! Checks a model, all of it, and with a thread of it dying after each of its accesses in turn.
//!
//! loom has passed models it never explored: when the threads that race include the one the model starts in, it may
//! run a single interleaving. So the models here race spawned threads only, and it is asserted that there was more
//! than one. And for each kind of model one is checked that must fail, for the reason that is given.

use std::{
    any::Any,
    cell::Cell,
    panic::{self, AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Once,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use crate::sync::{self, Death, Fault};

/// How to check.
#[derive(Clone, Copy, Debug)]
pub struct Check {
    name: &'static str,
    preemptions: usize,
    fault: Fault,
}

thread_local! {
    /// Threads of the model that have died, over all interleavings.
    static DEATHS: Cell<usize> = const { Cell::new(0) };
    /// Whether a panic is what is being waited for.
    static MUST_FAIL: Cell<bool> = const { Cell::new(false) };
}

/// A thread of a model that dies after so many accesses.
#[derive(Clone, Copy, Debug)]
pub struct Mortal(Option<u32>);

impl Mortal {
    /// Runs it in the current thread; none if it died. May be called once in a run of the model.
    pub fn live<T>(self, body: impl FnOnce() -> T) -> Option<T> {
        sync::set_life(self.0);
        let outcome = catch_unwind(AssertUnwindSafe(body));
        sync::set_life(None);
        match outcome {
            Ok(value) => Some(value),
            Err(payload) if payload.is::<Death>() => {
                DEATHS.set(DEATHS.get() + 1);
                None
            }
            Err(payload) => resume_unwind(payload),
        }
    }
}

impl Check {
    /// Explores every interleaving with at most this many preemptions; LOOM_MAX_PREEMPTIONS goes first.
    pub fn new(name: &'static str, preemptions: usize) -> Self {
        Check { name, preemptions, fault: Fault::None }
    }

    /// Takes something away from the code under test.
    pub fn without(self, fault: Fault) -> Self {
        Check { fault, ..self }
    }

    /// The model holds.
    pub fn holds(self, model: impl Fn() + Send + Sync + 'static) {
        let runs = Arc::new(AtomicUsize::new(0));
        self.explore(&runs, model);
        let runs = runs.load(Relaxed);
        println!("{}: holds in {runs} interleavings", self.name);
        assert!(runs > 1, "{}: nothing was explored", self.name);
    }

    /// The model holds wherever its mortal dies.
    pub fn holds_after_every_death(self, model: impl Fn(Mortal) + Send + Sync + 'static) {
        let runs = Arc::new(AtomicUsize::new(0));
        let steps = self.explore_deaths(&runs, model);
        let runs = runs.load(Relaxed);
        println!("{}: holds for a death after each of {steps} accesses, in {runs} interleavings", self.name);
        assert!(steps > 1 && runs > steps, "{}: nothing was explored", self.name);
    }

    /// The model fails, saying `why`.
    pub fn fails(self, why: &str, model: impl Fn() + Send + Sync + 'static) {
        self.must_fail(why, |runs| self.explore(runs, model));
    }

    /// The model fails, saying `why`, for some death of its mortal.
    pub fn fails_after_some_death(self, why: &str, model: impl Fn(Mortal) + Send + Sync + 'static) {
        self.must_fail(why, |runs| {
            self.explore_deaths(runs, model);
        });
    }

    fn explore(self, runs: &Arc<AtomicUsize>, model: impl Fn() + Send + Sync + 'static) {
        sync::set_fault(self.fault);
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound.get_or_insert(self.preemptions);
        let runs = Arc::clone(runs);
        builder.check(move || {
            runs.fetch_add(1, Relaxed);
            model();
        });
    }

    /// The number of accesses after which the mortal can die.
    fn explore_deaths(self, runs: &Arc<AtomicUsize>, model: impl Fn(Mortal) + Send + Sync + 'static) -> usize {
        let model = Arc::new(model);
        for step in 1.. {
            DEATHS.set(0);
            let model = Arc::clone(&model);
            self.explore(runs, move || model(Mortal(Some(step))));
            if DEATHS.get() == 0 {
                return step as usize - 1;
            }
        }
        unreachable!()
    }

    fn must_fail(self, why: &str, explore: impl FnOnce(&Arc<AtomicUsize>)) {
        quiet_when_expected();
        let runs = Arc::new(AtomicUsize::new(0));
        MUST_FAIL.set(true);
        let outcome = catch_unwind(AssertUnwindSafe(|| explore(&runs)));
        MUST_FAIL.set(false);
        let runs = runs.load(Relaxed);
        let Err(payload) = outcome else { panic!("{}: holds in {runs} interleavings, and must not", self.name) };
        let said = message(payload.as_ref());
        assert!(said.contains(why), "{}: fails with {said:?} instead of {why:?}", self.name);
        println!("{}: fails as it must, in interleaving {runs}: {why}", self.name);
    }
}

fn message(payload: &(dyn Any + Send)) -> &str {
    match payload.downcast_ref::<String>() {
        Some(text) => text,
        None => payload.downcast_ref::<&str>().copied().unwrap_or("?"),
    }
}

/// Panics that are waited for are not printed.
fn quiet_when_expected() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let print = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !MUST_FAIL.get() {
                print(info);
            }
        }));
    });
}
