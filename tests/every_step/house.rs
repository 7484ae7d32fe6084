//! A server that does a bit of everything from its start to its end, while one of its processes is killed.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    fmt, fs,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use forkring::{
    client::Client,
    proto::v1::{WorkItem, WorkResult},
    segment,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::task::JoinHandle;
use tonic::{Code, Status};

use crate::{
    common::{
        Files, PATIENCE, Server,
        audit::{self, CLAIMED, Copy, DONE, READY, Word},
        processes::{is_alive, is_stopped},
        server::{Left, serve_command, unique_name},
        soon, until,
    },
    ledger::{Ledger, Wanted},
    program,
};

/// Pools, and the numbers of their workers. Behind them comes `many`, see [`program`].
const POOLS: [(&str, u64); 3] = [("echo", 2), ("die", 2), ("hold", 2)];
/// The subscription that has a subscriber all the time, and one that gets it late.
const MINE: &str = "mine";
const LATER: &str = "later";
/// The workers of `many`, and who forks them.
const MANY: [&str; 2] = ["forkring-w6", "forkring-w7"];
const NURSERY: &str = "forkring-n3";
/// Workers that may have many items in hand.
const HOLDERS: [u64; 1] = [6];
/// About the largest payload, and an arena that it only fits if little else is in it.
const LARGEST: usize = (512 << 10) - 64;
const ARENA: &str = "576KiB";

/// Reads the name of a folder and dies with its worker unless that is there already. It makes it first, so the item's
/// next worker survives, but nobody can make one in `/proc`.
const DIE: &str = "read -r path
[ -d \"$path\" ] && echo survived && exit
mkdir \"$path\" 2>/dev/null
kill -KILL $PPID
exec sleep 60
";

/// Says that it has begun, and waits until there is a file of the name it reads.
const HOLD: &str = "read -r path
echo > \"$path.began\"
while [ ! -e \"$path\" ]; do sleep 0.005; done
echo held
";

/// Since when one has been lost that had something in the segment. A file of this name is made then.
pub const FRONT_LOST: &str = "front-lost";
pub const WORKER_LOST: &str = "worker-lost";

/// A process, and whether it is one that has come since something was lost.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Who {
    pub name: &'static str,
    pub since: Option<&'static str>,
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.since.map_or(Ok(()), |since| write!(f, "{since}:"))?;
        f.write_str(self.name)
    }
}

/// A process, and where it dies.
#[derive(Clone)]
pub struct Kill {
    pub who: Who,
    pub point: String,
    pub n: u64,
}

impl Kill {
    /// For the environment.
    fn spec(&self) -> String {
        format!("{}/{}:{}", self.who.name, self.point, self.n)
    }
}

impl fmt::Display for Kill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}:{}", self.who, self.point, self.n)
    }
}

/// See the module.
pub struct House {
    name: String,
    files: Files,
    kill: Option<Kill>,
    server: RefCell<Option<Server>>,
    left: RefCell<Option<Left>>,
    ledger: Ledger,
    /// A client of the server as it is now.
    client: RefCell<Option<Client>>,
    /// The front was killed by the test itself.
    front_was_killed: Cell<bool>,
    later: Cell<bool>,
    draining: Cell<bool>,
}

type Call = JoinHandle<Result<WorkResult, Status>>;

/// Until the next look.
async fn pause() {
    tokio::time::sleep(Duration::from_millis(5)).await;
}

fn pattern(id: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|at| (at * (id + 3) % 251) as u8).collect()
}

impl House {
    /// Lives a server's life, with a death in it; whether it came to that.
    pub async fn die_in(kill: &Kill) -> bool {
        let house = House::new(Some(kill.clone()));
        let mut command = house.command(kill.who);
        command.env("FORKRING_CRASH", kill.spec());
        command.env("FORKRING_CRASHED", house.files.path("crashed"));
        house.live(command).await;
        house.was_killed()
    }

    /// The same with a list of what is passed that would count for a death.
    pub async fn list_passes(who: Who, passes: PathBuf) {
        let house = House::new(None);
        let mut command = house.command(who);
        command.env("FORKRING_PASSES", passes);
        house.live(command).await;
    }

