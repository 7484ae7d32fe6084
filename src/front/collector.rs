//! The collector: the one task that rings workers, collects their results and decides when the front sleeps.
//!
//! It runs once for everything that the other tasks did before its turn, so that a burst of items costs one fence and
//! at most one syscall. While more is likely to come soon it keeps the runtime polling (the sockets too, through
//! `yield_now`) instead of sleeping; then it parks with the doorbell's protocol, and the runtime sleeps in epoll.

use std::{convert::Infallible, io, mem::take, time::Duration};

use tokio::{
    task::yield_now,
    time::{Instant, sleep_until},
};
use tonic_health::{ServingStatus, server::HealthReporter};

use super::hub::{Hub, until};
use crate::{
    config::Spin,
    crash_point::crash_point,
    doorbell::AsyncBell,
    process::now,
    segment::{Liveness, Slot},
    spin::Spinner,
};

/// What the health of the whole server is asked by.
const WHOLE: [&str; 2] = ["", "forkring.v1.Dispatcher"];

/// How long a woken worker may take to come before the next is woken. The timer exists only while an item waits and a
/// worker of its pool sleeps.
const LATE: Duration = Duration::from_millis(5);

/// Collects for as long as it is polled; ends only if it cannot.
pub async fn run(hub: &Hub, bell: &AsyncBell, mut reporter: HealthReporter, spin: Spin) -> io::Result<Infallible> {
    let segment = hub.with_front(|front| front.segment());
    let mut spinner = Spinner::new(spin);
    let mut spinning = None;
    let mut idle = false;
    let mut slept = false;
    let mut seen = hub.activity.get();
    let mut epoch = None;
    let mut was_rung = false;
    // When the next worker is rung for an item that waits. It stays while the front wakes for other reasons.
    let mut late = None;
    loop {
        hub.release_sent();
        hub.with_front(|front| front.ring());
        let (count, done_at) = hub.collect();
        let deadline = hub.expire();
        hub.tell_of_room(false);
        // A drain is told by both. The bell, because a worker can write over the epoch; the epoch, because who never
        // sleeps hears no bell.
        let (before, rung) = (epoch.replace(segment.epoch()), take(&mut was_rung));
        let changed = before != epoch;
        if changed || rung {
            hub.note_failing();
        }
        if rung {
            // After a death, items may wait that were given back.
            hub.watch_waiting();
        }
        if (changed || rung) && !hub.is_draining() {
            let draining = hub.with_front(|front| front.is_draining());
            if changed || draining {
                report_health(hub, &reporter, !draining).await;
            }
            if draining {
                // Ends the streams of those who watch.
                for name in services(hub) {
                    reporter.clear_service_status(name).await;
                }
                hub.draining.send_replace(true);
                hub.wake_all();
                crash_point!("front.draining");
            }
        }
        let active = count > 0 || seen != hub.activity.get();
        if active {
            hub.progress.notify_one();
            seen = hub.activity.get();
            if idle {
                // When a request reached the socket nobody knows; when a result was there is known.
                let arrived = if count > 0 { done_at } else { now() };
                spinner.busy(arrived, slept && count > 0);
                idle = false;
            }
            slept = false;
            spinning = None;
            yield_now().await;
            continue;
        }
        if !idle {
            idle = true;
            spinning = spinner.idle();
        }
        if let Some(spin) = &mut spinning {
            if spin.goes_on(&mut spinner) {
                yield_now().await;
                continue;
            }
            spinning = None;
        }

        hub.with_front(|front| front.going_to_sleep());
        // Whatever came before the flag was up must be seen now: the doorbell's protocol. What came by another task of
        // this thread is told by `notify`, which remembers.
        if hub.collect().0 > 0 || epoch != Some(segment.epoch()) {
            hub.with_front(|front| front.awake());
            hub.activity.set(hub.activity.get() + 1);
            continue;
        }
        // What nobody wanted was freed by that look, and does not count.
        hub.tell_of_room(false);
        let is_late = hub.waits_for_lane() || hub.with_front(|front| front.somebody_is_late());
        late = is_late.then(|| late.unwrap_or_else(|| Instant::now() + LATE));
        tokio::select! {
            biased;
            () = hub.notify.notified() => {}
            rung = bell.wait() => {
                rung?;
                was_rung = true;
            }
            () = until(deadline.unwrap_or(0)) => {}
            () = sleep_until(late.unwrap_or_else(Instant::now)), if late.is_some() => {
                late = None;
                hub.with_front(|front| front.ring_next());
                hub.tell_of_room(true);
            }
        }
        slept = true;
        hub.with_front(|front| front.awake());
    }
}

fn services(hub: &Hub) -> impl Iterator<Item = &str> {
    hub.pools.iter().map(String::as_str).chain(WHOLE)
}

/// A pool serves while one of its workers lives that is not in a crash loop; the server, while one of its pools does.
async fn report_health(hub: &Hub, reporter: &HealthReporter, serving: bool) {
    let (segment, topology) = hub.with_front(|front| (front.segment(), front.topology().clone()));
    let status = |ok| if ok { ServingStatus::Serving } else { ServingStatus::NotServing };
    let mut any = false;
    for (pool, name) in hub.pools.iter().enumerate() {
        let (first, count) = topology.workers(pool as u16);
        let alive = (first..first + count).any(|n| matches!(segment.liveness(Slot::Worker(n)), Liveness::Live(_)));
        any |= alive;
        reporter.set_service_status(name, status(serving && alive)).await;
    }
    for name in WHOLE {
        reporter.set_service_status(name, status(serving && any)).await;
    }
}
