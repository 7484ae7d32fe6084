//! Worker programs: what a pool runs instead of a closure. Each worker is forked and then replaced by the program, which
//! attaches through [`sdk`](crate::sdk) or speaks the same protocol in its own way.

use std::{
    ffi::{OsStr, OsString},
    fmt,
    fs::File,
    io::{self, Read as _, Seek as _},
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    sync::Arc,
};

use rustix::fs::{MemfdFlags, memfd_create};

use crate::{
    contract::{self, Contract, nursery::Nursery},
    process::{self, Child},
};

/// What runs a handler in Python.
const PYTHON_WORKER: &str = "forkring._worker";
/// How its check ends when it has said what is wrong.
const REFUSED: i32 = 2;

/// A command that becomes a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    program: OsString,
    arguments: Vec<OsString>,
    check: Option<Vec<OsString>>,
    /// Whether that tells which files it is made of, line by line on stdout.
    tells_files: bool,
    /// What it is started with to be a nursery: it loads all that workers need and forks them.
    nursery: Option<Vec<OsString>>,
    failures: Failures,
}

/// Memory that the workers of a pool share over their lives: a worker that cannot start notes there why, so that the next one
/// need not say the same at length. Only the workers read and write it, and there may be none.
#[derive(Clone, Debug, Default)]
struct Failures(Option<Arc<OwnedFd>>);

/// The environment variable that names its descriptor.
pub(crate) const FAILURES: &str = "FORKRING_WORKER_FAILURES";

impl Failures {
    fn new() -> Self {
        // Without it each worker says all.
        Failures(memfd_create("forkring-failures", MemfdFlags::CLOEXEC).ok().map(Arc::new))
    }
}

/// Two programs are equal if they run the same.
impl PartialEq for Failures {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Failures {}

impl Program {
    /// A program, looked up in PATH if it is a bare name.
    pub fn new(program: impl Into<OsString>) -> Self {
        Program {
            program: program.into(),
            arguments: Vec::new(),
            check: None,
            tells_files: false,
            nursery: None,
            failures: Failures::default(),
        }
    }

    /// What it is started with.
    pub fn args(mut self, arguments: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        self.arguments = arguments.into_iter().map(Into::into).collect();
        self
    }

    /// What it is started with once before the server takes its port: it should say on stderr what is wrong with it and
    /// exit, with 0 if nothing is.
    pub fn checked_with(mut self, arguments: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        self.check = Some(arguments.into_iter().map(Into::into).collect());
        self
    }

    /// A handler in Python, `module:attribute` or `file.py:attribute`; none if the text is no such thing. With `preload`
    /// one process imports it, and forks the workers; with `reload` the server is to know which files it is imported from.
    pub fn python(interpreter: &Path, handler: &str, preload: bool, reload: bool) -> Option<Self> {
        is_python(handler).then(|| {
            let arguments = |more: &[&'static str]| {
                let all = ["-m", PYTHON_WORKER].iter().chain(more).map(OsString::from);
                all.chain([handler.into()]).collect::<Vec<_>>()
            };
            let mut check = vec!["--check"];
            check.extend(preload.then_some("--preload"));
            check.extend(reload.then_some("--files"));
            let nursery = preload.then(|| arguments(&["--preload"]));
            let program = Program::new(interpreter).args(arguments(&[])).checked_with(arguments(&check));
            Program { nursery, tells_files: reload, failures: Failures::new(), ..program }
        })
    }

    /// The program's name, for messages.
    pub(crate) fn name(&self) -> &OsStr {
        &self.program
    }

    /// Starts the check, if there is one, with these variables.
    pub(crate) fn start_check(&self, variables: Vec<(String, String)>) -> io::Result<Option<Check>> {
        let Some(arguments) = &self.check else { return Ok(None) };
        let mut command = Command::new(&self.program);
        process::dies_with_us(command.args(arguments).envs(variables).stdin(Stdio::null()));
        if self.is_python() {
            process::holds_interrupts(&mut command);
        }
        let files = match self.tells_files {
            true => Some(File::from(memfd_create("forkring-files", MemfdFlags::CLOEXEC)?)),
            false => None,
        };
        match &files {
            Some(files) => command.stdout(files.try_clone()?),
            // What it prints must not get between what the server prints.
            None => command.stdout(io::stderr()),
        };
        let child = command.spawn()?;
        let pid = child.id();
        let pidfd = Child::adopted(pid)?.pidfd;
        Ok(Some(Check { child: Some(child), pid, pidfd, files }))
    }

    /// Runs the check, if there is one, with these variables. How it ended, and what files it told of.
    pub(crate) fn check(&self, variables: Vec<(String, String)>) -> io::Result<Option<(ExitStatus, Vec<PathBuf>)>> {
        self.start_check(variables)?.map(Check::finish).transpose()
    }

    /// Whether it is a handler in Python, and the interpreter has not what runs it: another reason for a check to fail.
    pub(crate) fn lacks_package(&self) -> bool {
        let import = || {
            let mut python = Command::new(&self.program);
            python.args(["-c", &format!("import {PYTHON_WORKER}")]);
            python.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()
        };
        self.is_python() && import().is_ok_and(|status| !status.success())
    }

