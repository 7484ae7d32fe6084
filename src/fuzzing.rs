//! What the fuzz targets (`tests/fuzz`) reach of the inside, and nobody else should.

use std::ffi::OsString;

use crate::{cli, dispatch::Failure};

/// Reads a command line; what is wrong with it. Nothing is run.
pub fn command_line<'a>(arguments: impl Iterator<Item = &'a str>) -> Result<(), String> {
    let arguments: Vec<_> = ["forkring"].into_iter().chain(arguments).map(OsString::from).collect();
    cli::check(&arguments)
}

/// Reads a result as a failure.
pub fn failure(code: u32, bytes: &[u8]) {
    Failure::from_result(code, bytes).code();
}
