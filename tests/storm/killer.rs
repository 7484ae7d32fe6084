//! Who kills, stops and restarts: at random, and never for lack of patience.

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use forkring::proto::v1::WorkItem;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    task::{JoinSet, spawn_local},
    time::sleep,
};

use super::{
    chance::Chance,
    common::{
        Files, PATIENCE, Server,
        audit::Copy,
        processes::{Process, children, is_stopped, state},
        server::unique_name,
        soon, until,
    },
    link::{Caller, Link},
    load::Storm,
    tally::Shape,
};

pub const WORKERS: usize = 16;
const SETTINGS: &str = "workers = 16\narena = '2MiB'\nmax_attempts = 255\nmax_message = '512KiB'";
/// A process that is killed younger than this is replaced ever more slowly, which too much of would be no storm.
const SETTLED: Duration = Duration::from_secs(1);

pub struct Killer {
    storm: Rc<Storm>,
    chance: Chance,
    journal: Files,
    pub server: Server,
    /// Kept to the end, because dropping one removes the segment, which is the next one's by then.
    dead: Vec<Server>,
    seen: HashMap<i32, Instant>,
    /// All that were, of all servers.
    pub killed: HashSet<i32>,
    stopped: Vec<(Process, Instant)>,
}

impl Killer {
    pub async fn start(storm: Rc<Storm>, chance: Chance) -> Self {
        let journal = Files::new();
        let server = serve(&unique_name(), &journal).await;
        storm.link.set_addr(&server.addr);
        Killer {
            storm,
            chance,
            journal,
            server,
            dead: Vec::new(),
            seen: HashMap::new(),
            killed: HashSet::new(),
            stopped: Vec::new(),
        }
    }

    pub fn journal(&self) -> PathBuf {
        self.journal.path("journal")
    }

    /// Storms for so long.
    pub async fn rage(&mut self, length: Duration) {
        let begin = Instant::now();
        // Two kills of the whole server, and a drain between them.
        let mut great = [25, 50, 75].map(|percent| length * percent / 100).into_iter().peekable();
        let mut next_is_drain = false;
        // However slow the machine is: it is a storm.
        while begin.elapsed() < length || great.peek().is_some() || !self.is_storm() {
            sleep(self.chance.millis(5, 50)).await;
            self.release_stopped(false);
            if great.next_if(|due| *due <= begin.elapsed()).is_some() {
                if next_is_drain {
                    self.drain_and_restart().await
                } else {
                    self.kill_server().await
                }
                next_is_drain = !next_is_drain;
            } else {
                self.strike();
            }
        }
        self.release_stopped(true);
        mend(&self.storm.link).await;
    }

    fn is_storm(&self) -> bool {
        let tally = self.storm.tally.borrow();
        let least = [("worker", 20), ("front", 2), ("stopped", 5)];
        least.iter().all(|(whom, least)| tally.kills.get(whom).is_some_and(|kills| kills >= least))
    }

    /// Kills or stops somebody.
    fn strike(&mut self) {
        let now = Instant::now();
        let children = self.server.children();
        self.seen.retain(|pid, _| children.iter().any(|child| child.pid == *pid));
        for child in &children {
            self.seen.entry(child.pid).or_insert(now);
        }
        let front = self.chance.percent(12);
        let any_age = self.chance.percent(20);
        let candidates: Vec<_> = children
            .into_iter()
            .filter(|child| is_front(child) == front)
            .filter(|child| any_age || self.seen.get(&child.pid).is_some_and(|seen| now - *seen >= SETTLED))
            .filter(|child| !self.stopped.iter().any(|(stopped, _)| stopped == child))
            .collect();
        let Some(victim) = self.chance.pick(&candidates).cloned() else { return };
        if self.chance.percent(25) {
            if send(&victim, Signal::SIGSTOP) {
                *self.storm.tally.borrow_mut().kills.entry("stopped").or_default() += 1;
                let until = now + if front { self.chance.millis(5, 50) } else { self.chance.millis(20, 400) };
                self.stopped.push((victim, until));
            }
        } else {
            self.kill(&victim);
        }
    }

    fn kill(&mut self, victim: &Process) {
        let front = is_front(victim);
        if front {
            self.storm.link.cut();
        }
        if !send(victim, Signal::SIGKILL) || !self.killed.insert(victim.pid) {
            return;
        }
        self.storm.tally.borrow_mut().killed(if front { "front" } else { "worker" });
        if front {
            let link = self.storm.link.clone();
            spawn_local(async move { mend(&link).await });
        }
    }

    /// Lets those go on that were stopped for long enough, or all of them; some are killed instead.
    fn release_stopped(&mut self, all: bool) {
        let now = Instant::now();
        let due = |(_, until): &mut (Process, Instant)| all || *until <= now;
        let due: Vec<_> = self.stopped.extract_if(.., due).collect();
        for (process, _) in due {
            if !all && self.chance.percent(50) {
                self.kill(&process);
            } else {
                send(&process, Signal::SIGCONT);
            }
        }
    }

