//! The buffer protocol, both ways.

use std::ffi::c_int;

use pyo3::{exceptions::PyBufferError, ffi, prelude::*};

/// Exports bytes.
///
/// # Safety
///
/// `view` is what Python gave to `__getbuffer__`. The bytes stay, and may be written unless `readonly`, for as long as
/// `owner` lives.
pub unsafe fn export(
    owner: &Bound<'_, PyAny>,
    view: *mut ffi::Py_buffer,
    bytes: (*mut u8, usize),
    readonly: bool,
    flags: c_int,
) -> PyResult<()> {
    if view.is_null() {
        return Err(PyBufferError::new_err("there is no view to fill"));
    }
    let len = isize::try_from(bytes.1)?;
    // SAFETY: as the caller promises; the view takes a reference to the owner, so it lives as long as the view.
    let filled = unsafe { ffi::PyBuffer_FillInfo(view, owner.as_ptr(), bytes.0.cast(), len, readonly.into(), flags) };
    if filled < 0 { Err(PyErr::fetch(owner.py())) } else { Ok(()) }
}

/// A view of somebody else's bytes, of whatever shape.
pub struct View {
    /// In a box, for views point into themselves.
    raw: Box<ffi::Py_buffer>,
}

impl View {
    /// An error if the object has no buffer.
    pub fn of(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let mut raw = Box::new(ffi::Py_buffer::new());
        // SAFETY: the object lives, and the view is ours.
        let got = unsafe { ffi::PyObject_GetBuffer(object.as_ptr(), &raw mut *raw, ffi::PyBUF_FULL_RO) };
        if got < 0 { Err(PyErr::fetch(object.py())) } else { Ok(View { raw }) }
    }

    /// How many bytes its elements have.
    pub fn len(&self) -> usize {
        usize::try_from(self.raw.len).unwrap_or(0)
    }

    /// Whether its elements are references to Python's objects, which mean nothing elsewhere.
    pub fn has_objects(&self) -> bool {
        if self.raw.format.is_null() {
            return false;
        }
        // SAFETY: a format is a C string that lives as long as the view.
        unsafe { std::ffi::CStr::from_ptr(self.raw.format) }.to_bytes().contains(&b'O')
    }

    /// Where the bytes are, if they are in one piece.
    pub fn contiguous(&self) -> Option<*const u8> {
        // SAFETY: the view is filled.
        let is = unsafe { ffi::PyBuffer_IsContiguous(&raw const *self.raw, b'C' as _) };
        (is == 1).then_some(self.raw.buf.cast_const().cast())
    }

    /// Writes the elements' bytes, row by row, to as many bytes.
    pub fn copy_to(&self, py: Python<'_>, to: &mut [u8]) -> PyResult<()> {
        if to.len() != self.len() {
            return Err(PyBufferError::new_err("a buffer changed its length"));
        }
        // SAFETY: there is room for as many bytes as the view has, as just checked.
        let copied = unsafe {
            ffi::PyBuffer_ToContiguous(to.as_mut_ptr().cast(), &raw const *self.raw, self.raw.len, b'C' as _)
        };
        if copied < 0 { Err(PyErr::fetch(py)) } else { Ok(()) }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: the view was filled by `of` and is released once; views are only made and dropped with the GIL.
        unsafe { ffi::PyBuffer_Release(&raw mut *self.raw) }
    }
}
