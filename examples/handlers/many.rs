//! A handler that has many items in hand at once, as one on an event loop does: it goes on with each as far as that can go, and
//! sleeps when none can.

use std::{io, path::Path, time::Duration};

use forkring::{
    Failure,
    handler::ReplyError,
    sdk::{Attached, OpenItem},
};

use super::items::{note, number};

/// How many at once.
const MOST: usize = 8;

/// An item on its way.
struct Job {
    open: OpenItem,
    /// How many parts are left to send.
    parts: usize,
}

/// What is to be done with it next.
enum Next {
    /// Something will come: credit or a cancel, which ring the bell.
    Wait,
    /// Its file will come, which rings nothing.
    Look,
    End(Result<(), Failure>),
    /// Forget it.
    Drop,
}

impl Job {
    fn begin(open: OpenItem) -> io::Result<Self> {
        let item = open.item();
        let parts = item.metadata("parts").map_or(0, |_| number(&item).unwrap_or(0));
        note(&item, "journal", &format!("{} began in {}", item.id(), std::process::id()))?;
        Ok(Job { open, parts })
    }

    /// False: not yet.
    fn send_part(&mut self) -> Result<bool, ReplyError> {
        let mut reply = self.open.reply();
        reply.clear();
        reply.write(&[b'x'; 1000])?;
        reply.try_send()
    }

    /// Echoes, once there is the file that the metadata names; before that, if the metadata says so, it sends as many parts
    /// as the payload says. Or drops the item, or takes no notice of a cancel.
    fn go_on(&mut self) -> Next {
        let item = self.open.item();
        if item.is_cancelled() && item.metadata("stubborn").is_none() {
            let _ = note(&item, "journal", "cancelled");
            let late = item.remaining() == Some(Duration::ZERO);
            return Next::End(Err(if late { Failure::deadline() } else { Failure::cancelled() }));
        }
        while self.parts > 0 {
            match self.send_part() {
                Ok(true) => self.parts -= 1,
                Ok(false) => return Next::Wait,
                Err(error) => return Next::End(Err(error.into())),
            }
            let _ = note(&self.open.item(), "sent", "part");
        }
        let item = self.open.item();
        if item.metadata("until").is_some_and(|until| !Path::new(until).exists()) {
            return Next::Look;
        }
        if item.metadata("drop").is_some() {
            return Next::Drop;
        }
        let payload = item.payload().to_vec();
        Next::End(self.open.reply().write(&payload).map_err(Failure::from))
    }
}

/// Until the server stops.
pub fn work(worker: &mut Attached) -> io::Result<()> {
    let mut jobs: Vec<Job> = Vec::new();
    loop {
        while let Some(item) = (jobs.len() < MOST).then(|| worker.take()).flatten() {
            jobs.push(Job::begin(item)?);
        }
        if worker.is_stopping() && jobs.is_empty() {
            return Ok(());
        }
        // From here on the bell rings for whatever is not seen by the look at the jobs.
        let sleeps = worker.arm(jobs.len() < MOST);
        let mut waits = None;
        let mut has_ended = false;
        for mut job in std::mem::take(&mut jobs) {
            match job.go_on() {
                next @ (Next::Wait | Next::Look) => {
                    if matches!(next, Next::Look) {
                        waits = Some(Duration::from_millis(1));
                    }
                    jobs.push(job);
                    continue;
                }
                Next::End(Ok(())) => job.open.complete(),
                Next::End(Err(failure)) => job.open.fail(&failure),
                Next::Drop => drop(job),
            }
            has_ended = true;
        }
        match waits {
            _ if !sleeps || has_ended => {}
            Some(time) => worker.bell().wait_at_most(time)?,
            None => worker.bell().wait()?,
        }
        worker.disarm()?;
    }
}
