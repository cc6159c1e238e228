//! Metrics in Prometheus' text format. Written out when they are asked for, from the counts that the
//! daemon keeps anyway, so that nothing has to be kept in step. Labels have few values, which are
//! known beforehand: no rooms and no participants.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use axum::{
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::IntoResponse,
};

use super::{App, MAX_LISTENERS, view};
use crate::{
    board::{CLOSE_BUCKETS, Phase, TrackState},
    failure::Cause,
    journal::Journal,
    ledger::Counts,
    registry::StreamState,
};

/// Answers that were given, by the first digit of their status.
#[derive(Default)]
pub(super) struct Requests([AtomicU64; 6]);

impl Requests {
    pub fn answered(&self, status: StatusCode) {
        let class = usize::from(status.as_u16() / 100);
        if let Some(count) = self.0.get(class) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Metrics in Prometheus' text format; ARCHITECTURE.md lists them.
#[utoipa::path(
    get,
    path = "/metrics",
    responses(
        (status = 200, description = "Metrics", content_type = "text/plain", body = String),
        (status = "4XX", description = "Refused", body = super::ErrorBody),
    )
)]
pub(super) async fn metrics(State(app): State<Arc<App>>) -> impl IntoResponse {
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    ([(CONTENT_TYPE, kind)], text(&app))
}

/// A family of metrics after the other.
#[derive(Default)]
struct Page(String);

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Cannot fail: it is a text.
        let _ = writeln!(self.0, "# HELP roomwarden_{name} {help}");
        let _ = writeln!(self.0, "# TYPE roomwarden_{name} {kind}");
    }

    /// With a label, of which neither name nor value needs quoting.
    fn sample(&mut self, name: &str, label: Option<(&str, &str)>, value: f64) {
        let _ = match label {
            Some((label, of)) => {
                writeln!(self.0, "roomwarden_{name}{{{label}=\"{of}\"}} {value}")
            }
            None => writeln!(self.0, "roomwarden_{name} {value}"),
        };
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, value: f64) {
        self.family(name, kind, help);
        self.sample(name, None, value);
    }

    fn gauge(&mut self, name: &str, help: &str, value: usize) {
        self.one(name, "gauge", help, value as f64);
    }

    fn counter(&mut self, name: &str, help: &str, value: f64) {
        self.one(name, "counter", help, value);
    }

    fn each<'a>(
        &mut self,
        (name, kind, label): (&str, &str, &str),
        help: &str,
        values: impl IntoIterator<Item = (&'a str, f64)>,
    ) {
        self.family(name, kind, help);
        for (of, value) in values {
            self.sample(name, Some((label, of)), value);
        }
    }
}

