//! `forkring dead`: look at dead letters, requeue them, drop them.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, anyhow, bail};
use clap::{Args, Subcommand};
use serde::Serialize;

use super::{
    Addr, print, print_json, say,
    show::{hex, on_one_line},
};
use crate::{
    client::Client,
    config::whole_number,
    proto::v1::{Attempt, DeadLetter, Status, attempt::End},
};

/// Look at items that killed their workers; requeue or drop them
#[derive(Debug, Args)]
#[command(after_help = "\
An item that killed --max-attempts workers fails with ABORTED, reason WORKER_CRASHED, and is kept
as a dead letter with its payload and with how its workers died. When --dead-letters is full, the
oldest make room.

Examples:
  forkring dead list                        what there is, oldest first
  forkring dead show 7                      all about letter 7
  forkring dead show 7 --payload crash.bin  its payload, to reproduce it
  forkring dead requeue 7                   once the handler is mended: submit it again
  forkring dead drop --all                  throw all away")]
pub struct DeadArgs {
    #[command(flatten)]
    addr: Addr,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    List(ListArgs),
    Show(ShowArgs),
    Requeue(RequeueArgs),
    Drop(DropArgs),
}

/// List the dead letters, oldest first
#[derive(Debug, Args)]
#[command(after_help = "\
A line has number, time, pool, the client's id, bytes of payload, and how the last of its workers
died. On stderr: that there are none; how many letters were dropped to make room for others, if any.")]
struct ListArgs {
    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
}

/// Show a dead letter, or save its payload
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  forkring dead show 7
  forkring dead show 7 --payload crash.bin
  forkring dead show 7 --payload - | xxd | head")]
struct ShowArgs {
    /// The letter's number
    #[arg(value_parser = whole_number(0..=u64::MAX))]
    number: u64,

    /// Write the payload there and nothing else; `-` is stdout
    #[arg(long, value_name = "FILE")]
    payload: Option<PathBuf>,

    /// Print one JSON object
    #[arg(long, conflicts_with = "payload")]
    json: bool,
}

/// Submit the items of dead letters once more
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  forkring dead requeue 7 9
  forkring dead requeue --all --subscription retried; forkring updates --subscription retried

An item has all its attempts before it again, and no deadline. Its result goes to the subscription
it was submitted under; if it came by Call or Process, to --subscription. The letter goes once its
item is accepted.")]
struct RequeueArgs {
    #[command(flatten)]
    letters: Numbers,

    /// Whose updates the results become of items that were not submitted
    #[arg(long, value_name = "NAME", default_value = "")]
    subscription: String,
}

/// Throw dead letters away
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  forkring dead drop 7 9
  forkring dead drop --all")]
struct DropArgs {
    #[command(flatten)]
    letters: Numbers,

