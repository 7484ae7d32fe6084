//! Items from files and from stdin.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail};

use crate::{
    client::MAX_MESSAGE,
    config::{parse_duration, whole_number},
    proto::v1::WorkItem,
    segment::PRIORITIES,
};

/// What the items of a command have in common.
#[derive(Debug, clap::Args)]
pub struct ItemArgs {
    /// The pool that is to handle the items; '' when the server has one
    pool: String,

    /// Each file is an item; `-` is stdin
    #[arg(value_name = "FILE", default_value = "-")]
    pub files: Vec<PathBuf>,

    /// How long an item may take, from its arrival
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub timeout: Option<Duration>,

    /// What the handler can look up beside the payload; repeatable
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_metadata)]
    metadata: Vec<(String, String)>,

    /// 0 to 3: a higher one is taken first
    #[arg(long, default_value_t = 0, value_parser = whole_number(0..=PRIORITIES - 1))]
    priority: u32,
}

impl ItemArgs {
    /// An item with these options.
    pub fn item(&self, id: u64, payload: Vec<u8>) -> WorkItem {
        let mut item = WorkItem::new(self.pool.as_str(), payload).with_id(id).with_priority(self.priority);
        item.metadata.extend(self.metadata.iter().cloned());
        match self.timeout {
            Some(timeout) => item.with_timeout(timeout),
            None => item,
        }
    }
}

fn parse_metadata(text: &str) -> Result<(String, String), &'static str> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("give KEY=VALUE"),
    }
}

/// What messages call an input.
pub fn name(path: &Path) -> String {
    if is_stdin(path) { "stdin".to_owned() } else { path.display().to_string() }
}

/// All of a file or of stdin.
pub fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let mut payload = Vec::new();
    let read = open(path).and_then(|input| input.take(MAX_MESSAGE as u64 + 1).read_to_end(&mut payload));
    read.with_context(|| format!("cannot read {}", name(path)))?;
    if payload.len() > MAX_MESSAGE {
        bail!("{} is too large: an item is at most 1GiB, and at most the server's --max-message", name(path));
    }
    Ok(payload)
}

/// Hands each line of a file or of stdin, without its end, to `each` until that says stop.
pub fn read_lines(path: &Path, mut each: impl FnMut(Vec<u8>) -> bool) -> anyhow::Result<()> {
    let failed = || format!("cannot read {}", name(path));
    let mut input = BufReader::new(open(path).with_context(failed)?);
    loop {
        let mut line = Vec::new();
        input.by_ref().take(MAX_MESSAGE as u64 + 1).read_until(b'\n', &mut line).with_context(failed)?;
        if line.len() > MAX_MESSAGE {
            bail!("{} has a line that is too large: an item is at most 1GiB", name(path));
        }
        let ended = line.pop_if(|last| *last == b'\n').is_some();
        if line.is_empty() && !ended {
            return Ok(());
        }
        if !each(line) {
            return Ok(());
        }
    }
}

fn open(path: &Path) -> io::Result<Box<dyn Read>> {
    if is_stdin(path) { Ok(Box::new(io::stdin().lock())) } else { Ok(Box::new(File::open(path)?)) }
}

fn is_stdin(path: &Path) -> bool {
    path.as_os_str() == "-"
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn lines(text: &str, most: usize) -> Vec<String> {
        let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
        file.write_all(text.as_bytes()).expect("a temporary file");
        let mut lines = Vec::new();
        let push = |line: Vec<u8>| {
            lines.push(String::from_utf8(line).expect("text"));
            lines.len() < most
        };
        read_lines(file.path(), push).expect("a readable file");
        lines
    }

    #[test]
    fn each_line_is_an_item_empty_ones_too() {
        assert!(lines("", 9).is_empty());
        assert_eq!(lines("a\n\nb\r\n", 9), ["a", "", "b\r"]);
        assert_eq!(lines("a\nb", 9), ["a", "b"]);
        assert_eq!(lines("a\nb\nc\n", 2), ["a", "b"]);
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let error = read(Path::new("/nonexistent/file")).expect_err("no such file");
        assert!(format!("{error:#}").starts_with("cannot read /nonexistent/file: No such file"), "{error:#}");
    }

    #[test]
    fn metadata_is_split_at_the_first_equals_sign() {
        assert_eq!(parse_metadata("a=b=c"), Ok(("a".to_owned(), "b=c".to_owned())));
        assert!(parse_metadata("a").is_err() && parse_metadata("=b").is_err());
    }
}
