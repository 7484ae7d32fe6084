//! `forkring call`: each file is an item, its result goes to stdout.

use std::{
    io::{self, IsTerminal as _},
    path::Path,
    time::Duration,
};

use anyhow::{anyhow, bail};

use super::{
    Addr,
    input::{self, ItemArgs},
    print, print_json, say,
    show::{ResultLine, hex, printable, say_traceback},
};
use crate::{
    client::Client,
    proto::v1::{Status, WorkItem, WorkResult},
};

/// How much longer than its item's timeout a call may take before the server itself is given up.
const SLACK: Duration = Duration::from_secs(5);

/// Give items to a pool and print their results
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  forkring call hash README.md              the result as it is
  echo hello | forkring call hash           stdin is the item
  forkring call hash *.rs --json            a line of JSON for each file
  forkring call hash big --timeout 500ms --priority 3 --metadata tenant=a

Results are written as they are, one after the other; on a terminal one that is not text is shown in hexadecimal.
Why an item failed is said on stderr, after its traceback if it has one; with --json the line has both.
Exit code 1 when any item failed.")]
pub struct CallArgs {
    #[command(flatten)]
    items: ItemArgs,

    #[command(flatten)]
    addr: Addr,

    /// Print one JSON object a line for each item, failed ones too
    #[arg(long)]
    json: bool,
}

/// Calls once per file.
pub fn run(args: CallArgs) -> anyhow::Result<()> {
    args.addr.run(async |client| {
        let mut failures = Vec::new();
        for (at, file) in args.items.files.iter().enumerate() {
            if let Err(error) = call_with(&args, &client, at as u64 + 1, file).await? {
                failures.push(error);
            }
        }
        match (failures.len(), args.items.files.len()) {
            (0, _) => Ok(()),
            (_, 1) => {
                let (error, traceback) = failures.remove(0);
                say_traceback(&traceback);
                Err(error)
            }
            (failed, all) => {
                for (error, traceback) in &failures {
                    say_traceback(traceback);
                    say(format_args!("{error:#}"));
                }
                bail!("{failed} of {all} items failed")
            }
        }
    })
}

/// Why an item failed, and where in the handler if that is to be shown.
type ItemFailure = (anyhow::Error, String);

/// Calls with one file. The inner error is the item's, the outer one ends the command.
async fn call_with(args: &CallArgs, client: &Client, id: u64, file: &Path) -> anyhow::Result<Result<(), ItemFailure>> {
    let name = input::name(file);
    let payload = match input::read(file) {
        Ok(payload) => payload,
        Err(error) => return Ok(Err((error, String::new()))),
    };
    match call(client, args.items.item(id, payload), args.items.timeout).await {
        Ok(result) if args.json => print_json(&ResultLine::of(&result, Some(&name)))?,
        Ok(result) => print_payload(&result.payload)?,
        Err(mut status) => {
            if args.json {
                print_json(&ResultLine::failed(id, &status, Some(&name)))?;
                status.traceback.clear();
            }
            return Ok(Err((anyhow!("{name}: {status}"), status.traceback)));
        }
    }
    Ok(Ok(()))
}

async fn call(client: &Client, item: WorkItem, timeout: Option<Duration>) -> Result<WorkResult, Status> {
    let call = client.call(item);
    let Some(limit) = timeout.map(|timeout| timeout.saturating_add(SLACK)) else {
        return call.await.map_err(|status| Status::from(&status));
    };
    // The item's timeout is the server's to keep; this one is for a server that answers nothing at all.
    match tokio::time::timeout(limit, call).await {
        Ok(answer) => answer.map_err(|status| Status::from(&status)),
        Err(_) => Err(Status {
            code: tonic::Code::DeadlineExceeded as i32,
            message: "the server did not answer".to_owned(),
            reason: "NO_ANSWER".to_owned(),
            ..Default::default()
        }),
    }
}

fn print_payload(payload: &[u8]) -> anyhow::Result<()> {
    if !io::stdout().is_terminal() {
        return print(payload);
    }
    match printable(payload) {
        Some(text) if text.ends_with('\n') => print(text),
        Some(text) => print(format!("{text}\n")),
        None => print(format!("{}\n", hex(payload))),
    }
}
