//! Models of the lock-free code, each with one beside it that must fail.

mod delivery;
mod doorbell;
mod lane;
mod mutants;
mod returns;
mod sweep;
mod word;
mod world;
