//! The native half of the Python package `forkring`: the command line, and the worker's side of Python handlers. The clients
//! are Python over grpcio, and have only the protos from here.
//!
//! # What it promises
//!
//! - The command line is the Rust program's; in a server the supervisor and the front never run Python.
//! - A worker holds the GIL while it handles an item and not while it waits for one.
//! - What a handler keeps of an item after its end is never another item's and never freed memory: see [`payload`] and
//!   [`reply`].
//! - In a child that a handler forks, its item is an error and not a crash.
//!
//! The GIL guards what several threads of a handler may do at once, so a free-threaded Python turns it on for us.

mod argument;
mod buffer;
mod family;
mod item;
mod many;
mod nursery;
mod payload;
mod reply;
mod result;
mod worker;

#[pyo3::pymodule(gil_used = true)]
mod _core {
    use std::{ffi::OsString, path::PathBuf};

    use pyo3::{prelude::*, types::PyBytes};

    #[pymodule_export]
    use super::{
        item::Item,
        many::Worker,
        nursery::Nursery,
        payload::{Payload, late_views},
        reply::Reply,
        worker::{inherit, run},
    };

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        super::family::watch_forks(module)
    }

    /// Runs the command line; the first argument is the program's name. `interpreter` and the arguments behind it are how
    /// this command is started. Returns the exit code.
    #[pyfunction]
    #[pyo3(signature = (arguments, interpreter, *starts))]
    fn main(py: Python<'_>, arguments: Vec<OsString>, interpreter: PathBuf, starts: Vec<OsString>) -> u8 {
        let python = forkring::cli::Python { interpreter, arguments: starts };
        py.detach(|| forkring::cli::run(arguments, Some(python)))
    }

    /// The compiled protos with all that they import, as a serialised `FileDescriptorSet`: the clients' messages.
    #[pyfunction]
    fn descriptor_set(py: Python<'_>) -> Bound<'_, PyBytes> {
        PyBytes::new(py, forkring::proto::DESCRIPTORS)
    }
}
