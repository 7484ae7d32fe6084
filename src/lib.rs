//! A gRPC server whose requests are worked on by **processes**, not threads.
//!
//! A front process (tonic, tokio) puts work items into lock-free rings in POSIX shared memory; forked workers take them
//! and send results back; nobody polls and nobody waits on a lock. A worker that dies loses nothing: its item goes to
//! another.
//!
//! ```standalone_crate
//! # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs"));
//! # fn main() {
//! use forkring::{Code, Failure, Pool, Server};
//!
//! fn main() -> Result<(), forkring::ServerError> {
//!     let square = Pool::new("square", |item, reply| {
//!         // The payload is read in place, in shared memory.
//!         let Ok(number) = std::str::from_utf8(item.payload()).unwrap_or("").parse::<u32>() else {
//!             return Err(Failure::new(Code::InvalidArgument, "NOT_A_NUMBER", "send a decimal number"));
//!         };
//!         // And the result is written in place.
//!         reply.write((u64::from(number) * u64::from(number)).to_string().as_bytes())?;
//!         Ok(())
//!     });
//!     // This process becomes the supervisor: it must have one thread, so start it before anything that starts more.
//!     Server::new()
//!         .listen(([127, 0, 0, 1], 50051).into())
//! #       .configure(example::settings)
//!         .pool(square.workers(4))
//!         .run()
//! }
//! # example::run(main, async |client| {
//! #     use forkring::proto::v1::WorkItem;
//! #     assert_eq!(client.call(WorkItem::new("square", "70000")).await?.payload, "4900000000");
//! #     let refused = client.call(WorkItem::new("square", "many")).await.unwrap_err();
//! #     assert_eq!((refused.code(), refused.message()), (Code::InvalidArgument, "send a decimal number"));
//! #     Ok(())
//! # });
//! # }
//! ```
//!
//! Clients speak `forkring.v1.Dispatcher` in any language; in Rust there is [`client::Client`]. The command line is
//! in [`cli`].
//!
//! The layers below the server are public for benchmarks and for those who want only the rings: [`dispatch`] over
//! [`ring`], [`doorbell`] and [`segment`]. `docs/design.md` has the protocols.

mod arena;
pub mod builtin;
pub mod cli;
pub mod client;
pub mod config;
mod contract;
mod crash_point;
pub mod dispatch;
pub mod doorbell;
pub mod front;
#[doc(hidden)]
pub mod fuzzing;
pub mod handler;
pub mod process;
pub mod program;
pub mod proto;
pub mod ring;
pub mod sdk;
pub mod segment;
mod server;
pub mod spin;
pub mod supervisor;
mod sync;
pub mod worker;

/// What it shows of Rust compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

pub use client::Client;
pub use handler::{Code, Failure, Handler, Item, Reply};
pub use program::Program;
pub use server::{BoundServer, Pool, Server, ServerError};
