//! A window over what is in flight, by items and by bytes: it bounds the memory of the demo, and with it how long items
//! queue, so that the latencies mean something.

use std::sync::{Condvar, Mutex, MutexGuard};

/// See the module.
#[derive(Debug)]
pub struct Window {
    most_items: u32,
    most_bytes: u64,
    inside: Mutex<Inside>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Inside {
    items: u32,
    bytes: u64,
    closed: bool,
}

impl Window {
    /// A window of so many items and bytes. One item always fits.
    pub fn new(most_items: u32, most_bytes: u64) -> Self {
        Self { most_items, most_bytes, inside: Mutex::default(), changed: Condvar::new() }
    }

    /// Waits for room; `false` when the window was closed.
    pub fn enter(&self, bytes: u64) -> bool {
        let full = |inside: &mut Inside| {
            let fits = inside.items < self.most_items && inside.bytes.saturating_add(bytes) <= self.most_bytes;
            !inside.closed && inside.items > 0 && !fits
        };
        let waited = self.changed.wait_while(self.lock(), full);
        let mut inside = waited.unwrap_or_else(|poisoned| poisoned.into_inner());
        if inside.closed {
            return false;
        }
        inside.items += 1;
        inside.bytes += bytes;
        true
    }

    /// Makes room.
    pub fn leave(&self, bytes: u64) {
        let mut inside = self.lock();
        inside.items = inside.items.saturating_sub(1);
        inside.bytes = inside.bytes.saturating_sub(bytes);
        drop(inside);
        // Not one: the one that is woken may wait for more room than another.
        self.changed.notify_all();
    }

    /// Lets nobody in any more.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        // Counters are whole at every point.
        self.inside.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread};

    use super::*;

    /// Enters from another thread; the channel gives the answer.
    fn enter(window: &Window, bytes: u64, then: impl FnOnce(&mpsc::Receiver<bool>)) {
        thread::scope(|scope| {
            let (sender, receiver) = mpsc::channel();
            scope.spawn(move || sender.send(window.enter(bytes)));
            then(&receiver);
        });
    }

    #[test]
    fn one_item_fits_whatever_its_size() {
        assert!(Window::new(1, 10).enter(100));
    }

    #[test]
    fn a_full_window_lets_in_when_one_leaves() {
        for (items, bytes) in [(2, 100), (9, 10)] {
            let window = Window::new(items, bytes);
            assert!(window.enter(5) && window.enter(5));
            enter(&window, 5, |entered| {
                assert!(entered.try_recv().is_err(), "there is no room yet");
                window.leave(5);
                assert_eq!(entered.recv(), Ok(true));
            });
        }
    }

    #[test]
    fn a_closed_window_lets_nobody_in() {
        let window = Window::new(1, 1);
        assert!(window.enter(1));
        enter(&window, 1, |entered| {
            window.close();
            assert_eq!(entered.recv(), Ok(false));
        });
        window.leave(1);
        assert!(!window.enter(1));
    }
}
