//! Why the provider gave no stream, or took one away: a closed set of causes, each with what it
//! means, what to do about it, and whether another try makes sense. Decided from what the provider
//! said and what the network did; knows no sockets.
//!
//! Sources: Deepgram's documentation of its streaming errors and close codes, RFC 6455 (section 7.4),
//! and for LiveKit Inference <https://github.com/livekit/agents/issues/6009>.

use std::{
    borrow::Cow,
    fmt, io,
    time::{Duration, Instant},
};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{close::now, domain::Phase};

/// What providers say of an error is kept to so many bytes.
const MAX_SAID: usize = 300;

/// The cause of a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Cause {
    /// The key is wrong, or not valid any more.
    Authentication,
    /// The key is right, but may not do this: use the model, or a feature.
    Permission,
    /// The account's credit or quota is used up.
    Quota,
    /// As many streams are open as the account may have.
    Concurrency,
    /// Too many requests within a time.
    RateLimit,
    /// The provider does not understand what it was asked for.
    BadRequest,
    /// The provider's own trouble.
    ProviderFault,
    /// The provider's name was not resolved.
    Dns,
    /// Nobody listens at the provider's address, or there is no route to it.
    Unreachable,
    /// The connection was cut.
    Reset,
    Tls,
    /// Nothing came, or nothing was taken, within the time that is allowed in this phase.
    Timeout(Phase),
    /// What came is no websocket, or not this protocol.
    Protocol,
    /// The provider cannot decode the audio.
    Audio,
    /// The provider got no audio for too long.
    Idle,
    /// No fault of the provider's: the operator's own limit of what may be used.
    Budget,
}

/// When another try makes sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// It fails for every stream alike until somebody has done something about it: one try now and
    /// then, for all.
    Probe { first: Duration, most: Duration },
    /// As soon as another stream has ended, or the provider has calmed down.
    Slot,
    /// It may pass by itself; if it goes on, it concerns all streams.
    Later,
    /// It concerns this stream alone.
    ThisStream,
}

impl Cause {
    pub const ALL: [Self; 19] = [
        Self::Authentication,
        Self::Permission,
        Self::Quota,
        Self::Concurrency,
        Self::RateLimit,
        Self::BadRequest,
        Self::ProviderFault,
        Self::Dns,
        Self::Unreachable,
        Self::Reset,
        Self::Tls,
        Self::Timeout(Phase::Connecting),
        Self::Timeout(Phase::Flushing),
        Self::Timeout(Phase::AwaitingAnswer),
        Self::Timeout(Phase::AwaitingEnd),
        Self::Protocol,
        Self::Audio,
        Self::Idle,
        Self::Budget,
    ];

    /// A word for it, for machines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Authentication => "authentication",
            Self::Permission => "permission",
            Self::Quota => "quota",
            Self::Concurrency => "concurrency",
            Self::RateLimit => "rate_limit",
            Self::BadRequest => "bad_request",
            Self::ProviderFault => "provider_fault",
            Self::Dns => "dns",
            Self::Unreachable => "unreachable",
            Self::Reset => "reset",
            Self::Tls => "tls",
            Self::Timeout(_) => "timeout",
            Self::Protocol => "protocol",
            Self::Audio => "audio",
            Self::Idle => "idle",
            Self::Budget => "budget",
        }
    }

    /// What it means, in a few words.
    pub fn meaning(self) -> &'static str {
        match self {
            Self::Authentication => "the key is not accepted",
            Self::Permission => "the key may not use this model or feature",
            Self::Quota => "the account's credit is used up",
            Self::Concurrency => "too many streams at once",
            Self::RateLimit => "too many requests at once",
            Self::BadRequest => "the provider does not understand the request",
            Self::ProviderFault => "the provider's fault",
            Self::Dns => "its name cannot be resolved",
            Self::Unreachable => "it cannot be reached",
            Self::Reset => "the connection was cut",
            Self::Tls => "no secure connection",
            Self::Timeout(Phase::Connecting) => "no answer in time",
            Self::Timeout(Phase::Flushing) => "it takes nothing any more",
            Self::Timeout(Phase::AwaitingAnswer | Phase::AwaitingEnd) => "no sign of life",
            Self::Protocol => "it speaks another protocol",
            Self::Audio => "the audio cannot be decoded",
            Self::Idle => "no audio in time",
            Self::Budget => "the budget for it is used up",
        }
    }

    /// What to do about it.
    pub fn advice(self) -> &'static str {
        match self {
            Self::Authentication => {
                "check stt.api_key (DEEPGRAM_API_KEY); with LiveKit Inference, key and secret of \
                 [livekit] or stt.inference_api_key and its secret"
            }
            Self::Permission => "take another stt.model, or a key that may use this one",
            Self::Quota => "add some: without it no stream is opened",
            Self::Concurrency => {
                "wait for other streams to end, close what else uses the account, or raise its limit"
            }
            Self::RateLimit => "nothing: it passes; if it comes often, raise the account's limit",
            Self::BadRequest => {
                "correct what it names: stt.url, stt.model, stt.language, [stt.parameters] or [stt.extra]"
            }
            Self::ProviderFault => {
                "nothing: it is tried again later; see the provider's status page"
            }
            Self::Dns => "check the host in stt.url, and this machine's DNS",
            Self::Unreachable => "check host and port in stt.url, firewalls and routes",
            Self::Reset => "nothing: it is tried again; if it goes on, check proxies on the way",
            Self::Tls => {
                "check that stt.url is https or wss, this machine's clock and its certificates"
            }
            Self::Timeout(_) => "nothing: it is tried again; if it goes on, check the network",
            Self::Protocol => "check that stt.url is a Deepgram-style server",
            Self::Audio => "try another stt.encoding",
            Self::Idle => "nothing: a stream is opened when there is audio",
            Self::Budget => "raise its limit in [budget], or wait for the next day or month",
        }
    }

    pub fn retry(self) -> Retry {
        let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
        match self {
            Self::Authentication | Self::Permission | Self::BadRequest => Retry::Probe {
                first: minutes(1),
                most: minutes(15),
            },
            Self::Quota => Retry::Probe {
                first: Duration::from_secs(15),
                most: minutes(5),
            },
            Self::Concurrency | Self::RateLimit => Retry::Slot,
            Self::ProviderFault
            | Self::Dns
            | Self::Unreachable
            | Self::Reset
            | Self::Tls
            | Self::Timeout(_)
            | Self::Protocol => Retry::Later,
            Self::Audio | Self::Idle | Self::Budget => Retry::ThisStream,
        }
    }
}

