//! Models of the lock-free code, each with one beside it that must fail.

mod doorbell;
mod lane;
mod mutants;
mod returns;
mod word;
mod world;