    fn new(kill: Option<Kill>) -> Self {
        let files = Files::new();
        fs::write(files.path("die.sh"), DIE).expect("a file");
        fs::write(files.path("hold.sh"), HOLD).expect("a file");
        files.make("app.py");
        House {
            name: unique_name(),
            files,
            kill,
            server: RefCell::default(),
            left: RefCell::default(),
            ledger: Ledger::default(),
            client: RefCell::default(),
            front_was_killed: Cell::default(),
            later: Cell::default(),
            draining: Cell::default(),
        }
    }

    async fn live(&self, command: Command) {
        self.start(command).await;
        tokio::select! {
            biased;
            () = self.day() => {}
            () = self.keep() => unreachable!("it goes on for ever"),
            () = self.subscribe(MINE) => unreachable!("it goes on for ever"),
            () = self.subscribe(LATER) => unreachable!("it goes on for ever"),
        }
    }

    /// The server, in whose crash points those count that `who` passes.
    fn command(&self, who: Who) -> Command {
        let mut command = self.plain_command();
        if let Some(since) = who.since {
            command.env("FORKRING_SINCE", self.files.path(since));
        }
        command
    }

    fn plain_command(&self) -> Command {
        let pools = POOLS.map(|(name, workers)| match name {
            // Over a stream large ones come in parts.
            "echo" => format!("echo:{workers}=echo:2KiB"),
            _ => format!("{name}:{workers}=exec:sh {}", self.files.name(&format!("{name}.sh"))),
        });
        let mut command = serve_command(&self.name, &["--arena", ARENA, "--capacity", "32", "--spin", "1ms"]);
        command.args(pools.iter().flat_map(|pool| ["--pool", pool]));
        program::interpret(&mut command, &self.files.name("app.py"));
        command.args(["--parent", &std::process::id().to_string()]);
        command
    }

    /// Starts a server; again, without a crash, if it crashed.
    async fn start(&self, command: Command) {
        let server = match Server::try_start(self.name.clone(), command, Files::new()).await {
            Ok(server) => server,
            Err(ended) => self.start_again(ended).await,
        };
        *self.client.borrow_mut() = Some(Client::connect_lazy(&server.addr).expect("an address"));
        *self.server.borrow_mut() = Some(server);
    }

    /// The supervisor was killed: all of its children are gone with it, and another takes over.
    async fn start_again(&self, mut dead: Server) -> Server {
        self.has_crashed("supervisor", &dead.log());
        self.left.replace(Some(dead.leave()));
        until("the end of all", || segment::inspect(&self.name).map_or(true, |info| !info.alive).then_some(())).await;
        Server::start(self.name.clone(), self.plain_command(), Files::new()).await
    }

    /// Whoever died was to die.
    #[track_caller]
    fn has_crashed(&self, who: &str, log: &str) {
        assert!(self.kills(who) && self.was_killed(), "the {who} ended by itself\n{log}");
    }

    fn was_killed(&self) -> bool {
        self.files.path("crashed").exists()
    }

    fn kills(&self, who: &str) -> bool {
        self.kill.as_ref().is_some_and(|kill| kill.who.name == who)
    }

    /// Sees to it that there is a server.
    async fn keep(&self) {
        loop {
            let ended = self.server.borrow_mut().as_mut().is_some_and(|server| server.has_ended().is_some());
            if ended && !self.draining.get() {
                self.replace().await;
            }
            pause().await;
        }
    }

    async fn replace(&self) {
        let dead = self.server.borrow_mut().take().expect("a server");
        let server = self.start_again(dead).await;
        *self.client.borrow_mut() = Some(Client::connect_lazy(&server.addr).expect("an address"));
        *self.server.borrow_mut() = Some(server);
    }

    fn client(&self) -> Client {
        self.client.borrow().clone().expect("a server was started")
    }

    /// A connection may break only if the other end of it was killed.
    #[track_caller]
    fn broke(&self, status: &Status) {
        let clear = [Code::Unavailable, Code::Unknown, Code::Internal, Code::Cancelled].contains(&status.code());
        let killed = self.kills("front") || self.kills("supervisor");
        assert!(clear && (killed || self.front_was_killed.get() || self.draining.get()), "{status}");
    }

