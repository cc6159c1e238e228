//! What the client sends: audio and messages.

use sha2::Digest as _;
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Message;

use super::{Phase, Step, Stream};
use crate::stt::decode::Decoder;
use crate::stt::dialect::Dialect;
use crate::stt::inference;
use crate::stt::messages::{ClientMessage, ServerMessage, SessionSettings};
use crate::stt::parameters;
use crate::stt::witness::End;

/// Pieces of audio decoded before other tasks get a turn.
const PIECES_A_TURN: usize = 16;
/// Of a language tag; the longest that is usual (RFC 5646, 4.4.1) is much shorter.
const MAX_LANGUAGE: usize = 64;

const UNDECODABLE: &str = "DATA-0000: the payload cannot be decoded as audio";

impl Stream {
    pub(super) async fn received(&mut self, message: Message) -> Step {
        self.slow_down(message.len());
        match message {
            Message::Binary(bytes) => self.binary(&bytes).await,
            Message::Text(text) => self.text(&text).await,
            Message::Close(frame) => self.close_frame_received(frame).await,
            // Pongs are sent by the websocket library.
            Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => Ok(()),
        }
    }

    async fn binary(&mut self, bytes: &[u8]) -> Step {
        if matches!(self.dialect, Dialect::Inference(_)) {
            self.entry.update(|r| r.texts.other += 1);
            self.reject_message("binary messages are not part of the protocol");
            return Ok(());
        }
        self.entry.audio_received(bytes.len());
        if !matches!(self.phase, Phase::Listening) {
            return Ok(());
        }
        if bytes.is_empty() {
            self.finish(End::EmptyAudio);
            return Ok(());
        }
        self.audio(bytes).await
    }

    async fn audio(&mut self, bytes: &[u8]) -> Step {
        self.last_input = Instant::now();
        self.audio_heard = true;
        self.digest.update(bytes);
        self.decoder.push(bytes);
        let mut pcm = Vec::new();
        let mut messages = Vec::new();
        let mut pieces = 0;
        loop {
            pcm.clear();
            match self.decoder.next(&mut pcm) {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    tracing::debug!(request_id = self.entry.request_id(), %error, "bad audio");
                    self.close_after_error(End::Undecodable, 1008, UNDECODABLE);
                    break;
                }
            }
            self.transcriber.push(&pcm, &mut messages);
            self.shared.audio.append(self.entry.request_id(), &pcm);
            self.queue(&mut messages);
            pieces += 1;
            if pieces % PIECES_A_TURN == 0 {
                self.send_due().await?;
                tokio::task::yield_now().await;
                if self.stop.is_cancelled() {
                    break;
                }
            }
        }
        self.entry.audio_decoded(self.transcriber.seconds());
        Ok(())
    }

    async fn text(&mut self, text: &str) -> Step {
        let message = self.dialect.parse(text);
        self.count(&message);
        // A Deepgram stream that never had audio times out in spite of KeepAlive.
        if self.audio_heard || matches!(self.dialect, Dialect::Inference(_)) {
            self.last_input = Instant::now();
        }
        if !matches!(self.phase, Phase::Listening) {
            return Ok(());
        }
        let uncreated = matches!(&self.dialect, Dialect::Inference(session) if !session.created);
        match message {
            ClientMessage::Create(settings) if uncreated => self.create(settings),
            ClientMessage::Create(_) => self.reject_message("session.create came twice"),
            ClientMessage::Audio(_) | ClientMessage::Finalize | ClientMessage::Update(_)
                if uncreated =>
            {
                self.reject_message("session.create must come first");
            }
            ClientMessage::Audio(bytes) if bytes.is_empty() => {}
            ClientMessage::Audio(bytes) => return self.audio(&bytes).await,
            ClientMessage::Update(settings) => self.apply(settings),
            ClientMessage::Finalize => {
                let mut messages = Vec::new();
                self.transcriber.finalize(&mut messages);
                messages.push(ServerMessage::Finalized);
                self.queue(&mut messages);
            }
            ClientMessage::Close => {
                self.close_requested = true;
                self.finish(End::Acknowledged);
            }
            ClientMessage::Invalid(message) => self.reject_message(&message),
            ClientMessage::KeepAlive => {}
            ClientMessage::Unknown => {
                let request_id = self.entry.request_id();
                tracing::warn!(request_id, "unknown text message");
            }
        }
        Ok(())
    }

    fn count(&self, message: &ClientMessage) {
        if let ClientMessage::Audio(bytes) = message {
            self.entry.audio_received(bytes.len());
            return;
        }
        self.entry.update(|r| match message {
            ClientMessage::KeepAlive => r.texts.keep_alive += 1,
            ClientMessage::Finalize => r.texts.finalize += 1,
            ClientMessage::Close => r.texts.close_stream += 1,
            ClientMessage::Create(_) => r.texts.create += 1,
            ClientMessage::Update(_) => r.texts.update += 1,
            ClientMessage::Audio(_) | ClientMessage::Invalid(_) | ClientMessage::Unknown => {
                r.texts.other += 1;
            }
        });
        if *message == ClientMessage::Close {
            self.entry.close_requested();
        }
    }

    fn create(&mut self, settings: SessionSettings) {
        if let Some(sample_rate) = settings.sample_rate {
            match Decoder::new(inference::format(sample_rate)) {
                Ok(decoder) => self.decoder = decoder,
                Err(error) => return self.reject_message(&error.to_string()),
            }
        }
        if let Dialect::Inference(session) = &mut self.dialect {
            session.created = true;
        }
        let sample_rate = settings.sample_rate.map(|rate| rate.to_string());
        let shown = [
            ("model", &settings.model),
            ("language", &settings.language),
            ("sample_rate", &sample_rate),
        ];
        let shown: Vec<_> = shown
            .into_iter()
            .filter_map(|(name, value)| Some((name.to_owned(), value.clone()?)))
            .map(|pair| parameters::shown(&pair))
            .collect();
        // The query may have told the model already.
        self.entry.update(|r| {
            for pair in shown {
                if !r.parameters.contains(&pair) {
                    r.parameters.push(pair);
                }
            }
        });
        self.apply(settings);
        self.queue(&mut vec![ServerMessage::Created]);
    }

    /// Rate and model are fixed when the session is created, as they are at LiveKit's.
    fn apply(&mut self, settings: SessionSettings) {
        if let (Dialect::Inference(session), Some(language)) =
            (&mut self.dialect, settings.language)
        {
            session.language = language.chars().take(MAX_LANGUAGE).collect();
        }
    }

    /// Ends a session whose client does not keep to the protocol.
    fn reject_message(&mut self, message: &str) {
        if matches!(self.phase, Phase::Listening) {
            self.queue(&mut vec![inference::invalid(message)]);
            self.close_after_error(End::ProtocolError { code: 1008 }, 1008, "invalid message");
        }
    }
}
