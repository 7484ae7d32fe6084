//! `forkring submit`: a stream of items in, a receipt out.

use std::{path::PathBuf, sync::Arc, thread};

use anyhow::bail;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::{
    Addr,
    input::{self, ItemArgs},
    print, print_json, say,
    show::RejectionLine,
};
use crate::proto::v1::{Status, SubmitReceipt, WorkItem};

/// Items that are read ahead of the stream.
const READ_AHEAD: usize = 4;

/// Submit items to a pool and print the receipt; `forkring updates` shows the results
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  forkring submit hash *.rs --subscription mine
  seq 1000 | forkring submit hash --lines --first-id 100
  forkring updates --subscription mine

Items are numbered from --first-id in the order given. Exit code 1 when any was rejected or could not be read.")]
pub struct SubmitArgs {
    #[command(flatten)]
    items: ItemArgs,

    #[command(flatten)]
    addr: Addr,

    /// Whose updates the results become
    #[arg(long, value_name = "NAME", default_value = "")]
    subscription: String,

    /// Each line is an item, not each file
    #[arg(long)]
    lines: bool,

    /// The id of the first item
    #[arg(long, value_name = "ID", default_value_t = 1)]
    first_id: u64,

    /// Print the receipt as one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Receipt<'a> {
    accepted: u64,
    rejected: u64,
    rejections: Vec<RejectionLine<'a>>,
}

/// Submits everything on one stream.
pub fn run(args: SubmitArgs) -> anyhow::Result<()> {
    let args = Arc::new(args);
    let (receipt, unread) = args.addr.run(async |client| {
        // Reading blocks (stdin may be a pipe that is slow), hence a thread; the channel bounds what it reads ahead.
        let (items, stream) = mpsc::channel(READ_AHEAD);
        let reader = thread::spawn({
            let args = Arc::clone(&args);
            move || read(&args, &items)
        });
        let receipt = client.submit(ReceiverStream::new(stream)).await;
        let receipt = receipt.map_err(|status| anyhow::anyhow!("{}", Status::from(&status)))?;
        // A receipt means that the stream has ended, and so has the reader.
        let unread = reader.join().map_err(|_| anyhow::anyhow!("reading the items failed"))?;
        Ok((receipt, unread))
    })?;
    print_receipt(&receipt, args.json)?;
    if receipt.rejected > 0 {
        bail!("{} of {} items were rejected", receipt.rejected, receipt.accepted + receipt.rejected);
    }
    if unread > 0 {
        bail!("{unread} of {} files were not submitted", args.items.files.len());
    }
    Ok(())
}

/// Sends all items; returns how many inputs could not be read.
fn read(args: &SubmitArgs, items: &mpsc::Sender<WorkItem>) -> usize {
    let mut id = args.first_id;
    let mut send = |payload| {
        let item = args.items.item(id, payload).with_subscription(args.subscription.as_str());
        id = id.wrapping_add(1);
        // Nobody receives any more when the server has refused the stream.
        items.blocking_send(item).is_ok()
    };
    let mut read_one = |file: &PathBuf| -> anyhow::Result<()> {
        if args.lines {
            return input::read_lines(file, &mut send);
        }
        send(input::read(file)?);
        Ok(())
    };
    let failed = |file: &&PathBuf| match read_one(file) {
        Ok(()) => false,
        Err(error) => {
            say(format_args!("{error:#}"));
            true
        }
    };
    args.items.files.iter().filter(failed).count()
}

fn print_receipt(receipt: &SubmitReceipt, json: bool) -> anyhow::Result<()> {
    for rejection in &receipt.rejections {
        let status = rejection.status.clone().unwrap_or_default();
        say(format_args!("item {}: {status}", rejection.id));
    }
    let SubmitReceipt { accepted, rejected, rejections } = receipt;
    if json {
        let rejections = rejections.iter().map(RejectionLine::of).collect();
        return print_json(&Receipt { accepted: *accepted, rejected: *rejected, rejections });
    }
    print(format!("accepted {accepted}, rejected {rejected}\n"))
}
