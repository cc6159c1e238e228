//! Where the server writes its account, and how long each stream counts as concurrent.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until};

use super::witness::{End, Protocol, StreamRecord, TcpEnd, TextCounts, Witness};

/// Streams that ended are remembered up to this number, the latest ones.
const KEPT_STREAMS: usize = 10_000;

/// See the module's description.
pub(super) struct Book {
    started: Instant,
    started_at: DateTime<Utc>,
    abrupt_linger: Duration,
    witness: watch::Sender<Witness>,
    /// Streams that ended and still count, in the order in which they will be freed. No longer
    /// than the limits of all keys together, since each of them counts.
    lingering: Mutex<VecDeque<Lingering>>,
    lingering_began: Notify,
}

struct Lingering {
    until: Instant,
    id: u64,
    protocol: Protocol,
}

/// A stream whose handshake is about to be accepted.
pub(super) struct NewStream {
    pub protocol: Protocol,
    pub request_id: String,
    /// Masked.
    pub key: String,
    pub parameters: Vec<(String, String)>,
}

impl Book {
    pub(super) fn new(abrupt_linger: Duration) -> Self {
        Self {
            started: Instant::now(),
            started_at: Utc::now(),
            abrupt_linger,
            witness: watch::Sender::new(Witness::default()),
            lingering: Mutex::default(),
            lingering_began: Notify::new(),
        }
    }

    /// What the times of the records count from.
    pub(super) fn started_at(&self) -> DateTime<Utc> {
        self.started_at
    }

    pub(super) fn listen_seconds(&self) -> f64 {
        self.witness.borrow().listen_seconds
    }

    pub(super) fn snapshot(&self) -> Witness {
        self.witness.borrow().clone()
    }

    /// The first account for which `condition` holds, or the last one before the time-out.
    pub(super) async fn wait_for(
        &self,
        condition: impl FnMut(&Witness) -> bool,
        timeout: Duration,
    ) -> Result<Witness, Witness> {
        let mut changes = self.witness.subscribe();
        let met = tokio::time::timeout(timeout, changes.wait_for(condition)).await;
        match met {
            Ok(Ok(witness)) => Ok(witness.clone()),
            Ok(Err(_)) | Err(_) => Err(self.snapshot()),
        }
    }

    pub(super) fn is_open(&self, request_id: &str) -> bool {
        let witness = self.witness.borrow();
        let record = witness.stream(request_id);
        record.is_some_and(|record| record.end.is_none())
    }

    pub(super) fn rejected(&self, status: u16) {
        self.witness
            .send_modify(|w| *w.rejected.entry(status).or_default() += 1);
    }

    pub(super) fn handshake_held(&self) {
        self.witness.send_modify(|w| w.held_handshakes += 1);
    }

    /// Enters a stream, unless `limit` count for its key.
    pub(super) fn open(self: &Arc<Self>, limit: usize, stream: NewStream) -> Option<Entry> {
        let opened_ms = self.now_ms();
        let (protocol, request_id) = (stream.protocol, stream.request_id.clone());
        let mut id = None;
        self.witness.send_if_modified(|w| {
            let counted = w.counted.entry(protocol).or_default();
            if *counted >= limit {
                return false;
            }
            *counted += 1;
            w.counted_now += 1;
            forget_oldest(w);
            w.opened += 1;
            w.open_now += 1;
            w.peak = w.peak.max(w.open_now);
            id = Some(w.opened);
            w.streams.push(stream.record(w.opened, opened_ms));
            true
        });
        Some(Entry {
            book: Arc::clone(self),
            id: id?,
            protocol,
            request_id,
            ended: false,
        })
    }

    /// Waits until a stream has lingered for long enough and frees it. Cancel safe.
    pub(super) async fn free_next(&self) {
        loop {
            let began = self.lingering_began.notified();
            let next = self.lingering().front().map(|next| next.until);
            match next {
                Some(until) => break sleep_until(until).await,
                None => began.await,
            }
        }
        let now = Instant::now();
        loop {
            let mut lingering = self.lingering();
            if lingering.front().is_none_or(|next| next.until > now) {
                return;
            }
            let Some(next) = lingering.pop_front() else {
                return;
            };
            drop(lingering);
            let freed_ms = self.now_ms();
            self.witness
                .send_modify(|w| free(w, next.id, next.protocol, freed_ms));
        }
    }

