//! Deepgram's `/v1/listen`, and what other servers speak of it.
//!
//! Source: Deepgram's API reference of live transcription, and its documentation of KeepAlive and
//! CloseStream.

use serde::Deserialize;

use super::{Dialect, MAX_TRANSCRIPT, Said, SpeechResult, cut, error, request_id};

pub struct Listen;

impl Dialect for Listen {
    fn keep_alive(&self) -> Option<&'static str> {
        Some(r#"{"type":"KeepAlive"}"#)
    }

    fn close(&self) -> &'static str {
        r#"{"type":"CloseStream"}"#
    }

    fn read(&mut self, text: &str) -> Vec<Said> {
        match serde_json::from_str::<ServerMessage>(text) {
            Ok(ServerMessage::Results(results)) => results.said(),
            Ok(ServerMessage::Metadata(metadata)) => {
                let done = Said::Done(metadata.duration);
                request_id(metadata.request_id)
                    .into_iter()
                    .chain([done])
                    .collect()
            }
            Ok(ServerMessage::Error(said)) => {
                vec![error([said.variant, said.description, said.message])]
            }
            Ok(ServerMessage::Other) | Err(_) => Vec::new(),
        }
    }

    /// Servers of this protocol that send no Metadata answer CloseStream by closing.
    fn is_done_by(&self, code: u16) -> bool {
        code == 1000
    }
}

/// As its owner speaks it.
pub struct OfOwner;

impl Dialect for OfOwner {
    fn keep_alive(&self) -> Option<&'static str> {
        None
    }

    fn is_owners(&self) -> bool {
        true
    }

    fn close(&self) -> &'static str {
        Listen.close()
    }

    fn read(&mut self, text: &str) -> Vec<Said> {
        Listen.read(text)
    }

    fn is_done_by(&self, code: u16) -> bool {
        Listen.is_done_by(code)
    }
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum ServerMessage {
    Results(Results),
    Metadata(Metadata),
    Error(ProviderError),
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
struct Results {
    #[serde(default)]
    start: f64,
    #[serde(default)]
    duration: f64,
    #[serde(default)]
    is_final: bool,
    channel: Channel,
    metadata: Option<ResultsMetadata>,
}

impl Results {
    fn said(self) -> Vec<Said> {
        let id = request_id(self.metadata.and_then(|metadata| metadata.request_id));
        let best = self.channel.alternatives.into_iter().next();
        let best = best.unwrap_or_default();
        // A final one without words still says that the provider is done with that audio.
        let worth_it = !best.transcript.is_empty() || self.is_final;
        let result = worth_it.then(|| {
            Said::Result(SpeechResult {
                start: self.start,
                duration: self.duration,
                text: cut(best.transcript, MAX_TRANSCRIPT),
                confidence: best.confidence,
                is_final: self.is_final,
            })
        });
        id.into_iter().chain(result).collect()
    }
}

#[derive(Deserialize)]
struct ResultsMetadata {
    request_id: Option<String>,
}

#[derive(Deserialize)]
struct Channel {
    #[serde(default)]
    alternatives: Vec<Alternative>,
}

#[derive(Default, Deserialize)]
struct Alternative {
    #[serde(default)]
    transcript: String,
    #[serde(default)]
    confidence: f64,
}

#[derive(Deserialize)]
struct Metadata {
    request_id: Option<String>,
    duration: Option<f64>,
}

#[derive(Deserialize)]
struct ProviderError {
    variant: Option<String>,
    description: Option<String>,
    message: Option<String>,
}