    /// Whether a check that ended so was ended by what it imported, which was not to say why.
    pub(crate) fn was_cut_short(&self, status: ExitStatus) -> bool {
        self.is_python() && status.code() != Some(REFUSED)
    }

    fn is_python(&self) -> bool {
        self.arguments.iter().any(|argument| argument == PYTHON_WORKER)
    }

    /// Closes the memory of its failures to start: in a forked child that does not become this program.
    pub(crate) fn close_failures(&mut self) {
        self.failures = Failures::default();
    }

    /// Becomes the program, in a child that has nothing to lose. Returns only if that fails.
    pub(crate) fn exec(&self, contract: &Contract, inherited: &[&dyn AsFd]) -> io::Error {
        self.replace_us(&self.arguments, contract::VARIABLE, contract.to_text(), inherited)
    }

    /// Whether its workers come from a nursery.
    pub(crate) fn has_nursery(&self) -> bool {
        self.nursery.is_some()
    }

    /// Becomes the nursery, in the same way.
    pub(crate) fn exec_nursery(&self, nursery: &Nursery, inherited: &[&dyn AsFd]) -> io::Error {
        let arguments = self.nursery.as_ref().unwrap_or(&self.arguments);
        self.replace_us(arguments, contract::nursery::VARIABLE, nursery.to_text(), inherited)
    }

    fn replace_us(
        &self,
        arguments: &[OsString],
        variable: &str,
        text: Result<String, serde_json::Error>,
        inherited: &[&dyn AsFd],
    ) -> io::Error {
        let text = match text {
            Ok(text) => text,
            Err(error) => return error.into(),
        };
        let mut command = Command::new(&self.program);
        command.args(arguments).env(variable, text);
        let mut inherited = inherited.to_vec();
        if let Some(failures) = &self.failures.0 {
            command.env(FAILURES, failures.as_raw_fd().to_string());
            inherited.push(failures);
        }
        process::exec(&mut command, &inherited)
    }
}

/// A check that was started. It is ended if nobody waits for it.
#[derive(Debug)]
pub(crate) struct Check {
    /// `None` in a forked child, whose process it is not.
    child: Option<std::process::Child>,
    pid: u32,
    /// Readable when it is over.
    pidfd: OwnedFd,
    files: Option<File>,
}

impl Check {
    /// Its process.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Closes its descriptors and lets the process go on: in a forked child, whose process it is not.
    pub fn leave(mut self) {
        self.child = None;
    }

    /// Waits for its end. How it ended, and the files that it told of.
    pub fn finish(mut self) -> io::Result<(ExitStatus, Vec<PathBuf>)> {
        let child = self.child.as_mut().ok_or(io::ErrorKind::NotFound)?;
        let status = child.wait()?;
        let mut text = Vec::new();
        if let Some(files) = &mut self.files {
            files.rewind()?;
            files.read_to_end(&mut text)?;
        }
        let lines = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        Ok((status, lines.map(|line| OsStr::from_bytes(line).into()).collect()))
    }
}

impl AsFd for Check {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for Check {
    fn drop(&mut self) {
        let Some(child) = &mut self.child else { return };
        // Both fail if it was waited for, which is just as well.
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// The words of its command line that say what it is: the last one names a Python handler.
impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.arguments.last().unwrap_or(&self.program).display())
    }
}

/// Whether a handler's text names one in Python.
fn is_python(text: &str) -> bool {
    let is_path = |text: &str| text.split('.').all(is_identifier);
    text.rsplit_once(':').is_some_and(|(module, attribute)| {
        is_path(attribute) && (is_path(module) || module.len() > 3 && module.ends_with(".py"))
    })
}

/// As Python has it, nearly: Python itself will know.
fn is_identifier(text: &str) -> bool {
    let mut chars = text.chars();
    chars.next().is_some_and(|first| first == '_' || first.is_alphabetic())
        && chars.all(|c| c == '_' || c.is_alphanumeric())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn python_handlers_are_told_from_others() {
        for text in ["app:handle", "my.pack_age:Model", "a1:b.c", "ärger:über", "dir/app.py:handle", "/a b/c:d.py:x"]
        {
            assert!(is_python(text), "{text}");
        }
        for text in
            ["app", "app:", ":handle", "app:handle()", "app.:x", "1app:x", "app:1", "a b:c", ".py:x", "dir/app:x"]
        {
            assert!(!is_python(text), "{text}");
        }
    }

    #[test]
    fn a_check_is_run_and_its_status_told() {
        let code = |script: &str| {
            let program = Program::new("sh").checked_with(["-c", script]);
            program.check(vec![("CODE".into(), "7".into())]).expect("a shell").and_then(|(status, _)| status.code())
        };
        assert_eq!(code("exit 0"), Some(0));
        assert_eq!(code("exit 3"), Some(3));
        assert_eq!(code("exit $CODE"), Some(7));
        assert!(Program::new("sh").check(Vec::new()).expect("nothing to run").is_none());
        let telling =
            Program { tells_files: true, ..Program::new("sh").checked_with(["-c", "echo /a; echo; echo /b c"]) };
        let (status, files) = telling.check(Vec::new()).expect("a shell").expect("a check");
        assert!(status.success() && files == [Path::new("/a"), Path::new("/b c")], "{files:?}");
        assert!(Program::new("/no/such").checked_with(["x"]).check(Vec::new()).is_err());
    }
}
