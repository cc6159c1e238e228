//! The life of one stream without its socket: takes `now` and messages, returns what to send. The
//! driver in `stream.rs` owns the socket and the clock, the [dialect](super::dialect) the words.
//!
//! Closing goes CloseStream -> remaining Results -> Metadata -> websocket close handshake -> end of
//! the connection, as Deepgram calls it, within one absolute deadline. What runs out is escalated: a
//! close frame when most of the time is gone, a reset at the deadline.

use std::{
    borrow::Cow,
    collections::VecDeque,
    time::{Duration, Instant},
};

use tokio_tungstenite::tungstenite::Message;

use super::dialect::{Dialect, Said, SpeechResult, cut};
use crate::{
    audio::Page,
    domain::{Outcome, Phase},
    failure::{Cause, Failure},
};

/// Deepgram drops a stream after 10 s without audio or KeepAlive and advises one every 3 to 5 s.
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(4);
/// KeepAlive is the owner's sign of life, not the socket's: without a word from the owner for this
/// long it is withheld, and the provider ends the stream by itself.
pub const OWNER_PATIENCE: Duration = Duration::from_secs(5);
/// How long the provider may take to end the connection after its last message before we do.
const END_PATIENCE: Duration = Duration::from_millis(250);
/// Messages that wait for the socket; beyond that the oldest audio goes. More than what can gather
/// while a stream is opened and until it counts as stalled.
const MAX_QUEUED: usize = 2048;
const MAX_QUEUED_OF_OWNER: usize = 64;
/// Reasons and ids come from the network: keep what is said of them short.
const MAX_DETAIL: usize = 300;

/// What a provider may keep us waiting before its connection counts as dead; `None` for ever. Both
/// hold while streaming; a close has its own deadline.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Nothing is heard, not even an answer to a ping.
    pub read: Option<Duration>,
    /// Nothing is taken, with something waiting.
    pub write: Option<Duration>,
}

/// What the driver is to do, in order.
#[derive(Debug, PartialEq)]
pub enum Action {
    Text(Cow<'static, str>),
    Audio(Page),
    Ping,
    /// A websocket close frame with code 1000.
    CloseFrame,
}

/// What the provider reported.
#[derive(Debug, Clone, PartialEq)]
pub enum Report {
    /// There is a stream, with the provider's id of it if the handshake's answer had one.
    Opened(Option<String>),
    /// A message as it came, of a stream whose owner speaks the protocol itself.
    Message(String),
    Result(SpeechResult),
    /// The provider's own words about something that is wrong.
    Error(String),
}

#[derive(Debug)]
enum State {
    Streaming,
    Closing(Closing),
    Over(Outcome),
}

#[derive(Debug)]
struct Closing {
    phase: Phase,
    /// When the graceful part is over, and when everything is.
    close_frame_at: Instant,
    deadline: Instant,
    close_frame_sent: bool,
}

pub struct Machine {
    dialect: Box<dyn Dialect>,
    limits: Limits,
    state: State,
    queue: VecDeque<Action>,
    reports: VecDeque<Report>,
    last_sent: Instant,
    heard: Instant,
    pinged: bool,
    owner_seen: Instant,
    /// When the first of the queue began to wait.
    waiting_since: Option<Instant>,
    peer_close: Option<(u16, String)>,
    /// The last error that the provider reported.
    last_error: Option<String>,
    provider_seconds: Option<f64>,
    request_id: Option<String>,
    dropped_audio: u64,
}

impl Machine {
    /// The machine of a stream whose handshake has just completed.
    pub fn new(now: Instant, limits: Limits, dialect: Box<dyn Dialect>) -> Self {
        let greeting = dialect.greeting().map(Action::Text);
        Self {
            dialect,
            limits,
            state: State::Streaming,
            queue: greeting.into_iter().collect(),
            reports: VecDeque::new(),
            last_sent: now,
            heard: now,
            pinged: false,
            owner_seen: now,
            waiting_since: None,
            peer_close: None,
            last_error: None,
            provider_seconds: None,
            request_id: None,
            dropped_audio: 0,
        }
    }

