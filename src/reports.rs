//! Usage reports: every stream that is settled is told to a webhook, one by one and in order, and
//! after its streams every session and room of which everything is closed. What is due is marked in the
//! ledger in the transaction that books the stream, and the mark goes when the receiver has taken it, so
//! that no restart loses a report. One may come twice; its id says so.
//!
//! They are signed as LiveKit signs its webhooks: a token in `Authorization`, with a hash of the body
//! in it. It is minted at the moment of sending and kept nowhere.

use std::{sync::Arc, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use livekit_api::access_token::AccessToken;
use livekit_net::{Header, HttpClient, HttpClientExt};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;
use url::Url;

use crate::{
    cli,
    config::Config,
    domain::backoff,
    store::{Due, Store, Taken},
};

/// Of a token: enough for clocks that differ.
const VALID: Duration = Duration::from_secs(300);
/// Between two tries of one report.
const RETRY_FIRST: Duration = Duration::from_millis(500);
const RETRY_MOST: Duration = Duration::from_secs(60);
/// Of what a receiver says.
const MAX_SAID: usize = 200;
const UNAUTHORIZED: u16 = 401;

/// Where reports go, and how they are signed.
pub struct Webhook {
    url: Url,
    key: String,
    secret: SecretString,
    timeout: Duration,
    client: Arc<dyn HttpClient>,
}

impl Webhook {
    /// None if no reports are wanted.
    pub fn new(config: &Config) -> Option<Self> {
        let reports = &config.usage_reports;
        let secret = reports
            .secret
            .as_ref()
            .unwrap_or(&config.livekit.api_secret);
        Some(Self {
            url: reports.url.clone()?,
            key: config.livekit.api_key.clone(),
            secret: secret.clone(),
            timeout: Duration::from_millis(reports.timeout_ms),
            client: livekit_net::http_client()?,
        })
    }

    /// Sends what is due, and what becomes due. Once `closing`, only what can be sent without a
    /// failure; the rest is for the next start. Cancel safe: at worst a report is sent again.
    pub async fn deliver(self, store: Store, closing: CancellationToken) {
        // Marks may be written late, or never if the disk is full: no report is sent for that.
        let mut taken = Taken::default();
        let mut failures = 0;
        loop {
            let Some(due) = store.next_due(taken).await else {
                tokio::select! {
                    biased;
                    () = store.changed() => continue,
                    () = closing.cancelled() => {}
                }
                // What came with the close.
                if store.next_due(taken).await.is_some() {
                    continue;
                }
                return;
            };
            match self.send(&due).await {
                Ok(()) => {
                    if failures > 0 {
                        tracing::info!("usage reports are delivered again");
                    }
                    failures = 0;
                    taken.take(due.mark);
                    store.delivered(due.mark);
                }
                Err(said) => {
                    let url = cli::shown(&self.url);
                    if failures == 0 {
                        tracing::error!(
                            report = due.id,
                            "usage reports can't be delivered to {url}: {said}; they are kept, and \
                             tried again in their order"
                        );
                    } else {
                        tracing::debug!(report = due.id, failures, said, "not delivered");
                    }
                    if closing.is_cancelled() {
                        return;
                    }
                    let pause = backoff(failures, RETRY_FIRST, RETRY_MOST, fastrand::f64());
                    failures += 1;
                    closing.run_until_cancelled(tokio::time::sleep(pause)).await;
                }
            }
        }
    }

    async fn send(&self, due: &Due) -> Result<(), String> {
        let mut body = due.content.clone();
        body.insert("event".to_owned(), due.event.into());
        body.insert("id".to_owned(), due.id.as_str().into());
        body.insert("createdAt".to_owned(), (due.at_ms / 1000).into());
        let body = Value::Object(body).to_string();
        match self.post(due, &body).await? {
            // By a token that was too old or too new, most likely.
            (UNAUTHORIZED, _) => match self.post(due, &body).await? {
                (200..300, _) => Ok(()),
                (status, said) => Err(format!("refused twice, with {status}: {said}")),
            },
            (200..300, _) => Ok(()),
            (status, said) => Err(format!("status {status}: {said}")),
        }
    }

    /// The answer's status, and what it says.
    async fn post(&self, due: &Due, body: &str) -> Result<(u16, String), String> {
        let token = self.mint(body)?;
        let header = |name: &str, value: &str| Header {
            name: name.to_owned(),
            value: value.to_owned(),
        };
        let headers = vec![
            header("Authorization", &token),
            header("Content-Type", "application/webhook+json"),
            header("Idempotency-Key", &due.id),
        ];
        let sent = self.client.post(self.url.to_string(), headers, body.into());
        let answer = match tokio::time::timeout(self.timeout, sent).await {
            Ok(Ok(answer)) => answer,
            // Its own words may quote the address, and what is secret in it.
            Ok(Err(_)) => return Err("no answer, or no connection".to_owned()),
            Err(_) => return Err(format!("no answer within {:?}", self.timeout)),
        };
        let said = &answer.body[..answer.body.len().min(MAX_SAID)];
        let said = String::from_utf8_lossy(said).replace(char::is_control, " ");
        // A receiver may say what it was sent.
        Ok((answer.status, said.replace(&token, "(not shown)")))
    }

    fn mint(&self, body: &str) -> Result<String, String> {
        AccessToken::with_api_key(&self.key, self.secret.expose_secret())
            .with_ttl(VALID)
            .with_sha256(&STANDARD.encode(Sha256::digest(body)))
            .to_jwt()
            .map_err(|error| format!("no token can be made: {error}"))
    }
}
