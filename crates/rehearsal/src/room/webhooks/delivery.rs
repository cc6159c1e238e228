//! One receiver's queue for one room: signed requests, repeated until one is answered.

use super::DeliveryOutcome;
use crate::room::{auth::Keys, witness::Recorder};
use axum::{
    body::Body,
    http::{Request, StatusCode, Uri, header},
};
use hyper_util::rt::TokioIo;
use livekit_protocol as proto;
use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    net::TcpStream,
    sync::mpsc,
    time::{sleep, timeout},
};

/// Requests for one event. LiveKit's number.
const MAX_ATTEMPTS: u32 = 5;
/// Pauses between them double up to this. LiveKit's limit.
const MAX_PAUSE: Duration = Duration::from_secs(30);
/// A receiver that has not answered by then has failed. (LiveKit's server waits for ever.)
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// A queue with nothing to do for this long ends. LiveKit's limit.
const IDLE: Duration = Duration::from_secs(300);

pub(super) struct Receiver {
    url: String,
    host: String,
    port: u16,
    path: String,
    /// The pause before the second request.
    retry: Duration,
    max_age: Duration,
    keys: Arc<Keys>,
}

pub(super) struct Item {
    pub id: Arc<str>,
    pub event: proto::WebhookEvent,
    pub queued: Instant,
}

pub(super) struct Queue {
    /// Of the receiver in the record.
    pub index: usize,
    pub receiver: Arc<Receiver>,
    pub recorder: Arc<Recorder>,
    pub items: mpsc::Receiver<Item>,
}

impl Receiver {
    pub fn new(url: &str, retry: Duration, max_age: Duration, keys: Arc<Keys>) -> io::Result<Self> {
        let invalid = || {
            let message = format!("not a webhook URL of http: {url:?}");
            io::Error::new(io::ErrorKind::InvalidInput, message)
        };
        let uri: Uri = url.parse().map_err(|_| invalid())?;
        let host = uri.host().filter(|_| uri.scheme_str() == Some("http"));
        let host = host.ok_or_else(invalid)?;
        Ok(Self {
            url: url.to_owned(),
            host: host.trim_matches(['[', ']']).to_owned(),
            port: uri.port_u16().unwrap_or(80),
            path: uri.path_and_query().map_or("/", |p| p.as_str()).to_owned(),
            retry,
            max_age,
            keys,
        })
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    async fn post(&self, event: &proto::WebhookEvent) -> io::Result<StatusCode> {
        let body = serde_json::to_vec(event)?;
        let token = self.keys.webhook(&body).map_err(io::Error::other)?;
        let authority = format!("{}:{}", self.host, self.port);
        let request = Request::post(&self.path)
            .header(header::HOST, authority)
            .header(header::CONTENT_TYPE, "application/webhook+json")
            .header(header::AUTHORIZATION, token)
            .body(Body::from(body))
            .map_err(io::Error::other)?;
        let stream = TcpStream::connect((self.host.as_str(), self.port)).await?;
        let http = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = http.map_err(io::Error::other)?;
        let exchange = async move {
            let answer = sender.send_request(request).await;
            answer.map(|a| a.status()).map_err(io::Error::other)
        };
        tokio::pin!(connection);
        tokio::pin!(exchange);
        tokio::select! {
            answer = &mut exchange => answer,
            ended = &mut connection => {
                ended.map_err(io::Error::other)?;
                exchange.await
            }
        }
    }
}

impl Queue {
    /// Delivers until there is nothing more to come.
    pub async fn run(mut self) {
        loop {
            match timeout(IDLE, self.items.recv()).await {
                Ok(Some(item)) => self.deliver(item).await,
                Ok(None) => return,
                // What came in at the last moment is still in the channel.
                Err(_) => self.items.close(),
            }
        }
    }

    async fn deliver(&self, item: Item) {
        let end = |outcome, error: &str| {
            (self.recorder).delivery_ended(&item.id, self.index, outcome, error);
        };
        if item.queued.elapsed() > self.receiver.max_age {
            return end(DeliveryOutcome::Dropped, "too old");
        }
        let mut pause = self.receiver.retry;
        for attempt in 1.. {
            let answer = timeout(ANSWER_TIMEOUT, self.receiver.post(&item.event)).await;
            let answer = answer.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
            let status = answer.as_ref().ok().map(StatusCode::as_u16);
            (self.recorder).delivery_tried(&item.id, self.index, status);
            let error = match answer {
                Ok(status) if is_final(status) => return end(DeliveryOutcome::Sent, ""),
                Ok(status) => status.to_string(),
                Err(e) => e.to_string(),
            };
            tracing::debug!(url = self.receiver.url, attempt, "webhook: {error}");
            if attempt == MAX_ATTEMPTS {
                return end(DeliveryOutcome::Failed, &error);
            }
            sleep(pause).await;
            pause = (2 * pause).min(MAX_PAUSE);
        }
    }
}

/// Answers that are not tried again, as in LiveKit's server: even a refusal is one.
fn is_final(status: StatusCode) -> bool {
    let failed = status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED;
    !failed && status != StatusCode::TOO_MANY_REQUESTS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_checked() {
        let receiver = |url| {
            let keys = Arc::new(Keys::new("key", "secret"));
            Receiver::new(url, Duration::ZERO, Duration::ZERO, keys)
        };
        let parsed = receiver("http://[::1]:8000/hook?a=b").expect("valid");
        assert_eq!((parsed.host.as_str(), parsed.port), ("::1", 8000));
        assert_eq!(parsed.path, "/hook?a=b");
        let parsed = receiver("http://localhost").expect("valid");
        assert_eq!((parsed.port, parsed.path.as_str()), (80, "/"));
        for bad in ["", "localhost", "https://localhost/", "http://", "/hook"] {
            assert!(receiver(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn only_failures_are_tried_again() {
        let again = |code| !is_final(StatusCode::from_u16(code).expect("status"));
        assert!(again(500) && again(503) && again(429));
        assert!(!again(200) && !again(401) && !again(404) && !again(501));
    }
}
