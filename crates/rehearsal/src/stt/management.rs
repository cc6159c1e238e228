//! Deepgram's management API, as far as it tells what was used and what is left, and short-lived
//! tokens.
//!
//! Source: <https://developers.deepgram.com/reference/manage/billing/list>,
//! <https://developers.deepgram.com/reference/auth/tokens/grant>

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, Response, Uri, header};
use axum::routing::{get, post};
use chrono::Utc;
use serde_json::{Value, json};
use uuid::Uuid;

use super::parameters;
use super::reject::{self, Reject};
use super::server::Shared;
use super::usage::{Books, Grouping, Period};

const PROJECT_NAME: &str = "rehearsal";
const BALANCE_ID: &str = "b1a0ce00-0000-4000-8000-726568656172";
/// Deepgram's bounds and defaults.
const LIMIT: std::ops::RangeInclusive<usize> = 1..=1000;
const DEFAULT_LIMIT: usize = 10;
const MAX_TTL_SECONDS: f64 = 3600.0;
const DEFAULT_TTL_SECONDS: f64 = 30.0;

/// What is asked of one project.
type Asked = (State<Arc<Shared>>, Path<Vec<String>>, HeaderMap, Uri);
type Answer = Result<Value, Reject>;

/// All routes of the API.
pub(super) fn routes() -> Router<Arc<Shared>> {
    let project = |answer: fn(&Project) -> Answer| {
        get(
            async move |(State(shared), Path(path), headers, uri): Asked| {
                respond(
                    Project::find(shared, path, &headers, &uri).and_then(|found| answer(&found)),
                )
            },
        )
    };
    Router::new()
        .route("/v1/auth/grant", post(grant))
        .route("/v1/projects", get(list_projects))
        .route("/v1/projects/{project}", project(Project::show))
        .route(
            "/v1/projects/{project}/balances",
            project(Project::balances),
        )
        .route(
            "/v1/projects/{project}/balances/{balance}",
            project(Project::balance),
        )
        .route("/v1/projects/{project}/usage", project(Project::usage))
        .route(
            "/v1/projects/{project}/usage/breakdown",
            project(Project::breakdown),
        )
        .route(
            "/v1/projects/{project}/requests",
            project(Project::requests),
        )
        .route(
            "/v1/projects/{project}/requests/{request}",
            project(Project::request),
        )
}

async fn list_projects(State(shared): State<Arc<Shared>>, headers: HeaderMap) -> Response<Body> {
    let project_id = &shared.config.project_id;
    respond(
        shared
            .keys
            .main(&headers)
            .map(|()| json!({"projects": [{"project_id": project_id, "name": PROJECT_NAME}]})),
    )
}

async fn grant(
    State(shared): State<Arc<Shared>>,
    headers: HeaderMap,
    body: Bytes,
) -> Response<Body> {
    respond(shared.keys.main(&headers).and_then(|()| {
        let ttl_seconds = ttl_seconds(&body)?;
        let ttl = Duration::from_secs_f64(ttl_seconds);
        let token = shared.keys.grant(ttl).ok_or_else(|| Reject::status(500))?;
        Ok(json!({"access_token": token, "expires_in": ttl_seconds}))
    }))
}

fn ttl_seconds(body: &[u8]) -> Result<f64, Reject> {
    if body.is_empty() {
        return Ok(DEFAULT_TTL_SECONDS);
    }
    let body: Value = serde_json::from_slice(body)
        .map_err(|error| Reject::bad_request(format!("not JSON: {error}")))?;
    match body.get("ttl_seconds") {
        None => Ok(DEFAULT_TTL_SECONDS),
        Some(value) => value
            .as_f64()
            .filter(|ttl| (1.0..=MAX_TTL_SECONDS).contains(ttl))
            .ok_or_else(|| Reject::bad_request("ttl_seconds: expected a number of 1 to 3600")),
    }
}

/// A project that was asked for by somebody who may.
struct Project {
    shared: Arc<Shared>,
    /// What the path names after the project.
    name: Option<String>,
    query: Vec<(String, String)>,
}