    /// Audio from the owner. Empty pages are not sent: an empty binary message harms the stream.
    pub fn audio(&mut self, now: Instant, page: Page) {
        self.owner_seen = now;
        if !matches!(self.state, State::Streaming) || page.is_empty() {
            return;
        }
        self.last_sent = now;
        let audio = |action: &Action| matches!(action, Action::Audio(_));
        if self.queue.len() >= MAX_QUEUED
            && let Some(oldest) = self.queue.iter().position(audio)
        {
            self.queue.remove(oldest);
            self.dropped_audio += 1;
        }
        self.waiting_since.get_or_insert(now);
        self.queue.push_back(Action::Audio(page));
    }

    /// A message from an owner who speaks the protocol itself.
    pub fn say(&mut self, now: Instant, text: String) {
        self.owner_seen = now;
        if matches!(self.state, State::Streaming) {
            self.last_sent = now;
            self.waiting_since.get_or_insert(now);
            self.queue.push_back(Action::Text(text.into()));
        }
    }

    /// Whether the owner may go on. One who speaks the protocol itself has to wait while the provider
    /// takes nothing; of others the oldest audio is dropped in the end, since they can't.
    pub fn takes_more(&self) -> bool {
        !self.dialect.is_owners() || self.queue.len() < MAX_QUEUED_OF_OWNER
    }

    /// The owner still wants the stream.
    pub fn owner_alive(&mut self, now: Instant) {
        self.owner_seen = now;
    }

    /// Asks the provider to finish and acknowledge by `deadline`. A later call can only bring the
    /// deadline forward.
    pub fn close(&mut self, now: Instant, deadline: Instant) {
        match &mut self.state {
            State::Streaming => {
                let close = self.dialect.close().into();
                self.queue.push_back(Action::Text(close));
                self.state = State::Closing(Closing {
                    phase: Phase::Flushing,
                    close_frame_at: escalation(now, deadline),
                    deadline,
                    close_frame_sent: false,
                });
            }
            State::Closing(closing) if deadline < closing.deadline => {
                closing.deadline = deadline;
                closing.close_frame_at = closing.close_frame_at.min(escalation(now, deadline));
            }
            State::Closing(_) | State::Over(_) => {}
        }
    }

    /// Anything at all came from the provider.
    pub fn heard(&mut self, now: Instant) {
        self.heard = now;
        self.pinged = false;
    }

    /// A text message from the provider.
    pub fn text(&mut self, now: Instant, text: &str) {
        if self.dialect.is_owners() {
            self.reports.push_back(Report::Message(text.to_owned()));
        }
        for said in self.dialect.read(text) {
            match said {
                Said::RequestId(id) => {
                    self.request_id.get_or_insert(id);
                }
                Said::Result(result) => self.reports.push_back(Report::Result(result)),
                Said::Error(said) => {
                    self.last_error = Some(said.clone());
                    self.reports.push_back(Report::Error(said));
                }
                Said::Done(seconds) => {
                    self.provider_seconds = seconds.or(self.provider_seconds);
                    // Only after CloseStream has left is it an answer to that.
                    if let State::Closing(closing) = &mut self.state
                        && closing.phase != Phase::Flushing
                    {
                        closing.phase = Phase::AwaitingEnd;
                        closing.close_frame_at = closing.close_frame_at.min(now + END_PATIENCE);
                    }
                }
            }
        }
    }

    /// Audio as it goes to the provider.
    pub fn frame(&self, page: Page) -> Message {
        self.dialect.audio(page)
    }

    /// The provider's close frame; the websocket library has answered it.
    pub fn close_frame(&mut self, code: u16, reason: &str) {
        self.peer_close = Some((code, bounded(reason)));
        if let State::Closing(closing) = &mut self.state {
            let unasked = closing.phase == Phase::Flushing || closing.close_frame_sent;
            if self.dialect.is_done_by(code) && !unasked {
                closing.phase = Phase::AwaitingEnd;
            }
        }
    }

    /// The connection is over; `failure` says how if it was not by a close frame.
    pub fn ended(&mut self, failure: Failure) {
        let outcome = match &self.state {
            State::Over(_) => return,
            State::Closing(Closing {
                phase: Phase::AwaitingEnd,
                ..
            }) if self.peer_closed_well() => Outcome::Acknowledged,
            // We gave up waiting and said so; that the provider then closed is no answer.
            State::Closing(Closing {
                phase,
                close_frame_sent: true,
                ..
            }) => Outcome::TimedOut { phase: *phase },
            State::Closing(_) | State::Streaming => {
                let failure = match &self.peer_close {
                    Some((code, reason)) => Failure::closed(*code, reason),
                    None => failure,
                };
                Outcome::peer_gone(match &self.last_error {
                    Some(said) => failure.after_error(said),
                    None => failure,
                })
            }
        };
        self.state = State::Over(outcome);
    }

