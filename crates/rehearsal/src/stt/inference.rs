//! The protocol of LiveKit Inference's `/v1/stt`: JSON both ways, audio as base64 within it.
//!
//! Source: the `inference.STT` of <https://github.com/livekit/agents> and
//! <https://github.com/livekit/agents-js>. Codes of errors other than inactivity are not known
//! from there; [`INVALID`] is this server's own.

use std::time::Duration;

use axum::http::Uri;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::decode::Format;
use super::messages::{ClientMessage, Results, ServerMessage, SessionSettings, StreamError, Word};
use super::parameters::{self, Parameters, SAMPLE_RATES};
use super::reject::Reject;

/// The one encoding.
const ENCODING: &str = "pcm_s16le";
const DEFAULT_SAMPLE_RATE: u32 = 16_000;
const DEFAULT_LANGUAGE: &str = "en";
/// The frameworks don't set it; enough to bridge the pauses between words.
const ENDPOINTING: Duration = Duration::from_millis(300);
/// No input for too long; not to be retried.
const INACTIVE: u32 = 2007;
/// A message that makes no sense.
const INVALID: u32 = 2001;

/// What is said of the quota when too many sessions are open. Named after the categories that are
/// known for language models.
pub(super) const CONCURRENCY: &str = "MaxConcurrentGatewaySTT";

/// What a session knows of itself beyond its audio.
#[derive(Debug)]
pub(super) struct Session {
    pub created: bool,
    pub language: String,
}

impl Default for Session {
    fn default() -> Self {
        Self {
            created: false,
            language: DEFAULT_LANGUAGE.to_owned(),
        }
    }
}

/// What a session starts with; session.create may change the sample rate.
pub(super) fn parameters(uri: &Uri) -> Result<Parameters, Reject> {
    let pairs = parameters::query(uri)?;
    Ok(Parameters {
        format: format(DEFAULT_SAMPLE_RATE),
        channels: 1,
        interim_results: true,
        endpointing: Some(ENDPOINTING),
        utterance_end: None,
        vad_events: true,
        punctuated: false,
        diarize: false,
        language: None,
        shown: pairs.iter().map(parameters::shown).collect(),
    })
}

/// How audio of this rate is decoded.
pub(super) fn format(sample_rate: u32) -> Format {
    Format::Linear16 {
        sample_rate,
        channels: 1,
    }
}

/// The error after which a session without input is closed.
pub(super) fn inactive() -> ServerMessage {
    error(INACTIVE, "session closed due to inactivity")
}

/// The error after which a session with senseless input is closed.
pub(super) fn invalid(message: &str) -> ServerMessage {
    error(INVALID, message)
}

fn error(code: u32, message: &str) -> ServerMessage {
    ServerMessage::Error(StreamError {
        variant: String::new(),
        description: String::new(),
        message: message.to_owned(),
        code,
    })
}

/// Reads a text message.
pub(super) fn parse(text: &str) -> ClientMessage {
    #[derive(Deserialize)]
    #[serde(tag = "type")]
    enum Incoming {
        #[serde(rename = "session.create")]
        Create {
            model: Option<String>,
            #[serde(default)]
            settings: Settings,
        },
        #[serde(rename = "session.update")]
        Update {
            #[serde(default)]
            settings: Settings,
        },
        #[serde(rename = "input_audio")]
        Audio { audio: String },
        #[serde(rename = "session.finalize")]
        Finalize,
        #[serde(rename = "session.close")]
        Close,
        #[serde(other)]
        Unknown,
    }
    let checked = |settings: Settings, model: Option<String>| settings.check(model);
    match serde_json::from_str(text) {
        Ok(Incoming::Create { model, settings }) => match checked(settings, model) {
            Ok(settings) => ClientMessage::Create(settings),
            Err(message) => ClientMessage::Invalid(message),
        },
        Ok(Incoming::Update { settings }) => match checked(settings, None) {
            Ok(settings) => ClientMessage::Update(settings),
            Err(message) => ClientMessage::Invalid(message),
        },
        Ok(Incoming::Audio { audio }) => match BASE64_STANDARD.decode(audio) {
            Ok(bytes) => ClientMessage::Audio(bytes),
            Err(_) => ClientMessage::Invalid("audio: not base64".to_owned()),
        },
        Ok(Incoming::Finalize) => ClientMessage::Finalize,
        Ok(Incoming::Close) => ClientMessage::Close,
        Ok(Incoming::Unknown) => ClientMessage::Unknown,
        Err(error) => ClientMessage::Invalid(error.to_string()),
    }
}

#[derive(Default, Deserialize)]
struct Settings {
    model: Option<String>,
    language: Option<String>,
    encoding: Option<String>,
    /// The frameworks send it as a string.
    sample_rate: Option<Value>,
}

