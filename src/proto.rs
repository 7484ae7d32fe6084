//! The messages, clients and servers that `build.rs` makes of `proto/forkring/v1`.

/// Package `forkring.v1`.
pub mod v1 {
    #![allow(missing_docs, clippy::all)]
    tonic::include_proto!("forkring.v1");
}

/// The compiled protos with all that they import, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
