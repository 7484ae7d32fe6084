//! The handlers that come along: `echo`, `echo:SIZE`, `sha256`, `sleep:DURATION`, `exec:COMMAND…`.

mod exec;

use std::{env, path::Path, str::FromStr, thread, time::Duration};

use rustix::fs::{Access, access};
use sha2::{Digest, Sha256};

use crate::{
    config::{ByteSize, parse_duration},
    handler::{Failure, Handler, Item, Reply},
};

/// A handler named on the command line or in a configuration file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Builtin {
    /// The result is the payload.
    Echo,
    /// The same in parts of so many bytes; all but the last are partial results.
    EchoInParts(usize),
    /// The result is the 32 bytes of the payload's SHA-256.
    Sha256,
    /// The result is the payload, after a while: for load tests.
    Sleep(Duration),
    /// A fresh process for each item: payload on stdin, result from stdout.
    Exec(Vec<String>),
}

/// Why there is no such handler.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum BuiltinError {
    #[error(
        "unknown handler `{0}`: there are echo, echo:SIZE, sha256, sleep:DURATION, exec:COMMAND and Python's MODULE:FUNCTION"
    )]
    Unknown(String),
    #[error("`{0}` is no size of a part: write echo:64 or echo:16KiB")]
    Size(String),
    #[error("`{0}` is no duration: write sleep:10ms or sleep:1.5s")]
    Duration(String),
    #[error("exec: names no command: write exec:COMMAND ARGUMENTS, as in `exec:wc -c`")]
    Command,
    #[error("exec: `{0}` has a quote that is not closed")]
    Quote(String),
    #[error("exec: there is no program `{0}` that can be run: look at its name, and whether it is executable")]
    Program(String),
    #[error("`{0}` names no function: write {0}:FUNCTION")]
    Function(String),
}

impl FromStr for Builtin {
    type Err = BuiltinError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            None if text == "echo" => Ok(Builtin::Echo),
            None if text == "sha256" => Ok(Builtin::Sha256),
            Some(("echo", size)) => match size.parse::<ByteSize>().map(ByteSize::bytes) {
                Ok(size @ 1..) => Ok(Builtin::EchoInParts(size as usize)),
                _ => Err(BuiltinError::Size(size.to_owned())),
            },
            Some(("sleep", time)) => {
                parse_duration(time).map(Builtin::Sleep).map_err(|_| BuiltinError::Duration(time.to_owned()))
            }
            Some(("exec", command)) => exec::split(command).map(Builtin::Exec),
            None if text.ends_with(".py") => Err(BuiltinError::Function(text.to_owned())),
            _ => Err(BuiltinError::Unknown(text.to_owned())),
        }
    }
}

impl Builtin {
    /// Whether it can work, as far as that can be known before there is an item.
    pub(crate) fn check(&self) -> Result<(), BuiltinError> {
        match self {
            Builtin::Exec(command) => match command.first() {
                Some(program) if !can_be_run(program) => Err(BuiltinError::Program(program.clone())),
                _ => Ok(()),
            },
            _ => Ok(()),
        }
    }
}

/// Looks where the start of the program will look.
fn can_be_run(program: &str) -> bool {
    let is_program = |path: &Path| path.is_file() && access(path, Access::EXEC_OK).is_ok();
    if program.contains('/') {
        return is_program(Path::new(program));
    }
    let path = env::var_os("PATH").unwrap_or_else(|| "/bin:/usr/bin".into());
    env::split_paths(&path).any(|folder| is_program(&folder.join(program)))
}

impl Handler for Builtin {
    fn handle(&mut self, item: &Item<'_>, reply: &mut Reply<'_, '_>) -> Result<(), Failure> {
        match self {
            Builtin::Echo => reply.write(item.payload())?,
            Builtin::EchoInParts(size) => {
                let (parts, last) = item.payload().split_at(item.payload().len().saturating_sub(1) / *size * *size);
                for part in parts.chunks(*size) {
                    reply.write(part)?;
                    reply.send()?;
                }
                reply.write(last)?;
            }
            Builtin::Sha256 => reply.write(&Sha256::digest(item.payload()))?,
            Builtin::Sleep(time) => {
                // The one handler whose work is to wait.
                thread::sleep(*time);
                reply.write(item.payload())?;
            }
            Builtin::Exec(command) => exec::run(command, item, reply)?,
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_what_the_command_line_says() {
        assert_eq!("echo".parse(), Ok(Builtin::Echo));
        assert_eq!("echo:16KiB".parse(), Ok(Builtin::EchoInParts(16 << 10)));
        for wrong in ["echo:", "echo:0", "echo:x"] {
            assert!(matches!(wrong.parse::<Builtin>(), Err(BuiltinError::Size(_))), "{wrong}");
        }
        assert_eq!("sleep:10ms".parse(), Ok(Builtin::Sleep(Duration::from_millis(10))));
        let exec = |words: &[&str]| Ok(Builtin::Exec(words.iter().map(ToString::to_string).collect()));
        assert_eq!("exec:tr a-z A-Z".parse(), exec(&["tr", "a-z", "A-Z"]));
        assert_eq!("exec:sh -c 'a \"b\" | c' \"d e\"".parse(), exec(&["sh", "-c", "a \"b\" | c", "d e"]));
        assert_eq!("exec:".parse::<Builtin>(), Err(BuiltinError::Command));
        assert!(matches!("exec:a 'b".parse::<Builtin>(), Err(BuiltinError::Quote(_))));
        assert!(matches!("sleep:soon".parse::<Builtin>(), Err(BuiltinError::Duration(_))));
        assert!(matches!("nope".parse::<Builtin>(), Err(BuiltinError::Unknown(_))));
        assert!(matches!("dir/app.py".parse::<Builtin>(), Err(BuiltinError::Function(_))));
    }

    #[test]
    fn a_program_is_looked_up() {
        let check = |line: &str| line.parse::<Builtin>().expect("the test's own handler").check();
        assert_eq!((check("exec:sh -c x"), check("exec:/bin/sh"), check("echo")), (Ok(()), Ok(()), Ok(())));
        let file = tempfile::NamedTempFile::new().expect("a file that is not executable");
        let file = file.path().display().to_string();
        for missing in ["no-such-program", "/no/such", "/dev/null", "/", &file] {
            assert_eq!(check(&format!("exec:{missing} x")), Err(BuiltinError::Program(missing.to_owned())));
        }
    }
}