    /// Call when [`Machine::next_timeout`] has passed.
    pub fn timeout(&mut self, now: Instant) {
        match &mut self.state {
            State::Streaming => {
                let passed = |at: Option<Instant>| at.is_some_and(|at| at <= now);
                let dead = if passed(self.stalled_at()) {
                    Some((Phase::Flushing, self.limits.write))
                } else if passed(self.silent_at()) {
                    Some((Phase::AwaitingAnswer, self.limits.read))
                } else {
                    None
                };
                if let Some((phase, limit)) = dead {
                    let said = format!("waited {:?}", limit.unwrap_or_default());
                    let failure = Failure::new(Cause::Timeout(phase), said);
                    self.state = State::Over(Outcome::peer_gone(failure));
                    return;
                }
                if passed(self.ping_at()) {
                    self.pinged = true;
                    self.queue.push_back(Action::Ping);
                }
                if self.keep_alive_due() <= now {
                    self.last_sent = now;
                    let is_wanted = now.saturating_duration_since(self.owner_seen) < OWNER_PATIENCE;
                    match self.dialect.keep_alive() {
                        Some(text) if is_wanted => self.queue.push_back(Action::Text(text.into())),
                        // The provider would not end it, or not for long.
                        None if !is_wanted => self.close(now, now + OWNER_PATIENCE),
                        Some(_) | None => {}
                    }
                }
            }
            State::Closing(closing) => {
                if now >= closing.deadline {
                    self.state = State::Over(Outcome::TimedOut {
                        phase: closing.phase,
                    });
                } else if now >= closing.close_frame_at && !closing.close_frame_sent {
                    closing.close_frame_sent = true;
                    self.queue.push_back(Action::CloseFrame);
                }
            }
            State::Over(_) => {}
        }
    }

    pub fn next_timeout(&self) -> Option<Instant> {
        match &self.state {
            State::Streaming => {
                let due = [self.stalled_at(), self.silent_at(), self.ping_at()];
                let keep_alive = self.keep_alive_due();
                Some(due.into_iter().flatten().fold(keep_alive, Instant::min))
            }
            State::Closing(c) if c.close_frame_sent => Some(c.deadline),
            State::Closing(c) => Some(c.close_frame_at.min(c.deadline)),
            State::Over(_) => None,
        }
    }

    /// The next thing to send, in order.
    pub fn next_action(&mut self, now: Instant) -> Option<Action> {
        let action = self.queue.pop_front();
        self.waiting_since = (!self.queue.is_empty()).then_some(now);
        action
    }

    /// Everything handed out has left for the kernel.
    pub fn flushed(&mut self) {
        if let State::Closing(closing) = &mut self.state
            && closing.phase == Phase::Flushing
            && self.queue.is_empty()
        {
            closing.phase = Phase::AwaitingAnswer;
        }
    }

    pub fn next_report(&mut self) -> Option<Report> {
        self.reports.pop_front()
    }

    /// Set once the stream is over. After a time-out the driver resets the connection.
    pub fn outcome(&self) -> Option<&Outcome> {
        match &self.state {
            State::Over(outcome) => Some(outcome),
            State::Streaming | State::Closing(_) => None,
        }
    }

    pub fn is_closing(&self) -> bool {
        !matches!(self.state, State::Streaming)
    }

    /// The provider's id of the stream, as its messages gave it.
    pub fn request_id(&self) -> Option<&str> {
        self.request_id.as_deref()
    }

    /// The seconds of audio that the provider has counted, if it has said so.
    pub fn provider_seconds(&self) -> Option<f64> {
        self.provider_seconds
    }

    /// Pages dropped because the socket took nothing.
    pub fn dropped_audio(&self) -> u64 {
        self.dropped_audio
    }

    fn keep_alive_due(&self) -> Instant {
        self.last_sent + KEEP_ALIVE_EVERY
    }

    fn stalled_at(&self) -> Option<Instant> {
        Some(self.waiting_since? + self.limits.write?)
    }

