//! The worker: items for a handler in Python, its results and exceptions back.

use forkring::{Code, Failure, Handler, dispatch, process, sdk::Attached, segment::Segment};
use pyo3::{exceptions::PyRuntimeError, prelude::*, types::PyString};

use crate::{item::Item, result};

/// A handler that is called with one item.
struct Function {
    handler: Py<PyAny>,
    /// From an exception to code, reason, message and traceback.
    describe: Py<PyAny>,
    segment: &'static Segment,
    pool: Py<PyString>,
}

/// Takes the worker's place in the server that started this process, and handles items by `handler(item)` until the server
/// stops. `describe(exception)` says what to tell the client.
#[pyfunction]
pub fn run(py: Python<'_>, handler: Py<PyAny>, describe: Py<PyAny>) -> PyResult<()> {
    py.detach(|| {
        let mut attached = Attached::from_env()?;
        let segment = attached.segment();
        let pool = Python::attach(|py| PyString::new(py, attached.pool()).unbind());
        attached.run(&mut Function { handler, describe, segment, pool })?;
        Ok(())
    })
    .map_err(|error: Box<dyn std::error::Error + Send + Sync>| PyRuntimeError::new_err(error.to_string()))
}

impl Handler for Function {
    fn handle(&mut self, item: &dispatch::Item<'_>, reply: &mut dispatch::Reply<'_, '_>) -> Result<(), Failure> {
        Python::attach(|py| {
            // SAFETY: `end` below is on every way, before `reply` is used and both end.
            let lent = unsafe { Item::lend(item, reply, self.segment, self.pool.clone_ref(py)) };
            let lent = Py::new(py, lent).map_err(Failure::handler)?;
            let outcome = self.handler.bind(py).call1((&lent,)).map_err(|error| self.failure(py, error));
            let filled = lent.get().filled(py);
            // The result may be a view of the payload: it is read before that ends, and gone after.
            let written = outcome.and_then(|returned| result::write(&returned, filled.as_ref(), reply));
            drop(filled);
            if let Err(error) = lent.get().end(py) {
                // It cannot be told from whom the bytes will be next, and somebody looks at them: another worker does
                // without the past.
                eprintln!("forkring: cannot keep a payload that outlives its handler, so the worker ends: {error}");
                process::die();
            }
            written
        })
    }
}

impl Function {
    /// What the client is told of an exception.
    fn failure(&self, py: Python<'_>, error: PyErr) -> Failure {
        let described = self.describe.bind(py).call1((error.into_value(py),));
        match described.and_then(|described| described.extract::<(i32, String, String, String)>()) {
            Ok((code, reason, message, traceback)) => {
                Failure::new(Code::from_i32(code), reason, message).with_traceback(traceback)
            }
            Err(error) => {
                let kind = error.get_type(py).name().map(|name| name.to_string()).unwrap_or_default();
                let message = format_args!("the handler raised an exception, and describing it raised {kind}");
                Failure::new(Code::Internal, "HANDLER_RAISED", message)
            }
        }
    }
}