impl Project {
    fn find(
        shared: Arc<Shared>,
        path: Vec<String>,
        headers: &HeaderMap,
        uri: &Uri,
    ) -> Result<Self, Reject> {
        shared.keys.main(headers)?;
        if path.first() != Some(&shared.config.project_id) {
            return Err(Reject::status(404));
        }
        Ok(Self {
            shared,
            name: path.into_iter().nth(1),
            query: parameters::query(uri)?,
        })
    }

    fn show(&self) -> Answer {
        Ok(json!({"project_id": self.shared.config.project_id, "name": PROJECT_NAME}))
    }

    fn balances(&self) -> Answer {
        Ok(json!({"balances": [self.balance_json()]}))
    }

    fn balance(&self) -> Answer {
        let known = self.name.as_deref() == Some(BALANCE_ID);
        known
            .then(|| self.balance_json())
            .ok_or_else(|| not_found("Balance not found."))
    }

    fn balance_json(&self) -> Value {
        json!({
            "balance_id": BALANCE_ID,
            "amount": self.shared.balance(),
            "units": "usd",
            "purchase_order_id": null,
        })
    }

    fn usage(&self) -> Answer {
        let witness = self.shared.book.snapshot();
        Ok(self.books().usage(&witness.streams, self.period()?))
    }

    fn breakdown(&self) -> Answer {
        let grouping = Grouping::parse(self.get("grouping")).map_err(Reject::bad_request)?;
        let witness = self.shared.book.snapshot();
        let period = self.period()?;
        Ok(self.books().breakdown(&witness.streams, period, grouping))
    }

    fn requests(&self) -> Answer {
        let page = self.number("page", 0..=usize::MAX)?.unwrap_or(0);
        let limit = self.number("limit", LIMIT)?.unwrap_or(DEFAULT_LIMIT);
        let period = self.period()?;
        let id = self.get("request_id");
        let witness = self.shared.book.snapshot();
        let books = self.books();
        Ok(books.requests(&witness.streams, period, id, page, limit))
    }

    fn request(&self) -> Answer {
        let witness = self.shared.book.snapshot();
        let record = self.name.as_deref().and_then(|id| witness.stream(id));
        let record = record.ok_or_else(|| not_found("Request not found."))?;
        Ok(json!({"request": self.books().request(record)}))
    }

    fn books(&self) -> Books<'_> {
        let config = &self.shared.config;
        Books {
            project_id: &config.project_id,
            started: self.shared.book.started_at(),
            usd_per_minute: config.usd_per_minute,
        }
    }

    fn period(&self) -> Result<Period, Reject> {
        Period::parse(self.get("start"), self.get("end"), Utc::now().date_naive())
            .map_err(Reject::bad_request)
    }

    fn number(
        &self,
        name: &str,
        range: std::ops::RangeInclusive<usize>,
    ) -> Result<Option<usize>, Reject> {
        let number = |text: &str| text.parse().ok().filter(|number| range.contains(number));
        self.get(name)
            .map(|text| {
                number(text).ok_or_else(|| {
                    let (low, high) = (range.start(), range.end());
                    Reject::bad_request(format!("{name}: expected a number of {low} to {high}"))
                })
            })
            .transpose()
    }

    fn get(&self, name: &str) -> Option<&str> {
        let pair = self.query.iter().find(|(key, _)| key == name);
        pair.map(|(_, value)| value.as_str())
    }
}

fn not_found(message: &str) -> Reject {
    Reject {
        code: "NOT_FOUND".to_owned(),
        ..Reject::status(404).message(message)
    }
}

fn respond(answer: Answer) -> Response<Body> {
    let request_id = Uuid::new_v4().to_string();
    match answer {
        Ok(json) => {
            let mut response = Response::new(Body::from(json.to_string()));
            let json = HeaderValue::from_static("application/json");
            response.headers_mut().insert(header::CONTENT_TYPE, json);
            reject::stamp(&mut response, &request_id);
            response
        }
        Err(reject) => reject.response(&request_id),
    }
}