    fn silent_at(&self) -> Option<Instant> {
        self.limits.read.map(|limit| self.heard + limit)
    }

    /// A ping half-way leaves the other half for its answer.
    fn ping_at(&self) -> Option<Instant> {
        let limit = self.limits.read.filter(|_| !self.pinged)?;
        Some(self.heard + limit / 2)
    }

    /// Whether nothing was wrong in the provider's eyes: 1005 is a close frame without a code.
    fn peer_closed_well(&self) -> bool {
        !matches!(&self.peer_close, Some((code, _)) if !matches!(code, 1000 | 1005))
    }
}

/// The graceful part gets four fifths of the time; the rest is for close frame and reset.
fn escalation(now: Instant, deadline: Instant) -> Instant {
    now + deadline.saturating_duration_since(now).mul_f64(0.8)
}

fn bounded(text: &str) -> String {
    cut(text.to_owned(), MAX_DETAIL)
}

#[cfg(test)]
mod tests {
    use super::{super::dialect, *};
    use crate::config::ProviderKind;

    const METADATA: &str = r#"{"type":"Metadata","request_id":"r","duration":1.5,"channels":1}"#;

    const LIMITS: Limits = Limits {
        read: None,
        write: Some(Duration::from_secs(10)),
    };

    fn listen() -> Box<dyn Dialect> {
        dialect::of(&crate::config::Config::for_tests().stt)
    }

    struct Rig {
        machine: Machine,
        start: Instant,
    }

    impl Rig {
        fn new() -> Self {
            let start = Instant::now();
            Self {
                machine: Machine::new(start, LIMITS, listen()),
                start,
            }
        }
        fn at(&self, ms: u64) -> Instant {
            self.start + Duration::from_millis(ms)
        }
        fn sent(&mut self) -> Vec<Action> {
            let now = self.start;
            let sent = std::iter::from_fn(|| self.machine.next_action(now)).collect();
            self.machine.flushed();
            sent
        }
        /// Runs the timers that are due until `ms`; each must move the next one on.
        fn run_until(&mut self, ms: u64) -> Vec<Action> {
            let (mut sent, until) = (self.sent(), self.at(ms));
            for _ in 0..1000 {
                let due = self.machine.next_timeout().filter(|due| *due <= until);
                let Some(due) = due else {
                    return sent;
                };
                self.machine.timeout(due);
                sent.extend(self.sent());
            }
            panic!(
                "its timers never come to an end: {:?}",
                self.machine.next_timeout()
            );
        }
        fn close(&mut self, ms: u64, deadline: u64) {
            let (now, deadline) = (self.at(ms), self.at(deadline));
            self.machine.close(now, deadline);
        }
    }

    fn page(byte: u8) -> Page {
        Page {
            bytes: vec![byte],
            samples: 960,
        }
    }

    fn cut() -> Failure {
        Failure::new(Cause::Reset, "cut")
    }

    fn close_stream() -> Action {
        Action::Text(r#"{"type":"CloseStream"}"#.into())
    }

    #[test]
    fn a_close_flushes_audio_first_and_is_acknowledged_only_when_the_connection_ends() {
        let mut rig = Rig::new();
        rig.machine.audio(rig.start, page(1));
        rig.close(0, 5000);
        rig.machine.audio(rig.start, page(2));
        assert_eq!(rig.sent(), [Action::Audio(page(1)), close_stream()]);
        let now = rig.at(100);
        rig.machine.text(now, METADATA);
        rig.machine.close_frame(1000, "");
        assert_eq!(rig.machine.outcome(), None);
        rig.machine.ended(cut());
        assert_eq!(rig.machine.outcome(), Some(&Outcome::Acknowledged));
        assert_eq!(rig.machine.provider_seconds(), Some(1.5));
    }

    #[test]
    fn finals_that_come_while_closing_are_reported() {
        let mut rig = Rig::new();
        rig.close(0, 5000);
        rig.sent();
        let result = r#"{"type":"Results","start":1,"duration":2,"is_final":true,
            "channel":{"alternatives":[{"transcript":"hello","confidence":0.9,"words":[]}]}}"#;
        let now = rig.at(400);
        rig.machine.text(now, result);
        let Some(Report::Result(got)) = rig.machine.next_report() else {
            panic!("no result")
        };
        assert_eq!(
            (got.text.as_str(), got.is_final, got.start),
            ("hello", true, 1.0)
        );
    }

