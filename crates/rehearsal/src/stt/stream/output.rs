//! What the client is sent, and when: the outbox, where faults may hold things back.

use std::time::Duration;

use chrono::{SecondsFormat, Utc};
use futures_util::SinkExt as _;
use sha2::Digest as _;
use tokio::time::{Instant, timeout};
use tokio_tungstenite::tungstenite::Message;

use super::{Phase, Step, Stream};
use crate::stt::dialect::Dialect;
use crate::stt::messages::{Metadata, ServerMessage};
use crate::stt::socket;
use crate::stt::witness::{End, TcpEnd};

/// Messages that `final_delay` may hold back; more, and the oldest is sent early.
const MAX_HELD: usize = 256;

/// What is to be sent, in order.
pub(super) struct Outgoing {
    queued: Instant,
    what: Parcel,
}

enum Parcel {
    Message(ServerMessage),
    Close { code: u16, reason: &'static str },
}

impl Stream {
    /// Everything that is left goes out: results, Metadata, close frame.
    pub(super) fn finish(&mut self, end: End) {
        let mut messages = Vec::new();
        self.transcriber.end_of_stream(&mut messages);
        messages.push(ServerMessage::Metadata(Metadata {
            transaction_key: "deprecated",
            request_id: self.entry.request_id().to_owned(),
            sha256: hex(&self.digest.clone().finalize()),
            created: Utc::now().to_rfc3339_opts(SecondsFormat::Millis, true),
            duration: self.transcriber.seconds(),
            channels: if self.audio_heard { self.channels } else { 0 },
        }));
        self.queue(&mut messages);
        let code = match self.dialect {
            Dialect::Flux(_) => socket::NO_STATUS,
            Dialect::Listen | Dialect::Inference(_) => 1000,
        };
        self.queue_close(code, "");
        self.phase = Phase::Finishing(end);
    }

    pub(super) fn close_after_error(&mut self, end: End, code: u16, reason: &'static str) {
        self.queue_close(code, reason);
        self.phase = Phase::Finishing(end);
    }

    pub(super) fn queue(&mut self, messages: &mut Vec<ServerMessage>) {
        let queued = Instant::now();
        self.outbox
            .extend(messages.drain(..).map(|message| Outgoing {
                queued,
                what: Parcel::Message(message),
            }));
    }

    fn queue_close(&mut self, code: u16, reason: &'static str) {
        self.outbox.push_back(Outgoing {
            queued: Instant::now(),
            what: Parcel::Close { code, reason },
        });
    }

    /// Nothing may be sent at present.
    pub(super) fn mute(&self) -> bool {
        self.faults.stall || (self.faults.never_answer_close && self.close_requested)
    }

    pub(super) fn send_at(&self, outgoing: &Outgoing) -> Instant {
        let delay = match &outgoing.what {
            Parcel::Message(message) if message.is_final() => self.faults.final_delay,
            Parcel::Message(ServerMessage::Metadata(_)) => self
                .faults
                .close_delay
                .unwrap_or(self.shared.config.close_delay),
            Parcel::Message(_) | Parcel::Close { .. } => Duration::ZERO,
        };
        outgoing.queued + delay
    }

    pub(super) async fn send_due(&mut self) -> Step {
        while let Some(first) = self.outbox.front() {
            let early = self.outbox.len() > MAX_HELD;
            if self.mute() || (!early && Instant::now() < self.send_at(first)) {
                break;
            }
            let Some(outgoing) = self.outbox.pop_front() else {
                break;
            };
            match outgoing.what {
                Parcel::Message(message) => self.send_message(&message).await?,
                Parcel::Close { code, reason } => self.send_close(code, reason).await?,
            }
        }
        Ok(())
    }

    async fn send_message(&mut self, message: &ServerMessage) -> Step {
        let text = match self.dialect.render(self.entry.request_id(), message) {
            Some(Ok(text)) => text,
            Some(Err(error)) => {
                tracing::error!(%error, "message cannot be written as JSON");
                return Ok(());
            }
            None => return Ok(()),
        };
        self.write(Message::text(text)).await?;
        self.entry.update(|r| match message {
            ServerMessage::Results(results) => {
                r.results_sent += 1;
                r.finals_sent += u64::from(results.is_final);
            }
            ServerMessage::Metadata(_) => r.metadata_sent = true,
            ServerMessage::SpeechStarted { .. }
            | ServerMessage::UtteranceEnd { .. }
            | ServerMessage::Error(_)
            | ServerMessage::Created
            | ServerMessage::Finalized => {}
        });
        Ok(())
    }

    /// Sends the close frame; from then on only the client's answer counts.
    pub(super) async fn send_close(&mut self, code: u16, reason: &str) -> Step {
        self.write(socket::close_frame(code, reason)).await?;
        self.entry.update(|r| r.close_code_sent = Some(code));
        // Nothing may follow a close frame; a fault's may have overtaken held results.
        self.outbox.clear();
        let phase = std::mem::replace(&mut self.phase, Phase::Listening);
        self.phase = match phase {
            Phase::Finishing(end) => Phase::AwaitingClose {
                end,
                until: Instant::now() + self.shared.config.close_timeout,
            },
            other => other,
        };
        Ok(())
    }

    pub(super) async fn write(&mut self, message: Message) -> Step {
        let limit = self.shared.config.write_timeout;
        let written = tokio::select! {
            biased;
            () = self.stop.cancelled() => {
                return Err((End::ServerStopped, TcpEnd::CutByServer));
            }
            written = timeout(limit, self.ws.send(message)) => written,
        };
        match written {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => self.failed(error).await,
            Err(_) => Err((End::NotReading, TcpEnd::CutByServer)),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
