//! How a stream ends: time-outs, close frames, and the TCP connection below.

use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use tokio::time::{Instant, timeout};
use tokio_tungstenite::tungstenite::Error as WsError;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

use super::{Phase, Step, Stream};
use crate::stt::dialect::Dialect;
use crate::stt::inference;
use crate::stt::socket::{self, Failure};
use crate::stt::witness::{End, TcpEnd};

/// How long a client may take to end the TCP connection after the close handshake.
const FIN_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a stopping server tries to say so.
const STOP_TIMEOUT: Duration = Duration::from_millis(500);

const IDLE: &str = "NET-0001: neither audio nor a text message within the timeout window";

impl Stream {
    pub(super) fn next_due(&self) -> Option<Instant> {
        let outbox = self.outbox.front().filter(|_| !self.mute());
        [
            outbox.map(|first| self.send_at(first)),
            self.mischief_at(),
            self.resume_reading_at(),
            self.idle_at(),
            match &self.phase {
                Phase::AwaitingClose { until, .. } if !self.faults.stall => Some(*until),
                _ => None,
            },
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn idle_at(&self) -> Option<Instant> {
        let listening = matches!(self.phase, Phase::Listening) && !self.mute();
        let config = &self.shared.config;
        let timeout = match self.dialect {
            Dialect::Listen | Dialect::Flux(_) => config.idle_timeout,
            Dialect::Inference(_) => config.inference_idle_timeout,
        };
        listening.then(|| self.last_input + timeout)
    }

    pub(super) async fn due(&mut self) -> Step {
        self.commit_mischief().await?;
        let now = Instant::now();
        if self.resume_reading_at().is_some_and(|at| at <= now) {
            self.read_at = None;
        }
        if self.idle_at().is_some_and(|at| at <= now) {
            if matches!(self.dialect, Dialect::Inference(_)) {
                self.queue(&mut vec![inference::inactive()]);
            }
            self.close_after_error(End::TimedOut, 1011, IDLE);
            return Ok(());
        }
        match &self.phase {
            Phase::AwaitingClose { until, .. } if *until <= now && !self.faults.stall => {
                Err((End::CloseUnanswered, TcpEnd::CutByServer))
            }
            _ => Ok(()),
        }
    }

    pub(super) async fn close_frame_received(&mut self, frame: Option<CloseFrame>) -> Step {
        let code = frame.map_or(socket::NO_STATUS, |frame| frame.code.into());
        self.entry.update(|r| r.close_code_received = Some(code));
        let end = match &self.phase {
            Phase::AwaitingClose { end, .. } => end.clone(),
            // What the server was about to say is the reason, had the client waited for it.
            Phase::Finishing(end) if *end != End::Acknowledged && *end != End::EmptyAudio => {
                end.clone()
            }
            _ => End::CloseFrame { code },
        };
        if self.mute() {
            // To read on would send the answer.
            self.phase = Phase::Mute(end);
            return Ok(());
        }
        Err((end, self.end_tcp().await))
    }

    /// After the close frames: the server ends the connection, the client follows.
    async fn end_tcp(&mut self) -> TcpEnd {
        let farewell = async {
            // Sends the answer to a close frame, if one is due.
            while let Some(Ok(_)) = self.ws.next().await {}
            socket::read_to_end(self.ws.get_mut()).await
        };
        tokio::select! {
            biased;
            tcp_end = timeout(FIN_TIMEOUT, farewell) => tcp_end.unwrap_or(TcpEnd::CutByServer),
            () = self.stop.cancelled() => TcpEnd::CutByServer,
        }
    }

    /// The websocket failed: the connection ended, or the client broke the protocol.
    pub(super) async fn failed(&mut self, error: WsError) -> Step {
        let code = match socket::failure(&error) {
            Failure::Ended(tcp_end) => return Err((self.end_without_close_frame(), tcp_end)),
            Failure::Violation { close_code } => close_code,
        };
        let farewell = async {
            let sent = self.ws.send(socket::close_frame(code, "")).await.is_ok();
            (sent, socket::read_to_end(self.ws.get_mut()).await)
        };
        let tcp_end = tokio::select! {
            biased;
            () = self.stop.cancelled() => TcpEnd::CutByServer,
            done = timeout(FIN_TIMEOUT, farewell) => match done {
                Ok((sent, tcp_end)) => {
                    if sent {
                        self.entry.update(|r| r.close_code_sent = Some(code));
                    }
                    tcp_end
                }
                Err(_) => TcpEnd::CutByServer,
            },
        };
        Err((End::ProtocolError { code }, tcp_end))
    }

    /// The end of a stream whose connection ended before the client's close frame came.
    pub(super) fn end_without_close_frame(&self) -> End {
        match &self.phase {
            Phase::Listening | Phase::Mute(_) => End::Abrupt,
            Phase::Finishing(end) | Phase::AwaitingClose { end, .. } => match end {
                End::Acknowledged | End::EmptyAudio => End::Abrupt,
                // The server had closed it; whether the client answered is told by the record.
                other => other.clone(),
            },
        }
    }

    pub(super) async fn say_stopping(&mut self) {
        if self.mute() {
            return;
        }
        let code = CloseCode::Away.into();
        let close = socket::close_frame(code, "server is stopping");
        let said = timeout(STOP_TIMEOUT, self.ws.send(close)).await;
        if matches!(said, Ok(Ok(()))) {
            self.entry.update(|r| r.close_code_sent = Some(code));
        }
    }
}

pub(super) fn server_fault(fault: &str) -> End {
    End::ServerFault {
        fault: fault.to_owned(),
    }
}
