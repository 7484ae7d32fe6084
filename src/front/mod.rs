//! The front: the process that speaks gRPC.
//!
//! # What it promises
//!
//! - An item is accepted (in shared memory) before anything is said to its client, and the payload is copied once, from the
//!   HTTP/2 frame to where the worker reads it; a large result goes from where the worker wrote it to the socket.
//! - Memory is bounded: streams stop reading when there is no room (HTTP/2 flow control does the rest), calls are
//!   refused with a retry delay.
//! - An idle front makes no syscall.
//!
//! # Why it is one thread
//!
//! One `current_thread` runtime and no `Send`: a request is decoded, offered, collected and answered with no hand-over
//! between threads, and all state is plain cells in one `Hub`. It scales by processes. The runtime starts
//! after the fork.

mod admin;
mod collector;
mod connection;
mod failure_log;
mod grace;
mod hub;
mod input;
mod listener;
mod mailbox;
mod output;
mod process;
mod request_body;
mod resets;
mod service;
mod status;
mod submit;
mod unary;
mod updates;
mod waiting;
pub mod wire;

use std::{io, net::TcpListener, rc::Rc};

use tokio::runtime::{Builder, LocalOptions};

use crate::{
    config::Config,
    crash_point::crash_point,
    dispatch::{Adopted, Front},
    doorbell::{AsyncBell, Bell},
};

/// Serves until the server has drained.
pub fn run(
    front: Front<'static>,
    adopted: Vec<Adopted>,
    bell: &Bell,
    listener: &TcpListener,
    complaint: &Bell,
    pools: Vec<String>,
    config: &Config,
) -> io::Result<()> {
    crate::process::keep_freed_memory(8);
    let listener = listener.try_clone()?;
    let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?;
    runtime.block_on(async {
        let bell = AsyncBell::new(bell.try_clone()?)?;
        let hub = Rc::new(hub::Hub::new(front, adopted, pools, config));
        let (reporter, routes) = service::routes()?;
        let serve = async {
            listener::accept(listener, hub.clone(), routes, config.max_connections, config.max_resets).await?;
            hub.drained().await;
            Ok(())
        };
        tokio::select! {
            collected = collector::run(&hub, &bell, reporter, config.spin) => collected.map(|never| match never {}),
            watched = waiting::run(&hub, complaint) => watched.map(|never| match never {}),
            served = serve => served,
        }?;
        crash_point!("front.drained");
        if let (_, results @ 1..) = hub.undelivered() {
            tracing::warn!(results, "results that no subscriber fetched are gone");
        }
        Ok(())
    })
}
