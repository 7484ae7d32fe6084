//! The gRPC side of the demo: one stream submits, another brings the results, each of which is checked.

use std::{
    collections::HashMap,
    path::PathBuf,
    process,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use anyhow::bail;
use bytes::Bytes;
use indicatif::HumanCount;
use nix::sys::signal::Signal;
use sha2::{Digest as _, Sha256};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};

use super::{NAMED, POOL, Shared, report::Report};
use crate::{
    cli::{say, show::hex},
    client::Client,
    proto::v1::{Status, SubmitReceipt, WorkItem, WorkResult},
};

/// How long no result may come while some are due.
const STALLED: Duration = Duration::from_secs(60);
/// How often the progress bar's text follows the count.
const SHOW_EVERY: u64 = 64;

/// A file on its way to the server.
#[derive(Debug)]
pub struct Outgoing {
    id: u64,
    payload: Bytes,
    expected: Expected,
}

impl Outgoing {
    /// Computes the digest that the result must be.
    pub fn new(id: u64, path: PathBuf, payload: Vec<u8>) -> Self {
        let expected = Expected {
            path,
            digest: Sha256::digest(&payload).into(),
            bytes: payload.len() as u64,
            sent: Instant::now(),
        };
        Self { id, payload: payload.into(), expected }
    }
}

/// What the result of an item must be.
#[derive(Debug)]
struct Expected {
    path: PathBuf,
    digest: [u8; 32],
    bytes: u64,
    sent: Instant,
}

/// The items that have no result yet, by id. The window bounds it.
#[derive(Debug, Default)]
pub struct Pending(Mutex<HashMap<u64, Expected>>);

impl Pending {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Expected>> {
        // A map is whole at every point where a holder of the lock could panic.
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// One run over the files.
pub struct Run<'a> {
    /// Where the server listens.
    pub addr: &'a str,
    /// With the threads that read.
    pub shared: &'a Arc<Shared>,
    /// How many workers there are.
    pub workers: u16,
    /// The files.
    pub items: mpsc::Receiver<Outgoing>,
    /// Ctrl-C.
    pub interrupted: oneshot::Receiver<Signal>,
}

impl Run<'_> {
    /// Until every accepted item has its result.
    pub async fn finish(self) -> anyhow::Result<Report> {
        let Self { addr, shared, workers, items, mut interrupted } = self;
        let client = Client::connect(addr).await?;
        let subscription = format!("demo-{}", process::id());
        let broken = |status: tonic::Status| anyhow::anyhow!("{}", Status::from(&status));
        // Before the first item, so that no result has to wait for its subscriber.
        let mut results = client.updates(&subscription, 0).await.map_err(broken)?;
        let started = Instant::now();
        let submitted = ReceiverStream::new(items).map({
            let shared = Arc::clone(shared);
            move |mut item| {
                item.expected.sent = Instant::now();
                shared.pending.lock().insert(item.id, item.expected);
                WorkItem::new(POOL, item.payload).with_id(item.id).with_subscription(subscription.as_str())
            }
        });
        let mut submit = Box::pin(client.submit(submitted));
        let mut receipt: Option<SubmitReceipt> = None;
        let mut report = Report::new(workers)?;
        while receipt.as_ref().is_none_or(|receipt| report.answered() < receipt.accepted) {
            tokio::select! {
                result = timeout(STALLED, results.message()) => match result {
                    Ok(Ok(Some(result))) => check(result, shared, &mut report),
                    Ok(Ok(None)) => bail!("the stream of updates ended early"),
                    Ok(Err(status)) => return Err(broken(status)),
                    // Reading may just be slow. Else what is pending counts as missing.
                    Err(_) if shared.pending.lock().is_empty() && receipt.is_none() => {}
                    Err(_) => break,
                },
                answer = &mut submit, if receipt.is_none() => receipt = Some(settle(answer.map_err(broken)?, shared, &mut report)),
                signal = &mut interrupted => bail!("interrupted by {}", signal.map_or("a signal", Signal::as_str)),
            }
        }
        report.elapsed = started.elapsed();
        for expected in std::mem::take(&mut *shared.pending.lock()).into_values() {
            wrong(&mut report.missing, shared, format_args!("{}: no result came", expected.path.display()));
        }
        if let Some(receipt) = receipt {
            // A receipt names only the first of the rejected ones; the others are pending still, but nothing is due.
            report.rejected = receipt.rejected;
            report.missing = receipt.accepted.saturating_sub(report.answered());
        }
        Ok(report)
    }
}

/// What was rejected has no result to come.
fn settle(receipt: SubmitReceipt, shared: &Shared, report: &mut Report) -> SubmitReceipt {
    for rejection in &receipt.rejections {
        let Some(expected) = shared.pending.lock().remove(&rejection.id) else { continue };
        let status = rejection.status.clone().unwrap_or_default();
        wrong(&mut report.rejected, shared, format_args!("{}: {status}", expected.path.display()));
    }
    receipt
}

fn check(result: WorkResult, shared: &Shared, report: &mut Report) {
    let id = result.id;
    let Some(expected) = shared.pending.lock().remove(&id) else {
        return wrong(&mut report.unexpected, shared, format_args!("item {id} has a second result"));
    };
    shared.window.leave(expected.bytes);
    report.record(&result, expected.bytes, expected.sent.elapsed());
    shared.bar.inc(expected.bytes);
    if report.answered().is_multiple_of(SHOW_EVERY) && !shared.bar.is_hidden() {
        shared.bar.set_message(format!("{} files", HumanCount(report.answered())));
    }
    let path = expected.path.display();
    match result.outcome() {
        Ok(digest) if digest[..] == expected.digest => report.matched += 1,
        Ok(digest) => {
            let (got, wanted) = (hex(&digest), hex(&expected.digest));
            wrong(&mut report.mismatched, shared, format_args!("{path}: the digest is {got}, not {wanted}"));
        }
        Err(status) => wrong(&mut report.failed, shared, format_args!("{path}: {status}")),
    }
}

/// Counts, and names the first few.
fn wrong(count: &mut u64, shared: &Shared, what: std::fmt::Arguments<'_>) {
    *count += 1;
    if *count <= NAMED {
        shared.bar.suspend(|| say(what));
    }
}