    #[test]
    fn without_an_answer_it_escalates_to_a_close_frame_and_then_times_out() {
        let mut rig = Rig::new();
        rig.close(0, 1000);
        assert_eq!(rig.run_until(799), [close_stream()]);
        assert_eq!(rig.run_until(999), [Action::CloseFrame]);
        assert_eq!(rig.machine.outcome(), None);
        rig.run_until(1000);
        let outcome = Outcome::TimedOut {
            phase: Phase::AwaitingAnswer,
        };
        assert_eq!(rig.machine.outcome(), Some(&outcome));
    }

    #[test]
    fn a_close_handshake_without_an_answer_is_no_acknowledgement() {
        let mut rig = Rig::new();
        rig.close(0, 1000);
        rig.run_until(900);
        rig.machine.close_frame(1000, "");
        rig.machine.ended(cut());
        let outcome = Outcome::TimedOut {
            phase: Phase::AwaitingAnswer,
        };
        assert_eq!(rig.machine.outcome(), Some(&outcome));
    }

    #[test]
    fn a_socket_that_takes_nothing_times_out_flushing() {
        let mut rig = Rig::new();
        rig.machine.audio(rig.start, page(1));
        rig.close(0, 1000);
        let late = rig.at(1000);
        rig.machine.timeout(late);
        let outcome = Outcome::TimedOut {
            phase: Phase::Flushing,
        };
        assert_eq!(rig.machine.outcome(), Some(&outcome));
    }

    #[test]
    fn hurry_brings_the_deadline_forward_and_never_back() {
        let mut rig = Rig::new();
        rig.close(0, 10_000);
        rig.sent();
        rig.close(100, 600);
        rig.close(200, 60_000);
        rig.run_until(600);
        assert!(matches!(
            rig.machine.outcome(),
            Some(Outcome::TimedOut { .. })
        ));
    }

    #[test]
    fn a_server_that_answers_without_metadata_acknowledges_by_closing() {
        let mut rig = Rig::new();
        rig.close(0, 1000);
        rig.sent();
        rig.machine.close_frame(1000, "");
        rig.machine.ended(cut());
        assert_eq!(rig.machine.outcome(), Some(&Outcome::Acknowledged));
    }

    #[test]
    fn a_server_that_answers_but_lingers_is_sent_a_close_frame() {
        let mut rig = Rig::new();
        rig.close(0, 10_000);
        rig.sent();
        let now = rig.at(100);
        rig.machine.text(now, METADATA);
        assert_eq!(rig.run_until(350), [Action::CloseFrame]);
        rig.machine.ended(cut());
        assert_eq!(rig.machine.outcome(), Some(&Outcome::Acknowledged));
    }

    #[test]
    fn a_stream_the_provider_ends_names_its_code_and_reason() {
        let mut rig = Rig::new();
        rig.machine.close_frame(1011, "NET-0001");
        rig.machine.ended(cut());
        let failure = Failure::closed(1011, "NET-0001");
        assert_eq!(rig.machine.outcome(), Some(&Outcome::peer_gone(failure)));
    }

    #[test]
    fn keep_alive_is_sent_while_quiet_and_wanted_and_withheld_when_the_owner_is_stuck() {
        let mut rig = Rig::new();
        for ms in (0..8000).step_by(1000) {
            let now = rig.at(ms);
            rig.machine.owner_alive(now);
            assert_eq!(rig.run_until(ms).len(), usize::from(ms == 4000));
        }
        assert_eq!(rig.run_until(9000).len(), 1, "owner seen at 7 s");
        assert_eq!(rig.run_until(60_000), [], "nothing of the owner since");
    }

    #[test]
    fn a_provider_without_keep_alive_is_asked_to_close_when_the_owner_is_stuck() {
        for provider in [ProviderKind::DeepgramFlux, ProviderKind::LivekitInference] {
            let mut config = crate::config::Config::for_tests().stt;
            config.provider = provider;
            let start = Instant::now();
            let machine = Machine::new(start, LIMITS, dialect::of(&config));
            let mut rig = Rig { machine, start };
            rig.sent();
            for ms in [3000, 6000, 9000] {
                let now = rig.at(ms);
                rig.machine.owner_alive(now);
                assert_eq!(rig.run_until(ms), [], "{provider:?}");
            }
            let [Action::Text(close), ..] = &rig.run_until(20_000)[..] else {
                panic!("{provider:?} is not asked");
            };
            assert!(close.to_lowercase().contains("close"), "{close}");
        }
    }

