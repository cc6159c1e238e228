//! What streams understand and say, whatever the client speaks, and how `/v1/listen` puts it.
//!
//! Source: <https://developers.deepgram.com/reference/speech-to-text/listen-streaming>

use serde::{Deserialize, Serialize};

/// What the transcripts are said to come from.
const MODEL_NAME: &str = "rehearsal-level-meter";
const MODEL_UUID: &str = "00000000-0000-4000-8000-726568656172";

/// A message of the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ClientMessage {
    KeepAlive,
    Finalize,
    /// CloseStream or session.close.
    Close,
    /// Audio in a text message.
    Audio(Vec<u8>),
    Create(SessionSettings),
    Update(SessionSettings),
    /// Something known that makes no sense; says what.
    Invalid(String),
    Unknown,
}

/// What a LiveKit Inference client sets; what it leaves out stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct SessionSettings {
    pub model: Option<String>,
    pub language: Option<String>,
    /// In Hz.
    pub sample_rate: Option<u32>,
}

/// Reads a text message of `/v1/listen`.
pub(super) fn parse_listen(text: &str) -> ClientMessage {
    #[derive(Deserialize)]
    struct Envelope {
        #[serde(rename = "type")]
        kind: String,
    }
    let kind = serde_json::from_str::<Envelope>(text).map(|envelope| envelope.kind);
    match kind.as_deref() {
        Ok("KeepAlive") => ClientMessage::KeepAlive,
        Ok("Finalize") => ClientMessage::Finalize,
        Ok("CloseStream") => ClientMessage::Close,
        _ => ClientMessage::Unknown,
    }
}

/// Writes a message of `/v1/listen`, if it has such a one.
pub(super) fn render_listen(message: &ServerMessage) -> Option<serde_json::Result<String>> {
    match message {
        ServerMessage::Created | ServerMessage::Finalized => None,
        ServerMessage::Results(_)
        | ServerMessage::SpeechStarted { .. }
        | ServerMessage::UtteranceEnd { .. }
        | ServerMessage::Metadata(_)
        | ServerMessage::Error(_) => Some(serde_json::to_string(message)),
    }
}

/// A message of the server; positions and lengths in seconds on the stream's time line.
#[derive(Debug, Serialize)]
#[serde(tag = "type")]
pub(super) enum ServerMessage {
    Results(Results),
    SpeechStarted {
        channel: [u32; 2],
        timestamp: f64,
    },
    UtteranceEnd {
        channel: [u32; 2],
        last_word_end: f64,
    },
    Metadata(Metadata),
    Error(StreamError),
    /// The session was created; only LiveKit Inference says so.
    #[serde(skip)]
    Created,
    /// Everything that was asked to be finalised is out; only LiveKit Inference says so.
    #[serde(skip)]
    Finalized,
}

#[derive(Debug, Serialize)]
pub(super) struct Results {
    pub channel_index: [u32; 2],
    pub duration: f64,
    pub start: f64,
    pub is_final: bool,
    pub speech_final: bool,
    pub channel: Channel,
    pub metadata: ResultsMetadata,
    pub from_finalize: bool,
}

#[derive(Debug, Serialize)]
pub(super) struct Channel {
    pub alternatives: [Alternative; 1],
}

#[derive(Debug, Serialize)]
pub(super) struct Alternative {
    pub transcript: String,
    pub confidence: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub languages: Option<Vec<String>>,
    pub words: Vec<Word>,
}

#[derive(Debug, Serialize)]
pub(super) struct Word {
    pub word: String,
    pub start: f64,
    pub end: f64,
    pub confidence: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub punctuated_word: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub speaker: Option<u32>,
}

#[derive(Debug, Serialize)]
pub(super) struct ResultsMetadata {
    pub request_id: String,
    pub model_info: ModelInfo,
    pub model_uuid: &'static str,
}

#[derive(Debug, Serialize)]
pub(super) struct ModelInfo {
    name: &'static str,
    version: &'static str,
    arch: &'static str,
}

#[derive(Debug, Serialize)]
pub(super) struct Metadata {
    pub transaction_key: &'static str,
    pub request_id: String,
    pub sha256: String,
    pub created: String,
    pub duration: f64,
    pub channels: u32,
}

/// An error within a stream. Deepgram has the texts, LiveKit Inference the message and a number.
#[derive(Clone, Debug, Serialize)]
pub(super) struct StreamError {
    pub variant: String,
    pub description: String,
    pub message: String,
    #[serde(skip)]
    pub code: u32,
}

impl ServerMessage {
    /// A Results that is final.
    pub(super) fn is_final(&self) -> bool {
        matches!(self, Self::Results(results) if results.is_final)
    }
}

impl ResultsMetadata {
    pub(super) fn new(request_id: &str) -> Self {
        Self {
            request_id: request_id.to_owned(),
            model_info: ModelInfo {
                name: MODEL_NAME,
                version: env!("CARGO_PKG_VERSION"),
                arch: "none",
            },
            model_uuid: MODEL_UUID,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{ClientMessage, parse_listen};

    #[test]
    fn client_messages_are_known_by_their_type_alone() {
        for (text, expected) in [
            (r#"{"type":"KeepAlive"}"#, ClientMessage::KeepAlive),
            (
                r#"{"type":"Finalize","channel":0}"#,
                ClientMessage::Finalize,
            ),
            (r#"{ "type": "CloseStream" }"#, ClientMessage::Close),
            (r#"{"type":"Configure"}"#, ClientMessage::Unknown),
            (r#"{"type":7}"#, ClientMessage::Unknown),
            ("[]", ClientMessage::Unknown),
            ("not json", ClientMessage::Unknown),
            ("", ClientMessage::Unknown),
        ] {
            assert_eq!(parse_listen(text), expected, "{text}");
        }
    }
}
