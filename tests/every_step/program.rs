//! What runs the pool `many`: this very program, which the server takes for a Python interpreter. So there are an app that it looks
//! at and watches, a nursery, and workers that are programs, one with many items in hand at once and one with one; and all of
//! them pass crash points, which those of an installed package do not.
#![allow(unsafe_code)]

#[path = "../../examples/handlers/items.rs"]
mod items;
#[path = "../../examples/handlers/many.rs"]
mod many;

use std::{
    env,
    io::{self, Read as _, Write as _},
    process::Command,
};

use forkring::{
    process,
    sdk::{Attached, Nursery},
};
use nix::{
    sys::wait::waitpid,
    unistd::{ForkResult, fork},
};

/// Names the file that the app is made of.
const APP: &str = "STEPS_APP";
/// The worker that has many items in hand.
const MANY: u16 = 6;

/// Makes this program the server's interpreter, and a file what the app is made of.
pub fn interpret(command: &mut Command, app: &str) {
    command.arg("--python").arg(env::current_exe().expect("a program"));
    command.args(["--preload", "--reload", "--pool", "many:2=app:many"]).env(APP, app);
}

/// Whether the server has started this program for that.
pub fn is_it() -> bool {
    env::args().nth(2).is_some_and(|module| module == "forkring._worker")
}

/// Does what it was started for.
pub fn run() {
    let has = |flag: &str| env::args().any(|argument| argument == flag);
    if has("--check") {
        println!("{}", env::var(APP).expect("a file"));
        return;
    }
    if has("--preload") {
        nurse().expect("a nursery");
    }
    let mut worker = Attached::from_env().expect("a worker");
    let worked = if worker.number() == MANY { many::work(&mut worker) } else { worker.run(&mut items::hold) };
    worked.expect("a worker that waits for items");
}

/// Forks workers for as long as any are wanted, as the package does it. It returns in each of them.
fn nurse() -> Result<(), Box<dyn std::error::Error>> {
    let mut nursery = Nursery::from_env()?;
    nursery.set_title(false);
    nursery.ready()?;
    loop {
        nursery.wait()?;
        let ((mut told, mut tell), (mut word, mut give_word)) = (io::pipe()?, io::pipe()?);
        // SAFETY: there is one thread, so the child may do all that this process may.
        match unsafe { fork() }? {
            ForkResult::Child => {
                // SAFETY: as before.
                if let ForkResult::Parent { child } = unsafe { fork() }? {
                    write!(tell, "{child}")?;
                    process::exit(0);
                }
                drop((told, tell, give_word));
                if word.read(&mut [0])? == 0 {
                    // The nursery is dead, and nobody knows of us.
                    process::exit(0);
                }
                process::set_variables(&nursery.settle_in()?)?;
                nursery.set_title(true);
                nursery.hand_over()?;
                return Ok(());
            }
            ForkResult::Parent { child: middle } => {
                drop((tell, word));
                let mut worker = String::new();
                told.read_to_string(&mut worker)?;
                waitpid(middle, None)?;
                if nursery.born(worker.parse()?)? {
                    give_word.write_all(b"!")?;
                }
            }
        }
    }
}
