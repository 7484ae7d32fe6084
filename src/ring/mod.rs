//! Lock-free rings of one machine word a cell, over memory that the caller provides.
//!
//! Both carry *hints*: the item table is the truth, so a hint that is stale or doubled does no harm. Neither has a
//! reserve step: an element is published by one atomic write, so a process that is killed at any instruction leaves
//! nothing behind that hides an element or blocks a peer.

pub mod lane;
pub mod returns;

pub use lane::{Full, Lane};
pub use returns::{Consumer, Producer};

/// Bits of an item index. A segment has at most 2^20 items.
pub const INDEX_BITS: u32 = 20;
/// Bits of an item's generation.
pub const GENERATION_BITS: u32 = 28;

/// Where an item is and which use of the record is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hint {
    /// Index of the item in the item table, below 2^20.
    pub index: u32,
    /// The item's generation, below 2^28.
    pub generation: u32,
}