fn text(app: &App) -> String {
    let daemon = &app.daemon;
    let registry = daemon.registry();
    let board = registry.board();
    let mut page = Page::default();
    let version = env!("CARGO_PKG_VERSION");
    page.each(
        ("build_info", "gauge", "version"),
        "The version.",
        [(version, 1.0)],
    );
    let uptime = daemon.started().elapsed().as_secs_f64();
    page.one("uptime_seconds", "gauge", "Since the start.", uptime);
    let ready = usize::from(view::not_ready(daemon).is_none());
    page.gauge("ready", "Whether it is ready to transcribe.", ready);
    let phase = board.phase();
    let phases = Phase::ALL.map(|of| (of.name(), f64::from(u8::from(of == phase))));
    page.each(
        ("state", "gauge", "state"),
        "How far the daemon is.",
        phases,
    );

    let rooms = board.rooms();
    page.gauge("rooms", "Rooms that it is in, or about to be.", rooms.len());
    let sessions: Vec<_> = rooms
        .iter()
        .flat_map(|room| room.sessions.values())
        .collect();
    page.gauge(
        "participants",
        "Participants with a session.",
        sessions.len(),
    );
    let mut tracks: BTreeMap<TrackState, usize> = BTreeMap::new();
    for track in sessions.iter().flat_map(|session| session.tracks.values()) {
        *tracks.entry(track.state).or_default() += 1;
    }
    let in_state = |state: TrackState| tracks.get(&state).copied().unwrap_or(0) as f64;
    page.each(
        ("tracks", "gauge", "state"),
        "Tracks by what is done with them.",
        TrackState::ALL.map(|state| (state.name(), in_state(state))),
    );

    let open = registry.open();
    let states = [
        StreamState::Opening,
        StreamState::Open,
        StreamState::Closing,
    ];
    page.each(
        ("streams", "gauge", "state"),
        "Streams on the books.",
        states.map(|state| {
            let count = open.iter().filter(|stream| stream.state == state).count();
            (state.name(), count as f64)
        }),
    );
    let counted = app.open();
    if let Some(kernel) = counted.kernel {
        let help = "Sockets to the provider that the kernel says the process holds.";
        page.gauge("kernel_sockets", help, kernel);
    }
    let disagree = usize::from(!counted.agree);
    page.gauge(
        "counts_disagree",
        "Whether registry and kernel count otherwise.",
        disagree,
    );

    let Counts {
        opened,
        acknowledged,
        timed_out,
        peer_gone,
        never_opened,
        unacknowledged_at_the_end: _,
    } = registry.ledger().counts();
    let help = "Streams that are over and that the provider counted, or may have.";
    page.counter("streams_opened_total", help, opened as f64);
    let outcomes = [
        ("acknowledged", acknowledged),
        ("timed_out", timed_out),
        ("peer_gone", peer_gone),
        ("never_opened", never_opened),
    ];
    page.each(
        ("streams_settled_total", "counter", "outcome"),
        "Receipts by outcome.",
        outcomes.map(|(name, count)| (name, count as f64)),
    );
    let totals = board.totals();
    let mut causes: Vec<_> = Cause::ALL.iter().map(|cause| cause.name()).collect();
    causes.dedup();
    let of = |cause: &'static str| totals.failures.get(cause).copied().unwrap_or(0) as f64;
    page.each(
        ("stream_failures_total", "counter", "cause"),
        "Streams that the provider or the network refused or ended.",
        causes.into_iter().map(|cause| (cause, of(cause))),
    );
    page.counter("audio_seconds_total", "Audio sent.", totals.audio_seconds);
    let help = "Time that connections were open.";
    page.counter("connection_seconds_total", help, totals.connection_seconds);
    let help = "From the order to close a stream to its receipt.";
    page.family("stream_close_seconds", "histogram", help);
    let mut below = 0;
    let bounds = CLOSE_BUCKETS.map(Some).into_iter().chain([None]);
    for (count, bound) in totals.closes.iter().zip(bounds) {
        below += count;
        let bound = bound.map_or("+Inf".to_owned(), |bound| bound.to_string());
        page.sample(
            "stream_close_seconds_bucket",
            Some(("le", &bound)),
            below as f64,
        );
    }
    page.sample("stream_close_seconds_sum", None, totals.close_seconds);
    page.sample("stream_close_seconds_count", None, below as f64);

    let gate = daemon.gate().standing();
    page.gauge("gate_held", "Places that are taken.", gate.held);
    page.gauge(
        "gate_waiting",
        "Tracks that wait for a place.",
        gate.waiting,
    );
    let help = "Streams that are over and that the provider may still count.";
    page.gauge("gate_quarantined", help, gate.quarantined);
    page.gauge("gate_peak", "Most places taken at once.", gate.peak);
    if let Some(limit) = gate.limit {
        page.gauge("gate_limit", "Places that there are.", limit);
    }
    let trouble = daemon.gate().trouble().borrow().clone();
    let trouble = trouble.map(|trouble| (trouble.failure.cause.name(), 1.0));
    page.each(
        ("provider_trouble", "gauge", "cause"),
        "Why nobody is let in to open a stream; not there if all is well.",
        trouble,
    );
    let livekit = usize::from(board.livekit().is_none());
    page.gauge(
        "livekit_up",
        "Whether LiveKit listed its rooms the last time.",
        livekit,
    );

    let orphans = registry.orphans().len();
    page.gauge(
        "streams_orphaned",
        "Streams that an earlier run left open.",
        orphans,
    );
    let missed = registry.journal().map_or(0, Journal::missed);
    let help = "Streams that were opened without being in the journal.";
    page.counter("streams_unjournaled_total", help, missed as f64);
    let classes = ["1xx", "2xx", "3xx", "4xx", "5xx"];
    let answers = app.requests.0.iter().skip(1);
    let answers = answers.map(|count| count.load(Ordering::Relaxed) as f64);
    page.each(
        ("api_requests_total", "counter", "status"),
        "Requests to this API, by the class of their answer's status.",
        classes.into_iter().zip(answers),
    );
    let listeners = MAX_LISTENERS - app.listeners.available_permits();
    page.gauge("api_listeners", "Who listens to events.", listeners);
    if let Some(bytes) = resident_bytes() {
        page.gauge("resident_memory_bytes", "Of this process.", bytes);
    }
    page.0
}

/// As the kernel has it (proc(5)); none elsewhere than on Linux.
fn resident_bytes() -> Option<usize> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: usize = statm.split(' ').nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size())
}