impl Serialize for Cause {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for Cause {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        // The phase of a time-out is not kept. What a newer version says is a fault to this one.
        let known = Self::ALL.into_iter().find(|cause| cause.name() == name);
        Ok(known.unwrap_or(Self::ProviderFault))
    }
}

/// A failure, with everything that is known of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub cause: Cause,
    /// Of the handshake's answer, if it was a refusal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// Of the websocket's close frame, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub close_code: Option<u16>,
    /// The provider's or the system's own words, its code among them.
    pub said: String,
    /// The provider's id of the request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    /// How long the provider asks to be left alone, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
}

impl Failure {
    pub fn new(cause: Cause, said: impl Into<String>) -> Self {
        Self {
            cause,
            status: None,
            close_code: None,
            said: bounded(said.into()),
            request_id: None,
            retry_after_ms: None,
        }
    }

    /// A handshake that was answered with anything but a websocket.
    pub fn refused(status: u16, answer: &Answer<'_>) -> Self {
        let told = Told::of(answer);
        let by_status = match status {
            401 => Cause::Authentication,
            402 => Cause::Quota,
            403 => Cause::Permission,
            429 => Cause::Concurrency,
            408 | 425 | 500..=599 => Cause::ProviderFault,
            // Not an error, and not what was asked for either.
            100..=299 => Cause::Protocol,
            _ => Cause::BadRequest,
        };
        // A code says more than a status; but a server in trouble may say anything.
        let cause = match by_status {
            Cause::ProviderFault => by_status,
            _ => by_words(&told.all()).unwrap_or(by_status),
        };
        Self {
            status: Some(status),
            request_id: answer
                .request_id
                .map(|id| bounded(id.to_owned()))
                .or(told.request_id),
            retry_after_ms: answer.retry_after.map(|after| after.as_millis() as u64),
            ..Self::new(cause, told.said)
        }
    }

    /// A stream that the provider closed without being asked.
    pub fn closed(code: u16, reason: &str) -> Self {
        let by_code = match code {
            1002 | 1003 | 1007 | 1009 | 1010 => Cause::Protocol,
            1008 => Cause::BadRequest,
            1006 | 1015 => Cause::Reset,
            3000 => Cause::Authentication,
            3003 => Cause::Permission,
            3008 => Cause::Timeout(Phase::AwaitingAnswer),
            _ => Cause::ProviderFault,
        };
        let cause = by_words(reason).unwrap_or(by_code);
        Self {
            close_code: Some(code),
            ..Self::new(cause, reason)
        }
    }

