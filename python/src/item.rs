//! Items, as a handler in Python sees them.
//!
//! An item's memory is lent to the Python object while its handler runs, and taken back before it is completed. What is
//! asked for later is an error, but for what is the object's own: id, attempt, deadline.
//!
//! All of it is used with the GIL, whatever thread has it, and without it only what borrows nothing of an item: so the
//! cells that open items share are looked at by one thread at a time.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use forkring::{
    Failure,
    dispatch::{self, Credit, ReplyError, Room},
    process,
    sdk::OpenItem,
    segment::{INLINE, Segment},
};
use pyo3::{
    exceptions::{PyModuleNotFoundError, PyRuntimeError, PyTypeError, PyValueError},
    intern,
    prelude::*,
    sync::PyOnceLock,
    types::{PyDict, PyMemoryView, PyString, PyType},
};

use crate::{argument, family::Owner, payload::Payload, reply::Reply, result::Source};

/// What is lent while the handler runs.
#[derive(Clone, Copy)]
enum Lent {
    /// The one item that the worker handles.
    Handled { item: *const dispatch::Item<'static>, reply: *mut dispatch::Reply<'static, 'static> },
    /// One of those that are open in the worker, from a box.
    Open(*mut OpenItem),
}

// SAFETY: they are used with the GIL, between the handler's call and its return, by whatever thread.
unsafe impl Send for Lent {}

/// What a handler's value is written as.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum As {
    Result,
    /// A partial result.
    Part,
}

#[derive(Default)]
struct State {
    lent: Option<Lent>,
    payload: Option<Py<Payload>>,
    reply: Option<Py<Reply>>,
    metadata: Option<Py<PyDict>>,
    /// Why it will fail, whatever else is said of it.
    failure: Option<Failure>,
}

/// Whether there is memory.
enum Reserved {
    Now,
    /// It is worth trying again then.
    After(Room<'static>),
    No,
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
    owner: Owner,
    segment: &'static Segment,
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
        let lent = Lent::Handled { item: (&raw const *item).cast(), reply: (&raw mut *reply).cast() };
        Item::new(item, lent, segment, pool)
    }

    /// One that is open beside others. If [`Item::end`] is never called it stays open as long as the process lives, and
    /// then is another worker's.
    pub fn open(open: OpenItem, segment: &'static Segment, pool: Py<PyString>) -> Self {
        let open = Box::into_raw(Box::new(open));
        // SAFETY: it is from a box, and nobody else has it.
        let item = unsafe { &*open }.item();
        Item::new(&item, Lent::Open(open), segment, pool)
    }

    fn new(item: &dispatch::Item<'_>, lent: Lent, segment: &'static Segment, pool: Py<PyString>) -> Self {
        Item {
            id: item.id(),
            attempt: item.attempt(),
            pool,
            deadline: item.deadline().map(|deadline| deadline.as_secs_f64()),
            owner: Owner::this(),
            segment,
            state: Mutex::new(State { lent: Some(lent), ..State::default() }),
        }
    }