    #[test]
    fn audio_makes_keep_alive_needless() {
        let mut rig = Rig::new();
        for ms in (0..20_000).step_by(40) {
            let now = rig.at(ms);
            rig.machine.audio(now, page(0));
            assert_eq!(rig.run_until(ms), [Action::Audio(page(0))]);
        }
    }

    #[test]
    fn the_queue_is_bounded_and_drops_the_oldest_audio() {
        let mut rig = Rig::new();
        for n in 0..(MAX_QUEUED + 10) {
            rig.machine.audio(rig.start, page(n as u8));
        }
        assert_eq!(rig.machine.dropped_audio(), 10);
        assert_eq!(rig.sent().len(), MAX_QUEUED);
    }

    #[test]
    fn metadata_before_close_stream_has_left_is_no_acknowledgement() {
        let mut rig = Rig::new();
        rig.close(0, 1000);
        let now = rig.at(1);
        rig.machine.text(now, METADATA);
        rig.machine.ended(cut());
        assert!(matches!(
            rig.machine.outcome(),
            Some(Outcome::PeerGone { .. })
        ));
    }

    #[test]
    fn an_error_code_after_metadata_is_no_acknowledgement() {
        let mut rig = Rig::new();
        rig.close(0, 1000);
        rig.sent();
        let now = rig.at(1);
        rig.machine.text(now, METADATA);
        rig.machine.close_frame(1011, "NET-0000");
        rig.machine.ended(cut());
        let failure = Failure::closed(1011, "NET-0000");
        assert_eq!(rig.machine.outcome(), Some(&Outcome::peer_gone(failure)));
    }

    #[test]
    fn a_socket_that_takes_no_audio_is_given_up() {
        let mut rig = Rig::new();
        rig.machine.audio(rig.start, page(1));
        for ms in (0..9_000).step_by(1000) {
            let now = rig.at(ms);
            rig.machine.owner_alive(now);
            rig.machine.timeout(now);
        }
        assert_eq!(rig.machine.outcome(), None);
        let late = rig.at(10_000);
        rig.machine.timeout(late);
        let Some(Outcome::PeerGone { detail, .. }) = rig.machine.outcome() else {
            panic!("no outcome")
        };
        assert_eq!(detail, "it takes nothing any more: waited 10s");
    }

    #[test]
    fn a_silent_provider_is_pinged_and_given_up_if_it_does_not_answer() {
        let start = Instant::now();
        let limits = Limits {
            read: Some(Duration::from_secs(3)),
            write: None,
        };
        let machine = Machine::new(start, limits, listen());
        let mut rig = Rig { machine, start };
        assert_eq!(rig.run_until(1499), []);
        assert_eq!(rig.run_until(2999), [Action::Ping]);
        let now = rig.at(2999);
        rig.machine.heard(now);
        assert!(!rig.run_until(4498).contains(&Action::Ping));
        assert!(rig.run_until(5998).contains(&Action::Ping));
        assert_eq!(rig.machine.outcome(), None);
        rig.run_until(5999);
        let Some(Outcome::PeerGone { detail, .. }) = rig.machine.outcome() else {
            panic!("no outcome")
        };
        assert!(detail.contains("no sign of life: waited 3s"), "{detail}");
    }

    #[test]
    fn unknown_and_broken_messages_change_nothing() {
        let mut rig = Rig::new();
        let now = rig.at(1);
        let deep = "[".repeat(100_000);
        let long = format!(
            r#"{{"type":"Error","description":"{}"}}"#,
            "x".repeat(10_000)
        );
        for text in [
            "",
            "{}",
            "[]",
            r#"{"type":"New"}"#,
            r#"{"type":"Results"}"#,
            &deep,
            &long,
        ] {
            rig.machine.text(now, text);
        }
        let Some(Report::Error(said)) = rig.machine.next_report() else {
            panic!("no error")
        };
        assert!(said.len() < 400);
        assert_eq!(rig.machine.outcome(), None);
    }
}