    /// A stream that ended after the provider had reported this error on it. What the provider said
    /// last tells more than how the connection then ended.
    pub fn after_error(mut self, said: &str) -> Self {
        if matches!(self.cause, Cause::ProviderFault | Cause::Reset)
            && let Some(cause) = by_words(said)
        {
            self.cause = cause;
        }
        if self.said.is_empty() {
            self.said = bounded(said.to_owned());
        }
        self
    }

    /// An error of the socket, while connecting or later.
    pub fn io(error: &io::Error) -> Self {
        use io::ErrorKind::{
            ConnectionRefused, HostUnreachable, InvalidData, NetworkUnreachable, NotFound, TimedOut,
        };
        let is_tls = error
            .get_ref()
            .is_some_and(|inner| inner.is::<rustls::Error>());
        let cause = match error.kind() {
            _ if is_tls => Cause::Tls,
            ConnectionRefused | HostUnreachable | NetworkUnreachable | NotFound => {
                Cause::Unreachable
            }
            TimedOut => Cause::Timeout(Phase::Connecting),
            InvalidData => Cause::Protocol,
            _ => Cause::Reset,
        };
        Self::new(cause, error.to_string())
    }

    pub fn retry_after(&self) -> Option<Duration> {
        self.retry_after_ms.map(Duration::from_millis)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(status) = self.status {
            write!(f, "refused with {status}, ")?;
        }
        if let Some(code) = self.close_code {
            write!(f, "close code {code}, ")?;
        }
        f.write_str(self.cause.meaning())?;
        if !self.said.is_empty() {
            write!(f, ": {}", self.said)?;
        }
        match &self.request_id {
            Some(id) => write!(f, " (request {id})"),
            None => Ok(()),
        }
    }
}

/// Why no stream is opened for anybody.
#[derive(Debug, Clone, PartialEq)]
pub struct Trouble {
    pub failure: Failure,
    /// When the next try is made, at the earliest.
    pub until: Instant,
}

impl Trouble {
    /// What it means for who is there.
    pub fn what(&self) -> &'static str {
        match self.failure.cause {
            Cause::Concurrency => "not everybody can be transcribed",
            Cause::Budget => "who is not yet transcribed has to wait",
            _ => "transcription is paused",
        }
    }

    /// Whether it has the same cause and lasts as long as another, about.
    pub fn is_same(&self, other: &Self) -> bool {
        let (this, that) = (self.until, other.until);
        let differ = this.saturating_duration_since(that) + that.saturating_duration_since(this);
        self.failure.cause == other.failure.cause && differ < Duration::from_secs(5)
    }

    pub fn log(&self) {
        let wait = self.until.saturating_duration_since(now());
        let (cause, advice) = (self.failure.cause.name(), self.failure.cause.advice());
        let (what, retry_in_ms) = (self.what(), wait.as_millis() as u64);
        tracing::error!(cause, advice, retry_in_ms, "{what}: {}", self.failure);
    }
}

/// What an HTTP answer holds besides its status.
#[derive(Debug, Default)]
pub struct Answer<'a> {
    /// `dg-error`.
    pub error: Option<&'a str>,
    /// `dg-request-id`.
    pub request_id: Option<&'a str>,
    pub retry_after: Option<Duration>,
    pub body: &'a [u8],
}

/// The bodies of Deepgram (two shapes) and of LiveKit Inference.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Body {
    err_code: Option<String>,
    err_msg: Option<String>,
    category: Option<String>,
    message: Option<String>,
    details: Option<String>,
    request_id: Option<String>,
    error: Option<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
    hint: Option<String>,
}

/// An answer's own words.
struct Told {
    said: String,
    error: String,
    request_id: Option<String>,
}

impl Told {
    fn of(answer: &Answer<'_>) -> Self {
        let body = serde_json::from_slice::<Body>(answer.body);
        let error = answer.error.unwrap_or_default().to_owned();
        let Ok(body) = body else {
            // Of a proxy on the way, perhaps.
            let text = String::from_utf8_lossy(&answer.body[..answer.body.len().min(MAX_SAID)]);
            let said = match text.trim() {
                "" => error.clone(),
                text => text.to_owned(),
            };
            return Self {
                said: bounded(said),
                error,
                request_id: None,
            };
        };
        let parts = [
            body.kind,
            body.err_code,
            body.category,
            body.err_msg,
            body.message,
            body.error,
            body.details,
            body.hint,
        ];
        let parts: Vec<String> = parts
            .into_iter()
            .flatten()
            .filter(|part| !part.is_empty())
            .collect();
        let said = match parts.as_slice() {
            [] => error.clone(),
            parts => parts.join(": "),
        };
        Self {
            said: bounded(said),
            error,
            request_id: body.request_id.map(bounded),
        }
    }