    fn state<T>(&self, with: impl FnOnce(&mut State) -> T) -> T {
        with(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Writes what the handler gave: all of its result, or what comes behind its earlier parts. False, if that takes waiting,
    /// and it must not.
    pub fn write(&self, value: &Bound<'_, PyAny>, what: As, may_wait: bool) -> Result<bool, Failure> {
        let py = value.py();
        let filled = self.state(|state| state.reply.as_ref().map(|reply| reply.clone_ref(py)));
        let filled = filled.as_ref().map(|filled| filled.bind(py));
        let source = Source::of(value, filled)?;
        let in_arena = filled.is_some_and(|filled| filled.get().is_in_arena());
        let is_filled = matches!(source, Source::Filled { .. });
        let start = self.with_reply(|reply| {
            if in_arena && !is_filled {
                // The handler still has that memory, and may write there.
                reply.discard();
            }
            if in_arena { 0 } else { reply.len() }
        });
        let start = start.map_err(Failure::handler)?;
        // A partial result has a block, however small it is.
        let least = if what == As::Part { INLINE + 1 } else { 0 };
        let mut is_there = is_filled;
        while !is_there {
            match self.reserve((start + source.len()).max(least), may_wait).map_err(Failure::handler)?? {
                Reserved::Now => is_there = true,
                // Other threads of the handler go on.
                Reserved::After(room) => py.detach(|| room.wait())?,
                Reserved::No => return Ok(false),
            }
        }
        self.with_reply(|reply| source.write(py, start, reply)).map_err(Failure::handler)??;
        drop(self.state(|state| state.reply.take()));
        Ok(true)
    }

    /// Sees to memory for a result of so many bytes.
    fn reserve(&self, len: usize, may_wait: bool) -> PyResult<Result<Reserved, ReplyError>> {
        self.with_reply(|reply| {
            if reply.try_reserve(len)? {
                return Ok(Reserved::Now);
            }
            if !may_wait {
                return Ok(Reserved::No);
            }
            match reply.lacks_room() {
                Ok(room) => Ok(Reserved::After(room)),
                // The last that can be done is to move what there is of the result, which is done when it is written to.
                Err(ReplyError::NoRoom) => Ok(Reserved::Now),
                Err(error) => Err(error),
            }
        })
    }

    /// Sends what was written as a partial result. False, if there is no credit yet.
    pub fn send(&self) -> Result<bool, Failure> {
        Ok(self.with_reply(|reply| reply.try_send()).map_err(Failure::handler)??)
    }

    /// Whether its client reads partial results as they are made.
    pub fn is_streamed(&self) -> PyResult<bool> {
        self.with_reply(|reply| reply.is_streamed())
    }

    /// What to wait for before the next partial result can be sent; none, if it can.
    pub fn lacks_credit(&self) -> Result<Option<Credit<'static>>, Failure> {
        let credit = self.with_reply(|reply| reply.credit()).map_err(Failure::handler)?;
        Ok(credit.filter(|credit| !credit.is_there()))
    }

    /// Why it fails, if nobody waits for it any more.
    pub fn given_up(&self) -> Option<Failure> {
        self.look(|item| item.given_up()).unwrap_or_default()
    }

    /// It will fail with this.
    pub fn fail(&self, failure: Failure) {
        self.state(|state| {
            state.failure.get_or_insert(failure);
        });
    }

    /// Takes back what was lent, which is about to be completed. What the handler's values were must be gone.
    pub fn end(&self, py: Python<'_>) -> Ended {
        let State { lent, payload, failure, .. } = self.state(std::mem::take);
        if let (Some(_), Some(payload)) = (lent, payload)
            && let Err(error) = Payload::end(payload, py, self.segment)
        {
            // It cannot be told from whom the bytes will be next, and somebody looks at them: another worker does without
            // the past.
            eprintln!("forkring: cannot keep a payload that outlives its handler, so the worker ends: {error}");
            process::die();
        }
        let open = match lent {
            // SAFETY: it is from a box, and was taken out of the state, so that this is the only one.
            Some(Lent::Open(open)) => Some(unsafe { Box::from_raw(open) }),
            _ => None,
        };
        Ended { open, failure }
    }

    fn lent(&self) -> PyResult<Lent> {
        self.owner.check("the item")?;
        let lent = self.state(|state| state.lent);
        lent.ok_or_else(|| PyRuntimeError::new_err("the item is completed: ask for this while its handler runs"))
    }

    /// Looks at the item.
    fn look<T>(&self, with: impl FnOnce(&dispatch::Item<'_>) -> T) -> PyResult<T> {
        Ok(match self.lent()? {
            // SAFETY: it is lent, and cannot be taken back meanwhile: that takes the GIL, and `with` runs no Python.
            Lent::Handled { item, .. } => with(unsafe { &*item }),
            // SAFETY: as above.
            Lent::Open(open) => with(&unsafe { &*open }.item()),
        })
    }

    fn with_reply<T>(&self, with: impl FnOnce(&mut dispatch::Reply<'_, 'static>) -> T) -> PyResult<T> {
        Ok(match self.lent()? {
            // SAFETY: as in `look`, and there is no other borrow of it: nobody else uses it before `end`, and to write a
            // value copies memory, which runs nobody's Python.
            Lent::Handled { reply, .. } => with(unsafe { &mut *reply }),
            // SAFETY: as above.
            Lent::Open(open) => with(&mut unsafe { &mut *open }.reply()),
        })
    }
}

/// An item that is no longer lent.
pub struct Ended {
    /// If it was one of many.
    pub open: Option<Box<OpenItem>>,
    pub failure: Option<Failure>,
}

#[pymethods]
impl Item {
    /// What the client sent.
    #[getter]
    fn payload(&self, py: Python<'_>) -> PyResult<Py<Payload>> {
        if let Some(payload) = self.state(|state| state.payload.as_ref().map(|payload| payload.clone_ref(py))) {
            return Ok(payload);
        }
        // SAFETY: `end` calls its `end`.
        let payload = self.look(|item| unsafe { Payload::of(item.payload(), self.segment) })?;
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
        let numpy = py.import(intern!(py, "numpy")).map_err(|error| {
            let is_missing = error.is_instance_of::<PyModuleNotFoundError>(py);
            if is_missing {
                PyModuleNotFoundError::new_err("item.numpy() needs NumPy: pip install numpy")
            } else {
                error
            }
        })?;
        let view = PyMemoryView::from(payload.bind(py))?;
        let array = || {
            let dtype = dtype.clone().map_or_else(|| numpy.getattr(intern!(py, "uint8")), Ok)?;
            let array = numpy.call_method1(intern!(py, "frombuffer"), (&view, dtype))?;
            match &shape {
                Some(shape) => array.call_method1(intern!(py, "reshape"), (shape,)),
                None => Ok(array),
            }
        };
        array().map_err(|error| no_array(py, payload.bind(py), dtype.as_ref(), shape.as_ref(), &error))
    }

    /// Memory for a result of so many bytes, all zero. What is in it when the handler returns it, or returns None, is sent
    /// from there with no copy.
    fn reply(&self, py: Python<'_>, nbytes: &Bound<'_, PyAny>) -> PyResult<Py<Reply>> {
        let nbytes = argument::size("nbytes", nbytes)?;
        let waits = matches!(self.lent()?, Lent::Handled { .. });
        // Behind the parts of a result that comes in one it is copied; and of many items none makes the others wait.
        let mut is_copied = nbytes <= INLINE || self.with_reply(|reply| !reply.is_empty())?;
        loop {
            // Anew after each wait: other threads go on.
            if self.state(|state| state.reply.is_some()) {
                return Err(PyValueError::new_err("the item has its reply: ask for one only, of the most bytes"));
            }
            if is_copied {
                break;
            }
            match self.reserve(nbytes, waits)?.map_err(|error| no_room(py, error))? {
                Reserved::Now => break,
                Reserved::After(room) => py.detach(|| room.wait())?,
                Reserved::No => is_copied = true,
            }
        }
        let lent = self.with_reply(|reply| lend(reply, nbytes, is_copied))?;
        let reply = Py::new(py, lent.map_err(|error| no_room(py, error))?)?;
        self.state(|state| state.reply = Some(reply.clone_ref(py)));
        Ok(reply)
    }

    fn __repr__(&self) -> String {
        format!("<forkring.Item id={} attempt={}>", self.id, self.attempt)
    }
}

/// An error about the type and shape that NumPy was to give a payload.
fn no_array(
    py: Python<'_>,
    payload: &Bound<'_, Payload>,
    dtype: Option<&Bound<'_, PyAny>>,
    shape: Option<&Bound<'_, PyAny>>,
    error: &PyErr,
) -> PyErr {
    let len = payload.len().unwrap_or_default();
    let given = |name: &str, value: Option<&Bound<'_, PyAny>>| {
        value.map(|value| format!("{name} is {}; ", argument::typed(value))).unwrap_or_default()
    };
    let (dtype, shape) = (given("dtype", dtype), given("shape", shape));
    let message = format!(
        "the payload of {len} bytes cannot be seen as such an array: {dtype}{shape}NumPy says: {}",
        error.value(py)
    );
    let refusal = if error.is_instance_of::<PyTypeError>(py) {
        PyTypeError::new_err(message)
    } else {
        PyValueError::new_err(message)
    };
    refusal.set_cause(py, Some(error.clone_ref(py)));
    refusal
}

/// Memory in the arena, or to copy from.
fn lend(reply: &mut dispatch::Reply<'_, '_>, len: usize, is_copied: bool) -> Result<Reply, ReplyError> {
    let (end, most) = (reply.len().saturating_add(len), reply.max_len());
    if end > most {
        return Err(ReplyError::TooLarge { len: end, most });
    }
    if is_copied {
        return Ok(Reply::own(len));
    }
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
