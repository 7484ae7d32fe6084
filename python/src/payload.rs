//! Payloads: what a client sent, read in place.
//!
//! # What it promises
//!
//! A payload in the segment is not copied, and a view of it never shows another item's bytes, however long it is kept.
//!
//! # Why that holds
//!
//! Who has a pointer to the bytes has a reference to the [`Payload`] object: views of the buffer protocol do, and so do
//! libraries that only keep the object that they had the pointer from. So if at the end of its item somebody else has a
//! reference, the bytes are pinned before the item is completed, until the object goes: the pages under them become private
//! copies at the same address, see `forkring::segment::Pin`. Small payloads are copies from the start.

use std::{
    ffi::c_int,
    io,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use forkring::segment::{INLINE, Pin, Segment};
use pyo3::{
    exceptions::{PyIndexError, PyRuntimeWarning, PyTypeError},
    ffi,
    prelude::*,
    types::{PyBytes, PyMemoryView},
};

use crate::{argument, buffer, family::Owner};

/// How many payloads outlived their handlers.
static LATE: AtomicU64 = AtomicU64::new(0);

enum Bytes {
    Copy(Box<[u8]>),
    /// In the segment.
    Lent(&'static [u8]),
}

/// What a client sent: read-only bytes for whatever takes a buffer, such as `memoryview`, `bytes`, `hashlib` and NumPy.
#[pyclass(frozen, module = "forkring")]
pub struct Payload {
    /// In other processes it is not looked at, for a copy, too: what is an error is so whatever its size.
    bytes: Bytes,
    owner: Owner,
    pin: OnceLock<Pin<'static>>,
}

impl Payload {
    /// Of an item that is being handled.
    ///
    /// # Safety
    ///
    /// [`Payload::end`] is called before the item is completed.
    pub unsafe fn of(bytes: &[u8], segment: &'static Segment) -> Self {
        let bytes = if segment.can_pin(bytes) {
            // SAFETY: the segment stays mapped, and the bytes stay what they are until the item is completed; from
            // `end` on they are pinned as long as this object lives, or nobody else has it.
            Bytes::Lent(unsafe { std::slice::from_raw_parts(bytes.as_ptr(), bytes.len()) })
        } else {
            Bytes::Copy(bytes.into())
        };
        Payload { bytes, owner: Owner::this(), pin: OnceLock::new() }
    }

    fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Copy(bytes) => bytes,
            Bytes::Lent(bytes) => bytes,
        }
    }

    /// The same for whoever asks, who may be in a child.
    fn own_bytes(&self) -> PyResult<&[u8]> {
        self.owner.check("the payload")?;
        Ok(self.bytes())
    }

    /// The item is about to be completed, and this is the last reference that is not the handler's. Whether somebody else
    /// keeps it.
    pub fn end(this: Py<Self>, py: Python<'_>, segment: &'static Segment) -> io::Result<()> {
        // SAFETY: the object lives. Read with the GIL, so that nobody counts meanwhile.
        let references = unsafe { ffi::Py_REFCNT(this.as_ptr()) };
        let payload = this.get();
        if references == 1 {
            return Ok(());
        }
        if let Bytes::Lent(bytes) = payload.bytes {
            let _ = payload.pin.set(segment.pin(bytes)?);
        }
        // Small ones are copies anyway, and so are those whose memory shares a page with one that is kept.
        if payload.bytes().len() > INLINE && LATE.fetch_add(1, Relaxed) == 0 {
            warn(py);
        }
        Ok(())
    }
}

fn warn(py: Python<'_>) {
    let message = c"an item's payload was kept after its handler had returned, and was copied for that; to keep one, \
        keep bytes(item.payload)";
    let category = py.get_type::<PyRuntimeWarning>();
    if let Err(error) = PyErr::warn(py, &category, message, 0) {
        error.write_unraisable(py, None);
    }
}

/// How many payloads of this worker were kept after their handlers had returned.
#[pyfunction]
pub fn late_views() -> u64 {
    LATE.load(Relaxed)
}

#[pymethods]
impl Payload {
    /// # Safety
    ///
    /// Called by Python.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let bytes = slf.get().own_bytes()?;
        // SAFETY: a copy lives as long as the object and does not move with it; for bytes in the segment see the module.
        unsafe { buffer::export(slf.as_any(), view, (bytes.as_ptr().cast_mut(), bytes.len()), true, flags) }
    }

    /// # Safety
    ///
    /// Called by Python.
    #[allow(clippy::unused_self)]
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        // NumPy asks whether there is this method: if there is, it keeps the view and not only the object.
    }

    fn __len__(&self) -> usize {
        self.bytes().len()
    }

    fn __bytes__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, self.own_bytes()?))
    }

    fn __getitem__<'py>(slf: &Bound<'py, Self>, index: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let view = PyMemoryView::from(slf)?;
        view.get_item(index).map_err(|error| {
            let (py, len, index) = (slf.py(), slf.get().bytes().len(), argument::typed(index));
            if error.is_instance_of::<PyIndexError>(py) {
                PyIndexError::new_err(format!("the index is {index}: the payload is not that long, it has {len} bytes"))
            } else if error.is_instance_of::<PyTypeError>(py) {
                PyTypeError::new_err(format!(
                    "the index is {index}: a payload is indexed by an integer or a slice of integers"
                ))
            } else {
                error
            }
        })
    }

    fn __eq__(&self, py: Python<'_>, other: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        let Ok(view) = buffer::View::of(other) else { return Ok(py.NotImplemented()) };
        let mut bytes = vec![0; view.len()];
        view.copy_to(py, &mut bytes)?;
        Ok((bytes == self.own_bytes()?).into_pyobject(py)?.to_owned().into_any().unbind())
    }

    fn __repr__(&self) -> String {
        format!("<forkring.Payload of {} bytes>", self.bytes().len())
    }
}
