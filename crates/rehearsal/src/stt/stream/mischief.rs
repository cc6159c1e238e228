//! Faults that a stream commits by itself when their time has come.

use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::time::{Instant, timeout};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

use super::closing::server_fault;
use super::{Phase, Step, Stream};
use crate::stt::faults::ErrorWith;
use crate::stt::messages::{ServerMessage, StreamError};
use crate::stt::witness::{End, TcpEnd};

/// Often enough to annoy any client.
const MIN_GARBAGE_INTERVAL: Duration = Duration::from_millis(10);
/// Final, without payload; the opcode is reserved for further non-control frames.
const BAD_FRAME: [u8; 2] = [0x83, 0];

/// What has been committed already.
#[derive(Default)]
pub(super) struct Committed {
    error: Option<ErrorWith>,
    garbage: usize,
    last_garbage: Option<Instant>,
}

impl Stream {
    /// When the next of them is due.
    pub(super) fn mischief_at(&self) -> Option<Instant> {
        [
            self.drop_at(),
            self.close_at(),
            self.error_at(),
            self.garbage_at(),
            self.bad_frame_at(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Commits what is due.
    pub(super) async fn commit_mischief(&mut self) -> Step {
        let now = Instant::now();
        let reached = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if reached(self.drop_at()) {
            return Err((server_fault("drop_after"), TcpEnd::CutByServer));
        }
        if reached(self.close_at())
            && let Some(fault) = self.faults.close_with.clone()
        {
            self.phase = Phase::Finishing(server_fault("close_with"));
            let sendable = CloseCode::from(fault.code).is_allowed();
            let code = if sendable { fault.code } else { 1011 };
            return self.send_close(code, &fault.reason).await;
        }
        if reached(self.bad_frame_at()) {
            return self.send_bad_frame().await;
        }
        if reached(self.error_at())
            && let Some(error) = self.faults.error.clone()
        {
            self.queue(&mut vec![ServerMessage::Error(StreamError {
                variant: error.variant.clone(),
                description: error.description.clone(),
                message: error.message.clone(),
                code: error.code,
            })]);
            self.committed.error = Some(error);
        }
        if reached(self.garbage_at()) {
            let message = garbage(self.committed.garbage);
            self.committed.garbage += 1;
            self.committed.last_garbage = Some(now);
            self.write(message).await?;
        }
        Ok(())
    }

    /// Faults were changed: one that was taken back may be committed again.
    pub(super) fn forgive(&mut self) {
        if self.faults.error.is_none() {
            self.committed.error = None;
        }
    }

    fn may_speak(&self) -> bool {
        matches!(self.phase, Phase::Listening) && !self.mute()
    }

    fn drop_at(&self) -> Option<Instant> {
        self.faults.drop_after.map(|after| self.opened + after)
    }

    fn close_at(&self) -> Option<Instant> {
        let fault = self.faults.close_with.as_ref()?;
        self.may_speak().then(|| self.opened + fault.after)
    }

    fn error_at(&self) -> Option<Instant> {
        let fault = self.faults.error.as_ref()?;
        let due = self.may_speak() && self.committed.error.as_ref() != Some(fault);
        due.then(|| self.opened + fault.after)
    }

    fn garbage_at(&self) -> Option<Instant> {
        let every = self.faults.garbage_every?.max(MIN_GARBAGE_INTERVAL);
        let last = self.committed.last_garbage.unwrap_or(self.opened);
        self.may_speak().then(|| last + every)
    }

    fn bad_frame_at(&self) -> Option<Instant> {
        let after = self.faults.bad_frame_after?;
        self.may_speak().then(|| self.opened + after)
    }

    /// From then on only the client's reaction counts.
    async fn send_bad_frame(&mut self) -> Step {
        let limit = self.shared.config.write_timeout;
        let tcp = self.ws.get_mut();
        match timeout(limit, tcp.write_all(&BAD_FRAME)).await {
            Ok(Ok(())) => {
                self.outbox.clear();
                self.phase = Phase::AwaitingClose {
                    end: server_fault("bad_frame_after"),
                    until: Instant::now() + self.shared.config.close_timeout,
                };
                Ok(())
            }
            Ok(Err(_)) => Err((self.end_without_close_frame(), TcpEnd::Reset)),
            Err(_) => Err((End::NotReading, TcpEnd::CutByServer)),
        }
    }

    /// The client is not read from before this, or until the connection is reset.
    pub(super) fn resume_reading_at(&self) -> Option<Instant> {
        self.faults.read_bytes_per_second.and(self.read_at)
    }

    /// So much was read: it takes its time.
    pub(super) fn slow_down(&mut self, bytes: usize) {
        self.read_at = self.faults.read_bytes_per_second.map(|rate| {
            let seconds = bytes as f64 / f64::from(rate.get());
            Instant::now() + Duration::from_secs_f64(seconds)
        });
    }
}

/// In turn, what the protocols don't have.
fn garbage(index: usize) -> Message {
    const TEXTS: [&str; 8] = [
        "{ not JSON",
        r#"{"type":"Surprise","payload":[1,2,3]}"#,
        r#"{"type":"Results"}"#,
        r#"{"type":"final_transcript"}"#,
        r#"{"type":7}"#,
        "{}",
        "[]",
        "",
    ];
    let index = index % (TEXTS.len() + 2);
    match TEXTS.get(index) {
        Some(text) => Message::text(*text),
        None if index == TEXTS.len() => Message::binary(vec![0, 0xff, 0x7f]),
        None => Message::Ping(vec![1].into()),
    }
}
