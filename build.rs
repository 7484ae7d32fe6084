//! Compiles the protos with protox, so that no protoc is needed, and keeps the descriptor set for reflection.

use std::{env, error::Error, fs, path::PathBuf};

use protox::prost::Message as _;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(["forkring/v1/dispatcher.proto", "forkring/v1/admin.proto"], ["proto"])?;
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    // Payloads as `Bytes`: a message that was read into one buffer is not copied apart again.
    tonic_prost_build::configure().bytes(".forkring.v1").compile_fds(descriptors)?;
    Ok(())
}