    fn lingering(&self) -> MutexGuard<'_, VecDeque<Lingering>> {
        self.lingering
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

impl NewStream {
    fn record(self, id: u64, opened_ms: u64) -> StreamRecord {
        StreamRecord {
            id,
            protocol: self.protocol,
            request_id: self.request_id,
            key: self.key,
            parameters: self.parameters,
            opened_ms,
            first_audio_ms: None,
            last_audio_ms: None,
            close_requested_ms: None,
            ended_ms: None,
            freed_ms: None,
            audio_seconds: 0.0,
            audio_bytes: 0,
            audio_messages: 0,
            empty_audio_messages: 0,
            texts: TextCounts::default(),
            results_sent: 0,
            finals_sent: 0,
            close_requested: false,
            metadata_sent: false,
            close_code_sent: None,
            close_code_received: None,
            end: None,
            tcp_end: None,
        }
    }
}

fn get_mut(w: &mut Witness, id: u64) -> Option<&mut StreamRecord> {
    let index = w.streams.binary_search_by_key(&id, |s| s.id).ok()?;
    w.streams.get_mut(index)
}

fn forget_oldest(w: &mut Witness) {
    if w.streams.len() < KEPT_STREAMS {
        return;
    }
    if let Some(index) = w.streams.iter().position(|s| s.end.is_some()) {
        w.streams.remove(index);
        w.forgotten += 1;
    }
}

fn free(w: &mut Witness, id: u64, protocol: Protocol, now_ms: u64) {
    w.counted_now = w.counted_now.saturating_sub(1);
    if let Some(counted) = w.counted.get_mut(&protocol) {
        *counted = counted.saturating_sub(1);
    }
    if let Some(record) = get_mut(w, id) {
        record.freed_ms = Some(now_ms);
    }
}

/// Whether a provider would not notice at once that the stream has ended.
fn lingers(record: &StreamRecord, end: &End) -> bool {
    // LiveKit Inference lets go as soon as it has read session.close, whatever follows.
    let released = record.protocol == Protocol::Inference && record.close_requested;
    end.is_abrupt() && !released
}

/// The right to write one stream's record. Dropped without [`Entry::end`], the stream is recorded
/// as [`End::Lost`].
pub(super) struct Entry {
    book: Arc<Book>,
    id: u64,
    protocol: Protocol,
    request_id: String,
    ended: bool,
}

impl Entry {
    pub(super) fn request_id(&self) -> &str {
        &self.request_id
    }

    pub(super) fn protocol(&self) -> Protocol {
        self.protocol
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut StreamRecord)) {
        self.book.witness.send_modify(|w| {
            if let Some(record) = get_mut(w, self.id) {
                change(record);
            }
        });
    }

    /// A message with audio came.
    pub(super) fn audio_received(&self, bytes: usize) {
        let now = self.book.now_ms();
        self.update(|r| {
            if bytes == 0 {
                r.empty_audio_messages += 1;
                return;
            }
            r.first_audio_ms.get_or_insert(now);
            r.last_audio_ms = Some(now);
            r.audio_bytes += bytes as u64;
            r.audio_messages += 1;
        });
    }

    /// So much of the stream's audio has been decoded, in seconds from its start.
    pub(super) fn audio_decoded(&self, seconds: f64) {
        self.book.witness.send_modify(|w| {
            let Some(record) = get_mut(w, self.id) else {
                return;
            };
            let added = seconds - std::mem::replace(&mut record.audio_seconds, seconds);
            if self.protocol == Protocol::Listen {
                w.listen_seconds += added;
            }
        });
    }

    /// CloseStream or session.close came.
    pub(super) fn close_requested(&self) {
        let now = self.book.now_ms();
        self.update(|r| {
            r.close_requested = true;
            r.close_requested_ms.get_or_insert(now);
        });
    }

    /// The TCP connection has ended.
    pub(super) fn end(mut self, end: End, tcp_end: TcpEnd) {
        self.record_end(end, tcp_end);
    }