    fn all(&self) -> String {
        format!("{} {}", self.said, self.error)
    }
}

/// The cause that a provider's words name, if they name one.
fn by_words(words: &str) -> Option<Cause> {
    let words = words.to_ascii_lowercase();
    let has = |any: &[&str]| any.iter().any(|word| words.contains(word));
    Some(match () {
        () if has(&["insufficient_permissions"]) => Cause::Permission,
        () if has(&["invalid_auth", "invalid credentials", "unauthorized"]) => {
            Cause::Authentication
        }
        () if has(&["payment_required", "not enough credit", "maxgatewaycredits"]) => Cause::Quota,
        () if has(&["data-0000"]) => Cause::Audio,
        // 2007: LiveKit Inference's code for it.
        () if has(&["net-0001", "due to inactivity"]) || words.starts_with("2007") => Cause::Idle,
        () if has(&["net-0000"]) => Cause::ProviderFault,
        () if has(&["concurren"]) => Cause::Concurrency,
        () if has(&[
            "rate limit",
            "rate_limit",
            "ratelimit",
            "per minute",
            "perminute",
        ]) =>
        {
            Cause::RateLimit
        }
        () if has(&["quota"]) => Cause::Quota,
        () => return None,
    })
}

/// A text without what must not be seen. To be done before anything is cut off: a part of a secret is
/// not recognised.
pub fn without<'a>(secret: &str, text: &'a str) -> Cow<'a, str> {
    match !secret.is_empty() && text.contains(secret) {
        true => text.replace(secret, "***").into(),
        false => text.into(),
    }
}

