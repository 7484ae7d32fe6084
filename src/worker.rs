//! The worker process: take → handle → complete, until the server stops.
//!
//! # What it promises
//!
//! Each claimed item is completed: with the handler's result, with its error, or with its panic as an error; an item
//! that had expired or was given up before it was claimed never reaches the handler. If the process dies first, the
//! sweep completes it or gives it to another worker.
//!
//! A handler's panic must not take the item's memory along, so it is caught here; with `panic = "abort"` it is the
//! death of the process.

use std::{
    any::Any,
    io,
    panic::{self, AssertUnwindSafe},
};

use tonic::Code;

use crate::{
    config::Spin,
    crash_point::crash_point,
    dispatch::{Claimed, Failure, Worker},
    handler::Handler,
    process::now,
    segment::{Slot, Stage},
    spin::Spinner,
};

/// Works until the server stops, or wants another in this one's place.
pub fn run(worker: &mut Worker<'_>, handler: &mut dyn Handler, spin: Spin, max_result: usize) -> io::Result<()> {
    let mut spinner = Spinner::new(spin);
    let mut slept = false;
    let mut was_idle = false;
    // When the item before was done, if this one was claimed right after it.
    let mut done = None;
    let slot = Slot::Worker(worker.number());
    loop {
        if worker.segment().is_retiring(slot) {
            worker.ring();
            crash_point!("worker.retired");
            return Ok(());
        }
        if let Some(claimed) = worker.take() {
            worker.chain();
            if was_idle {
                spinner.busy(claimed.offered(), slept);
                done = None;
            }
            let began = claimed.began(done);
            done = Some(handle(worker, handler, claimed, began, max_result));
            (slept, was_idle) = (false, false);
        } else if worker.segment().stage() == Stage::Stopping {
            crash_point!("worker.stopped");
            return Ok(());
        } else if !was_idle && wait_spinning(worker, &mut spinner) {
            was_idle = true;
        } else {
            worker.sleep()?;
            (slept, was_idle) = (true, true);
        }
    }
}

/// Spins for work, if that is likely to pay and not too many of the pool do; whether there is some.
fn wait_spinning(worker: &Worker<'_>, spinner: &mut Spinner) -> bool {
    let Some(mut spin) = spinner.idle() else { return false };
    if !worker.begin_spin() {
        return false;
    }
    let found = loop {
        for _ in 0..64 {
            if worker.has_work() {
                break;
            }
            std::hint::spin_loop();
        }
        if worker.has_work() {
            break true;
        }
        if !spin.goes_on(spinner) {
            break false;
        }
    };
    worker.end_spin();
    found
}

/// Handles one item, claimed at `began`, whatever happens. When it was done.
fn handle<'s>(
    worker: &mut Worker<'s>,
    handler: &mut dyn Handler,
    claimed: Claimed<'s>,
    began: u64,
    max_result: usize,
) -> u64 {
    let failed = |worker: &mut Worker<'s>, claimed: Claimed<'s>, failure: Failure| {
        let done = now();
        worker.reply(&claimed, max_result).fail(claimed, &failure, began, done);
        done
    };
    if let Some(failure) = refusal(&claimed, began) {
        return failed(worker, claimed, failure);
    }
    let Some((item, mut reply)) = worker.open(&claimed, max_result) else {
        return failed(worker, claimed, malformed());
    };
    // The handler may leave its own state inconsistent when it panics; that is the same trade as a thread pool's.
    let outcome = panic::catch_unwind(AssertUnwindSafe(|| handler.handle(&item, &mut reply)));
    crash_point!("worker.handled");
    drop(item);
    let done = now();
    match outcome {
        Ok(Ok(())) => reply.complete(claimed, 0, began, done),
        Ok(Err(failure)) => reply.fail(claimed, &failure, began, done),
        Err(panic) => {
            let failure = Failure::new(Code::Internal, "HANDLER_PANICKED", panic_message(&*panic));
            reply.fail(claimed, &failure, began, done);
        }
    }
    done
}

/// Why an item that was claimed at `began` does not reach the handler, if it does not.
pub(crate) fn refusal(claimed: &Claimed<'_>, began: u64) -> Option<Failure> {
    if (1..=began).contains(&claimed.deadline()) {
        return Some(Failure::deadline());
    }
    claimed.is_cancelled().then(Failure::cancelled)
}

/// Of an item that cannot be opened.
pub(crate) fn malformed() -> Failure {
    Failure::new(Code::Internal, "MALFORMED_ITEM", "the request is not in its arena")
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    format!("the handler panicked: {}", text.as_deref().unwrap_or("with no message"))
}
