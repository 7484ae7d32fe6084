//! The peer in `scripts/compare`: an ordinary tonic server that answers from the handler.
//!
//! No dispatch, no worker, no shared memory: what is left is the cost of gRPC itself on one thread. It runs on tonic's
//! default settings, as most servers do; `--wide` gives it the windows and frames that large payloads want.
//!
//!     cargo run --release --example bare_tonic -- --listen 127.0.0.1:50052

use std::{
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
};

use anyhow::Context as _;
use clap::Parser;
use forkring::proto::v1::{
    GetUpdatesRequest, SubmitReceipt, WorkItem, WorkResult,
    dispatcher_server::{Dispatcher, DispatcherServer},
};
use tokio_stream::Stream;
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Server, server::TcpIncoming},
};

/// An echo over Call and Process, answered from the handler.
#[derive(Parser)]
struct Options {
    /// Where to listen; port 0 takes a free one
    #[arg(long, default_value = "127.0.0.1:50052")]
    listen: SocketAddr,

    /// Wider windows and larger frames than tonic's defaults
    #[arg(long)]
    wide: bool,
}

struct Echo;

/// The results of a `Process` stream: each item, turned around.
struct Echoes(Streaming<WorkItem>);

impl Stream for Echoes {
    type Item = Result<WorkResult, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let item = Pin::new(&mut self.0).poll_next(context);
        item.map(|item| item.map(|item| item.map(echo)))
    }
}

fn echo(item: WorkItem) -> WorkResult {
    WorkResult { id: item.id, payload: item.payload, ..Default::default() }
}

#[tonic::async_trait]
impl Dispatcher for Echo {
    type ProcessStream = Echoes;
    type GetUpdatesStream = Echoes;

    async fn call(&self, request: Request<WorkItem>) -> Result<Response<WorkResult>, Status> {
        Ok(Response::new(echo(request.into_inner())))
    }

    async fn process(&self, request: Request<Streaming<WorkItem>>) -> Result<Response<Echoes>, Status> {
        Ok(Response::new(Echoes(request.into_inner())))
    }

    async fn submit(&self, _: Request<Streaming<WorkItem>>) -> Result<Response<SubmitReceipt>, Status> {
        Err(Status::unimplemented("a bare server has no queue to submit to"))
    }

    async fn get_updates(&self, _: Request<GetUpdatesRequest>) -> Result<Response<Echoes>, Status> {
        Err(Status::unimplemented("a bare server has no updates"))
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    // `Server::serve` sets no-delay by default; an incoming of one's own has to.
    let incoming = TcpIncoming::bind(options.listen)
        .with_context(|| format!("cannot listen on {}", options.listen))?
        .with_nodelay(Some(true));
    println!("listening on {}", incoming.local_addr()?);

    let mut server = Server::builder();
    if options.wide {
        server = server
            .initial_stream_window_size(16 << 20)
            .initial_connection_window_size(64 << 20)
            .max_frame_size(1 << 20);
    }
    server.add_service(DispatcherServer::new(Echo)).serve_with_incoming(incoming).await?;
    Ok(())
}