    #[command(flatten)]
    addr: Addr,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Numbers {
    /// The letters' numbers
    #[arg(value_name = "NUMBER", value_parser = whole_number(0..=u64::MAX))]
    numbers: Vec<u64>,

    /// All that are there now
    #[arg(long)]
    all: bool,
}

/// Runs the command that was named.
pub fn run(args: DeadArgs) -> anyhow::Result<()> {
    args.addr.run(async |client| match &args.command {
        Command::List(args) => list(args, &client).await,
        Command::Show(args) => show(args, &client).await,
        Command::Requeue(args) => {
            let requeue = async |number| client.requeue_dead_letter(number, &args.subscription).await;
            each(&client, &args.letters, "requeued", requeue).await
        }
        Command::Drop(args) => {
            let drop = async |number| client.drop_dead_letter(number).await;
            each(&client, &args.letters, "dropped", drop).await
        }
    })
}

fn failed(status: tonic::Status) -> anyhow::Error {
    anyhow!("{}", Status::from(&status))
}

async fn list(args: &ListArgs, client: &Client) -> anyhow::Result<()> {
    let mut none = true;
    let dropped = every(client, |letter| {
        none = false;
        if args.json { print_json(&LetterLine::of(&letter)) } else { print(format!("{}\n", line(&letter))) }
    });
    let dropped = dropped.await?;
    if none && !args.json {
        say_none();
    }
    match dropped {
        0 => {}
        dropped => say(format_args!("{dropped} older letters were dropped to make room (--dead-letters)")),
    }
    Ok(())
}

/// On stderr, so that a program that reads the list sees an empty one.
fn say_none() {
    say("there are no dead letters");
}

/// Hands out all letters, page by page; how many were dropped for room.
async fn every(client: &Client, mut each: impl FnMut(DeadLetter) -> anyhow::Result<()>) -> anyhow::Result<u64> {
    let mut after = 0;
    loop {
        let page = client.dead_letters(after).await.map_err(failed)?;
        page.letters.into_iter().try_for_each(&mut each)?;
        if page.next <= after {
            return Ok(page.dropped);
        }
        after = page.next;
    }
}

async fn show(args: &ShowArgs, client: &Client) -> anyhow::Result<()> {
    let letter = client.dead_letter(args.number).await.map_err(failed)?;
    match &args.payload {
        _ if args.json => print_json(&LetterLine::with_payload(&letter)),
        None => print(description(&letter)),
        Some(file) => {
            if file.as_os_str() == "-" {
                print(&letter.payload)?;
            } else {
                fs::write(file, &letter.payload).with_context(|| format!("cannot write {}", file.display()))?;
            }
            if letter.truncated {
                bail!("only {} of {} bytes were kept (--dead-letters)", letter.payload.len(), letter.payload_size);
            }
            Ok(())
        }
    }
}

/// Does `work` with each of the letters; says which it failed with.
async fn each(
    client: &Client,
    letters: &Numbers,
    done: &str,
    work: impl AsyncFn(u64) -> Result<(), tonic::Status>,
) -> anyhow::Result<()> {
    let mut numbers = letters.numbers.clone();
    if letters.all {
        let push = |letter: DeadLetter| {
            numbers.push(letter.number);
            Ok(())
        };
        every(client, push).await?;
        if numbers.is_empty() {
            say_none();
        }
    }
    let mut failures = Vec::new();
    for &number in &numbers {
        match work(number).await {
            Ok(()) => print(format!("{done} {number}\n"))?,
            Err(status) => failures.push(failed(status)),
        }
    }
    match (failures.len(), numbers.len()) {
        (0, _) => Ok(()),
        (_, 1) => Err(failures.remove(0)),
        (failed, all) => {
            failures.iter().for_each(|error| say(format_args!("{error:#}")));
            bail!("{failed} of {all} letters were not {done}")
        }
    }
}

/// A letter as a line of JSON.
#[derive(Debug, Serialize)]
struct LetterLine<'a> {
    number: u64,
    time: Option<String>,
    pool: &'a str,
    id: u64,
    priority: u32,
    metadata: &'a std::collections::HashMap<String, String>,
    subscription: Option<&'a str>,
    payload_size: u64,
    truncated: bool,
    attempts: u32,
    history: Vec<AttemptLine<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload_hex: Option<String>,
}

#[derive(Debug, Serialize)]
struct AttemptLine<'a> {
    attempt: u32,
    worker: u32,
    pid: u32,
    signal: Option<i32>,
    exit_code: Option<i32>,
    cause: &'a str,
    time: Option<String>,
}

impl<'a> LetterLine<'a> {
    fn of(letter: &'a DeadLetter) -> Self {
        LetterLine {
            number: letter.number,
            time: time(letter.time),
            pool: &letter.pool,
            id: letter.id,
            priority: letter.priority,
            metadata: &letter.metadata,
            subscription: letter.subscription.as_deref(),
            payload_size: letter.payload_size,
            truncated: letter.truncated,
            attempts: letter.attempts,
            history: letter.history.iter().map(AttemptLine::of).collect(),
            payload_hex: None,
        }
    }

    fn with_payload(letter: &'a DeadLetter) -> Self {
        LetterLine { payload_hex: Some(hex(&letter.payload)), ..Self::of(letter) }
    }
}

impl<'a> AttemptLine<'a> {
    fn of(attempt: &'a Attempt) -> Self {
        let (signal, exit_code) = match attempt.end {
            Some(End::Signal(signal)) => (Some(signal), None),
            Some(End::ExitCode(code)) => (None, Some(code)),
            None => (None, None),
        };
        let Attempt { attempt, worker, pid, ref cause, time: at, .. } = *attempt;
        AttemptLine { attempt, worker, pid, signal, exit_code, cause, time: time(at) }
    }
}

/// In RFC 3339, to the second.
fn time(time: Option<prost_types::Timestamp>) -> Option<String> {
    let mut time = time?;
    time.nanos = 0;
    Some(time.to_string())
}

