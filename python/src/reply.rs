//! Replies: memory that the result is sent from, lent to the handler for writing.
//!
//! A view that is written to after its item's end reaches no other item: the memory is held until the last reference to
//! the [`Reply`] object goes. What it changes, if anything, is the very result that it was lent for.

use std::ffi::c_int;

use forkring::dispatch::Hold;
use pyo3::{ffi, prelude::*};

use crate::{buffer, family::Owner};

enum Memory {
    /// In the worker's own arena.
    Held { at: *mut u8, _hold: Hold },
    /// Copied in the end: small results travel in the item's record, and some come behind others.
    Own(*mut [u8]),
}

/// Where a handler writes its result in place: writable bytes for whatever takes a buffer.
#[pyclass(frozen, module = "forkring")]
pub struct Reply {
    memory: Memory,
    len: usize,
    owner: Owner,
}

// SAFETY: the memory is this object's own or held for it, and what happens to its bytes is between Python's threads, as
// with a bytearray.
unsafe impl Send for Reply {}
// SAFETY: as above.
unsafe impl Sync for Reply {}

impl Reply {
    /// In the arena.
    pub fn held(bytes: &mut [u8], hold: Hold) -> Self {
        Reply { memory: Memory::Held { at: bytes.as_mut_ptr(), _hold: hold }, len: bytes.len(), owner: Owner::this() }
    }

    /// Of its own.
    pub fn own(len: usize) -> Self {
        Reply { memory: Memory::Own(Box::into_raw(vec![0; len].into_boxed_slice())), len, owner: Owner::this() }
    }

    /// Whether what is in it is in its place.
    pub fn is_in_arena(&self) -> bool {
        matches!(self.memory, Memory::Held { .. })
    }

    /// The bytes of one that is to be copied.
    pub fn own_bytes(&self) -> Option<&[u8]> {
        match self.memory {
            Memory::Held { .. } => None,
            // SAFETY: the box is this object's, and nobody writes to it while the caller has the GIL.
            Memory::Own(bytes) => Some(unsafe { &*bytes }),
        }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    fn place(&self) -> *mut u8 {
        match self.memory {
            Memory::Held { at, .. } => at,
            Memory::Own(bytes) => bytes.cast(),
        }
    }

    /// Where in it this address is.
    pub fn offset_of(&self, address: *const u8, len: usize) -> Option<usize> {
        let offset = address.addr().checked_sub(self.place().addr())?;
        (offset.checked_add(len)? <= self.len).then_some(offset)
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if let Memory::Own(bytes) = self.memory {
            // SAFETY: it came from a box, and views of it have gone before it.
            drop(unsafe { Box::from_raw(bytes) });
        }
    }
}

#[pymethods]
impl Reply {
    /// # Safety
    ///
    /// Called by Python.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let reply = slf.get();
        reply.owner.check("the reply")?;
        // SAFETY: the memory is held by the object, or its own.
        unsafe { buffer::export(slf.as_any(), view, (reply.place(), reply.len), false, flags) }
    }

    /// # Safety
    ///
    /// Called by Python.
    #[allow(clippy::unused_self)]
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        // As in a payload.
    }

    fn __len__(&self) -> usize {
        self.len
    }

    fn __repr__(&self) -> String {
        format!("<forkring.Reply of {} bytes>", self.len)
    }
}
