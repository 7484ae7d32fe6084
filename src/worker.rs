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
            // What it carries may take its time to go.
            drop(panic);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        dispatch::{Bells, Front, Item, Kind, Offer, Reply, Topology},
        segment::{Geometry, Liveness, Segment, SegmentOwner},
    };

    #[test]
    fn who_retires_wakes_the_front_first() {
        let (request_bytes, result_bytes) = (1 << 17, 1 << 17);
        let geometry =
            Geometry { items: 1, fronts: 1, workers: 1, pools: 1, request_bytes, result_bytes, letter_bytes: 0 };
        let owner = SegmentOwner::create(&format!("unit-worker-{}", std::process::id()), geometry).unwrap();
        let view = |slot| Segment::attach(owner.object(), owner.name(), slot).unwrap();
        let [ours, theirs, supervisor] = [Slot::Front(0), Slot::Worker(0), Slot::Supervisor].map(view);
        let (topology, bells) = (Topology::new([1]), Bells::new(1, 1).unwrap());
        let (mut front, _) = Front::attach(&ours, topology.clone(), bells.clone(), 0);
        let mut worker = Worker::attach(&theirs, topology, bells.clone(), 0).unwrap();
        let (kind, subscription, metadata) = (Kind::Call, &[][..], &[][..]);
        let offer = Offer { pool: 0, priority: 0, id: 1, offered: now(), deadline: 0, kind, subscription, metadata };
        let mut request = front.request(0).unwrap();
        front.offer(&offer, &mut request).unwrap();
        bells.front(0).drain().unwrap();
        front.going_to_sleep();
        let mut retires = |_: &Item<'_>, _: &mut Reply<'_, '_>| {
            supervisor.set_liveness(Slot::Worker(0), Liveness::Retiring(1));
            Ok(())
        };
        run(&mut worker, &mut retires, Spin::Off, 0).unwrap();
        assert!(bells.front(0).has_rung());
        assert!(front.collect().is_some());
    }
}