    fn record_end(&mut self, end: End, tcp_end: TcpEnd) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let now = self.book.now_ms();
        let linger = self.book.abrupt_linger;
        let mut lingering = false;
        self.book.witness.send_modify(|w| {
            w.open_now = w.open_now.saturating_sub(1);
            if let Some(record) = get_mut(w, self.id) {
                lingering = !linger.is_zero() && lingers(record, &end);
                record.ended_ms = Some(now);
                record.end = Some(end);
                record.tcp_end = Some(tcp_end);
            }
            if !lingering {
                free(w, self.id, self.protocol, now);
            }
        });
        // One that would linger beyond all time counts for ever.
        if lingering && let Some(until) = Instant::now().checked_add(linger) {
            self.book.lingering().push_back(Lingering {
                until,
                id: self.id,
                protocol: self.protocol,
            });
            self.book.lingering_began.notify_one();
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.record_end(End::Lost, TcpEnd::CutByServer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new_book(abrupt_linger: Duration) -> Arc<Book> {
        Arc::new(Book::new(abrupt_linger))
    }

    fn open(book: &Arc<Book>, limit: usize) -> Option<Entry> {
        open_as(book, limit, Protocol::Listen)
    }

    fn open_as(book: &Arc<Book>, limit: usize, protocol: Protocol) -> Option<Entry> {
        let stream = NewStream {
            protocol,
            request_id: "id".to_owned(),
            key: "...".to_owned(),
            parameters: Vec::new(),
        };
        book.open(limit, stream)
    }

    #[test]
    fn a_stream_whose_task_is_gone_is_lost_not_open() {
        let book = new_book(Duration::ZERO);
        let entry = open(&book, 1).expect("room");
        assert!(open(&book, 1).is_none());
        drop(entry);
        let witness = book.snapshot();
        assert_eq!((witness.open_now, witness.opened, witness.peak), (0, 1, 1));
        assert_eq!(witness.streams[0].end, Some(End::Lost));
        assert_eq!(witness.unacknowledged().count(), 1);
        assert!(open(&book, 1).is_some());
    }

    #[test]
    fn only_streams_that_ended_are_forgotten() {
        let book = new_book(Duration::ZERO);
        let oldest = open(&book, 2).expect("room");
        for _ in 0..KEPT_STREAMS + 5 {
            let entry = open(&book, 2).expect("room");
            entry.end(End::Acknowledged, TcpEnd::Fin);
        }
        oldest.update(|r| r.results_sent = 7);
        let witness = book.snapshot();
        assert_eq!(witness.streams.len(), KEPT_STREAMS);
        assert_eq!(witness.forgotten, 6);
        assert_eq!(witness.streams[0].results_sent, 7);
        assert_eq!(witness.streams[0].end, None);
    }

    #[tokio::test]
    async fn what_ended_abruptly_counts_until_it_has_lingered() {
        let linger = Duration::from_millis(50);
        let book = new_book(linger);
        let fault = "stall".to_owned();
        for (end, counts) in [
            (End::Acknowledged, false),
            (End::Abrupt, true),
            (End::CloseFrame { code: 1000 }, true),
            (End::CloseUnanswered, true),
            (End::TimedOut, false),
            (End::ServerFault { fault }, false),
        ] {
            let entry = open(&book, 1).expect("room");
            entry.end(end.clone(), TcpEnd::Fin);
            let witness = book.snapshot();
            assert_eq!(witness.open_now, 0);
            assert_eq!(witness.counted_now, usize::from(counts), "{end:?}");
            if counts {
                assert!(open(&book, 1).is_none(), "{end:?}");
                book.free_next().await;
            }
            let witness = book.snapshot();
            assert_eq!(witness.counted_now, 0, "{end:?}");
            let record = witness.streams.last().expect("a record");
            let after = record.freed_ms.expect("freed") - record.ended_ms.expect("ended");
            assert_eq!(after >= 49, counts, "{end:?}: {after} ms");
        }
    }

    #[test]
    fn each_key_has_its_own_limit_and_session_close_frees_whatever_follows() {
        let book = new_book(Duration::from_secs(600));
        let listen = open_as(&book, 1, Protocol::Listen).expect("room");
        let inference = open_as(&book, 1, Protocol::Inference).expect("room");
        assert!(open_as(&book, 1, Protocol::Listen).is_none());
        for entry in [listen, inference] {
            entry.close_requested();
            entry.end(End::Abrupt, TcpEnd::Fin);
        }
        assert!(open_as(&book, 1, Protocol::Listen).is_none());
        assert!(open_as(&book, 1, Protocol::Inference).is_some());
    }
}
