use parking_lot::Mutex;

/// A place for a callback that is run without its lock held, so that it may replace itself.
///
/// Calls come from one thread at a time: the driver's.
pub(crate) struct Callback<F>(Mutex<Slot<F>>);

struct Slot<F> {
    callback: Option<F>,
    /// Counts replacements, so that a callback that was replaced while it ran is not put back.
    generation: u64,
    sealed: bool,
}

impl<F> Default for Callback<F> {
    fn default() -> Self {
        Self(Mutex::new(Slot {
            callback: None,
            generation: 0,
            sealed: false,
        }))
    }
}

impl<F> Callback<F> {
    pub(crate) fn set(&self, callback: Option<F>) {
        let mut slot = self.0.lock();
        let unused = if slot.sealed {
            callback
        } else {
            slot.generation += 1;
            std::mem::replace(&mut slot.callback, callback)
        };
        // Foreign code, which may use this very place, may run when it is dropped.
        drop(slot);
        drop(unused);
    }

    pub(crate) fn is_set(&self) -> bool {
        self.0.lock().callback.is_some()
    }

    /// Returns false if there is no callback.
    pub(crate) fn call(&self, run: impl FnOnce(&mut F)) -> bool {
        let (mut callback, generation) = {
            let mut slot = self.0.lock();
            let generation = slot.generation;
            match slot.callback.take() {
                Some(callback) => (callback, generation),
                None => return false,
            }
        };
        run(&mut callback);
        let mut slot = self.0.lock();
        if slot.generation == generation {
            slot.callback = Some(callback);
        } else {
            drop(slot);
            drop(callback);
        }
        true
    }

    /// Drops the callback and every later one.
    pub(crate) fn seal(&self) {
        let mut slot = self.0.lock();
        slot.sealed = true;
        slot.generation += 1;
        let unused = slot.callback.take();
        drop(slot);
        drop(unused);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    type Fun = Box<dyn FnMut() + Send>;

    #[test]
    fn a_callback_may_replace_itself() {
        let place: Arc<Callback<Fun>> = Arc::default();
        let (count, inner) = (Arc::new(Mutex::new(0)), place.clone());
        let counter = count.clone();
        place.set(Some(Box::new(move || {
            *counter.lock() += 1;
            inner.set(None);
        })));
        assert!(place.call(|f| f()));
        assert!(!place.call(|f| f()));
        assert_eq!(*count.lock(), 1);
    }

    #[test]
    fn sealing_drops_what_is_and_what_comes() {
        let held = Arc::new(());
        let holder = |held: Arc<()>| -> Option<Fun> { Some(Box::new(move || drop(held.clone()))) };
        let place: Callback<Fun> = Callback::default();
        place.set(holder(held.clone()));
        assert_eq!(Arc::strong_count(&held), 2);
        place.seal();
        place.set(holder(held.clone()));
        assert_eq!(Arc::strong_count(&held), 1);
        assert!(!place.is_set());
    }

    #[test]
    fn a_callback_that_seals_while_it_runs_is_dropped() {
        let place: Arc<Callback<Fun>> = Arc::default();
        let inner = place.clone();
        place.set(Some(Box::new(move || inner.seal())));
        assert!(place.call(|f| f()));
        assert_eq!(Arc::strong_count(&place), 1);
    }
}
