//! Waiting for a server that is not there yet.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

use super::ConnectError;
use crate::config::format_duration;

/// The delay after which a waiting client says that it waits.
const TELL_AFTER: Duration = Duration::from_secs(1);
/// The pause after the first attempt. Each further attempt doubles it.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
/// The longest pause between two attempts, and so the longest delay between a server's start and the connection.
const LONGEST_PAUSE: Duration = Duration::from_millis(80);

/// Tries to connect, at least once, until an attempt succeeds, an attempt fails for good, or `patience` is over. Returns the error of
/// the last attempt. After a second it calls `tell` once.
pub(crate) async fn until_connected<T>(
    addr: &str,
    patience: Duration,
    mut attempt: impl AsyncFnMut() -> Result<T, ConnectError>,
    tell: impl FnOnce(),
) -> Result<T, ConnectError> {
    if patience.is_zero() {
        return attempt().await;
    }
    let deadline = Instant::now().checked_add(patience);
    let mut last = None;
    let attempts = async {
        for number in 0.. {
            match attempt().await {
                Err(error @ ConnectError::Unreachable { .. }) => last = Some(error),
                ended => return Some(ended),
            }
            sleep(pause(number)).await;
        }
        None
    };
    let told = async {
        sleep(TELL_AFTER).await;
        tell();
        std::future::pending().await
    };
    let ended = async {
        tokio::select! {
            ended = attempts => ended,
            never = told => never,
        }
    };
    let ended = match deadline {
        Some(deadline) => timeout_at(deadline, ended).await.ok().flatten(),
        None => ended.await,
    };
    match (ended, last) {
        (Some(ended), _) => ended,
        (None, Some(error)) => Err(error),
        // The first attempt has not ended yet.
        (None, None) => {
            let cause = format!("no answer within {}", format_duration(patience));
            Err(ConnectError::Unreachable { addr: addr.to_owned(), cause })
        }
    }
}

/// Returns the pause after an attempt, the first of which has the number 0.
fn pause(number: u32) -> Duration {
    FIRST_PAUSE.saturating_mul(2_u32.saturating_pow(number)).min(LONGEST_PAUSE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_are_bounded() {
        for (number, millis) in [(0, 5), (1, 10), (2, 20), (3, 40), (4, 80), (5, 80), (u32::MAX, 80)] {
            assert_eq!(pause(number), Duration::from_millis(millis), "{number}");
        }
    }
}
