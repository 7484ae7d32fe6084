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
        let mut failures = Vec::new();
        for (at, file) in args.items.files.iter().enumerate() {
            if let Err(error) = call_with(&args, &client, at as u64 + 1, file).await? {
                failures.push(error);
            }
        }
        match (failures.len(), args.items.files.len()) {
            (0, _) => Ok(()),
            (_, 1) => Err(failures.remove(0)),
            (failed, all) => {
                failures.iter().for_each(|error| say(format_args!("{error:#}")));
                bail!("{failed} of {all} items failed")
            }
        }
    })
}

/// Calls with one file. The inner error is the item's, the outer one ends the command.
async fn call_with(args: &CallArgs, client: &Client, id: u64, file: &Path) -> anyhow::Result<anyhow::Result<()>> {
    let name = input::name(file);
    let payload = match input::read(file) {
        Ok(payload) => payload,
        Err(error) => return Ok(Err(error)),
    };
    match call(client, args.items.item(id, payload), args.items.timeout).await {
        Ok(result) if args.json => print_json(&ResultLine::of(&result, Some(&name)))?,
        Ok(result) => print_payload(&result.payload)?,
        Err(status) => {
            if args.json {
                print_json(&ResultLine::failed(id, &status, Some(&name)))?;
            }
            return Ok(Err(anyhow!("{name}: {status}")));
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
