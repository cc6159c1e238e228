//! LiveKit Inference, `/v1/stt`: JSON both ways, audio in base64 within it. A session is over when
//! the provider says session.closed; a websocket that just closes leaves it counted.
//!
//! Source: the `inference.STT` of <https://github.com/livekit/agents>, and
//! <https://github.com/livekit/agents-js/issues/1731>.

use std::borrow::Cow;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio_tungstenite::tungstenite::Message;

use super::{Dialect, MAX_TRANSCRIPT, Said, SpeechResult, cut, error, request_id};
use crate::{
    audio::{LINEAR16_RATE, Page},
    config::SttConfig,
};

pub struct Inference {
    create: String,
    /// The provider itself can't be told to leave them out.
    interim_results: bool,
}

impl Inference {
    pub fn new(config: &SttConfig) -> Self {
        // The frameworks send the rate as a text.
        let mut settings = json!({
            "sample_rate": LINEAR16_RATE.to_string(),
            "encoding": "pcm_s16le",
            "extra": extra(config),
        });
        if let Some(language) = &config.language {
            settings["language"] = language.as_str().into();
        }
        let create = json!({
            "type": "session.create",
            "model": config.model,
            "settings": settings,
        });
        Self {
            create: create.to_string(),
            interim_results: config.interim_results,
        }
    }
}

/// Parameters of the model's own provider, by their names and types there.
fn extra(config: &SttConfig) -> Value {
    let set = serde_json::to_value(&config.parameters).unwrap_or_default();
    let set = match set {
        Value::Object(set) => set,
        _ => Map::new(),
    };
    let is_set = |value: &Value| !value.is_null() && value.as_array().is_none_or(|v| !v.is_empty());
    let mut extra: Map<String, Value> =
        set.into_iter().filter(|(_, value)| is_set(value)).collect();
    for (name, text) in &config.extra {
        // As a number or a truth value, if it is one.
        let typed = serde_json::from_str(text).ok();
        let typed = typed.filter(|value: &Value| value.is_number() || value.is_boolean());
        extra.insert(name.clone(), typed.unwrap_or_else(|| text.as_str().into()));
    }
    Value::Object(extra)
}

impl Dialect for Inference {
    fn greeting(&self) -> Option<Cow<'static, str>> {
        Some(self.create.clone().into())
    }

    fn audio(&self, page: Page) -> Message {
        const BEFORE: &str = r#"{"type":"input_audio","audio":""#;
        const AFTER: &str = r#""}"#;
        let encoded = page.bytes.len().div_ceil(3) * 4;
        let mut text = String::with_capacity(BEFORE.len() + encoded + AFTER.len());
        text.push_str(BEFORE);
        BASE64_STANDARD.encode_string(&page.bytes, &mut text);
        text.push_str(AFTER);
        Message::text(text)
    }

    /// A session without audio lasts for half an hour.
    fn keep_alive(&self) -> Option<&'static str> {
        None
    }

    fn close(&self) -> &'static str {
        r#"{"type":"session.close"}"#
    }

    fn read(&mut self, text: &str) -> Vec<Said> {
        let Ok(message) = serde_json::from_str::<ServerMessage>(text) else {
            return Vec::new();
        };
        match message {
            ServerMessage::Created { session_id } => request_id(session_id).into_iter().collect(),
            ServerMessage::Interim(transcript) if self.interim_results => {
                vec![transcript.said(false)]
            }
            ServerMessage::Final(transcript) => vec![transcript.said(true)],
            ServerMessage::Closed => vec![Said::Done(None)],
            ServerMessage::Error { message, code } => {
                vec![error([code.map(|code| code.to_string()), message])]
            }
            ServerMessage::Interim(_) | ServerMessage::Other => Vec::new(),
        }
    }

    fn is_done_by(&self, _code: u16) -> bool {
        false
    }
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum ServerMessage {
    #[serde(rename = "session.created")]
    Created { session_id: Option<String> },
    #[serde(rename = "interim_transcript")]
    Interim(Transcript),
    #[serde(rename = "final_transcript")]
    Final(Transcript),
    #[serde(rename = "session.closed")]
    Closed,
    #[serde(rename = "error")]
    Error {
        message: Option<String>,
        code: Option<Value>,
    },
    #[serde(other)]
    Other,
}

/// Start and duration in seconds on the session's time line.
#[derive(Deserialize)]
struct Transcript {
    #[serde(default)]
    transcript: String,
    #[serde(default)]
    start: f64,
    #[serde(default)]
    duration: f64,
    #[serde(default)]
    confidence: f64,
}

impl Transcript {
    fn said(self, is_final: bool) -> Said {
        Said::Result(SpeechResult {
            start: self.start,
            duration: self.duration,
            text: cut(self.transcript, MAX_TRANSCRIPT),
            confidence: self.confidence,
            is_final,
        })
    }
}
