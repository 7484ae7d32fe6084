//! What handlers have in common: they tell a test what they do, and wait until it lets them go on.

use std::{
    fs::OpenOptions,
    io::{self, Write as _},
    path::PathBuf,
    thread,
    time::Duration,
};

use forkring::{Code, Failure, Item, Reply};

/// Works until there is a file of the name that the metadata gives, whoever waits, and echoes.
pub fn hold(item: &Item<'_>, reply: &mut Reply<'_, '_>) -> Result<(), Failure> {
    note(item, "journal", &format!("{} began in {}", item.id(), std::process::id()))?;
    wait(item);
    reply.write(item.payload())?;
    Ok(())
}

/// Waits for the file that the item's metadata names, if any.
pub fn wait(item: &Item<'_>) {
    if let Some(until) = item.metadata("until") {
        let until = PathBuf::from(until);
        while !until.exists() {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Appends a line to the file that the item's metadata names, if any. One write, so that lines do not mix.
pub fn note(item: &Item<'_>, key: &str, line: &str) -> io::Result<()> {
    let Some(path) = item.metadata(key) else { return Ok(()) };
    OpenOptions::new().create(true).append(true).open(path)?.write_all(format!("{line}\n").as_bytes())
}

/// The payload as a number.
pub fn number(item: &Item<'_>) -> Result<usize, Failure> {
    let wrong = |error| Failure::new(Code::InvalidArgument, "NOT_A_NUMBER", error);
    text(item.payload())?.trim().parse().map_err(wrong)
}

/// Bytes as text.
pub fn text(bytes: &[u8]) -> Result<&str, Failure> {
    std::str::from_utf8(bytes).map_err(|error| Failure::new(Code::InvalidArgument, "NOT_TEXT", error))
}
