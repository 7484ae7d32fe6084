//! The worker that handles one item after the other: items for a handler in Python, its results and exceptions back.

use forkring::{
    Code, Failure, Handler, dispatch,
    sdk::{self, Attached},
    segment::Segment,
};
use pyo3::{
    exceptions::PyRuntimeError,
    intern,
    prelude::*,
    types::{PyIterator, PyString, iterator::PySendResult},
};

use crate::item::{As, Item};

/// A handler that is called with one item.
struct Function {
    handler: Py<PyAny>,
    /// From an exception to code, reason, message and traceback.
    describe: Py<PyAny>,
    /// It is a generator function, whose values are partial results.
    yields: bool,
    segment: &'static Segment,
    pool: Py<PyString>,
}

/// Takes what the server has left open for this worker, so that no program that is started from now on inherits it.
#[pyfunction]
pub fn inherit() -> PyResult<()> {
    sdk::inherit().map_err(|error| PyRuntimeError::new_err(error.to_string()))?;
    sdk::set_title();
    Ok(())
}

/// Takes the worker's place in the server that started this process, and handles items by `handler(item)` until the server
/// stops. `describe(exception)` says what to tell the client.
#[pyfunction]
pub fn run(py: Python<'_>, handler: Py<PyAny>, yields: bool, describe: Py<PyAny>) -> PyResult<()> {
    py.detach(|| {
        let mut attached = Attached::from_env()?;
        let segment = attached.segment();
        let pool = Python::attach(|py| PyString::new(py, attached.pool()).unbind());
        attached.run(&mut Function { handler, describe, yields, segment, pool })?;
        Ok(())
    })
    .map_err(|error: Box<dyn std::error::Error + Send + Sync>| PyRuntimeError::new_err(error.to_string()))
}

impl Handler for Function {
    fn handle(&mut self, item: &dispatch::Item<'_>, reply: &mut dispatch::Reply<'_, '_>) -> Result<(), Failure> {
        Python::attach(|py| {
            // SAFETY: `end` is on every way, by `lending` also on that of a panic, before `reply` is used and both end.
            let lent = unsafe { Item::lend(item, reply, self.segment, self.pool.clone_ref(py)) };
            let lent = Py::new(py, lent).map_err(Failure::handler)?;
            let lending = Lending(lent.get(), py);
            let outcome = self.handler.bind(py).call1((&lent,)).map_err(|error| self.failure(py, error));
            // The result may be a view of the payload: it is read before that ends, and gone after.
            let written = match outcome {
                Ok(generator) if self.yields => self.stream(lent.get(), &generator),
                Ok(returned) => lent.get().write(&returned, As::Result, true).map(drop),
                Err(failure) => Err(failure),
            };
            drop(lending);
            written
        })
    }
}

/// Takes back what was lent to a handler, when it is dropped.
struct Lending<'a, 'py>(&'a Item, Python<'py>);

impl Drop for Lending<'_, '_> {
    fn drop(&mut self) {
        self.0.end(self.1);
    }
}

impl Function {
    /// Sends what a generator yields, each value before it is asked for the next; what it returns is the result.
    fn stream(&self, item: &Item, generator: &Bound<'_, PyAny>) -> Result<(), Failure> {
        let py = generator.py();
        let values = generator.cast::<PyIterator>().map_err(Failure::handler)?;
        loop {
            let sent = match values.send(&py.None().into_bound(py)) {
                Ok(PySendResult::Next(part)) => send(item, &part),
                Ok(PySendResult::Return(result)) => return item.write(&result, As::Result, true).map(drop),
                Err(error) => return Err(self.failure(py, error)),
            };
            if let Err(failure) = sent {
                // Nobody reads on: it gets a GeneratorExit where it is.
                if let Err(error) = generator.call_method0(intern!(py, "close")) {
                    error.write_unraisable(py, Some(generator));
                }
                return Err(failure);
            }
        }
    }

    /// What the client is told of an exception.
    fn failure(&self, py: Python<'_>, error: PyErr) -> Failure {
        let described = self.describe.bind(py).call1((error.into_value(py),));
        let described = described.and_then(|described| described.extract::<Described>());
        described.map(failure).unwrap_or_else(Failure::handler)
    }
}

/// Code, reason, message and traceback.
pub type Described = (i32, String, String, String);

/// The failure that is described.
pub fn failure((code, reason, message, traceback): Described) -> Failure {
    Failure::new(Code::from_i32(code), reason, message).with_traceback(traceback)
}

/// Sends a partial result as soon as there is credit.
fn send(item: &Item, part: &Bound<'_, PyAny>) -> Result<(), Failure> {
    let py = part.py();
    let wait = || {
        while let Some(credit) = item.lacks_credit()? {
            py.detach(|| credit.wait())?;
        }
        Ok::<_, Failure>(())
    };
    wait()?;
    item.write(part, As::Part, true)?;
    while !item.send()? {
        wait()?;
    }
    // Of an item whose results come in one nobody else says so.
    item.given_up().map_or(Ok(()), Err)
}
