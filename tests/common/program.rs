//! The commands of `forkring` as programs that are run to their end.

use std::{
    fs::File,
    io::Write as _,
    process::{Command, Stdio},
};

use super::{files::Files, server::forkring, until};

/// What a program left.
#[derive(Debug)]
pub struct Outcome {
    /// None if a signal ended it.
    pub code: Option<i32>,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

/// `forkring` with these arguments and this on its stdin.
pub async fn run(args: &[&str], stdin: &[u8]) -> Outcome {
    let mut command = forkring();
    command.args(args);
    finish(command, stdin).await
}

/// A command behind the words of another, which runs it.
pub fn behind(words: &[&str], command: &Command) -> Command {
    let mut wrapped = Command::new(words[0]);
    wrapped.args(&words[1..]).arg(command.get_program()).args(command.get_args());
    for (key, value) in command.get_envs() {
        match value {
            Some(value) => wrapped.env(key, value),
            None => wrapped.env_remove(key),
        };
    }
    wrapped
}

/// Runs a command to its end. It is killed if that does not come.
pub async fn finish(mut command: Command, stdin: &[u8]) -> Outcome {
    let files = Files::new();
    // Files, because nobody has to read from them meanwhile.
    File::create(files.path("stdin")).and_then(|mut file| file.write_all(stdin)).expect("a file");
    command.stdin(File::open(files.path("stdin")).expect("a file"));
    command.stdout(File::create(files.path("stdout")).expect("a file"));
    command.stderr(File::create(files.path("stderr")).expect("a file"));
    let mut child = Killed(command.spawn().expect("the program"));
    let code = until(&format!("the end of {command:?}"), || child.0.try_wait().expect("our child")).await.code();
    let stderr = String::from_utf8(std::fs::read(files.path("stderr")).expect("a file")).expect("text");
    Outcome { code, stdout: std::fs::read(files.path("stdout")).expect("a file"), stderr }
}

/// A program that is not left behind.
#[derive(Debug)]
pub struct Killed(pub std::process::Child);

impl Killed {
    pub fn start(command: &mut Command) -> Self {
        Killed(command.stdin(Stdio::null()).spawn().expect("the program"))
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        // Both fail if it has been waited for, which is just as well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Outcome {
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).expect("text")
    }

    /// Each line of stdout as JSON.
    pub fn json(&self) -> Vec<serde_json::Value> {
        self.text().lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }

    /// It ended with this code and one line on stderr that says this.
    #[track_caller]
    pub fn assert_failed(&self, code: i32, says: &str) {
        assert_eq!(self.code, Some(code), "{}", self.stderr);
        assert_eq!(self.stderr.lines().count(), 1, "{}", self.stderr);
        assert!(self.stderr.starts_with("forkring: ") && self.stderr.contains(says), "{} / {says}", self.stderr);
    }

    /// It ended with 0 and had nothing to say on stderr.
    #[track_caller]
    pub fn assert_succeeded(&self) {
        assert_eq!((self.code, self.stderr.as_str()), (Some(0), ""));
    }
}
