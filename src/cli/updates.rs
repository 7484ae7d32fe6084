//! `forkring updates`: the results of submitted items, as they come.

use std::{io, thread};

use anyhow::bail;
use rustix::event::{PollFd, PollFlags, poll};
use tokio::sync::oneshot;

use super::{
    Addr, StdoutClosed, print, print_json,
    show::{ResultLine, on_one_line, say_traceback},
};
use crate::{
    client::Client,
    config::whole_number,
    proto::v1::{Status, WorkResult},
};

/// Print the results of submitted items as they are done
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  forkring updates --subscription mine
  forkring updates --subscription mine --limit 10 --json

Results that were done before wait for you. Two readers of one subscription share its results.
A failed item is a line like any other, its traceback follows on stderr; exit code 1 when the stream breaks, or ends before --limit results.")]
pub struct UpdatesArgs {
    #[command(flatten)]
    addr: Addr,

    /// Whose results
    #[arg(long, value_name = "NAME", default_value = "")]
    subscription: String,

    /// End after so many results; 0: when the server drains
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = whole_number(0..=u64::MAX))]
    limit: u64,

    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
}

/// Prints until the stream ends, or nobody reads any more.
pub fn run(args: UpdatesArgs) -> anyhow::Result<()> {
    args.addr.run(async |client| {
        let mut closed = stdout_closed();
        tokio::select! {
            done = print_results(&args, &client) => done,
            Ok(()) = &mut closed => Err(StdoutClosed.into()),
        }
    })
}

async fn print_results(args: &UpdatesArgs, client: &Client) -> anyhow::Result<()> {
    let broken = |status: tonic::Status| anyhow::anyhow!("{}", Status::from(&status));
    let mut results = client.updates(&args.subscription, args.limit).await.map_err(broken)?;
    let mut count = 0;
    while let Some(result) = results.message().await.map_err(broken)? {
        count += 1;
        if args.json {
            print_json(&ResultLine::of(&result, None))?;
        } else {
            let traceback = result.status.as_ref().map(|status| status.traceback.clone()).unwrap_or_default();
            print(format!("{}\n", line(result)))?;
            say_traceback(&traceback);
        }
    }
    if count < args.limit {
        bail!("the stream ended after {count} of {} results", args.limit);
    }
    Ok(())
}

/// Tells when the reader of a pipe has gone, which writing finds out only with the next result.
fn stdout_closed() -> oneshot::Receiver<()> {
    let (told, closed) = oneshot::channel();
    thread::spawn(move || {
        let stdout = io::stdout();
        // No event is asked for: an error is told anyway, and of a terminal or a file there is none.
        let ended = poll(&mut [PollFd::new(&stdout, PollFlags::empty())], None);
        if ended.is_ok() {
            // The command may have ended by itself.
            let _ = told.send(());
        }
    });
    closed
}

fn line(result: WorkResult) -> String {
    let id = result.id;
    match result.outcome() {
        Ok(payload) => format!("{id} ok {}", on_one_line(&payload)),
        Err(status) => format!("{id} failed {}", on_one_line(status.to_string().as_bytes())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_a_line() {
        let result = WorkResult { id: 7, payload: "a\nb".into(), ..Default::default() };
        assert_eq!(line(result), "7 ok a\\nb");
        let status =
            Status { code: 13, message: "two\nlines".into(), reason: "HANDLER_FAILED".into(), ..Default::default() };
        let result = WorkResult { id: 8, status: Some(status), ..Default::default() };
        assert_eq!(line(result), "8 failed INTERNAL (HANDLER_FAILED): two\\nlines");
    }
}
