//! A client that was made before a fork works after it, in the parent, the child and the child's child.
//!
//! A program of its own, with no test harness: it forks in the midst of traffic. A child that hangs is ended by an alarm.
#![allow(unsafe_code)]

mod common;

use std::{
    panic::{self, AssertUnwindSafe},
    sync::{
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc,
    },
    thread,
};

use common::{PATIENCE, Server, refusal, soon, until};
use forkring::{
    client::{Client, Results},
    process,
    proto::v1::WorkItem,
};
use nix::{
    sys::wait::{WaitStatus, waitpid},
    unistd::{ForkResult, Pid, alarm, fork},
};
use tokio::sync::oneshot;
use tonic::{Code, transport::Endpoint};

const CHILDREN: usize = 4;
const CALLS: u64 = 100;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

fn item(n: u64) -> WorkItem {
    WorkItem::new("echo", n.to_string()).with_id(n)
}

/// Every kind of call, each checked.
async fn use_it(client: &Client, subscription: &str) {
    for n in 0..CALLS {
        let result = soon("a result", client.call(item(n))).await.expect("a result");
        assert_eq!(result.payload, n.to_string());
    }
    let items = tokio_stream::iter((0..CALLS).map(item));
    let mut results = soon("a stream", client.process(items)).await.expect("a stream");
    assert_eq!(count(&mut results).await, CALLS);
    let subscribed = subscription.to_owned();
    let items = tokio_stream::iter((0..CALLS).map(move |n| item(n).with_subscription(subscribed.as_str())));
    assert_eq!(soon("a receipt", client.submit(items)).await.expect("a receipt").accepted, CALLS);
    let mut results = soon("a stream", client.updates(subscription, CALLS)).await.expect("a stream");
    assert_eq!(count(&mut results).await, CALLS);
}

async fn count(results: &mut Results) -> u64 {
    let mut count = 0;
    while soon("a result", results.message()).await.expect("a result").is_some() {
        count += 1;
    }
    count
}

/// Forks a child that runs this and exits with 0, unless it panics or hangs.
fn fork_child(child: impl FnOnce()) -> Pid {
    // SAFETY: there are other threads, so the child may rely on no lock that one of them can hold. It allocates, which
    // glibc allows after a fork, and uses what it makes itself; it never returns into its parent's frames.
    match unsafe { fork() }.expect("a fork") {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            alarm::set(2 * PATIENCE.as_secs() as u32);
            let ended = panic::catch_unwind(AssertUnwindSafe(child));
            process::exit(u8::from(ended.is_err()));
        }
    }
}

fn assert_fine(child: Pid) {
    assert_eq!(waitpid(child, None).expect("our child"), WaitStatus::Exited(child, 0));
}

/// What a child does with a client and a stream of its parent's.
fn child(client: Client, results: &mut Results, foreign: &Client, n: usize) {
    runtime().block_on(async {
        let parent = nix::unistd::getppid();
        let of_stream = refusal(soon("an error", results.message()).await);
        let of_client = refusal(soon("an error", foreign.call(item(1))).await);
        for (what, (code, reason, message)) in [("stream", of_stream), ("client", of_client)] {
            assert_eq!((code, reason.as_str()), (Code::FailedPrecondition, "FORKED"));
            let wanted = format!("this {what} belongs to process {parent}; open a new one after fork");
            assert!(message.contains(&wanted), "{message}");
        }
        use_it(&client, &format!("child {n}")).await;
    });
    let clone = client.clone();
    let grandchild = fork_child(move || runtime().block_on(use_it(&clone, &format!("grandchild {n}"))));
    assert_fine(grandchild);
    // What is its parent's part of it is only forgotten.
    drop(client);
}

fn main() {
    let main = runtime();
    let server = main.block_on(Server::serve(&["--pool", "echo=echo"]));
    let calls = AtomicU64::new(0);
    let (tell, told) = mpsc::channel();
    let (end, ended) = oneshot::channel::<()>();
    thread::scope(|scope| {
        // A thread whose runtime has the connection, and that uses it all the time.
        let traffic = scope.spawn(|| {
            runtime().block_on(async {
                let client = server.client().await;
                let updates = soon("a stream", client.updates("parent", 1)).await.expect("a stream");
                tell.send((client.clone(), updates)).expect("main waits");
                let call = || async {
                    loop {
                        soon("a result", client.call(item(1))).await.expect("a result");
                        calls.fetch_add(1, Relaxed);
                    }
                };
                tokio::select! {
                    _ = ended => {}
                    _ = async { tokio::join!(call(), call(), call()) } => {}
                }
            });
        });
        let (client, mut updates) = told.recv_timeout(PATIENCE).expect("a client");
        let foreign = {
            let _inside = main.enter();
            let endpoint = Endpoint::from_shared(format!("http://{}", server.addr)).expect("an address");
            Client::from_channel(endpoint.connect_lazy())
        };
        let more = || {
            let before = calls.load(Relaxed);
            main.block_on(until("more traffic", || (calls.load(Relaxed) > before + CALLS).then_some(())));
        };
        let mut children = Vec::new();
        for n in 0..CHILDREN {
            more();
            children.push(fork_child(|| child(client.clone(), &mut updates, &foreign, n)));
        }
        more();
        children.into_iter().for_each(assert_fine);
        more();
        main.block_on(use_it(&client, "main"));
        main.block_on(async {
            let items = tokio_stream::iter([item(7).with_subscription("parent")]);
            assert_eq!(soon("a receipt", client.submit(items)).await.expect("a receipt").accepted, 1);
            assert_eq!(count(&mut updates).await, 1, "the parent's stream is as it was");
            soon("a result", foreign.call(item(1))).await.expect("the parent's own channel is as it was");
        });
        end.send(()).expect("the traffic goes on");
        traffic.join().expect("traffic that goes well");
    });
    main.block_on(server.drain());
    println!("{CHILDREN} children, and a child of each, were forked in traffic: all calls went well");
}
