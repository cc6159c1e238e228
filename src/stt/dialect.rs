//! What each provider's protocol says and hears. When to say it, and what its answers mean for the
//! stream's life, is the [machine](super::machine)'s, the same for all.

mod flux;
mod inference;
mod listen;

use std::borrow::Cow;

use tokio_tungstenite::tungstenite::{Bytes, Message};

use crate::{
    audio::Page,
    config::{ProviderKind, SttConfig},
};

/// Reasons and ids come from the network: keep what is said of them short.
const MAX_DETAIL: usize = 300;
const MAX_TRANSCRIPT: usize = 32 << 10;

/// A protocol, for the life of one stream.
pub trait Dialect: Send {
    /// What comes before any audio, if anything.
    fn greeting(&self) -> Option<Cow<'static, str>> {
        None
    }

    /// Audio as it is sent; never of nothing.
    fn audio(&self, page: Page) -> Message {
        Message::Binary(Bytes::from(page.bytes))
    }

    /// What keeps a stream without audio open, if there is such a message.
    fn keep_alive(&self) -> Option<&'static str>;

    /// Whether the stream's owner speaks it: everything is passed on as it is, both ways.
    fn is_owners(&self) -> bool {
        false
    }

    /// Asks for what is left of the results, and for the end.
    fn close(&self) -> &'static str;

    /// Reads a text message. Nothing for what is not understood: newer servers say more.
    fn read(&mut self, text: &str) -> Vec<Said>;

    /// Whether the provider, in answer to [`Dialect::close`] and without [`Said::Done`], says with a
    /// close frame of this code that everything is done.
    fn is_done_by(&self, code: u16) -> bool;
}

/// What a message says.
#[derive(Debug, Clone, PartialEq)]
pub enum Said {
    Result(SpeechResult),
    /// The provider's id of the stream.
    RequestId(String),
    /// An answer to [`Dialect::close`]: nothing more comes. With the seconds of audio that the
    /// provider has counted, if it says so.
    Done(Option<f64>),
    /// The provider's own words about something that is wrong.
    Error(String),
}

#[derive(Debug, Clone, PartialEq)]
pub struct SpeechResult {
    /// Seconds on the stream's time line.
    pub start: f64,
    pub duration: f64,
    /// Empty for audio in which nothing was said.
    pub text: String,
    pub confidence: f64,
    pub is_final: bool,
}

/// The protocol of streams that are opened with these settings.
pub fn of(config: &SttConfig) -> Box<dyn Dialect> {
    match config.provider {
        ProviderKind::Deepgram => Box::new(listen::Listen),
        ProviderKind::DeepgramFlux => Box::new(flux::Flux {
            interim_results: config.interim_results,
        }),
        ProviderKind::LivekitInference => Box::new(inference::Inference::new(config)),
    }
}

/// That of a stream whose owner speaks `/v1/listen` itself: KeepAlive is the owner's to say.
pub fn of_owner() -> Box<dyn Dialect> {
    Box::new(listen::OfOwner)
}

fn request_id(id: Option<String>) -> Option<Said> {
    id.map(|id| Said::RequestId(cut(id, MAX_DETAIL)))
}

fn error<const N: usize>(parts: [Option<String>; N]) -> Said {
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    Said::Error(cut(parts.join(": "), MAX_DETAIL))
}

/// At most so many bytes of it.
pub(super) fn cut(mut text: String, most: usize) -> String {
    if text.len() > most {
        text.truncate(text.floor_char_boundary(most));
        text.push_str("...");
    }
    text
}
