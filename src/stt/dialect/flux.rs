//! Deepgram Flux, `/v2/listen`: turns instead of utterances. It has neither Finalize nor KeepAlive
//! (which it takes for an error), and answers CloseStream by what is left of the turn and the end of
//! the websocket, without Metadata.
//!
//! Source: Deepgram's API reference of `/v2/listen` and its documentation of CloseStream for Flux.

use serde::Deserialize;

use super::{Dialect, MAX_TRANSCRIPT, Said, SpeechResult, cut, error, request_id};

pub struct Flux {
    /// The provider itself can't be told to leave them out.
    pub interim_results: bool,
}

impl Dialect for Flux {
    fn keep_alive(&self) -> Option<&'static str> {
        None
    }

    fn close(&self) -> &'static str {
        r#"{"type":"CloseStream"}"#
    }

    fn read(&mut self, text: &str) -> Vec<Said> {
        match serde_json::from_str::<ServerMessage>(text) {
            Ok(ServerMessage::Connected { request_id: id }) => request_id(id).into_iter().collect(),
            Ok(ServerMessage::TurnInfo(turn)) if turn.is_final() || self.interim_results => {
                turn.said().into_iter().collect()
            }
            Ok(ServerMessage::Error { code, description }) => vec![error([code, description])],
            Ok(ServerMessage::TurnInfo(_) | ServerMessage::Other) | Err(_) => Vec::new(),
        }
    }

    /// 1005 is a close frame without a code (RFC 6455, section 7.1.5).
    fn is_done_by(&self, code: u16) -> bool {
        matches!(code, 1000 | 1005)
    }
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum ServerMessage {
    Connected {
        request_id: Option<String>,
    },
    TurnInfo(Turn),
    Error {
        code: Option<String>,
        description: Option<String>,
    },
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
struct Turn {
    event: String,
    /// Of what has been transcribed of the turn, in seconds on the stream's time line.
    #[serde(default)]
    audio_window_start: f64,
    #[serde(default)]
    audio_window_end: f64,
    #[serde(default)]
    transcript: String,
    #[serde(default)]
    words: Vec<Word>,
}

#[derive(Deserialize)]
struct Word {
    #[serde(default)]
    confidence: f64,
}

impl Turn {
    fn is_final(&self) -> bool {
        self.event == "EndOfTurn"
    }

    fn said(self) -> Option<Said> {
        let is_final = self.is_final();
        if self.transcript.is_empty() && !is_final {
            return None;
        }
        let sum: f64 = self.words.iter().map(|word| word.confidence).sum();
        Some(Said::Result(SpeechResult {
            start: self.audio_window_start,
            duration: (self.audio_window_end - self.audio_window_start).max(0.0),
            text: cut(self.transcript, MAX_TRANSCRIPT),
            confidence: sum / self.words.len().max(1) as f64,
            is_final,
        }))
    }
}