fn bounded(mut text: String) -> String {
    if text.len() > MAX_SAID {
        text.truncate(text.floor_char_boundary(MAX_SAID));
        text.push_str("...");
    }
    // It goes into single lines.
    text.retain(|c| !c.is_control());
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(body: &str) -> Answer<'_> {
        Answer {
            body: body.as_bytes(),
            request_id: Some("R"),
            ..Answer::default()
        }
    }

    #[test]
    fn refusals_by_status_and_by_both_shapes_of_body() {
        let table = [
            (
                400,
                "Bad Request",
                "Bad Request: no such model",
                Cause::BadRequest,
            ),
            (
                401,
                "INVALID_AUTH",
                "Invalid credentials.",
                Cause::Authentication,
            ),
            (401, "INSUFFICIENT_PERMISSIONS", "No.", Cause::Permission),
            (
                402,
                "ASR_PAYMENT_REQUIRED",
                "not enough credits",
                Cause::Quota,
            ),
            (
                403,
                "INSUFFICIENT_PERMISSIONS",
                "no access to the model",
                Cause::Permission,
            ),
            (403, "FORBIDDEN", "No.", Cause::Permission),
            (
                404,
                "PROJECT_NOT_FOUND",
                "Project not found.",
                Cause::BadRequest,
            ),
            (408, "TIMEOUT", "Too slow.", Cause::ProviderFault),
            (418, "", "", Cause::BadRequest),
            (
                429,
                "TOO_MANY_REQUESTS",
                "Please try again later.",
                Cause::Concurrency,
            ),
            (
                429,
                "TOO_MANY_REQUESTS",
                "Rate limit exceeded.",
                Cause::RateLimit,
            ),
            (
                500,
                "INTERNAL_SERVER_ERROR",
                "Internal server error.",
                Cause::ProviderFault,
            ),
            (502, "", "", Cause::ProviderFault),
            (
                503,
                "SERVICE_UNAVAILABLE",
                "Quota service is down.",
                Cause::ProviderFault,
            ),
            (
                504,
                "GATEWAY_TIMEOUT",
                "Gateway timeout.",
                Cause::ProviderFault,
            ),
            (301, "", "", Cause::BadRequest),
            (200, "", "", Cause::Protocol),
        ];
        for (status, code, message, cause) in table {
            let bodies = [
                format!(r#"{{"err_code":"{code}","err_msg":"{message}","request_id":"B"}}"#),
                format!(r#"{{"category":"{code}","message":"{message}","details":""}}"#),
                format!("{code} {message}"),
            ];
            for body in bodies {
                let failure = Failure::refused(status, &answer(&body));
                assert_eq!(failure.cause, cause, "{status} {body}");
                assert_eq!(failure.request_id.as_deref(), Some("R"));
                assert!(failure.said.contains(message), "{failure}");
                let text = failure.to_string();
                assert!(
                    text.starts_with(&format!("refused with {status}, ")),
                    "{text}"
                );
            }
            // In a header alone.
            let error = format!("{code}: {message}");
            let header = Answer {
                error: Some(&error),
                ..Answer::default()
            };
            assert_eq!(
                Failure::refused(status, &header).cause,
                cause,
                "{status} {error}"
            );
        }
    }

    #[test]
    fn inferences_quotas_are_told_apart() {
        let table = [
            ("MaxGatewayCredits", Cause::Quota),
            ("MaxConcurrentSessions", Cause::Concurrency),
            ("RequestsPerMinute", Cause::RateLimit),
        ];
        for (category, cause) in table {
            let body = format!(
                r#"{{"error":"STT quota exceeded, category: {category}","type":"inference_quota_exceeded","quota_type":"stt","category":"{category}","hint":"Upgrade."}}"#
            );
            let failure = Failure::refused(429, &answer(&body));
            assert_eq!(failure.cause, cause, "{category}");
            assert!(failure.said.contains("Upgrade."), "{failure}");
        }
    }

    #[test]
    fn closes_by_code_and_by_reason() {
        let table = [
            (1000, "", Cause::ProviderFault),
            (1001, "", Cause::ProviderFault),
            (1002, "", Cause::Protocol),
            (1003, "", Cause::Protocol),
            (1005, "", Cause::ProviderFault),
            (1007, "", Cause::Protocol),
            (1008, "DATA-0000", Cause::Audio),
            (1008, "policy", Cause::BadRequest),
            (1009, "", Cause::Protocol),
            (1011, "NET-0000", Cause::ProviderFault),
            (1011, "NET-0001: no audio", Cause::Idle),
            (1011, "", Cause::ProviderFault),
            (1012, "", Cause::ProviderFault),
            (1013, "", Cause::ProviderFault),
            (3000, "", Cause::Authentication),
            (3003, "", Cause::Permission),
            (3008, "", Cause::Timeout(Phase::AwaitingAnswer)),
            (4000, "concurrency limit reached", Cause::Concurrency),
            (4001, "not enough credits", Cause::Quota),
            (4400, "", Cause::ProviderFault),
        ];
        for (code, reason, cause) in table {
            assert_eq!(
                Failure::closed(code, reason).cause,
                cause,
                "{code} {reason}"
            );
        }
    }

    #[test]
    fn what_was_said_before_the_end_explains_the_end() {
        let cut = Failure::io(&io::ErrorKind::ConnectionReset.into());
        assert_eq!(cut.cause, Cause::Reset);
        assert_eq!(
            cut.after_error("DATA-0000: no audio in it").cause,
            Cause::Audio
        );
        let closed = Failure::closed(1011, "").after_error("something broke");
        assert_eq!(closed.cause, Cause::ProviderFault);
        assert_eq!(closed.said, "something broke");
        let told = Failure::closed(1008, "DATA-0000").after_error("NET-0001");
        assert_eq!(told.cause, Cause::Audio);
    }

    #[test]
    fn errors_of_the_socket() {
        use io::ErrorKind as Kind;
        let table = [
            (Kind::ConnectionRefused, Cause::Unreachable),
            (Kind::HostUnreachable, Cause::Unreachable),
            (Kind::NetworkUnreachable, Cause::Unreachable),
            (Kind::ConnectionReset, Cause::Reset),
            (Kind::ConnectionAborted, Cause::Reset),
            (Kind::BrokenPipe, Cause::Reset),
            (Kind::UnexpectedEof, Cause::Reset),
            (Kind::TimedOut, Cause::Timeout(Phase::Connecting)),
            (Kind::InvalidData, Cause::Protocol),
        ];
        for (kind, cause) in table {
            assert_eq!(Failure::io(&kind.into()).cause, cause, "{kind:?}");
        }
        let tls = rustls::Error::General("no".to_owned());
        assert_eq!(
            Failure::io(&io::Error::new(Kind::InvalidData, tls)).cause,
            Cause::Tls
        );
    }

    #[test]
    fn what_is_said_is_bounded_in_one_line() {
        let body = format!("{}\r\nit is wrong {}", "x".repeat(100), "é".repeat(400));
        let failure = Failure::refused(401, &answer(&body));
        assert!(failure.said.len() < MAX_SAID + 10);
        assert!(!failure.said.contains('\n'), "{failure}");
    }

    #[test]
    fn every_cause_says_what_it_means_and_what_to_do() {
        for cause in Cause::ALL {
            assert!(!cause.meaning().is_empty() && !cause.advice().is_empty());
            let json = serde_json::to_string(&cause).expect("JSON");
            assert_eq!(json, format!("\"{}\"", cause.name()));
            let back: Cause = serde_json::from_str(&json).expect("a cause");
            assert_eq!(back.name(), cause.name());
        }
    }
}
