//! Arguments of handlers' calls: an error names the argument, the value and its type, and what is allowed.

use pyo3::{
    exceptions::{PyTypeError, PyValueError},
    intern,
    prelude::*,
    types::PyBool,
};

/// Returns a value as an error shows it: `7.5, of type float`.
pub fn typed(value: &Bound<'_, PyAny>) -> String {
    let shown = value.py().import(intern!(value.py(), "forkring._arguments"));
    let shown = shown.and_then(|module| module.call_method1(intern!(value.py(), "typed"), (value,)));
    // It fails only if there is no memory, and then there is another error soon.
    shown.map(|text| text.to_string()).unwrap_or_default()
}

/// Returns a number of bytes.
pub fn size(name: &str, value: &Bound<'_, PyAny>) -> PyResult<usize> {
    let refuse = || format!("{name} is {}: it must be a number of bytes, an integer of 0 or more", typed(value));
    if value.is_instance_of::<PyBool>() {
        return Err(PyTypeError::new_err(refuse()));
    }
    let operator = value.py().import(intern!(value.py(), "operator"))?;
    let Ok(number) = operator.call_method1(intern!(value.py(), "index"), (value,)) else {
        return Err(PyTypeError::new_err(refuse()));
    };
    if number.lt(0)? {
        return Err(PyValueError::new_err(refuse()));
    }
    // A larger number is too large for any memory, as the caller says.
    Ok(number.extract().unwrap_or(usize::MAX))
}
