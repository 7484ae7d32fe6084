//! The lock-free code that ships, file by file, on its own.
//!
//! Without features it is compiled with the processor's atomics and its unit tests run under Miri. With the feature
//! `loom` the very same files are compiled with [`sync`] in the place of the server's: atomics of a model checker that
//! can also end a thread after any access and take orderings and fences away.

#[cfg(feature = "loom")]
pub mod check;
mod crash_point;
#[path = "../../../src/ring/mod.rs"]
pub mod ring;
#[path = "../../../src/doorbell/sleepers.rs"]
pub mod sleepers;
#[cfg(feature = "loom")]
pub mod sync;
#[cfg(not(feature = "loom"))]
#[path = "../../../src/sync.rs"]
mod sync;
#[cfg(feature = "loom")]
#[path = "../../../src/dispatch/word.rs"]
pub mod word;
