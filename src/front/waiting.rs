//! Items that wait: when one has not been taken for a while, the next worker is woken and the supervisor asked to look at
//! the workers that were rung.
//!
//! The collector does the same within milliseconds when it sleeps. This also works while the front never sleeps, and while
//! no other worker of the pool is idle. Its timer exists only from an offer, or a ring of the front's bell, until no item
//! waits.

use std::{convert::Infallible, io, time::Duration};

use tokio::time::sleep;

use super::hub::Hub;
use crate::doorbell::Bell;

/// How long an item waits before the supervisor is asked.
const PATIENCE: Duration = Duration::from_secs(1);

/// Watches for as long as it is polled; ends only if it cannot ring.
pub async fn run(hub: &Hub, complaint: &Bell) -> io::Result<Infallible> {
    loop {
        hub.something_may_wait().await;
        loop {
            sleep(PATIENCE).await;
            if !hub.with_front(|front| front.has_waiting()) {
                break;
            }
            hub.with_front(|front| front.ring_next());
            complaint.ring()?;
        }
    }
}
