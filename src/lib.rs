//! A gRPC server whose requests are worked on by processes.

mod crash_point;
pub mod doorbell;
pub mod process;
pub mod proto;
pub mod ring;
pub mod segment;
mod sync;
