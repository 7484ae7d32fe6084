//! The nursery: a process that has imported an app and forks its workers. The forks are Python's own.

use forkring::sdk;
use pyo3::{exceptions::PyRuntimeError, prelude::*};

/// What a server that started this process as a nursery wants of it.
#[pyclass(unsendable)]
pub struct Nursery {
    /// None in a worker that has attached.
    nursery: Option<sdk::Nursery>,
}

fn error(error: impl std::fmt::Display) -> PyErr {
    PyRuntimeError::new_err(error.to_string())
}

impl Nursery {
    fn get(&self) -> PyResult<&sdk::Nursery> {
        self.nursery.as_ref().ok_or_else(|| error("this process is a worker"))
    }
}

#[pymethods]
impl Nursery {
    #[new]
    fn new() -> PyResult<Self> {
        let nursery = sdk::Nursery::from_env().map_err(error)?;
        nursery.set_title(false);
        Ok(Nursery { nursery: Some(nursery) })
    }

    /// Says that the app is imported.
    fn ready(&self) -> PyResult<()> {
        Ok(self.get()?.ready()?)
    }

    /// Waits until a worker is wanted.
    fn wait(&mut self) -> PyResult<()> {
        // There is no other thread that the GIL would be given to.
        let nursery = self.nursery.as_mut().ok_or_else(|| error("this process is a worker"))?;
        nursery.wait().map_err(error)
    }

    /// Says that it is there; whether it may begin.
    fn born(&self, pid: u32) -> PyResult<bool> {
        Ok(self.get()?.born(pid)?)
    }

    /// Says why it is not.
    fn stillborn(&self, why: &str) -> PyResult<()> {
        Ok(self.get()?.stillborn(why)?)
    }

    /// In the worker: sets it up, and returns the variables for its environment.
    fn settle_in(&self) -> PyResult<Vec<(String, String)>> {
        let nursery = self.get()?;
        let variables = nursery.settle_in().map_err(error)?;
        nursery.set_title(true);
        Ok(variables)
    }

    /// In the worker: leaves the worker's place in the server for whatever takes it.
    fn hand_over(&mut self) -> PyResult<()> {
        let nursery = self.nursery.take().ok_or_else(|| error("this process is a worker"))?;
        nursery.hand_over().map_err(error)
    }
}
