//! Whose an item is: a child that a handler forks has nothing of the segment, so to look at what is there would be its death.

use std::{
    process,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
};

use pyo3::{exceptions::PyRuntimeError, intern, prelude::*, types::PyDict};

/// This process, or 0 if nobody has asked since it was forked: to ask the kernel each time takes longer than all else.
static PID: AtomicU32 = AtomicU32::new(0);

/// The process that something belongs to.
#[derive(Clone, Copy)]
pub struct Owner(u32);

impl Owner {
    /// This process.
    pub fn this() -> Self {
        let known = PID.load(Relaxed);
        if known != 0 {
            return Owner(known);
        }
        let pid = process::id();
        PID.store(pid, Relaxed);
        Owner(pid)
    }

    /// An error in any other process.
    pub fn check(self, what: &str) -> PyResult<()> {
        let Owner(pid) = self;
        if Owner::this().0 == pid {
            return Ok(());
        }
        let advice = "pass bytes(item.payload) to the child";
        Err(PyRuntimeError::new_err(format!("{what} belongs to process {pid}: {advice}")))
    }
}

#[pyfunction]
fn forget_pid() {
    PID.store(0, Relaxed);
}

/// From now on a child that Python forks knows that it is one.
pub fn watch_forks(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    let hooks = PyDict::new(py);
    hooks.set_item(intern!(py, "after_in_child"), wrap_pyfunction!(forget_pid, module)?)?;
    py.import(intern!(py, "os"))?.call_method(intern!(py, "register_at_fork"), (), Some(&hooks))?;
    Ok(())
}
