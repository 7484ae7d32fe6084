//! The baseline (grpc.aio + multiprocessing.Queue) rewritten for forkring.
//!
//! `scripts/baseline` is how Python teams often write it: a `grpc.aio` server in one process, two bounded
//! `multiprocessing.Queue`s, a worker process for each other core, and updates that clients get by way of a loop that looks
//! ten times a second. Here: the handler, and where to listen. Fork comes before gRPC, nobody polls, and an item whose worker
//! dies goes to another.
//!
//!     cargo run --release --example rewritten
//!     forkring updates --addr 127.0.0.1:8080
//!     seq 100 | forkring submit work --lines --addr 127.0.0.1:8080
//!
//! `submit` sends the items and `updates` prints their results: start either first, each from a shell of its own.

use forkring::{Failure, Item, Pool, Reply, Server, ServerError};
use sha2::{Digest as _, Sha256};

/// Uses the CPU: a digest of a digest, many times over.
fn cpu_intensive_work(item: &Item<'_>, reply: &mut Reply<'_, '_>) -> Result<(), Failure> {
    let digest = (0..100_000).fold(Sha256::digest(item.payload()), |digest, _| Sha256::digest(digest));
    reply.write(format!("{digest:x}").as_bytes())?;
    Ok(())
}

fn main() -> Result<(), ServerError> {
    Server::new().listen(([0, 0, 0, 0], 8080).into()).pool(Pool::new("work", cpu_intensive_work)).run()
}
