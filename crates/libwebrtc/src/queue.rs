use std::{
    collections::VecDeque,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use parking_lot::Mutex;

/// A bounded queue between the engine, which pushes, and one stream, which polls. Drops the oldest.
pub(crate) struct Queue<T> {
    capacity: usize,
    state: Mutex<State<T>>,
}

struct State<T> {
    items: VecDeque<T>,
    dropped: u64,
    closed: bool,
    waker: Option<Waker>,
}

impl<T> Queue<T> {
    pub(crate) fn new(capacity: usize) -> Arc<Self> {
        Arc::new(Self {
            capacity,
            state: Mutex::new(State {
                items: VecDeque::new(),
                dropped: 0,
                closed: false,
                waker: None,
            }),
        })
    }

    pub(crate) fn push(&self, item: T) {
        let waker = {
            let mut state = self.state.lock();
            if state.closed {
                return;
            }
            if state.items.len() >= self.capacity {
                state.items.pop_front();
                state.dropped += 1;
            }
            state.items.push_back(item);
            state.waker.take()
        };
        // Foreign code: not under the lock.
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Nothing goes in any more; what is in comes out.
    pub(crate) fn close(&self) {
        let waker = {
            let mut state = self.state.lock();
            state.closed = true;
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    pub(crate) fn poll(&self, cx: &mut Context<'_>) -> Poll<Option<T>> {
        let mut state = self.state.lock();
        match state.items.pop_front() {
            Some(item) => Poll::Ready(Some(item)),
            None if state.closed => Poll::Ready(None),
            None => {
                state.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.state.lock().items.len()
    }

    pub(crate) fn dropped(&self) -> u64 {
        self.state.lock().dropped
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.state.lock().closed
    }
}
