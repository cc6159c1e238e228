use std::{
    fmt,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
};

use parking_lot::Mutex;

use crate::{
    audio_source::native::NativeAudioSource, encoded_audio::EncodedAudioFrame,
    media_stream_track::RtcTrackState, playout::PlayoutStats, queue::Queue,
};

/// An audio track, local (with a source) or remote.
///
/// Unlike the genuine engine's, a remote track stands for one publication: when the server gives
/// the same media section to another one, the receiver gets a new track and the old one ends, so
/// that nobody's audio can come out of somebody else's track.
#[derive(Clone)]
pub struct RtcAudioTrack {
    inner: Arc<Inner>,
}

struct Inner {
    id: String,
    enabled: AtomicBool,
    source: Option<NativeAudioSource>,
    outlets: Mutex<Outlets>,
    /// Of the last stream that decoded it.
    playout: Mutex<Option<PlayoutStats>>,
}

/// Where a remote track's packets go.
struct Outlets {
    ended: bool,
    /// End-to-end encrypted, which this engine can't undo.
    barred: bool,
    queues: Vec<Weak<Queue<EncodedAudioFrame>>>,
}

impl RtcAudioTrack {
    pub(crate) fn new(id: String, source: Option<NativeAudioSource>) -> Self {
        Self {
            inner: Arc::new(Inner {
                id,
                enabled: AtomicBool::new(true),
                source,
                outlets: Mutex::new(Outlets {
                    ended: false,
                    barred: false,
                    queues: Vec::new(),
                }),
                playout: Mutex::default(),
            }),
        }
    }

    pub fn id(&self) -> String {
        self.inner.id.clone()
    }

    pub fn enabled(&self) -> bool {
        self.inner.enabled.load(Ordering::Relaxed)
    }

    /// A disabled local track sends nothing, a disabled remote one drops what arrives.
    /// Returns whether the value changed.
    pub fn set_enabled(&self, enabled: bool) -> bool {
        self.inner.enabled.swap(enabled, Ordering::Relaxed) != enabled
    }

    pub fn state(&self) -> RtcTrackState {
        match self.inner.outlets.lock().ended {
            true => RtcTrackState::Ended,
            false => RtcTrackState::Live,
        }
    }

    pub(crate) fn source(&self) -> Option<&NativeAudioSource> {
        self.inner.source.as_ref()
    }

    /// Nothing comes out from now on, and streams end: what arrives is encrypted.
    pub(crate) fn bar(&self) {
        self.inner.outlets.lock().barred = true;
        self.end();
    }

    pub(crate) fn is_barred(&self) -> bool {
        self.inner.outlets.lock().barred
    }

    pub(crate) fn set_playout(&self, stats: PlayoutStats) {
        *self.inner.playout.lock() = Some(stats);
    }

    pub(crate) fn playout(&self) -> Option<PlayoutStats> {
        *self.inner.playout.lock()
    }

    /// Copies of what arrives go to `queue` until the track ends; on an ended one, it is closed.
    pub(crate) fn attach(&self, queue: &Arc<Queue<EncodedAudioFrame>>) {
        let mut outlets = self.inner.outlets.lock();
        if !outlets.ended {
            outlets.queues.retain(|queue| queue.strong_count() > 0);
            outlets.queues.push(Arc::downgrade(queue));
            return;
        }
        drop(outlets);
        queue.close();
    }

    pub(crate) fn deliver(&self, frame: EncodedAudioFrame) {
        if !self.enabled() {
            return;
        }
        // Upgraded first: waking a consumer is foreign code and must not run under the lock.
        let queues: Vec<_> = self
            .inner
            .outlets
            .lock()
            .queues
            .iter()
            .filter_map(Weak::upgrade)
            .collect();
        for queue in queues {
            queue.push(frame.clone());
        }
    }

    pub(crate) fn end(&self) {
        let queues = {
            let mut outlets = self.inner.outlets.lock();
            outlets.ended = true;
            std::mem::take(&mut outlets.queues)
        };
        for queue in queues.iter().filter_map(Weak::upgrade) {
            queue.close();
        }
    }
}

impl fmt::Debug for RtcAudioTrack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RtcAudioTrack")
            .field("id", &self.id())
            .field("enabled", &self.enabled())
            .field("state", &self.state())
            .finish()
    }
}
