//! Decoded audio, kept for tests that listen to it.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::vad::SAMPLE_RATE;

/// Over all streams, in samples (256 MiB); beyond it the oldest stream's audio is dropped.
const MAX_TOTAL: usize = 128 * 1024 * 1024;
const MAX_STREAMS: usize = 1024;

/// The first seconds of each stream.
pub(super) struct AudioStore {
    /// In samples a stream.
    limit: usize,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    streams: VecDeque<(String, Vec<i16>)>,
    total: usize,
}

impl AudioStore {
    pub(super) fn new(limit: Duration) -> Self {
        let samples = limit.as_secs_f64() * f64::from(SAMPLE_RATE);
        Self {
            limit: (samples as usize).min(MAX_TOTAL),
            kept: Mutex::default(),
        }
    }

    pub(super) fn get(&self, request_id: &str) -> Option<Vec<i16>> {
        self.lock()
            .streams
            .iter()
            .find(|(id, _)| id == request_id)
            .map(|(_, audio)| audio.clone())
    }

    pub(super) fn append(&self, request_id: &str, pcm: &[i16]) {
        if self.limit == 0 || pcm.is_empty() {
            return;
        }
        let mut kept = self.lock();
        // New streams are at the back, and they are the ones that get audio.
        let index = match kept.streams.iter().rposition(|(id, _)| id == request_id) {
            Some(index) => index,
            None => {
                kept.streams.push_back((request_id.to_owned(), Vec::new()));
                kept.streams.len() - 1
            }
        };
        let audio = &mut kept.streams[index].1;
        let added = pcm.len().min(self.limit - audio.len());
        audio.extend_from_slice(&pcm[..added]);
        kept.total += added;
        while kept.total > MAX_TOTAL || kept.streams.len() > MAX_STREAMS {
            let Some((_, dropped)) = kept.streams.pop_front() else {
                break;
            };
            kept.total -= dropped.len();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_stream_keeps_its_first_seconds() {
        let store = AudioStore::new(Duration::from_secs(1));
        for _ in 0..100 {
            store.append("a", &[1; 960]);
            store.append("b", &[2; 10]);
        }
        assert_eq!(store.get("a"), Some(vec![1; 48_000]));
        assert_eq!(store.get("b"), Some(vec![2; 1000]));
        assert_eq!(store.get("c"), None);
    }

    #[test]
    fn nothing_is_kept_unless_asked_for() {
        let store = AudioStore::new(Duration::ZERO);
        store.append("a", &[1; 960]);
        assert_eq!(store.get("a"), None);
    }
}
