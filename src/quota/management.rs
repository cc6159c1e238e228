//! The provider's management API, as far as it tells what was used and what is left: Deepgram's
//! `/v1/projects`.

use std::{sync::Arc, time::Duration};

use chrono::{DateTime, Utc};
use livekit_net::{Header, HttpClient, HttpClientExt};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use url::Url;

use crate::{
    cli,
    config::{Config, ProviderKind},
};

/// For one answer.
const LIMIT: Duration = Duration::from_secs(20);
/// Requests in one answer, and answers at most.
const PAGE: usize = 1000;
const MAX_PAGES: usize = 10_000;
/// Of what a server says.
const MAX_SAID: usize = 200;

pub(super) struct Management {
    client: Arc<dyn HttpClient>,
    base: Url,
    key: SecretString,
    pub project: String,
}

#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Balance {
    pub amount: f64,
    /// `usd` or `hour`.
    pub units: String,
}

/// Sums of a period.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(super) struct ProviderUsage {
    pub requests: u64,
    /// Of audio.
    pub hours: f64,
}

/// A stream, as the provider lists it.
#[derive(Debug)]
pub(super) struct Request {
    pub id: String,
    pub created: Option<DateTime<Utc>>,
    /// Of audio; none if it does not say.
    pub seconds: Option<f64>,
}

impl Management {
    /// Finds the project, unless it is configured. The error says what to do.
    pub async fn connect(config: &Config) -> Result<Self, String> {
        if config.stt.provider == ProviderKind::LivekitInference {
            let said = "LiveKit Inference has no API that tells what was used, or is left: see the \
                        project's page of LiveKit Cloud";
            return Err(said.to_owned());
        }
        let key = config.stt.api_key.clone();
        if key.expose_secret().is_empty() {
            return Err("stt.api_key is not set (DEEPGRAM_API_KEY)".to_owned());
        }
        let client = livekit_net::http_client().ok_or("there is no HTTP client")?;
        let mut management = Self {
            client,
            base: base(config),
            key,
            project: config.quota.project.clone().unwrap_or_default(),
        };
        if management.project.is_empty() {
            management.project = management.only_project().await?;
        }
        Ok(management)
    }

    async fn only_project(&self) -> Result<String, String> {
        #[derive(Deserialize)]
        struct Projects {
            projects: Vec<Project>,
        }
        #[derive(Deserialize)]
        struct Project {
            project_id: String,
        }
        let Projects { mut projects } = self.get("v1/projects", &[]).await?;
        match projects.len() {
            1 => Ok(projects.remove(0).project_id),
            0 => Err("the key belongs to no project: set quota.project".to_owned()),
            _ => {
                let ids: Vec<_> = projects.into_iter().map(|found| found.project_id).collect();
                let ids = ids.join(", ");
                Err(format!(
                    "the key belongs to several projects: set quota.project to one of {ids}"
                ))
            }
        }
    }

    pub async fn balances(&self) -> Result<Vec<Balance>, String> {
        #[derive(Deserialize)]
        struct Balances {
            balances: Vec<Balance>,
        }
        let found: Balances = self.of_project("balances", &[]).await?;
        Ok(found.balances)
    }

    /// By whole days.
    pub async fn usage(
        &self,
        from: DateTime<Utc>,
        to: DateTime<Utc>,
    ) -> Result<ProviderUsage, String> {
        #[derive(Deserialize)]
        struct Usage {
            results: Vec<Day>,
        }
        #[derive(Deserialize)]
        struct Day {
            #[serde(default)]
            hours: f64,
            #[serde(default)]
            requests: u64,
        }
        let found: Usage = self.of_project("usage", &days(from, to)).await?;
        let mut sum = ProviderUsage::default();
        for day in found.results {
            sum.requests += day.requests;
            sum.hours += day.hours;
        }
        Ok(sum)
    }

    /// By whole days, all of them.
    pub async fn requests(
        &self,
        from: DateTime<Utc>,
        to: DateTime<Utc>,
    ) -> Result<Vec<Request>, String> {
        #[derive(Deserialize)]
        struct Answer {
            requests: Vec<Listed>,
        }
        #[derive(Deserialize)]
        struct Listed {
            request_id: String,
            created: Option<String>,
            response: Option<Response>,
        }
        #[derive(Deserialize)]
        struct Response {
            details: Option<Details>,
        }
        #[derive(Deserialize)]
        struct Details {
            duration: Option<f64>,
            total_audio: Option<f64>,
        }
        let mut all = Vec::new();
        for page in 0..MAX_PAGES {
            let mut query = days(from, to);
            query.push(("page", page.to_string()));
            query.push(("limit", PAGE.to_string()));
            let Answer { requests } = self.of_project("requests", &query).await?;
            let last = requests.len() < PAGE;
            all.extend(requests.into_iter().map(|listed| {
                let details = listed.response.and_then(|response| response.details);
                let created = listed.created.as_deref().map(str::parse);
                Request {
                    id: listed.request_id,
                    created: created.and_then(Result::ok),
                    seconds: details.and_then(|details| details.duration.or(details.total_audio)),
                }
            }));
            if last {
                break;
            }
        }
        Ok(all)
    }

    async fn of_project<T: DeserializeOwned>(
        &self,
        what: &str,
        query: &[(&str, String)],
    ) -> Result<T, String> {
        self.get(&format!("v1/projects/{}/{what}", self.project), query)
            .await
    }

    async fn get<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &[(&str, String)],
    ) -> Result<T, String> {
        let mut url = self.base.clone();
        let before = url.path().trim_end_matches('/').to_owned();
        url.set_path(&format!("{before}/{path}"));
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        let shown = cli::shown(&url);
        let headers = vec![Header {
            name: "Authorization".to_owned(),
            value: format!("Token {}", self.key.expose_secret()),
        }];
        let asked = self.client.get(url.into(), headers);
        let answer = match tokio::time::timeout(LIMIT, asked).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => return Err(format!("{shown}: {error} (quota.url)")),
            Err(_) => {
                return Err(format!(
                    "{shown} does not answer within {LIMIT:?} (quota.url)"
                ));
            }
        };
        let body = &answer.body[..answer.body.len().min(MAX_SAID)];
        let said = String::from_utf8_lossy(body).replace(self.key.expose_secret(), "(not shown)");
        match answer.status {
            200 => serde_json::from_slice(&answer.body)
                .map_err(|error| format!("{shown} answers with something else: {error}")),
            401 | 403 => Err(format!(
                "{shown} refuses the key, which needs the rights to see usage and billing: {said}"
            )),
            404 => Err(format!(
                "{shown} is not there (quota.url, quota.project): {said}"
            )),
            status => Err(format!("{shown} answers with status {status}: {said}")),
        }
    }
}

/// As configured, or on the host of `stt.url`.
fn base(config: &Config) -> Url {
    if let Some(url) = &config.quota.url {
        return url.clone();
    }
    let mut url = config.stt.url.clone();
    let secure = url.scheme() == "wss";
    // Cannot fail between web schemes.
    let _ = url.set_scheme(if secure { "https" } else { "http" });
    url.set_path("");
    url.set_query(None);
    url
}

fn days(from: DateTime<Utc>, to: DateTime<Utc>) -> Vec<(&'static str, String)> {
    let day = |time: DateTime<Utc>| time.format("%F").to_string();
    vec![("start", day(from)), ("end", day(to))]
}
