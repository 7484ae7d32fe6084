//! `forkring call`: each file is an item, its result goes to stdout.

use std::{
    io::{self, IsTerminal as _},
    time::Duration,
};

use anyhow::bail;

use super::{
    Addr,
    input::{self, ItemArgs},
    print, print_json, say,
    show::{ResultLine, hex, printable},
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
        let mut failed = 0;
        for (at, file) in args.items.files.iter().enumerate() {
            let name = input::name(file);
            let payload = match input::read(file) {
                Ok(payload) => payload,
                Err(error) => {
                    say(format_args!("{error:#}"));
                    failed += 1;
                    continue;
                }
            };
            let id = at as u64 + 1;
            match call(&client, args.items.item(id, payload), args.items.timeout).await {
                Ok(result) if args.json => print_json(&ResultLine::of(&result, Some(&name)))?,
                Ok(result) => print_payload(&result.payload)?,
                Err(status) => {
                    failed += 1;
                    say(format_args!("{name}: {status}"));
                    if args.json {
                        print_json(&ResultLine::failed(id, &status, Some(&name)))?;
                    }
                }
            }
        }
        match failed {
            0 => Ok(()),
            _ => bail!("{failed} of {} items failed", args.items.files.len()),
        }
    })
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
