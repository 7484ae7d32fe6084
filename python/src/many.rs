//! The worker that has many items open at once: what an event loop and a maker of batches do with it is Python.

use std::{
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use forkring::{doorbell::Bell, sdk::Attached, segment::Segment};
use pyo3::{exceptions::PyRuntimeError, prelude::*, types::PyString};

use crate::{
    item::{As, Item},
    worker::{Described, failure},
};

/// This process as a worker of the server that started it. It belongs to one thread.
#[pyclass(unsendable, module = "forkring._core")]
pub struct Worker {
    /// In a box: its cache lines want an alignment that Python does not give to objects.
    attached: Box<Attached>,
    segment: &'static Segment,
    pool: Py<PyString>,
}

impl Worker {
    fn bell(&self) -> &Bell {
        self.attached.bell()
    }
}

#[pymethods]
impl Worker {
    #[new]
    fn new(py: Python<'_>) -> PyResult<Self> {
        let attached = Attached::from_env().map_err(|error| PyRuntimeError::new_err(error.to_string()))?;
        let pool = PyString::new(py, attached.pool()).unbind();
        Ok(Worker { segment: attached.segment(), attached: Box::new(attached), pool })
    }

    /// The next item, if there is one.
    fn take(&mut self, py: Python<'_>) -> PyResult<Option<Py<Item>>> {
        let open = self.attached.take();
        open.map(|open| Py::new(py, Item::open(open, self.segment, self.pool.clone_ref(py)))).transpose()
    }

    /// Waits for items, with no GIL: up to `most` of them, and for more than the first one no longer than `seconds`. None of
    /// them: the server stops.
    fn gather(&mut self, py: Python<'_>, most: usize, seconds: f64) -> PyResult<Vec<Py<Item>>> {
        let delay = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
        let mut items = Vec::new();
        let mut first = None;
        loop {
            while items.len() < most
                && let Some(item) = self.take(py)?
            {
                items.push(item);
            }
            if self.attached.is_stopping() || items.len() >= most {
                return Ok(items);
            }
            let mut left = None;
            if !items.is_empty() {
                let waited = first.get_or_insert_with(Instant::now).elapsed();
                left = Some(delay.saturating_sub(waited));
            }
            if left == Some(Duration::ZERO) {
                return Ok(items);
            }
            if self.attached.arm(true) {
                let bell = self.bell();
                py.detach(|| left.map_or_else(|| bell.wait(), |left| bell.wait_at_most(left)))?;
            }
            self.attached.disarm()?;
        }
    }

    /// Says that this process is about to wait for the bell; False, if it must not.
    fn arm(&self, for_items: bool) -> bool {
        self.attached.arm(for_items)
    }

    /// Forgets the rings so far.
    fn disarm(&self) -> PyResult<()> {
        Ok(self.attached.disarm()?)
    }

    /// The bell's descriptor.
    fn fileno(&self) -> i32 {
        self.bell().as_raw_fd()
    }

    /// Whether the server stops.
    #[getter]
    fn stopping(&self) -> bool {
        self.attached.is_stopping()
    }

    /// Sends a partial result; False, if it cannot be sent yet.
    #[staticmethod]
    fn send(item: &Bound<'_, Item>, part: &Bound<'_, PyAny>) -> PyResult<bool> {
        let item = item.get();
        let sent = match item.lacks_credit() {
            Ok(Some(_)) => return Ok(false),
            Ok(None) => item.write(part, As::Part, false),
            Err(failure) => Err(failure),
        };
        // Credit that was there stays.
        settle(item, sent.and_then(|written| if written { item.send() } else { Ok(false) }))
    }

    /// Whether an item's client reads partial results as they are made, at its own pace.
    #[staticmethod]
    fn streams(item: &Bound<'_, Item>) -> PyResult<bool> {
        item.get().is_streamed()
    }

    /// Writes the result; False, if there is no room for it yet, and `may_wait` does not say to wait for it here.
    #[staticmethod]
    #[pyo3(signature = (item, result, may_wait = false))]
    fn write(item: &Bound<'_, Item>, result: &Bound<'_, PyAny>, may_wait: bool) -> PyResult<bool> {
        settle(item.get(), item.get().write(result, As::Result, may_wait))
    }

    /// Completes an item, of whose result and payload the caller keeps nothing: with what was written, or with an error that
    /// is described.
    #[staticmethod]
    #[pyo3(signature = (item, error = None))]
    fn end(py: Python<'_>, item: &Bound<'_, Item>, error: Option<Described>) {
        let ended = item.get().end(py);
        let Some(open) = ended.open else { return };
        match ended.failure.or_else(|| error.map(failure)) {
            Some(failure) => open.fail(&failure),
            None => open.complete(),
        }
    }
}

/// A failure of a value is the item's, and an exception of the caller's.
fn settle(item: &Item, done: Result<bool, forkring::Failure>) -> PyResult<bool> {
    done.map_err(|failure| {
        item.fail(failure);
        PyRuntimeError::new_err("the value cannot be sent")
    })
}