    /// Receives what comes over a subscription, for as long as it is polled. Over a connection of its own, so that the
    /// kernel, when it closes the connection of a killed front, still delivers what that had written: it resets one on
    /// which the front has something to read, and then what is under way is lost.
    async fn subscribe(&self, name: &str) {
        loop {
            let addr = self.server.borrow().as_ref().map(|server| server.addr.clone());
            if let Some(addr) = addr.filter(|_| name == MINE || self.later.get()) {
                let client = Client::connect_lazy(&addr).expect("an address");
                match client.updates(name, 0).await {
                    Ok(mut results) => loop {
                        match results.message().await {
                            Ok(Some(result)) => self.ledger.receive(result),
                            Ok(None) => break,
                            Err(status) => break self.broke(&status),
                        }
                    },
                    Err(status) => self.broke(&status),
                }
            }
            pause().await;
        }
    }

    /// Submits items until there is a receipt for all. Those of an attempt that broke off may have been accepted.
    async fn submit(&self, items: impl Fn() -> Vec<WorkItem>) -> Vec<u64> {
        loop {
            let items = items();
            let ids: Vec<_> = items.iter().map(|item| item.id).collect();
            match soon("a receipt", self.client().submit(tokio_stream::iter(items))).await {
                Ok(receipt) => {
                    assert_eq!((receipt.accepted, receipt.rejected), (ids.len() as u64, 0));
                    self.ledger.accept(ids.iter().copied());
                    return ids;
                }
                Err(status) => self.broke(&status),
            }
            pause().await;
        }
    }

    /// Calls until there is an answer.
    async fn call(&self, item: WorkItem) -> WorkResult {
        loop {
            match soon("an answer", self.client().call(item.clone())).await {
                Ok(result) => {
                    self.ledger.check(&result);
                    return result;
                }
                Err(status) => self.broke(&status),
            }
            pause().await;
        }
    }

    fn spawn_call(&self, item: WorkItem) -> Call {
        let client = self.client();
        tokio::spawn(async move { client.call(item).await })
    }

    /// A call that has come so far.
    async fn call_until(&self, item: WorkItem, phase: u64) -> Call {
        let id = item.id;
        let call = self.spawn_call(item);
        until("a call", || (self.phase(id) == Some(phase) || call.is_finished()).then_some(())).await;
        call
    }

    fn echo(&self, len: usize, priority: u32) -> WorkItem {
        let bytes = pattern(len as u64, len);
        let id = self.ledger.issue(Wanted::Bytes(bytes.clone()));
        WorkItem::new("echo", bytes).with_id(id).with_priority(priority).with_subscription(MINE)
    }

    fn hold(&self, until: &str) -> WorkItem {
        let id = self.ledger.issue(Wanted::Bytes(b"held\n".to_vec()));
        WorkItem::new("hold", self.files.name(until) + "\n").with_id(id).with_subscription(MINE)
    }

    fn expired(&self) -> WorkItem {
        let id = self.ledger.issue(Wanted::Expired);
        WorkItem::new("hold", "").with_id(id).with_timeout(Duration::ZERO).with_subscription(MINE)
    }

    /// One of several that a worker has in hand, until there is a file of that name.
    fn many(&self, until: &str) -> WorkItem {
        let bytes = until.as_bytes().to_vec();
        let id = self.ledger.issue(Wanted::Bytes(bytes.clone()));
        WorkItem::new("many", bytes).with_id(id).with_subscription(MINE).with_metadata("until", self.files.name(until))
    }

    fn die(&self, path: &str, wanted: Wanted) -> WorkItem {
        let id = self.ledger.issue(wanted);
        WorkItem::new("die", format!("{path}\n")).with_id(id).with_subscription(MINE)
    }

    fn die_once(&self) -> WorkItem {
        let item = self.die("", Wanted::Bytes(b"survived\n".to_vec()));
        WorkItem { payload: (self.files.name(&format!("died-{}", item.id)) + "\n").into(), ..item }
    }

