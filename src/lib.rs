//! A gRPC server whose requests are worked on by processes.

mod arena;
pub mod builtin;
pub mod cli;
pub mod client;
pub mod config;
mod crash_point;
pub mod dispatch;
pub mod doorbell;
pub mod front;
pub mod handler;
pub mod process;
pub mod proto;
pub mod ring;
pub mod segment;
mod server;
pub mod spin;
pub mod supervisor;
mod sync;
pub mod worker;

pub use handler::{Code, Failure, Handler, Item, Reply};
pub use server::{BoundServer, Pool, Server, ServerError};