    /// Kills the supervisor, and all with it; the next server of that name adopts what it left.
    async fn kill_server(&mut self) {
        // Stopped, it starts nobody whom we do not know.
        self.server.signal(Signal::SIGSTOP);
        until("a supervisor that is stopped", || is_stopped(self.server.pid()).then_some(())).await;
        self.killed.extend(children(self.server.pid()).iter().map(|child| child.pid));
        self.storm.link.cut();
        self.storm.tally.borrow_mut().killed("server");
        self.server.signal(Signal::SIGKILL);
        self.server.ended().await;
        self.stopped.clear();
        self.next().await;
    }

    /// Drains the server in order, but for some workers, and starts another: whatever was accepted is delivered before.
    async fn drain_and_restart(&mut self) {
        self.release_stopped(true);
        let storm = self.storm.clone();
        mend(&storm.link).await;
        // Whoever is not there when it drains gets nothing.
        storm.lasting.set(true);
        self.subscribers().await;
        // Who was answered by a front that has been killed since knows it by now.
        sleep(Duration::from_millis(50)).await;
        self.subscribers().await;
        let family = self.server.children();
        storm.link.cut();
        *storm.tally.borrow_mut().kills.entry("drained").or_default() += 1;
        self.server.signal(Signal::SIGTERM);
        for child in family.iter().filter(|child| !is_front(child)).take(3) {
            sleep(self.chance.millis(0, 5)).await;
            self.kill(child);
        }
        let status = self.server.ended().await;
        self.server.assert_drained(status, &family);
        storm.lasting.set(false);
        self.next().await;
    }

    /// Waits until all subscribers are there to stay.
    async fn subscribers(&self) {
        let begin = Instant::now();
        while !self.storm.is_attached() {
            let (server, storm) = (&self.server, &self.storm);
            let segment = || Copy::read(&server.segment()).map(|segment| (segment.faults(), segment.in_use()));
            let states = || server.children().iter().map(|child| state(child.pid)).collect::<Vec<_>>().join("\n");
            assert!(
                begin.elapsed() < PATIENCE,
                "not all subscribers came: {:?} of {} cuts\n{}\n{:?}",
                storm.attached.borrow(),
                storm.link.cuts(),
                states(),
                segment()
            );
            sleep(Duration::from_millis(2)).await;
        }
    }

    async fn next(&mut self) {
        let next = serve(&self.server.name, &self.journal).await;
        self.storm.link.set_addr(&next.addr);
        self.dead.push(std::mem::replace(&mut self.server, next));
        mend(&self.storm.link).await;
    }

    /// Everything that was accepted has been delivered, or never will be.
    pub async fn settle(&self) {
        let (begin, mut owed, mut since) = (Instant::now(), usize::MAX, Instant::now());
        while owed > 0 && since.elapsed() < PATIENCE / 3 && begin.elapsed() < 2 * PATIENCE {
            let before = owed;
            owed = self.storm.tally.borrow().owed();
            if owed < before {
                since = Instant::now();
            }
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// No record leaks: as many calls are taken at once as there are items, and one more is not.
    pub async fn assert_capacity(&mut self, capacity: usize) {
        let caller = Caller::new(&self.storm.link);
        let begin = Instant::now();
        loop {
            let go = format!("go{}", self.chance.next());
            let mut calls = JoinSet::new();
            for _ in 0..=capacity {
                let item = self.storm.item(Shape::Call, &mut Chance::new(0));
                let item = WorkItem { payload: Default::default(), ..item };
                let (client, item) = (caller.client.clone(), item.with_metadata("until", self.journal.name(&go)));
                calls.spawn(async move { client.call(item).await });
            }
            // Nobody is answered but who is refused.
            let refused = soon("a refusal", calls.join_next()).await;
            self.journal.make(&go);
            let answers = soon("the answers", calls.join_all()).await;
            assert!(refused.expect("a call").expect("a task").is_err(), "more were taken than fit");
            match answers.iter().filter(|answer| answer.is_err()).count() {
                0 => return,
                // What was abandoned may be in work still.
                refused => assert!(begin.elapsed() < PATIENCE, "{refused} items of {capacity} are lost"),
            }
        }
    }

    /// Ends the last server in order, and looks at what all of them said.
    pub async fn end(self) {
        for log in self.dead.iter().map(Server::log).chain([self.server.drain().await]) {
            for bad in ["panicked at src/", "ERROR", "no subscriber fetched"] {
                assert!(!log.contains(bad), "{log}");
            }
        }
    }
}

async fn serve(name: &str, journal: &Files) -> Server {
    Server::handlers_with(name, &["trace"], SETTINGS, &[("JOURNAL", &journal.name("journal"))]).await
}

fn is_front(process: &Process) -> bool {
    process.name == "forkring-front"
}

/// Whether it was still there.
fn send(process: &Process, signal: Signal) -> bool {
    kill(Pid::from_raw(process.pid), signal).is_ok()
}

/// Waits until a new connection is served.
async fn mend(link: &Arc<Link>) {
    let cuts = link.cuts();
    let begin = Instant::now();
    // None of the tally's: it need not be there, only be answered.
    while let Err(status) = Caller::new(link).client.updates("nobody", 0).await {
        assert!(begin.elapsed() < PATIENCE, "no front came: {status}");
        if link.cuts() != cuts {
            return;
        }
        sleep(Duration::from_millis(2)).await;
    }
    link.mended(cuts);
}
