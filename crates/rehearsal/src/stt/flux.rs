//! How Deepgram Flux, `/v2/listen`, puts what streams say: turns instead of utterances. Neither
//! Finalize nor KeepAlive; CloseStream is answered by what is left of the turn and a close frame
//! without a code.
//!
//! Source: Deepgram's API reference of `/v2/listen` and its documentation of CloseStream for Flux.

use std::time::Duration;

use axum::http::Uri;
use serde::Serialize;

use super::messages::{ClientMessage, Results, ServerMessage, Word, parse_listen};
use super::parameters::{self, Parameters};
use super::reject::Reject;

/// The pause that ends a turn, when nothing else says so.
const END_OF_TURN: Duration = Duration::from_millis(500);

/// Where a stream is in its conversation.
#[derive(Debug, Default)]
pub(super) struct Turns {
    sequence_id: u64,
    turn_index: u64,
    started: bool,
}

/// What is asked for in the query of `/v2/listen`.
pub(super) fn parameters(uri: &Uri) -> Result<Parameters, Reject> {
    let pairs = parameters::query(uri)?;
    let model = pairs.iter().find(|(name, _)| name == "model");
    if model.is_none_or(|(_, model)| !model.starts_with("flux-")) {
        return Err(Reject::bad_request("model: expected one of Flux"));
    }
    for unknown in [
        "interim_results",
        "punctuate",
        "endpointing",
        "vad_events",
        "language",
    ] {
        if pairs.iter().any(|(name, _)| name == unknown) {
            return Err(Reject::bad_request(format!("{unknown}: unknown parameter")));
        }
    }
    Ok(Parameters {
        interim_results: true,
        endpointing: Some(END_OF_TURN),
        ..Parameters::parse(uri)?
    })
}

/// Reads a text message: it has one less than `/v1/listen`, and takes the others for errors.
pub(super) fn parse(text: &str) -> ClientMessage {
    match parse_listen(text) {
        ClientMessage::Close => ClientMessage::Close,
        _ => ClientMessage::Invalid("unknown message".to_owned()),
    }
}

#[derive(Serialize)]
#[serde(tag = "type")]
enum Outgoing<'a> {
    Connected {
        request_id: &'a str,
        sequence_id: u64,
    },
    TurnInfo {
        request_id: &'a str,
        sequence_id: u64,
        event: &'static str,
        turn_index: u64,
        audio_window_start: f64,
        audio_window_end: f64,
        transcript: &'a str,
        words: Vec<TurnWord<'a>>,
        end_of_turn_confidence: f64,
    },
    Error {
        sequence_id: u64,
        code: &'a str,
        description: &'a str,
    },
}

#[derive(Serialize)]
struct TurnWord<'a> {
    word: &'a str,
    confidence: f64,
}

impl<'a> TurnWord<'a> {
    fn new(word: &'a Word) -> Self {
        Self {
            word: &word.word,
            confidence: word.confidence,
        }
    }
}

impl Turns {
    /// Writes a message, if the protocol has such a one.
    pub(super) fn render(
        &mut self,
        request_id: &str,
        message: &ServerMessage,
    ) -> Option<serde_json::Result<String>> {
        let sequence_id = self.sequence_id;
        let outgoing = match message {
            ServerMessage::Created => Outgoing::Connected {
                request_id,
                sequence_id,
            },
            ServerMessage::Results(results) => self.turn(request_id, results),
            ServerMessage::Error(error) => Outgoing::Error {
                sequence_id,
                code: &error.variant,
                description: match error.description.as_str() {
                    "" => &error.message,
                    description => description,
                },
            },
            ServerMessage::SpeechStarted { .. }
            | ServerMessage::UtteranceEnd { .. }
            | ServerMessage::Metadata(_)
            | ServerMessage::Finalized => return None,
        };
        self.sequence_id += 1;
        Some(serde_json::to_string(&outgoing))
    }

    fn turn<'a>(&mut self, request_id: &'a str, results: &'a Results) -> Outgoing<'a> {
        let [alternative] = &results.channel.alternatives;
        let says_something = !alternative.transcript.is_empty();
        let turn_index = self.turn_index;
        let event = match says_something {
            true if results.is_final => {
                self.turn_index += 1;
                self.started = false;
                "EndOfTurn"
            }
            true if !self.started => {
                self.started = true;
                "StartOfTurn"
            }
            _ => "Update",
        };
        Outgoing::TurnInfo {
            request_id,
            sequence_id: self.sequence_id,
            event,
            turn_index,
            audio_window_start: results.start,
            audio_window_end: results.start + results.duration,
            transcript: &alternative.transcript,
            words: alternative.words.iter().map(TurnWord::new).collect(),
            end_of_turn_confidence: f64::from(u8::from(event == "EndOfTurn")),
        }
    }
}
