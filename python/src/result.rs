//! What a handler returned or yielded, as bytes of its item's result.

use std::borrow::Cow;

use forkring::{Code, Failure, dispatch};
use pyo3::{
    prelude::*,
    types::{PyBytes, PyString},
};

use crate::{buffer::View, reply::Reply};

/// Where the bytes are.
pub enum Source<'a> {
    Bytes(Cow<'a, [u8]>),
    /// A part of what was filled in place, which is in the result's own block.
    Filled {
        offset: usize,
        len: usize,
    },
    View(View),
}

impl<'a> Source<'a> {
    /// `filled` is what the handler asked for to write its result to.
    pub fn of(returned: &'a Bound<'_, PyAny>, filled: Option<&'a Bound<'_, Reply>>) -> Result<Self, Failure> {
        if let Some(filled) = filled
            && (returned.is_none() || returned.is(filled))
        {
            return Ok(Source::part(filled.get(), 0, filled.get().len()));
        }
        if returned.is_none() {
            return Ok(Source::Bytes(Cow::default()));
        }
        if let Ok(bytes) = returned.cast::<PyBytes>() {
            return Ok(Source::Bytes(bytes.as_bytes().into()));
        }
        if let Ok(text) = returned.cast::<PyString>() {
            let text = text.to_cow().map_err(|error| bad(returned.py(), &error))?;
            return Ok(Source::Bytes(match text {
                Cow::Borrowed(text) => text.as_bytes().into(),
                Cow::Owned(text) => text.into_bytes().into(),
            }));
        }
        let Ok(view) = View::of(returned) else {
            let kind = returned.get_type().name().map(|name| name.to_string()).unwrap_or_default();
            // What a handler is goes by how it is written, and a decorator hides that.
            let advice = match kind.as_str() {
                "coroutine" => "a decorator of an `async def` must be an `async def`, too",
                "generator" => "a decorator of a generator function must be a generator function, too",
                "async_generator" => "a decorator of an async generator must be an async generator, too",
                _ => "return bytes, str, None, a NumPy array or anything else with a buffer",
            };
            return Err(unsuitable(format_args!("the handler returned `{kind}`: {advice}")));
        };
        if view.has_objects() {
            return Err(unsuitable(format_args!(
                "the handler returned an array of Python objects: give it a number type"
            )));
        }
        if let Some(filled) = filled
            && let Some(address) = view.contiguous()
            && let Some(offset) = filled.get().offset_of(address, view.len())
        {
            return Ok(Source::part(filled.get(), offset, view.len()));
        }
        Ok(Source::View(view))
    }

    fn part(filled: &'a Reply, offset: usize, len: usize) -> Self {
        match filled.own_bytes() {
            Some(bytes) => Source::Bytes(bytes.get(offset..offset + len).unwrap_or_default().into()),
            None => Source::Filled { offset, len },
        }
    }

    pub fn len(&self) -> usize {
        match self {
            Source::Bytes(bytes) => bytes.len(),
            Source::Filled { len, .. } => *len,
            Source::View(view) => view.len(),
        }
    }

    /// Writes them behind the first `start` bytes of what there is of the result.
    pub fn write(&self, py: Python<'_>, start: usize, reply: &mut dispatch::Reply<'_, '_>) -> Result<(), Failure> {
        match self {
            Source::Bytes(bytes) => Ok(reply.write(bytes)?),
            // In its block, which it has had since it was lent.
            Source::Filled { offset, len } => {
                reply.buffer(offset + len)?.copy_within(offset.., 0);
                reply.buffer(*len)?;
                Ok(())
            }
            Source::View(view) if start == 0 => {
                view.copy_to(py, reply.buffer(view.len())?).map_err(|error| bad(py, &error))
            }
            // By a copy: `write` takes more than it needs, so that many small ones copy little.
            Source::View(view) => {
                let mut bytes = vec![0; view.len()];
                view.copy_to(py, &mut bytes).map_err(|error| bad(py, &error))?;
                Ok(reply.write(&bytes)?)
            }
        }
    }
}

fn unsuitable(message: std::fmt::Arguments<'_>) -> Failure {
    Failure::new(Code::Internal, "BAD_RESULT", message)
}

fn bad(py: Python<'_>, error: &PyErr) -> Failure {
    unsuitable(format_args!("the handler's result cannot be read: {}", error.value(py)))
}
