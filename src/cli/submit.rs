//! `forkring submit`: a stream of items in, a receipt out.

use std::{future, path::PathBuf, sync::Arc, thread};

use anyhow::{anyhow, bail};
use prost::Message as _;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::{
    Addr,
    input::{self, ItemArgs},
    print, print_json, say,
    show::RejectionLine,
};
use crate::{
    client::Client,
    config::whole_number,
    proto::v1::{Rejection, Status, SubmitReceipt, WorkItem},
};

/// Items that are read ahead of the stream.
const READ_AHEAD: usize = 4;
/// The server ends a stream at an item that is too large for it, and does not say which that was. So one with this many
/// bytes has a stream to itself, beside which the round trip is little.
const LARGE: usize = 64 << 10;

/// Submit items to a pool and print the receipt; `forkring updates` shows the results
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  forkring submit hash *.rs --subscription mine
  seq 1000 | forkring submit hash --lines --first-id 100
  forkring updates --subscription mine

Items are numbered from --first-id in the order given; those that are too large for the server count as rejected.
Exit code 1 when any was rejected or could not be read.")]
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
    #[arg(long, value_name = "ID", default_value_t = 1, value_parser = whole_number(0..=u64::MAX))]
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

/// Submits everything, in order.
pub fn run(args: SubmitArgs) -> anyhow::Result<()> {
    let args = Arc::new(args);
    let (receipt, sources) = args.addr.run(async |client| {
        // Reading blocks (stdin may be a pipe that is slow), hence a thread; the channel bounds what it reads ahead.
        let (sender, mut items) = mpsc::channel(READ_AHEAD);
        let reader = thread::spawn({
            let args = Arc::clone(&args);
            move || read(&args, &sender)
        });
        let receipt = submit(&client, &mut items).await?;
        // All items were received, so the reader is done.
        let sources = reader.join().map_err(|_| anyhow!("reading the items failed"))?;
        Ok((receipt, sources))
    })?;
    let name_of = |id: u64| Some(sources.files.get(usize::try_from(id.wrapping_sub(args.first_id)).ok()?)?.as_str());
    print_receipt(&receipt, name_of, args.json)?;
    if receipt.rejected > 0 {
        bail!("rejected: {} of {} items", receipt.rejected, receipt.accepted + receipt.rejected);
    }
    if sources.unread > 0 {
        bail!("not submitted: {} of {} files", sources.unread, args.items.files.len());
    }
    Ok(())
}

/// Submits all items that come, on as many streams as it takes; one receipt for all. A stream that breaks ends it.
async fn submit(client: &Client, items: &mut mpsc::Receiver<WorkItem>) -> anyhow::Result<SubmitReceipt> {
    let mut total = SubmitReceipt::default();
    let mut next = items.recv().await;
    while let Some(first) = next.take() {
        let id = first.id;
        let is_alone = first.encoded_len() >= LARGE;
        let (sender, stream) = mpsc::channel(READ_AHEAD);
        let feed = async {
            let mut item = first;
            // Nobody receives any more when the server has refused the stream.
            while sender.send(item).await.is_ok() && !is_alone {
                match items.recv().await {
                    Some(small) if small.encoded_len() < LARGE => item = small,
                    other => {
                        next = other;
                        break;
                    }
                }
            }
            drop(sender);
            future::pending().await
        };
        let submitted = tokio::select! {
            submitted = client.submit(ReceiverStream::new(stream)) => submitted,
            never = feed => never,
        };
        match submitted.map_err(|status| Status::from(&status)) {
            Ok(receipt) => {
                total.accepted += receipt.accepted;
                total.rejected += receipt.rejected;
                total.rejections.extend(receipt.rejections);
            }
            Err(status) if is_alone && status.reason == "MESSAGE_TOO_LARGE" => {
                total.rejected += 1;
                total.rejections.push(Rejection { id, status: Some(status) });
            }
            Err(status) if total.accepted > 0 => bail!("{status}; accepted on earlier streams: {}", total.accepted),
            Err(status) => bail!("{status}"),
        }
        if is_alone {
            next = items.recv().await;
        }
    }
    Ok(total)
}

/// Where the items were from.
#[derive(Default)]
struct Sources {
    /// What the items' files are called, one for each, in order. Lines have none.
    files: Vec<String>,
    /// How many inputs could not be read.
    unread: usize,
}

/// Sends all items.
fn read(args: &SubmitArgs, items: &mpsc::Sender<WorkItem>) -> Sources {
    let mut id = args.first_id;
    let mut send = |payload| {
        let item = args.items.item(id, payload).with_subscription(args.subscription.as_str());
        id = id.wrapping_add(1);
        // Nobody receives any more when a stream has broken.
        items.blocking_send(item).is_ok()
    };
    let mut sources = Sources::default();
    let mut read_one = |file: &PathBuf| -> anyhow::Result<()> {
        if args.lines {
            return input::read_lines(file, &mut send);
        }
        send(input::read(file)?);
        sources.files.push(input::name(file));
        Ok(())
    };
    for file in &args.items.files {
        if let Err(error) = read_one(file) {
            say(format_args!("{error:#}"));
            sources.unread += 1;
        }
    }
    sources
}

fn print_receipt<'a>(
    receipt: &'a SubmitReceipt,
    name_of: impl Fn(u64) -> Option<&'a str>,
    json: bool,
) -> anyhow::Result<()> {
    for Rejection { id, status } in &receipt.rejections {
        let status = status.clone().unwrap_or_default();
        let name = name_of(*id).map(|name| format!(" ({name})")).unwrap_or_default();
        say(format_args!("item {id}{name}: {status}"));
    }
    let SubmitReceipt { accepted, rejected, rejections } = receipt;
    if json {
        let rejections = rejections.iter().map(|one| RejectionLine::of(one, name_of(one.id))).collect();
        return print_json(&Receipt { accepted: *accepted, rejected: *rejected, rejections });
    }
    print(format!("accepted {accepted}, rejected {rejected}\n"))
}