    /// The phase of the item with this id, if it is in use.
    fn phase(&self, id: u64) -> Option<u64> {
        self.in_use().get(&id).map(|word| word.phase)
    }

    /// From its load to its drain.
    async fn day(&self) {
        tokio::join!(
            self.submits(),
            self.calls(),
            self.stream(&[3, 30_000, 300, 9_000, 30_000]),
            self.deaths(),
            self.cancels(),
            self.manifold()
        );
        self.reload().await;
        self.lose_the_front().await;
        self.lose_a_worker().await;
        self.later.set(true);
        self.settle().await;
        self.drain().await;
    }

    async fn submits(&self) {
        for lens in [[10, 64, 65], [5_000, 1, 20_000], [0, 40_000, 100]] {
            self.submit(|| (0..3).map(|i| self.echo(lens[i as usize], i)).collect()).await;
        }
    }

    async fn calls(&self) {
        for len in [10, 65, 30_000, 5] {
            self.call(self.echo(len, 3)).await;
        }
    }

    async fn stream(&self, lens: &[usize]) {
        'again: loop {
            let items: Vec<_> = lens.iter().map(|len| self.echo(*len, 1)).collect();
            let count = items.len();
            let mut results = match self.client().process(tokio_stream::iter(items)).await {
                Ok(results) => results,
                Err(status) => {
                    self.broke(&status);
                    pause().await;
                    continue;
                }
            };
            let (mut parts, mut ended) = (BTreeMap::<u64, (u32, Vec<u8>)>::new(), 0);
            while ended < count {
                match soon("a result", results.message()).await {
                    Ok(result) => {
                        let mut result = result.expect("a result for each item");
                        let (attempts, bytes) = parts.entry(result.id).or_default();
                        if result.attempts != std::mem::replace(attempts, result.attempts) {
                            // What came before of it is void.
                            bytes.clear();
                        }
                        assert_eq!(bytes.len(), result.sequence as usize * (2 << 10), "{} is not in order", result.id);
                        bytes.extend_from_slice(&result.payload);
                        if !result.partial {
                            result.payload = std::mem::take(bytes).into();
                            self.ledger.check(&result);
                            ended += 1;
                        }
                    }
                    Err(status) => {
                        self.broke(&status);
                        continue 'again;
                    }
                }
            }
            return;
        }
    }

    async fn deaths(&self) {
        self.submit(|| vec![self.die_once(), self.die("/proc/never", Wanted::Crashed)]).await;
    }

    /// Waits until these are in work; or wait for that, if somebody was killed: then there may be twice as many.
    async fn held(&self, ids: &[u64]) {
        let is_held = |id: &u64| match self.phase(*id) {
            Some(READY) => self.was_killed(),
            phase => phase == Some(CLAIMED) || self.is_over(*id),
        };
        until("items in work", || ids.iter().all(is_held).then_some(())).await;
    }

    /// Items that are all in hand at once, one of them of the worker that takes no more.
    async fn manifold(&self) {
        let holder = Pid::from_raw(self.stop(MANY[0]).await);
        let one = self.submit(|| vec![self.many("many")]).await;
        self.held(&one).await;
        let _ = kill(holder, Signal::SIGCONT);
        let others = self.submit(|| (0..3).map(|_| self.many("many")).collect()).await;
        self.held(&others).await;
        self.files.make("many");
    }

    /// The app has changed: nursery and workers make room for others, those with items in hand when they are done.
    async fn reload(&self) {
        let find = || [NURSERY, MANY[0], MANY[1]].map(|name| self.find(name));
        let before = find();
        let ids = self.submit(|| (0..4).map(|_| self.many("reloaded")).collect()).await;
        self.held(&ids).await;
        self.files.make("app.py");
        until("another nursery", || find()[0].filter(|nursery| Some(*nursery) != before[0])).await;
        self.files.make("reloaded");
        let are_others = || find().iter().zip(&before).all(|(now, before)| now.is_some() && now != before);
        until("other workers", || are_others().then_some(())).await;
    }

    /// Calls that go away: two in work and one that waits.
    async fn cancels(&self) {
        'again: loop {
            let items = [1, 2, 3].map(|n| self.hold(&format!("cancelled-{n}")));
            let ids = items.each_ref().map(|item| item.id);
            let calls = items.map(|item| self.spawn_call(item));
            let end = loop {
                let phases = ids.map(|id| self.phase(id));
                let count = |phase| phases.iter().filter(|seen| **seen == Some(phase)).count();
                if (count(CLAIMED), count(READY)) == (2, 1) {
                    break true;
                }
                if calls.iter().any(JoinHandle::is_finished) {
                    break false;
                }
                pause().await;
            };
            if end {
                // The one that waits first, or it would be taken.
                let waits = ids.map(|id| self.phase(id) == Some(READY));
                for waiting in [true, false] {
                    for (call, _) in calls.iter().zip(waits).filter(|(_, waits)| *waits == waiting) {
                        call.abort();
                    }
                    if waiting {
                        until("a cancelled item", || {
                            (!ids.iter().any(|id| self.phase(*id) == Some(READY))).then_some(())
                        })
                        .await;
                    }
                }
            } else {
                calls.iter().for_each(JoinHandle::abort);
            }
            for call in calls {
                match call.await {
                    Ok(Err(status)) => self.broke(&status),
                    Ok(Ok(result)) => panic!("{result:?} of an item that is held"),
                    Err(_) => {}
                }
            }
            if end {
                return;
            }
            continue 'again;
        }
    }

    /// The pid of a child that lives, if it does.
    fn find(&self, name: &str) -> Option<i32> {
        let server = self.server.borrow();
        server.as_ref()?.children().into_iter().find(|child| child.name == name).map(|child| child.pid)
    }

    /// Makes a child stand still; its pid. If it has died by itself instead, then its successor.
    async fn stop(&self, name: &str) -> i32 {
        loop {
            let pid = until(name, || self.find(name)).await;
            let _ = kill(Pid::from_raw(pid), Signal::SIGSTOP);
            until("one that stands still", || (is_stopped(pid) || !is_alive(pid)).then_some(())).await;
            if is_stopped(pid) {
                return pid;
            }
        }
    }

    /// Kills a child that stands still, so that whoever passes a point since then is another, and waits for that.
    async fn lose(&self, name: &str, pid: i32, since: &str) {
        self.files.make(since);
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        until("another", || self.find(name).filter(|other| *other != pid)).await;
    }

    /// The front is killed while there are items of each kind in each phase.
    async fn lose_the_front(&self) {
        let ended = self.many("ended");
        let ends = ended.id;
        let (done, in_work) =
            (self.call_until(ended, CLAIMED).await, self.call_until(self.hold("held"), CLAIMED).await);
        let held = self.submit(|| vec![self.hold("held")]).await;
        self.held(&held).await;
        self.submit(|| vec![self.hold("held"), self.expired(), self.hold("held")]).await;
        let waiting = self.call_until(self.hold("held"), READY).await;
        self.submit_for_later().await;

        self.front_was_killed.set(true);
        let front = self.stop("forkring-front").await;
        // A call that is done, and whose caller has not been told.
        self.files.make("ended");
        until("a call that is done", || (self.phase(ends) != Some(CLAIMED)).then_some(())).await;
        self.lose("forkring-front", front, FRONT_LOST).await;
        self.files.make("held");
        for call in [done, in_work, waiting] {
            match soon("an answer", call).await.expect("a task") {
                Ok(result) => self.ledger.check(&result),
                Err(status) => self.broke(&status),
            }
        }
        self.call(self.echo(7, 0)).await;
    }

    /// A worker is killed while results of its wait for a subscriber, and items for its successor.
    async fn lose_a_worker(&self) {
        let other = self.stop("forkring-w1").await;
        self.submit_for_later().await;
        let worker = self.stop("forkring-w0").await;
        let waiting = self.submit(|| [10, 30_000].map(|len| self.echo(len, 0)).into()).await;
        self.lose("forkring-w0", worker, WORKER_LOST).await;
        until("what waited", || waiting.iter().all(|id| self.is_over(*id)).then_some(())).await;
        let _ = kill(Pid::from_raw(other), Signal::SIGCONT);
    }

    /// Has results that nobody fetches yet.
    async fn submit_for_later(&self) {
        let done = self.submit(|| [10, 5_000].map(|len| self.echo(len, 0).with_subscription(LATER)).into()).await;
        until("results", || done.iter().all(|id| self.phase(*id) == Some(DONE)).then_some(())).await;
    }

    fn is_over(&self, id: u64) -> bool {
        !self.ledger.missing().contains(&id)
    }

    /// All that was accepted comes, once, and then nothing is left.
    async fn settle(&self) {
        self.delivered().await;
        self.files.make("go");
        // A fresh item goes through each lane, and takes stale hints with it.
        for priority in 0..4 {
            self.call(self.echo(20, priority)).await;
            self.call(self.hold("go").with_priority(priority)).await;
            self.call(self.many("go").with_priority(priority)).await;
            let here = self.files.name(".");
            self.call(self.die(&here, Wanted::Bytes(b"survived\n".to_vec())).with_priority(priority)).await;
        }
        self.at_rest().await;
        // And no memory leaked: the largest item fits, at each worker while the other stands still.
        for number in [0, 1] {
            let other = Pid::from_raw(self.stop(&format!("forkring-w{}", 1 - number)).await);
            let result = self.call(self.echo(LARGEST, 0)).await;
            // Each has sent partial results, whoever was faster before.
            self.stream(&[9_000]).await;
            let _ = kill(other, Signal::SIGCONT);
            assert_eq!(result.worker, number);
        }
        self.at_rest().await;
    }

    async fn delivered(&self) {
        self.delivered_but(0).await;
    }

    /// All that was accepted has come, but for so many.
    async fn delivered_but(&self, gone: usize) {
        let begin = Instant::now();
        while self.ledger.missing().len() > gone {
            let missing = self.ledger.missing();
            assert!(
                begin.elapsed() < PATIENCE,
                "accepted and not delivered: {missing:?}; in use: {:#?}",
                self.in_use()
            );
            pause().await;
        }
    }

    /// The items that are in use, by their ids.
    fn in_use(&self) -> BTreeMap<u64, Word> {
        let copy = self.server.borrow().as_ref().and_then(|server| Copy::read(&server.segment()).ok());
        let Some(copy) = copy else { return BTreeMap::new() };
        copy.in_use().into_iter().map(|(item, word)| (copy.id(item), word)).collect()
    }

    async fn at_rest(&self) {
        let begin = Instant::now();
        loop {
            let faults = match &*self.server.borrow() {
                Some(server) => audit::faults_at_rest(server, &HOLDERS),
                None => vec!["no server".to_owned()],
            };
            if faults.is_empty() {
                return;
            }
            assert!(begin.elapsed() < PATIENCE, "not at rest: {faults:#?}");
            pause().await;
        }
    }

    /// It ends in order, with all that was accepted. Only if the front dies now it takes the subscribers along, and what
    /// they have not got is counted.
    async fn drain(&self) {
        let held = self.submit(|| vec![self.hold("end"), self.many("end"), self.many("end"), self.echo(50, 2)]).await;
        self.held(&held[..3]).await;
        self.draining.set(true);
        loop {
            let family = self.server.borrow().as_ref().map(Server::children).unwrap_or_default();
            if let Some(server) = &*self.server.borrow() {
                server.signal(Signal::SIGTERM);
            }
            self.files.make("end");
            let status = until("its end", || self.server.borrow_mut().as_mut()?.has_ended()).await;
            if status.code() == Some(0) {
                let server = self.server.borrow_mut().take().expect("a server");
                server.assert_drained(status, &family);
                let log = server.log();
                let gone = log.lines().find_map(|line| line.split("are gone results=").nth(1)?.parse().ok());
                let gone: usize = gone.filter(|_| log.contains("draining") && self.kills("front")).unwrap_or(0);
                // The last of it may be in the socket still.
                self.delivered_but(gone).await;
                return;
            }
            self.replace().await;
            self.delivered().await;
        }
    }
}