fn line(letter: &DeadLetter) -> String {
    let cause = letter.history.last().map_or("", |attempt| &attempt.cause);
    let time = time(letter.time).unwrap_or_default();
    let DeadLetter { number, pool, id, payload_size, .. } = letter;
    format!("{number}  {time}  {pool}  id {id}  {payload_size} bytes  {}", on_one_line(cause.as_bytes()))
}

fn description(letter: &DeadLetter) -> String {
    let mut text = String::new();
    let mut field = |name: &str, value: &str| {
        text.push_str(&format!("{name:<14}{}\n", on_one_line(value.as_bytes())));
    };
    field("letter", &letter.number.to_string());
    field("time", &time(letter.time).unwrap_or_default());
    field("pool", &letter.pool);
    field("id", &letter.id.to_string());
    field("priority", &letter.priority.to_string());
    match &letter.subscription {
        Some(name) => field("subscription", &format!("`{name}`")),
        None => field("subscription", "none: it was not submitted"),
    }
    let mut metadata: Vec<_> = letter.metadata.iter().collect();
    metadata.sort_unstable();
    metadata.iter().for_each(|(key, value)| field("metadata", &format!("{key}={value}")));
    field("attempts", &letter.attempts.to_string());
    for attempt in &letter.history {
        let Attempt { attempt, worker, pid, ref cause, time: at, .. } = *attempt;
        let at = time(at).unwrap_or_default();
        field("", &format!("{attempt}: {at}, worker {worker}, pid {pid}: {cause}"));
    }
    let kept = if letter.truncated { format!(", of which {} were kept", letter.payload.len()) } else { String::new() };
    field("payload", &format!("{} bytes{kept}", letter.payload_size));
    if !letter.payload.is_empty() {
        text.push_str(&format!("{:<14}{}\n", "", on_one_line(&letter.payload)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn letter() -> DeadLetter {
        let time = Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 5 });
        DeadLetter {
            number: 7,
            pool: "hash".into(),
            id: 42,
            metadata: [("b".to_owned(), "2".to_owned()), ("a".to_owned(), "1\n".to_owned())].into(),
            subscription: Some(String::new()),
            payload: vec![0, 255].into(),
            payload_size: 2,
            time,
            attempts: 3,
            history: vec![
                Attempt {
                    attempt: 2,
                    pid: 9,
                    end: Some(End::ExitCode(3)),
                    cause: "exited".into(),
                    ..Default::default()
                },
                Attempt {
                    attempt: 3,
                    worker: 1,
                    pid: 10,
                    end: Some(End::Signal(11)),
                    cause: "the worker was killed".into(),
                    time,
                },
            ],
            ..Default::default()
        }
    }

    #[test]
    fn a_letter_is_a_line() {
        assert_eq!(line(&letter()), "7  2023-11-14T22:13:20Z  hash  id 42  2 bytes  the worker was killed");
        assert!(line(&DeadLetter::default()).starts_with("0    "));
    }

    #[test]
    fn a_description_has_all_of_it() {
        let text = description(&letter());
        for line in [
            "letter        7",
            "subscription  ``",
            "metadata      a=1\\n",
            "metadata      b=2",
            "              2: , worker 0, pid 9: exited",
            "              3: 2023-11-14T22:13:20Z, worker 1, pid 10: the worker was killed",
            "payload       2 bytes",
            "              0x00ff",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        let cut = DeadLetter { truncated: true, payload_size: 99, ..letter() };
        assert!(description(&cut).contains("payload       99 bytes, of which 2 were kept\n"));
    }

    #[test]
    fn a_line_of_json_tells_signals_from_exits() {
        let letter = letter();
        let json = serde_json::to_value(LetterLine::of(&letter)).expect("a plain value");
        assert_eq!((json["number"].as_u64(), json["subscription"].as_str()), (Some(7), Some("")));
        assert!(json.get("payload_hex").is_none());
        assert_eq!((json["history"][0]["exit_code"].as_i64(), json["history"][0]["signal"].as_i64()), (Some(3), None));
        assert_eq!(json["history"][1]["signal"], 11);
        let json = serde_json::to_value(LetterLine::with_payload(&letter)).expect("a plain value");
        assert_eq!(json["payload_hex"], "00ff");
    }
}