impl Settings {
    fn check(self, model: Option<String>) -> Result<SessionSettings, String> {
        if self.encoding.is_some_and(|encoding| encoding != ENCODING) {
            return Err(format!("encoding: expected `{ENCODING}`"));
        }
        let sample_rate = match self.sample_rate {
            None => None,
            Some(Value::String(text)) => Some(text.parse().ok()),
            Some(value) => Some(value.as_u64().and_then(|rate| u32::try_from(rate).ok())),
        };
        let sample_rate = match sample_rate {
            None => None,
            Some(Some(rate)) if SAMPLE_RATES.contains(&rate) => Some(rate),
            Some(_) => {
                let (low, high) = (SAMPLE_RATES.start(), SAMPLE_RATES.end());
                return Err(format!("sample_rate: expected a number of {low} to {high}"));
            }
        };
        Ok(SessionSettings {
            model: model.or(self.model),
            language: self.language,
            sample_rate,
        })
    }
}

#[derive(Serialize)]
#[serde(tag = "type")]
enum Outgoing<'a> {
    #[serde(rename = "session.created")]
    Created { session_id: &'a str },
    #[serde(rename = "start_of_speech")]
    StartOfSpeech { session_id: &'a str },
    #[serde(rename = "interim_transcript")]
    Interim(Transcript<'a>),
    #[serde(rename = "final_transcript")]
    Final(Transcript<'a>),
    #[serde(rename = "session.finalized")]
    Finalized { session_id: &'a str },
    #[serde(rename = "session.closed")]
    Closed { session_id: &'a str },
    #[serde(rename = "error")]
    Error {
        session_id: &'a str,
        message: &'a str,
        code: u32,
    },
}

/// Start and duration in seconds on the session's time line.
#[derive(Serialize)]
struct Transcript<'a> {
    session_id: &'a str,
    request_id: &'a str,
    transcript: &'a str,
    start: f64,
    duration: f64,
    confidence: f64,
    language: &'a str,
    words: &'a [Word],
}

impl Session {
    /// Writes a message, if the protocol has such a one.
    pub(super) fn render(
        &self,
        session_id: &str,
        message: &ServerMessage,
    ) -> Option<serde_json::Result<String>> {
        let outgoing = match message {
            ServerMessage::Created => Outgoing::Created { session_id },
            ServerMessage::SpeechStarted { .. } => Outgoing::StartOfSpeech { session_id },
            ServerMessage::Results(results) => {
                let transcript = self.transcript(session_id, results)?;
                if results.is_final {
                    Outgoing::Final(transcript)
                } else {
                    Outgoing::Interim(transcript)
                }
            }
            ServerMessage::Finalized => Outgoing::Finalized { session_id },
            ServerMessage::Metadata(_) => Outgoing::Closed { session_id },
            ServerMessage::Error(error) => Outgoing::Error {
                session_id,
                message: &error.message,
                code: error.code,
            },
            ServerMessage::UtteranceEnd { .. } => return None,
        };
        Some(serde_json::to_string(&outgoing))
    }

    /// None for silence: the frameworks take any final transcript for the end of speech.
    fn transcript<'a>(&'a self, id: &'a str, results: &'a Results) -> Option<Transcript<'a>> {
        let [alternative] = &results.channel.alternatives;
        (!alternative.transcript.is_empty()).then(|| Transcript {
            session_id: id,
            request_id: id,
            transcript: &alternative.transcript,
            start: results.start,
            duration: results.duration,
            confidence: alternative.confidence,
            language: &self.language,
            words: &alternative.words,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_read_as_the_frameworks_write_them() {
        let create = r#"{"type": "session.create", "model": "deepgram/nova-3", "settings":
            {"sample_rate": "24000", "encoding": "pcm_s16le", "language": "de", "extra": {"a": 1}},
            "fallback": {"models": []}, "connection": {"timeout": 10, "retries": 3}}"#;
        let settings = SessionSettings {
            model: Some("deepgram/nova-3".to_owned()),
            language: Some("de".to_owned()),
            sample_rate: Some(24_000),
        };
        assert_eq!(parse(create), ClientMessage::Create(settings));
        let update = r#"{"type":"session.update","settings":{"model":"m","sample_rate":8000}}"#;
        let settings = SessionSettings {
            model: Some("m".to_owned()),
            language: None,
            sample_rate: Some(8000),
        };
        assert_eq!(parse(update), ClientMessage::Update(settings));
        for (text, expected) in [
            (
                r#"{"type":"input_audio","audio":"AQI="}"#,
                ClientMessage::Audio(vec![1, 2]),
            ),
            (r#"{"type":"session.finalize"}"#, ClientMessage::Finalize),
            (r#"{"type":"session.close"}"#, ClientMessage::Close),
            (
                r#"{"type":"session.dance","audio":7}"#,
                ClientMessage::Unknown,
            ),
        ] {
            assert_eq!(parse(text), expected, "{text}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (text, named) in [
            (r#"{"type":"input_audio"}"#, "audio"),
            (r#"{"type":"input_audio","audio":"?"}"#, "audio: not base64"),
            (
                r#"{"type":"session.create","settings":{"encoding":"opus"}}"#,
                "encoding",
            ),
            (
                r#"{"type":"session.create","settings":{"sample_rate":"fast"}}"#,
                "sample_rate",
            ),
            (
                r#"{"type":"session.update","settings":{"sample_rate":1e99}}"#,
                "sample_rate",
            ),
            ("{}", "type"),
            ("not json", "expected"),
        ] {
            let ClientMessage::Invalid(message) = parse(text) else {
                panic!("{text}");
            };
            assert!(message.contains(named), "{text}: {message}");
        }
    }
}
