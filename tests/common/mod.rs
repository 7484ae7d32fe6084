//! What the integration tests share: servers as programs of their own, with real processes, memory and sockets, and
//! ways to wait for something instead of some time.
#![allow(dead_code)] // Each test file uses its own part of it.

pub mod audit;
pub mod cgroup;
pub mod files;
pub mod frames;
pub mod health;
pub mod processes;
pub mod program;
pub mod raw;
pub mod server;

use std::{
    env,
    fmt::Debug,
    io::{self, Write as _},
    str::FromStr,
    time::{Duration, Instant},
};

use forkring::{
    client::Client,
    proto::v1::{self, WorkItem, WorkResult},
};
use tonic::Code;

#[allow(unused_imports)]
pub use files::Files;
pub use server::Server;

/// How long anything may take that will come. Long, so that a slow machine fails nothing; only a defect needs it.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Runs a test on a runtime of its own thread, and ends it if it hangs.
pub fn run<T>(test: impl Future<Output = T>) -> T {
    run_within(3 * PATIENCE, test)
}

/// The same for one that takes longer.
pub fn run_within<T>(limit: Duration, test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let ended = runtime.block_on(async { tokio::time::timeout(limit, test).await });
    ended.expect("the test hangs")
}

/// What the environment asks of a test: a number, if the variable is set.
pub fn variable<T: FromStr>(name: &str) -> Option<T> {
    env::var(name).ok().map(|value| value.parse().ok().unwrap_or_else(|| panic!("{name} is no number")))
}

/// Looks until there is what is looked for.
pub async fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begin.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// What must come, comes in good time.
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("waited {PATIENCE:?} for {what}"),
    }
}

/// Tries with a time that is only just long enough, on a machine that has nothing else to do: one that takes longer is given
/// twice as long, again and again.
pub async fn in_time<T>(mut time: Duration, mut attempt: impl AsyncFnMut(Duration) -> Option<T>) -> T {
    for _ in 0..6 {
        if let Some(done) = attempt(time).await {
            return done;
        }
        time *= 2;
    }
    panic!("{:?} are not enough either", time / 2)
}

/// Says what of a test is left out here, and why: past the capture of its output.
pub fn skip(why: &str) {
    let _ = writeln!(io::stderr(), "\nSKIPPED: {why}");
}

/// Code, reason and message of a refused call.
pub fn refusal<T: Debug>(answer: Result<T, tonic::Status>) -> (Code, String, String) {
    let status = answer.expect_err("this must be refused");
    let v1::Status { reason, message, .. } = v1::Status::from(&status);
    (status.code(), reason, message)
}

/// The same of a result on a stream.
pub fn failure(result: WorkResult) -> (Code, String, String) {
    let v1::Status { code, reason, message, .. } = result.outcome().expect_err("this must have failed");
    (Code::from_i32(code), reason, message)
}

/// Asserts that something was refused with this code and reason, and that the message says this.
#[track_caller]
pub fn assert_refused((code, reason, message): (Code, String, String), wanted: (Code, &str), says: &str) {
    assert_eq!((code, reason.as_str()), wanted, "{message}");
    assert!(message.contains(says), "`{message}` does not say `{says}`");
    assert!(!message.contains('\n'), "`{message}` is more than a line");
}

/// A server answers: whatever was done to it before did no harm.
pub async fn assert_serves(client: &Client, pool: &str) {
    let echo = soon("an answer", client.call(WorkItem::new(pool, "still there?").with_id(7))).await;
    let echo = echo.expect("a server that serves");
    assert_eq!((echo.id, &echo.payload[..]), (7, &b"still there?"[..]));
}
