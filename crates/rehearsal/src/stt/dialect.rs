//! Which of the protocols a stream speaks.

use super::flux::{self, Turns};
use super::inference::{self, Session};
use super::messages::{self, ClientMessage, ServerMessage};
use super::witness::Protocol;

/// See the module's description.
#[derive(Debug)]
pub(super) enum Dialect {
    Listen,
    Flux(Turns),
    Inference(Session),
}

impl Dialect {
    pub(super) fn new(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Listen => Self::Listen,
            Protocol::Flux => Self::Flux(Turns::default()),
            Protocol::Inference => Self::Inference(Session::default()),
        }
    }

    /// Reads a text message of the client.
    pub(super) fn parse(&self, text: &str) -> ClientMessage {
        match self {
            Self::Listen => messages::parse_listen(text),
            Self::Flux(_) => flux::parse(text),
            Self::Inference(_) => inference::parse(text),
        }
    }

    /// Writes a message to the client, if the protocol has such a one.
    pub(super) fn render(
        &mut self,
        request_id: &str,
        message: &ServerMessage,
    ) -> Option<serde_json::Result<String>> {
        match self {
            Self::Listen => messages::render_listen(message),
            Self::Flux(turns) => turns.render(request_id, message),
            Self::Inference(session) => session.render(request_id, message),
        }
    }
}
