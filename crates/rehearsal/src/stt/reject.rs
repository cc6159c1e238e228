//! Requests that are refused, and what is answered.

use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderName, HeaderValue, Response, StatusCode, header};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

const REQUEST_ID: HeaderName = HeaderName::from_static("dg-request-id");
const ERROR: HeaderName = HeaderName::from_static("dg-error");
const QUOTA_EXCEEDED: &str = "inference_quota_exceeded";

/// A refused request, with the codes of Deepgram or LiveKit Inference. As JSON only `status` is
/// needed, and `retry_after_s` is in seconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Spec", into = "Spec")]
pub struct Reject {
    /// HTTP status; one that isn't a client or server error is sent as 500.
    pub status: u16,
    /// `err_code` or `category` of the body, and the `dg-error` header.
    pub code: String,
    /// `err_msg` or `message` of the body.
    pub message: String,
    /// Sent as Retry-After, in whole seconds.
    pub retry_after: Option<Duration>,
    /// Which shape the body has.
    pub body: ErrorBody,
    /// Added to a body of shape [`ErrorBody::Inference`].
    pub quota: Option<Box<Quota>>,
}

/// Which of LiveKit Inference's quotas is used up.
///
/// Source: <https://github.com/livekit/agents/issues/6009>
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quota {
    /// Such as `stt`.
    pub quota_type: String,
    /// Such as `MaxGatewayCredits`.
    pub category: String,
    /// What the user may do about it.
    pub hint: String,
}

/// Shapes of error bodies: Deepgram's two, and LiveKit Inference's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorBody {
    /// `{err_code, err_msg, request_id}`
    #[default]
    ErrCode,
    /// `{category, message, details, request_id}`
    Category,
    /// `{error}`, and with [`Reject::quota`] `{error, type, quota_type, category, hint}`
    Inference,
}

/// A rejection as JSON.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Spec {
    status: u16,
    code: Option<String>,
    message: Option<String>,
    retry_after_s: Option<u64>,
    #[serde(default)]
    body: ErrorBody,
    quota: Option<Box<Quota>>,
}

impl From<Spec> for Reject {
    fn from(spec: Spec) -> Self {
        let usual = Self::status(spec.status);
        Self {
            code: spec.code.unwrap_or(usual.code),
            message: spec.message.unwrap_or(usual.message),
            retry_after: spec.retry_after_s.map(Duration::from_secs),
            body: spec.body,
            quota: spec.quota,
            status: spec.status,
        }
    }
}

impl From<Reject> for Spec {
    fn from(reject: Reject) -> Self {
        Self {
            status: reject.status,
            code: Some(reject.code),
            message: Some(reject.message),
            retry_after_s: reject.retry_after.map(|after| after.as_secs()),
            body: reject.body,
            quota: reject.quota,
        }
    }
}

impl Reject {
    /// The rejection with which Deepgram uses this status.
    pub fn status(status: u16) -> Self {
        let (code, message) = match status {
            400 => ("Bad Request", "Bad Request."),
            401 => ("INVALID_AUTH", "Invalid credentials."),
            402 => (
                "ASR_PAYMENT_REQUIRED",
                "Project does not have enough credits for an ASR request.",
            ),
            403 => (
                "INSUFFICIENT_PERMISSIONS",
                "Project does not have access to the requested model.",
            ),
            404 => ("PROJECT_NOT_FOUND", "Project not found."),
            429 => (
                "TOO_MANY_REQUESTS",
                "Too many requests. Please try again later.",
            ),
            503 => ("SERVICE_UNAVAILABLE", "Service unavailable."),
            504 => ("GATEWAY_TIMEOUT", "Gateway timeout."),
            _ => ("INTERNAL_SERVER_ERROR", "Internal server error."),
        };
        Self {
            status,
            code: code.to_owned(),
            message: message.to_owned(),
            retry_after: None,
            body: ErrorBody::default(),
            quota: None,
        }
    }

    /// LiveKit Inference's 429 for a quota that is used up. `MaxGatewayCredits` is final; the
    /// categories of concurrency and rate pass.
    pub fn quota(category: impl Into<String>) -> Self {
        let category = category.into();
        Self {
            code: QUOTA_EXCEEDED.to_owned(),
            message: format!("STT quota exceeded, category: {category}"),
            body: ErrorBody::Inference,
            quota: Some(Box::new(Quota {
                quota_type: "stt".to_owned(),
                category,
                hint: "Upgrade the plan, or close sessions that are not needed.".to_owned(),
            })),
            ..Self::status(429)
        }
    }

    /// Replaces the message.
    pub fn message(mut self, message: impl Into<String>) -> Self {
        self.message = message.into();
        self
    }

    /// Adds Retry-After.
    pub fn retry_after(mut self, after: Duration) -> Self {
        self.retry_after = Some(after);
        self
    }

    /// Chooses the shape of the body.
    pub fn body(mut self, body: ErrorBody) -> Self {
        self.body = body;
        self
    }

    /// A 400 with this message.
    pub(super) fn bad_request(message: impl AsRef<str>) -> Self {
        Self::status(400).message(format!("Bad Request: {}", message.as_ref()))
    }

    /// The status that is sent.
    pub(super) fn sent_status(&self) -> StatusCode {
        StatusCode::from_u16(self.status)
            .ok()
            .filter(|status| status.is_client_error() || status.is_server_error())
            .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    /// The whole answer.
    pub(super) fn response(&self, request_id: &str) -> Response<Body> {
        let mut response = Response::new(Body::from(self.json(request_id).to_string()));
        *response.status_mut() = self.sent_status();
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        );
        // Header values hold no line breaks; a message that does isn't repeated there.
        let error = format!("{}: {}", self.code, self.message);
        if let Ok(value) = HeaderValue::from_str(&error) {
            headers.insert(ERROR, value);
        }
        if let Some(after) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(after.as_secs()));
        }
        stamp(&mut response, request_id);
        response
    }

    fn json(&self, request_id: &str) -> Value {
        match (self.body, &self.quota) {
            (ErrorBody::ErrCode, _) => json!({
                "err_code": self.code,
                "err_msg": self.message,
                "request_id": request_id,
            }),
            (ErrorBody::Category, _) => json!({
                "category": self.code,
                "message": self.message,
                "details": "",
                "request_id": request_id,
            }),
            (ErrorBody::Inference, None) => json!({ "error": self.message }),
            (ErrorBody::Inference, Some(quota)) => json!({
                "error": self.message,
                "type": QUOTA_EXCEEDED,
                "quota_type": quota.quota_type,
                "category": quota.category,
                "hint": quota.hint,
            }),
        }
    }
}

/// Adds what every answer carries.
pub(super) fn stamp<B>(response: &mut Response<B>, request_id: &str) {
    if let Ok(value) = HeaderValue::from_str(request_id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
}
