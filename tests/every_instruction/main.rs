//! Kill at every instruction: a worker is single-stepped from take to complete and killed after the n-th instruction,
//! for every n; and so is a supervisor in its sweep. After each death another sweep and another worker complete what
//! was offered, exactly once, and an audit of the segment finds nothing left.
//!
//! The role is single-stepped once to learn its instructions; after that each n is run to by a breakpoint, since to step
//! there each time would take steps by the square of their number. By default a run takes one n in so many, from
//! another start each time; `FORKRING_TEST_INSTRUCTIONS=all` takes every one.
//!
//! It has a `main` of its own, because only a process with one thread may fork.
#[cfg(target_arch = "x86_64")]
#[path = "../common/mod.rs"]
mod common;
#[cfg(target_arch = "x86_64")]
mod kill;
#[cfg(target_arch = "x86_64")]
mod rig;
#[cfg(target_arch = "x86_64")]
mod stepped;

fn main() {
    // A test runner may only ask for names.
    if std::env::args().any(|argument| argument == "--list") {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    kill::every_one();
    #[cfg(not(target_arch = "x86_64"))]
    println!("SKIPPED: instructions are stepped on x86-64 only");
}
