//! What a handler returned, as the item's result.

use forkring::{Code, Failure, dispatch};
use pyo3::{
    prelude::*,
    types::{PyBytes, PyString},
};

use crate::{buffer::View, reply::Reply};

/// Writes it; `filled` is what the handler asked for to write its result to.
pub fn write(
    returned: &Bound<'_, PyAny>,
    filled: Option<&Py<Reply>>,
    reply: &mut dispatch::Reply<'_, '_>,
) -> Result<(), Failure> {
    let py = returned.py();
    if let Some(filled) = filled
        && (returned.is_none() || returned.is(filled))
    {
        return fill(filled.get(), 0, filled.get().len(), reply);
    }
    if returned.is_none() {
        return Ok(());
    }
    if let Ok(bytes) = returned.cast::<PyBytes>() {
        return copy(bytes.as_bytes(), reply);
    }
    if let Ok(text) = returned.cast::<PyString>() {
        let text = text.to_cow().map_err(|error| bad(py, &error))?;
        return copy(text.as_bytes(), reply);
    }
    let Ok(view) = View::of(returned) else {
        let kind = returned.get_type().name().map(|name| name.to_string()).unwrap_or_default();
        return Err(unsuitable(format_args!(
            "the handler returned `{kind}`: return bytes, str, None, a NumPy array or anything else with a buffer"
        )));
    };
    if view.has_objects() {
        return Err(unsuitable(format_args!("the handler returned an array of Python objects: give it a number type")));
    }
    if let Some(filled) = filled
        && let Some(address) = view.contiguous()
        && let Some(offset) = filled.get().offset_of(address, view.len())
    {
        return fill(filled.get(), offset, view.len(), reply);
    }
    reply.clear();
    view.copy_to(py, reply.buffer(view.len())?).map_err(|error| bad(py, &error))
}

fn copy(bytes: &[u8], reply: &mut dispatch::Reply<'_, '_>) -> Result<(), Failure> {
    reply.clear();
    Ok(reply.write(bytes)?)
}

/// The result is this part of what was filled in place.
fn fill(filled: &Reply, offset: usize, len: usize, reply: &mut dispatch::Reply<'_, '_>) -> Result<(), Failure> {
    match filled.small_bytes() {
        Some(bytes) => copy(bytes.get(offset..offset + len).unwrap_or_default(), reply),
        None => {
            // In its block, which it has had since it was lent.
            reply.buffer(offset + len)?.copy_within(offset.., 0);
            reply.buffer(len)?;
            Ok(())
        }
    }
}

fn unsuitable(message: std::fmt::Arguments<'_>) -> Failure {
    Failure::new(Code::Internal, "BAD_RESULT", message)
}

fn bad(py: Python<'_>, error: &PyErr) -> Failure {
    unsuitable(format_args!("the handler's result cannot be read: {}", error.value(py)))
}
