//! One participant: a task that supervises a task for each of the participant's audio tracks,
//! each of which feeds one STT stream. A track that panics or fails is restarted without touching
//! the others; whatever ends a track runs the one close path, `Transcriber::close`.

use std::{
    collections::{HashMap, VecDeque},
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{FutureExt, Stream, StreamExt, stream::Fuse};
use tokio::{
    sync::{mpsc, watch},
    task::{Id, JoinSet},
    time::{Interval, MissedTickBehavior},
};

use crate::{
    audio::{AudioLine, Ear, OpusPacket, Page, Span, TrackClock, samples, seconds},
    board::{SessionCard, TrackCard, TrackState},
    close::{CloseOrder, now, order},
    config::{Encoding, SttConfig},
    domain::{CloseReason, Outcome, StreamKey, Transcript, backoff},
    failure::Retry,
    registry::Registry,
    stt::{
        connect::Provider,
        dialect::SpeechResult,
        gate::{Admission, Gate},
        machine::Report,
        stream::{self, StreamHandle},
    },
    transcripts::Sinks,
};

/// A stream that lasted this long has been a good one: the next failure is a first one again.
const GOOD_STREAM_SECONDS: f64 = 10.0;
/// Restarts of a panicking track before it is given up.
const MAX_RESTARTS: u32 = 5;
/// While others wait for a place, who has been silent for so long gives up theirs.
const YIELD_AFTER: Duration = Duration::from_secs(1);
/// How often a stream is told that it is still wanted.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);
/// Packets that are taken at once; the room keeps no more of a track either.
const PACKETS_AT_ONCE: usize = 250;
/// Audio that is sent again goes in messages of this length.
const REPLAYED_AT_ONCE: Duration = Duration::from_secs(1);
/// Times of results are rounded; a packet that ends this little after one is part of it.
const ROUNDING: Duration = Duration::from_millis(10);

/// One Opus packet of a track.
#[derive(Debug, Clone)]
pub struct Packet {
    pub payload: Arc<[u8]>,
    /// RTP timestamp, 48 kHz.
    pub timestamp: u32,
    /// Extended sequence number.
    pub sequence: u64,
    /// In dBov (RFC 6464), if the server passes it on.
    pub level: Option<i8>,
    pub received_at: Instant,
}

/// The packets of a track, from now to its end.
pub type Packets = Pin<Box<dyn Stream<Item = Packet> + Send>>;

/// An audio track of the room, as the session sees it.
pub struct Track {
    /// Track SID.
    pub sid: String,
    /// Starts (or, after a panic, starts again) to receive.
    pub packets: Box<dyn Fn() -> Packets + Send + Sync>,
    /// Whether its participant has muted it, and so is not expected to send anything.
    pub muted: Box<dyn Fn() -> bool + Send + Sync>,
    /// Its participant's priority: the highest first, when streams are scarce.
    pub priority: Box<dyn Fn() -> i32 + Send + Sync>,
}

/// How streams are used.
#[derive(Debug, Clone)]
pub struct Settings {
    pub encoding: Encoding,
    /// Audio per message.
    pub page: Duration,
    /// What a close may take when nothing else bounds it.
    pub close_grace: Duration,
    /// How long a participant who is not muted may send nothing before the stream is closed;
    /// `None` for ever.
    pub idle_after: Option<Duration>,
    /// None if streams are kept open through any silence.
    pub parking: Option<Parking>,
    /// The most audio that is sent again after a lost connection.
    pub replay: Duration,
    /// Pauses before another try: the first and the longest.
    pub retry_first: Duration,
    pub retry_most: Duration,
}

/// When a stream is closed because its participant is silent, and how one is opened again.
#[derive(Debug, Clone, Copy)]
pub struct Parking {
    pub after: Duration,
    /// What is below is silence, in dBov.
    pub threshold: i8,
    /// How much from before the first word is sent.
    pub preroll: Duration,
}

impl Settings {
    pub fn new(config: &SttConfig) -> Self {
        let ms = Duration::from_millis;
        Self {
            encoding: config.encoding,
            page: ms(config.page_ms),
            close_grace: ms(config.close_grace_ms),
            idle_after: (config.idle_after_ms > 0).then(|| ms(config.idle_after_ms)),
            parking: (config.park_after_ms > 0).then(|| Parking {
                after: ms(config.park_after_ms),
                threshold: 0i8.saturating_sub_unsigned(config.speech_level),
                preroll: ms(config.preroll_ms),
            }),
            replay: ms(config.replay_ms),
            retry_first: ms(config.retry_first_ms),
            retry_most: ms(config.retry_most_ms),
        }
    }
}

/// What streams are opened with. One that is open stays with what it was opened with.
pub struct Stt {
    pub provider: Arc<Provider>,
    pub settings: Settings,
    /// One for the whole process.
    pub gate: Gate,
    since: Instant,
}

impl Stt {
    pub fn new(provider: Provider, settings: Settings, gate: Gate) -> Self {
        Self {
            provider: Arc::new(provider),
            settings,
            gate,
            since: now(),
        }
    }

    /// Has pages end at whole multiples of their length since then.
    pub fn paged_since(self, since: Instant) -> Self {
        Self { since, ..self }
    }

    /// Ticks every page length, for all streams in the same moments: the process wakes up once for
    /// all of them.
    fn page_ends(&self) -> Interval {
        let (page, now) = (self.settings.page, now());
        let first = match now.checked_duration_since(self.since) {
            Some(past) => {
                let into_page = past.as_nanos() % page.as_nanos();
                now + page - Duration::from_nanos(into_page as u64)
            }
            None => self.since,
        };
        let mut ticks = tokio::time::interval_at(first.into(), page);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        ticks
    }
}

/// What every session of a room has in common.
pub struct Context {
    pub room: String,
    pub registry: Registry,
    /// As it is configured now.
    pub stt: watch::Receiver<Arc<Stt>>,
    pub sinks: Sinks,
    /// Transcripts for the room itself, if they go there.
    pub to_room: Option<mpsc::Sender<Transcript>>,
}

impl Context {
    pub fn stt(&self) -> Arc<Stt> {
        self.stt.borrow().clone()
    }

    /// An order to close, when nothing but the usual grace bounds it.
    pub fn within_grace(&self, reason: CloseReason) -> CloseOrder {
        CloseOrder {
            reason,
            deadline: now() + self.stt().settings.close_grace,
        }
    }

    fn deliver(&self, transcript: Transcript) {
        self.sinks.deliver(&transcript);
        let Some(to_room) = &self.to_room else {
            return;
        };
        if let Err(mpsc::error::TrySendError::Full(lost)) = to_room.try_send(transcript)
            && lost.is_final
        {
            tracing::error!(
                room = self.room,
                participant = lost.participant,
                "the room takes no transcripts: one was not sent there"
            );
        }
    }
}

/// What a session is told.
pub enum Command {
    Add(Track),
    /// Closes the stream of the track with this SID.
    Remove(String, CloseOrder),
}

/// The life of a session: until ordered to close, or until `commands` is dropped. Returns when
/// every stream of it is settled, but for those of tasks that panicked, which the registry closes.
pub async fn run(
    context: Arc<Context>,
    participant: String,
    card: SessionCard,
    mut commands: mpsc::Receiver<Command>,
    mut orders: watch::Receiver<Option<CloseOrder>>,
) {
    let mut session = Session {
        context,
        participant,
        card,
        tracks: JoinSet::new(),
        running: HashMap::new(),
    };
    let first = loop {
        tokio::select! {
            biased;
            new = next_order(&mut orders) => match new {
                Some(new) => break new,
                None => break session.context.within_grace(CloseReason::OwnerLost),
            },
            ended = session.tracks.join_next_with_id(), if !session.tracks.is_empty() => {
                session.track_ended(ended);
            }
            command = commands.recv() => match command {
                Some(Command::Add(track)) => session.add(Arc::new(track), 0),
                Some(Command::Remove(sid, new)) => session.remove(&sid, &new),
                None => break session.context.within_grace(CloseReason::OwnerLost),
            },
        }
    };
    // Sealed: commands are no longer read.
    session.close(first, orders).await;
}

struct Session {
    context: Arc<Context>,
    participant: String,
    card: SessionCard,
    tracks: JoinSet<()>,
    running: HashMap<Id, Running>,
}

struct Running {
    track: Arc<Track>,
    orders: watch::Sender<Option<CloseOrder>>,
    restarts: u32,
}

impl Session {
    fn add(&mut self, track: Arc<Track>, restarts: u32) {
        // Subscribed anew after a reconnect: what is left of the old subscription is over.
        let over = self.context.within_grace(CloseReason::TrackEnded);
        self.remove(&track.sid, &over);
        let (orders, ordered) = watch::channel(None);
        let card = self.card.track(&track.sid);
        let (context, participant) = (self.context.clone(), &self.participant);
        let transcriber = Transcriber::new(context, participant, track.clone(), card);
        let packets = (track.packets)();
        let task = self.tracks.spawn(transcriber.run(packets, ordered));
        self.running.insert(
            task.id(),
            Running {
                track,
                orders,
                restarts,
            },
        );
    }

    fn remove(&self, sid: &str, new: &CloseOrder) {
        for running in self
            .running
            .values()
            .filter(|running| running.track.sid == sid)
        {
            order(&running.orders, new);
        }
    }

    fn track_ended(&mut self, ended: Option<Result<(Id, ()), tokio::task::JoinError>>) {
        let (id, panicked) = match ended {
            None => return,
            Some(Ok((id, ()))) => (id, false),
            Some(Err(error)) => (error.id(), true),
        };
        let Some(running) = self.running.remove(&id) else {
            return;
        };
        let (room, participant, track) =
            (&self.context.room, &self.participant, &running.track.sid);
        if !panicked || running.orders.borrow().is_some() {
            return;
        }
        if running.restarts == MAX_RESTARTS {
            tracing::error!(
                room,
                participant,
                track,
                "transcription keeps failing by a defect; this track is given up"
            );
            return;
        }
        tracing::error!(
            room,
            participant,
            track,
            "transcription failed by a defect; restarted"
        );
        self.add(running.track, running.restarts + 1);
    }

    /// Closes all tracks at once and waits for them; stronger orders are passed on meanwhile.
    async fn close(mut self, first: CloseOrder, mut orders: watch::Receiver<Option<CloseOrder>>) {
        let all = |running: &HashMap<Id, Running>, new: &CloseOrder| {
            running
                .values()
                .for_each(|running| order(&running.orders, new));
        };
        all(&self.running, &first);
        let mut owner_there = true;
        while !self.tracks.is_empty() {
            tokio::select! {
                _ = self.tracks.join_next() => {}
                new = next_order(&mut orders), if owner_there => match new {
                    Some(new) => all(&self.running, &new),
                    None => owner_there = false,
                },
            }
        }
    }
}

/// The next order, or a stronger one; `None` when nobody can give one any more. Cancel safe.
async fn next_order(orders: &mut watch::Receiver<Option<CloseOrder>>) -> Option<CloseOrder> {
    loop {
        orders.changed().await.ok()?;
        if let Some(new) = orders.borrow_and_update().clone() {
            return Some(new);
        }
    }
}

/// Feeds one audio track to the provider and passes on what it reports.
///
/// What the provider may still need is kept: the packets since its last final result, up to
/// [`Settings::replay`]. A stream that is lost is replaced by one that begins with them, so that no
/// word is lost or heard twice.
struct Transcriber {
    context: Arc<Context>,
    key: StreamKey,
    card: TrackCard,
    track: Arc<Track>,
    clock: TrackClock,
    /// When it was last seen to be muted.
    muted_at: Option<Instant>,
    ear: Ear,
    spoke_at: Option<Instant>,
    /// Whether there is anything to transcribe: not while the participant is parked.
    wanted: bool,
    /// Its last stream was closed for that.
    parked: bool,
    /// Samples that waited for a stream for too long, since the last one.
    missed: u64,
    kept: VecDeque<Kept>,
    open: Option<Open>,
    /// What the stream was opened with.
    stt: Arc<Stt>,
    failures: u32,
    retry_at: Option<Instant>,
    /// For its turn to open a stream.
    waiting: Option<Pin<Box<dyn Future<Output = Admission> + Send>>>,
    /// Names segments; unique to this track and process.
    tag: u32,
    segments: u64,
}

/// A packet of which the provider has not yet said all.
struct Kept {
    span: Span,
    payload: Arc<[u8]>,
}

struct Open {
    stream: StreamHandle,
    line: AudioLine,
    since: Instant,
    told_alive: Instant,
    /// It was told to close, and takes no more audio.
    closing: bool,
}

impl Transcriber {
    fn new(context: Arc<Context>, participant: &str, track: Arc<Track>, card: TrackCard) -> Self {
        let key = StreamKey {
            room: context.room.clone(),
            participant: participant.to_owned(),
            track: track.sid.clone(),
        };
        Self {
            key,
            card,
            track,
            clock: TrackClock::default(),
            muted_at: None,
            ear: Ear::default(),
            spoke_at: None,
            wanted: false,
            parked: false,
            missed: 0,
            kept: VecDeque::new(),
            open: None,
            stt: context.stt(),
            failures: 0,
            retry_at: None,
            waiting: None,
            tag: fastrand::u32(..),
            segments: 0,
            context,
        }
    }

    async fn run(mut self, packets: Packets, mut orders: watch::Receiver<Option<CloseOrder>>) {
        let mut packets = packets.fuse();
        let mut page_ends = self.stt.page_ends();
        let mut first = loop {
            if page_ends.period() != self.stt.settings.page {
                page_ends = self.stt.page_ends();
            }
            let retry_at = self.retry_at;
            self.show();
            tokio::select! {
                biased;
                new = next_order(&mut orders) => break new.unwrap_or_else(|| {
                    self.context.within_grace(CloseReason::OwnerLost)
                }),
                report = next_report(&mut self.open) => match report {
                    Some(report) => self.report(report),
                    None => self.stream_ended().await,
                },
                _ = page_ends.tick(), if self.open.is_some() => {
                    if !self.take_packets(&mut packets) {
                        break self.context.within_grace(CloseReason::TrackEnded);
                    }
                    self.tick(now());
                }
                packet = packets.next(), if self.open.is_none() => match packet {
                    Some(packet) => self.packet(packet),
                    None => break self.context.within_grace(CloseReason::TrackEnded),
                },
                () = sleep_until(retry_at) => {
                    self.retry_at = None;
                    self.want_stream();
                }
                admission = admitted(&mut self.waiting) => {
                    self.waiting = None;
                    self.open_stream(admission);
                }
            }
        };
        // The track may have ended a moment before the order, unnoticed until the end of a page.
        if self.open.is_some() && !self.take_packets(&mut packets) {
            first.merge(&self.context.within_grace(CloseReason::TrackEnded));
        }
        // Detached: no more audio is taken from the room.
        drop(packets);
        self.close(first, orders).await;
    }

    /// Puts on its card what it does now.
    fn show(&mut self) {
        let state = match &self.open {
            Some(open) if open.closing => TrackState::Closing,
            Some(_) => TrackState::Streaming,
            None if self.waiting.is_some() => TrackState::Waiting,
            None if self.retry_at.is_some() => TrackState::Retrying,
            None if self.parked && !self.wanted => TrackState::Parked,
            None => TrackState::Quiet,
        };
        let stream = self.open.as_ref().map(|open| open.stream.id());
        self.card.tell(state, stream);
    }

    /// Takes the packets that have come since the last page. They wait for its end rather than wake
    /// this task, each of them, for nothing. Returns false when the track is over.
    fn take_packets(&mut self, packets: &mut Fuse<Packets>) -> bool {
        for _ in 0..PACKETS_AT_ONCE {
            match packets.next().now_or_never() {
                Some(Some(packet)) => self.packet(packet),
                Some(None) => return false,
                None => break,
            }
        }
        true
    }

    fn packet(&mut self, packet: Packet) {
        let placed = self.clock.place(&OpusPacket {
            payload: &packet.payload,
            timestamp: packet.timestamp,
            sequence: packet.sequence,
            received_at: packet.received_at,
        });
        let Some(span) = placed else {
            return;
        };
        self.listen(&packet, span);
        match &mut self.open {
            Some(open) if !open.closing => {
                let page = open.line.packet(span, &packet.payload);
                open.stream.audio(page);
                self.keep(span, packet.payload);
            }
            // It waits for the next stream.
            Some(_) => self.keep(span, packet.payload),
            None => {
                self.keep(span, packet.payload);
                if self.retry_at.is_none() {
                    self.want_stream();
                }
            }
        }
    }

    /// Hears whether the participant speaks, if that makes a difference.
    fn listen(&mut self, packet: &Packet, span: Span) {
        if self.open.is_none() && !self.wanted {
            // The next stream follows what is configured now.
            self.stt = self.context.stt();
        }
        let Some(parking) = self.stt.settings.parking else {
            self.wanted = true;
            return;
        };
        let (payload, level) = (&packet.payload, packet.level);
        if self
            .ear
            .hears(payload, level, span.samples, parking.threshold)
        {
            self.spoke_at = Some(packet.received_at);
            self.wanted = true;
        }
    }

    fn keep(&mut self, span: Span, payload: Arc<[u8]>) {
        self.kept.push_back(Kept { span, payload });
        let Settings {
            replay, parking, ..
        } = self.stt.settings;
        let limit = match parking {
            Some(parking) if !self.wanted => parking.preroll,
            Some(parking) => parking.preroll.max(replay),
            None => replay,
        };
        let oldest = span.end().saturating_sub(samples(limit));
        // The packet itself stays: it may be the first of a stream.
        while self.kept.len() > 1 && self.kept[0].span.at < oldest {
            let dropped = self.kept.pop_front();
            if self.wanted && self.open.is_none() {
                self.missed += dropped.map_or(0, |kept| kept.span.samples);
            }
        }
    }

    /// The provider has said all about the track up to this position.
    fn done_until(&mut self, position: u64) {
        while self
            .kept
            .front()
            .is_some_and(|kept| kept.span.end() <= position)
        {
            self.kept.pop_front();
        }
    }

    /// Takes a place in the queue for a stream, if there is something to send.
    fn want_stream(&mut self) {
        if self.wanted && self.waiting.is_none() && !self.kept.is_empty() {
            let priority = (self.track.priority)();
            self.waiting = Some(Box::pin(self.context.stt().gate.admit(priority)));
        }
    }

    /// Opens a stream that begins with what was kept. Does nothing if there is nothing to send, or
    /// if the daemon takes no more streams.
    fn open_stream(&mut self, admission: Admission) {
        let Some(first) = self.kept.front() else {
            return;
        };
        self.stt = self.context.stt();
        let Stt {
            provider, settings, ..
        } = &*self.stt;
        let opened = stream::open(
            &self.context.registry,
            provider.clone(),
            self.key.clone(),
            settings.close_grace,
            Some(admission),
        );
        // Refused only when the daemon closes: the order to close is on its way.
        let Ok(mut stream) = opened else {
            return;
        };
        let (mut line, mut page) = AudioLine::new(settings.encoding, settings.page, first.span.at);
        for kept in &self.kept {
            let Page {
                bytes,
                samples: more,
            } = line.packet(kept.span, &kept.payload);
            page.bytes.extend(bytes);
            page.samples += more;
            if page.samples >= samples(REPLAYED_AT_ONCE) {
                stream.audio(std::mem::take(&mut page));
            }
        }
        stream.audio(page);
        let missed = seconds(std::mem::take(&mut self.missed));
        if missed > 0.0 {
            tracing::warn!(id = %stream.id(), key = %self.key, missed,
                "what was said first is lost: it waited for a stream for too long");
        }
        self.parked = false;
        self.open = Some(Open {
            stream,
            line,
            since: now(),
            told_alive: now(),
            closing: false,
        });
    }

    fn tick(&mut self, now: Instant) {
        let Some(open) = &mut self.open else {
            return;
        };
        if open.closing {
            return;
        }
        let page = open.line.tick(&self.clock, now);
        open.stream.audio(page);
        if now.saturating_duration_since(open.told_alive) >= SIGN_OF_LIFE {
            open.told_alive = now;
            open.stream.alive();
        }
        // Somebody who unmutes has all the time there is to begin to speak, and so has a stream that
        // begins with what was said before.
        if (self.track.muted)() {
            self.muted_at = Some(now);
        }
        let since = |at: Instant| now.saturating_duration_since(at);
        let unmuted = self.muted_at.map_or(Duration::MAX, since);
        let quiet = self.clock.quiet(now).unwrap_or_default();
        let quiet = quiet.min(unmuted).min(since(open.since));
        let idle_after = self.stt.settings.idle_after;
        if idle_after.is_some_and(|limit| quiet >= limit) {
            let order = self.context.within_grace(CloseReason::Idle);
            return self.close_stream(&order);
        }
        let silent = self.spoke_at.map_or(Duration::MAX, since);
        let silent = silent.min(since(open.since));
        let parked = |Parking { after, .. }: Parking| {
            silent >= after || silent >= YIELD_AFTER && self.stt.gate.is_crowded()
        };
        if self.stt.settings.parking.is_some_and(parked) {
            (self.wanted, self.parked) = (false, true);
            let order = self.context.within_grace(CloseReason::Parked);
            self.close_stream(&order);
        }
    }

    /// The first steps of the close of a stream: flush what is buffered, and order the rest, which
    /// the stream's own task does. Its reports are still to be read, to the end.
    fn close_stream(&mut self, new: &CloseOrder) {
        if let Some(open) = &mut self.open {
            if !open.closing {
                open.closing = true;
                let last = open.line.finish();
                open.stream.audio(last);
            }
            open.stream.close(new);
        }
    }

    fn report(&mut self, report: Report) {
        let Some(open) = &self.open else {
            return;
        };
        match report {
            Report::Result(result) => {
                let end = open.line.track_time(result.start + result.duration);
                let done = result.is_final.then_some(end);
                if !result.text.is_empty() {
                    let transcript = self.transcript(open, result);
                    self.segments += u64::from(transcript.is_final);
                    self.context.deliver(transcript);
                }
                if let Some(end) = done {
                    self.done_until(position(end) + samples(ROUNDING));
                }
            }
            Report::Opened(_) | Report::Message(_) => {}
            Report::Error(said) => {
                let (id, key) = (open.stream.id(), &self.key);
                tracing::error!(%id, %key, said, "the STT provider reports an error");
            }
        }
    }

    fn transcript(&self, open: &Open, result: SpeechResult) -> Transcript {
        let StreamKey {
            room,
            participant,
            track,
        } = self.key.clone();
        Transcript {
            room,
            participant,
            track,
            segment: format!("SG_{:08x}_{}", self.tag, self.segments),
            is_final: result.is_final,
            text: result.text,
            start: open.line.track_time(result.start),
            duration: result.duration,
            confidence: result.confidence,
        }
    }

    /// A stream is over, its reports read. One that was told to close has said all about what it was
    /// sent; otherwise another is opened, after a delay that grows with every failure.
    async fn stream_ended(&mut self) {
        let Some(mut open) = self.open.take() else {
            return;
        };
        // No receipt: the stream's task died, and the registry closes the stream.
        let settled = open.stream.settled().await;
        let outcome = settled.as_ref().map(|settled| &settled.outcome);
        if open.closing && outcome == Some(&Outcome::Acknowledged) {
            self.failures = 0;
            let sent = open.line.sent();
            self.done_until(sent);
            return self.want_stream();
        }
        // There may be words in what was not acknowledged.
        self.wanted = true;
        let good = |wall_seconds| wall_seconds >= GOOD_STREAM_SECONDS;
        if settled
            .as_ref()
            .is_some_and(|s| s.outcome.opened() && good(s.wall_seconds))
        {
            self.failures = 0;
        }
        let stt = self.context.stt();
        let cause = outcome.and_then(Outcome::failure).map(|f| f.cause);
        let (first, most) = match cause.map(|cause| (cause, cause.retry())) {
            Some((cause, Retry::Probe { first, most })) if stt.gate.leaves_alone(cause) => {
                (first, most)
            }
            // The gate says when.
            Some((_, Retry::Probe { .. } | Retry::Slot)) => return self.want_stream(),
            Some((_, Retry::Later | Retry::ThisStream)) | None => {
                (stt.settings.retry_first, stt.settings.retry_most)
            }
        };
        let delay = backoff(self.failures, first, most, fastrand::f64());
        self.failures += 1;
        self.retry_at = Some(now() + delay);
    }

    /// The close path of a track: its stream has what is buffered, is acknowledged, delivers what
    /// still comes, and is settled. Bounded by the order's deadline, which the stream's own task
    /// keeps.
    async fn close(mut self, first: CloseOrder, mut orders: watch::Receiver<Option<CloseOrder>>) {
        self.close_stream(&first);
        self.show();
        let mut owner_there = true;
        while self.open.is_some() {
            tokio::select! {
                report = next_report(&mut self.open) => match report {
                    Some(report) => self.report(report),
                    None => break,
                },
                new = next_order(&mut orders), if owner_there => match new {
                    Some(new) => self.close_stream(&new),
                    None => owner_there = false,
                },
            }
        }
        if let Some(open) = &mut self.open {
            let settled = open.stream.settled().await;
            let sent = open.line.sent();
            if settled.is_some_and(|settled| settled.outcome == Outcome::Acknowledged) {
                self.done_until(sent);
            }
        }
        let (id, key) = (self.open.as_ref().map(|open| open.stream.id()), &self.key);
        let counts = self.clock.counts();
        let lost = self
            .open
            .as_ref()
            .map_or(0, |open| open.stream.dropped_pages());
        // While parked, what is kept is silence.
        let untranscribed = match (self.kept.front(), self.kept.back()) {
            (Some(first), Some(last)) if self.wanted => {
                seconds(last.span.end() - first.span.at + self.missed)
            }
            _ => 0.0,
        };
        if lost > 0 || counts.malformed > 0 || counts.late > 0 || untranscribed > 0.0 {
            let (late, malformed) = (counts.late, counts.malformed);
            tracing::warn!(?id, %key, lost, late, malformed, untranscribed,
                "audio was not all passed on");
        }
    }
}

/// A time on the track, in seconds, as a position.
fn position(track_seconds: f64) -> u64 {
    samples(Duration::try_from_secs_f64(track_seconds).unwrap_or_default())
}

async fn admitted(
    waiting: &mut Option<Pin<Box<dyn Future<Output = Admission> + Send>>>,
) -> Admission {
    match waiting {
        Some(waiting) => waiting.await,
        None => std::future::pending().await,
    }
}

async fn next_report(open: &mut Option<Open>) -> Option<Report> {
    match open {
        Some(open) => open.stream.report().await,
        None => std::future::pending().await,
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
#[allow(
    clippy::disallowed_methods,
    reason = "tests do on purpose what is banned"
)]
mod tests {
    use std::io::Cursor;

    use futures_util::{SinkExt, stream as packets};
    use tokio::sync::oneshot;
    use tokio_tungstenite::{accept_async, tungstenite::Message};

    use super::*;
    use crate::{
        config::Config,
        ledger::Ledger,
        stt::{connect::InMemory, gate::Limits},
    };

    /// 20 ms of CELT.
    const FRAME: [u8; 4] = [0x78, 1, 2, 3];
    const METADATA: &str = r#"{"type":"Metadata","request_id":"r","duration":0.08}"#;
    /// On the paused clock: until nobody has anything to do.
    const IDLE: Duration = Duration::from_millis(1);

    /// Three packets, which fill no page, and then the end of the track.
    fn track(ended: oneshot::Receiver<()>) -> Track {
        let frames = (0..3).map(|n| Packet {
            payload: FRAME.into(),
            timestamp: n * 960,
            sequence: n.into(),
            level: None,
            received_at: now(),
        });
        let end = packets::once(ended).filter_map(async |_| None);
        let all = std::sync::Mutex::new(Some(packets::iter(frames).chain(end)));
        Track {
            sid: "t".to_owned(),
            packets: Box::new(move || Box::pin(all.lock().unwrap().take().expect("asked once"))),
            muted: Box::new(|| false),
            priority: Box::new(|| 0),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn pages_end_at_multiples_of_their_length_since_the_given_moment() {
        let ms = Duration::from_millis;
        for (past, future) in [(117, 0), (0, 0), (0, 5)] {
            let since = now() - ms(past) + ms(future);
            let (connect, _connections) = mpsc::unbounded_channel();
            let config = Config::for_tests().stt;
            let provider = Provider::in_memory(&config, InMemory(connect));
            let gate = Gate::new(Limits::new(&config));
            let stt = Stt::new(provider, Settings::new(&config), gate).paged_since(since);
            let (begun, page) = (now(), stt.settings.page);
            let end = stt.page_ends().tick().await.into_std();
            assert!(end > begun && end <= begun + page);
            assert_eq!((end - since).as_nanos() % page.as_nanos(), 0);
        }
    }

    /// Audio that waits for the handshake when the order comes, and audio that fills no page.
    #[tokio::test(start_paused = true)]
    async fn everything_that_was_said_is_sent_before_the_stream_is_closed() {
        let (connect, mut connections) = mpsc::unbounded_channel();
        let mut config = Config::for_tests().stt;
        config.page_ms = 1000;
        let provider = Provider::in_memory(&config, InMemory(connect));
        let gate = Gate::new(Limits::new(&config));
        let stt = Stt::new(provider, Settings::new(&config), gate);
        let registry = Registry::new(Ledger::default());
        let context = Context {
            room: "r".to_owned(),
            registry: registry.clone(),
            stt: watch::channel(Arc::new(stt)).1,
            sinks: Sinks::default(),
            to_room: None,
        };
        let (commands, received) = mpsc::channel(1);
        let (_orders, ordered) = watch::channel(None);
        let (end, ended) = oneshot::channel();
        let sent = commands.try_send(Command::Add(track(ended)));
        assert!(sent.is_ok());
        let room = registry.board().room("r", "us");
        let card = room.session("p", "PA_p");
        let life = run(Arc::new(context), "p".into(), card, received, ordered);
        let session = tokio::spawn(life);

        let connection = connections.recv().await.expect("a connection");
        tokio::time::sleep(IDLE).await;
        drop(end);
        tokio::time::sleep(IDLE).await;
        let mut socket = accept_async(connection).await.expect("handshake");
        let mut audio = Vec::new();
        loop {
            match socket.next().await.expect("a message").expect("read") {
                Message::Binary(page) => audio.extend(page),
                Message::Text(text) => {
                    assert!(text.contains("CloseStream"), "{text}");
                    break;
                }
                other => panic!("{other}"),
            }
        }
        socket.send(Message::text(METADATA)).await.expect("sent");
        socket.close(None).await.expect("closed");
        while socket.next().await.is_some_and(|message| message.is_ok()) {}
        let drained = tokio::time::timeout(Duration::from_secs(60), registry.drained());
        drained.await.expect("drained");
        drop(commands);
        session.await.expect("no panic");

        let [receipt] = &registry.ledger().receipts()[..] else {
            panic!("one receipt")
        };
        assert_eq!(receipt.outcome, Outcome::Acknowledged);
        assert_eq!(receipt.reason, CloseReason::TrackEnded);
        assert_eq!(receipt.totals.audio_bytes, audio.len() as u64);
        let mut reader = ogg::PacketReader::new(Cursor::new(audio));
        let read = std::iter::from_fn(|| reader.read_packet().expect("whole pages"));
        let packets: Vec<_> = read.skip(2).collect();
        let frames = packets.iter().filter(|packet| packet.data == FRAME);
        assert_eq!(frames.count(), 3);
        let last = packets.last().expect("packets");
        assert!(last.last_in_stream(), "no end of the stream is marked");
        assert_eq!(last.absgp_page(), 4 * 960, "with 20 ms of silence");
    }
}
