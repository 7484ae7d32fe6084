//! Items, as a handler in Python sees them.
//!
//! An item's memory is lent to the Python object while its handler runs, and taken back before it is completed. What is
//! asked for later is an error, but for what is the object's own: id, attempt, deadline.

use std::{
    io,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use forkring::{
    dispatch::{self, ReplyError},
    segment::{INLINE, Segment},
};
use pyo3::{
    exceptions::{PyRuntimeError, PyValueError},
    intern,
    prelude::*,
    sync::PyOnceLock,
    types::{PyDict, PyMemoryView, PyString, PyType},
};

use crate::{payload::Payload, reply::Reply};

/// What is lent while the handler runs.
#[derive(Clone, Copy)]
struct Lent {
    item: *const dispatch::Item<'static>,
    reply: *mut dispatch::Reply<'static, 'static>,
    segment: &'static Segment,
}

// SAFETY: they are used with the GIL, between the handler's call and its return, by whatever thread.
unsafe impl Send for Lent {}

#[derive(Default)]
struct State {
    lent: Option<Lent>,
    payload: Option<Py<Payload>>,
    reply: Option<Py<Reply>>,
    metadata: Option<Py<PyDict>>,
}

/// One unit of work.
#[pyclass(frozen, module = "forkring")]
pub struct Item {
    /// The id that the client gave the item.
    #[pyo3(get)]
    id: u64,
    /// 1 unless earlier workers died of it.
    #[pyo3(get)]
    attempt: u32,
    /// The name of the worker's pool.
    #[pyo3(get)]
    pool: Py<PyString>,
    /// When it expires, on the clock of `time.monotonic()`; None: never.
    #[pyo3(get)]
    deadline: Option<f64>,
    /// The lock is never held while Python runs, and the GIL always is while it is taken.
    state: Mutex<State>,
}

impl Item {
    /// Lends an item to Python.
    ///
    /// # Safety
    ///
    /// [`Item::end`] is called before any of the three is used or ends otherwise.
    pub unsafe fn lend(
        item: &dispatch::Item<'_>,
        reply: &mut dispatch::Reply<'_, '_>,
        segment: &'static Segment,
        pool: Py<PyString>,
    ) -> Self {
        let lent = Lent { item: (&raw const *item).cast(), reply: (&raw mut *reply).cast(), segment };
        Item {
            id: item.id(),
            attempt: item.attempt(),
            pool,
            deadline: item.deadline().map(|deadline| deadline.as_secs_f64()),
            state: Mutex::new(State { lent: Some(lent), ..State::default() }),
        }
    }

    fn state<T>(&self, with: impl FnOnce(&mut State) -> T) -> T {
        with(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What the handler asked for to write its result to.
    pub fn filled(&self, py: Python<'_>) -> Option<Py<Reply>> {
        self.state(|state| state.reply.as_ref().map(|reply| reply.clone_ref(py)))
    }

    /// Takes back what was lent.
    pub fn end(&self, py: Python<'_>) -> io::Result<()> {
        let State { lent, payload, .. } = self.state(std::mem::take);
        match (lent, payload) {
            (Some(lent), Some(payload)) => Payload::end(payload, py, lent.segment),
            _ => Ok(()),
        }
    }

    fn lent(&self) -> PyResult<Lent> {
        let lent = self.state(|state| state.lent);
        lent.ok_or_else(|| PyRuntimeError::new_err("the item is completed: ask for this while its handler runs"))
    }

    /// Looks at the item.
    fn look<T>(&self, with: impl FnOnce(&dispatch::Item<'_>) -> T) -> PyResult<T> {
        let lent = self.lent()?;
        // SAFETY: it is lent, and cannot be taken back meanwhile: that takes the GIL, and `with` runs no Python.
        Ok(with(unsafe { &*lent.item }))
    }
}

#[pymethods]
impl Item {
    /// What the client sent.
    #[getter]
    fn payload(&self, py: Python<'_>) -> PyResult<Py<Payload>> {
        if let Some(payload) = self.state(|state| state.payload.as_ref().map(|payload| payload.clone_ref(py))) {
            return Ok(payload);
        }
        let segment = self.lent()?.segment;
        // SAFETY: `end` calls its `end`.
        let payload = self.look(|item| unsafe { Payload::of(item.payload(), segment) })?;
        let payload = Py::new(py, payload)?;
        self.state(|state| state.payload = Some(payload.clone_ref(py)));
        Ok(payload)
    }

    /// What the client sent beside the payload.
    #[getter]
    fn metadata(&self, py: Python<'_>) -> PyResult<Py<PyDict>> {
        if let Some(metadata) = self.state(|state| state.metadata.as_ref().map(|metadata| metadata.clone_ref(py))) {
            return Ok(metadata);
        }
        let owned = |(key, value): (&str, &str)| (key.to_owned(), value.to_owned());
        let pairs = self.look(|item| item.all_metadata().map(owned).collect::<Vec<_>>())?;
        let metadata = PyDict::new(py);
        for (key, value) in pairs {
            metadata.set_item(key, value)?;
        }
        self.state(|state| state.metadata = Some(metadata.clone().unbind()));
        Ok(metadata.unbind())
    }

    /// How many seconds are left until the deadline; None: as many as it takes.
    fn remaining(&self) -> PyResult<Option<f64>> {
        self.look(|item| item.remaining().map(|left: Duration| left.as_secs_f64()))
    }

    /// Whether nobody waits for the result any more. A handler that takes long does well to ask now and then.
    #[getter]
    fn cancelled(&self) -> PyResult<bool> {
        self.look(|item| item.is_cancelled())
    }

    /// The payload as a NumPy array, with no copy. It is read-only.
    #[pyo3(signature = (dtype = None, shape = None))]
    fn numpy<'py>(
        &self,
        py: Python<'py>,
        dtype: Option<Bound<'py, PyAny>>,
        shape: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let payload = self.payload(py)?;
        let numpy = py.import(intern!(py, "numpy"))?;
        let dtype = dtype.map_or_else(|| numpy.getattr(intern!(py, "uint8")), Ok)?;
        let view = PyMemoryView::from(payload.bind(py))?;
        let array = numpy.call_method1(intern!(py, "frombuffer"), (view, dtype))?;
        match shape {
            Some(shape) => array.call_method1(intern!(py, "reshape"), (shape,)),
            None => Ok(array),
        }
    }

    /// Memory for a result of so many bytes, all zero. What is in it when the handler returns it, or returns None, is sent
    /// from there with no copy.
    fn reply(&self, py: Python<'_>, nbytes: usize) -> PyResult<Py<Reply>> {
        let lent = self.lent()?;
        if self.state(|state| state.reply.is_some()) {
            return Err(PyValueError::new_err("the item has its reply: ask for one only, of the most bytes"));
        }
        // SAFETY: as in `look`, and there is no other borrow of it: nobody else uses it before `end`.
        let reply = unsafe { &mut *lent.reply };
        let reply = if nbytes <= INLINE {
            match nbytes <= reply.max_len() {
                true => Ok(Reply::small(nbytes)),
                false => Err(ReplyError::TooLarge { len: nbytes, most: reply.max_len() }),
            }
        } else {
            lend(reply, nbytes)
        };
        let reply = Py::new(py, reply.map_err(|error| no_room(py, error))?)?;
        self.state(|state| state.reply = Some(reply.clone_ref(py)));
        Ok(reply)
    }

    fn __repr__(&self) -> String {
        format!("<forkring.Item id={} attempt={}>", self.id, self.attempt)
    }
}

/// Memory in the arena.
fn lend(reply: &mut dispatch::Reply<'_, '_>, len: usize) -> Result<Reply, ReplyError> {
    reply.buffer(len)?;
    let hold = reply.hold().ok_or(ReplyError::NoRoom)?;
    let bytes = reply.buffer(len)?;
    // It has the bytes of an earlier result, which are not this item's to send.
    bytes.fill(0);
    Ok(Reply::held(bytes, hold))
}

/// The exception that fails the item as a Rust handler's would.
fn no_room(py: Python<'_>, error: ReplyError) -> PyErr {
    static ABORT: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    let (code, reason) = match error {
        ReplyError::TooLarge { .. } => ("RESOURCE_EXHAUSTED", "RESULT_TOO_LARGE"),
        ReplyError::NoRoom => ("RESOURCE_EXHAUSTED", "RESULTS_FULL"),
        ReplyError::Cancelled => ("CANCELLED", "CANCELLED"),
        ReplyError::Expired => ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"),
    };
    match ABORT.import(py, "forkring", "Abort") {
        Ok(abort) => match abort.call1((code, error.to_string(), reason)) {
            Ok(abort) => PyErr::from_value(abort),
            Err(error) => error,
        },
        Err(error) => error,
    }
}
