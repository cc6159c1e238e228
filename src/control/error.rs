//! What is said when something is refused: one shape for all of it.

use axum::{
    Json,
    extract::rejection::{BytesRejection, JsonRejection, PathRejection, QueryRejection},
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{requests::Refused, room, store::StoreError};

/// Of what is quoted.
const MAX_SAID: usize = 300;

/// Why a request is refused.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct ErrorBody {
    pub error: ErrorSaid,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct ErrorSaid {
    /// For machines; stays the same.
    #[schema(value_type = String, example = "not_found")]
    pub code: std::borrow::Cow<'static, str>,
    /// For people.
    pub message: String,
    /// What to do about it.
    pub fix: String,
}

#[derive(Debug)]
pub(crate) struct ApiError {
    pub status: StatusCode,
    code: &'static str,
    message: String,
    fix: String,
    header: Extra,
}

/// A header that belongs to it.
#[derive(Debug)]
enum Extra {
    None,
    Bearer,
    RetryAfter(u64),
}

impl ApiError {
    pub fn new(
        status: StatusCode,
        code: &'static str,
        message: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self {
            status,
            code,
            message: message.into(),
            fix: fix.into(),
            header: Extra::None,
        }
    }

    pub fn unauthorized(message: &str, fix: &str) -> Self {
        Self {
            header: Extra::Bearer,
            ..Self::new(StatusCode::UNAUTHORIZED, "unauthorized", message, fix)
        }
    }

    pub fn too_often(code: &'static str, message: &str, after_seconds: u64) -> Self {
        let fix = format!("try again in {after_seconds} s");
        Self {
            header: Extra::RetryAfter(after_seconds),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, code, message, fix)
        }
    }

    pub fn bad_request(message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "bad_request", message, fix)
    }

    pub fn not_found(message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", message, fix)
    }

    pub fn too_large() -> Self {
        let said = format!(
            "the body is larger than {} KB",
            super::access::MAX_BODY >> 10
        );
        let fix = "send less";
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", said, fix)
    }

    pub fn not_json() -> Self {
        Self::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "not_json",
            "the body is not said to be JSON",
            "send it with `Content-Type: application/json`, or send none",
        )
    }

    pub fn too_slow() -> Self {
        Self::new(
            StatusCode::REQUEST_TIMEOUT,
            "too_slow",
            "the body did not come in time",
            "send it at once",
        )
    }

    pub fn no_ledger() -> Self {
        Self::new(
            StatusCode::CONFLICT,
            "no_ledger",
            "no ledger is kept",
            "set ledger.enabled = true, and state.dir or ledger.file",
        )
    }

    pub fn ledger(error: &StoreError) -> Self {
        if let StoreError::TooManyRows { .. } = error {
            return Self::new(
                StatusCode::BAD_REQUEST,
                "too_many_rows",
                error.to_string(),
                "give a later since, or sum by less; `roomwarden usage` has no such limit",
            );
        }
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "ledger",
            error.to_string(),
            "see the log; once a stream is over there is a ledger",
        )
    }

    pub fn ended() -> Self {
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "ended",
            "the daemon has ended before it was done",
            "ask again once it runs: what is done needs not be done again",
        )
    }

    pub fn stuck() -> Self {
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "stuck",
            "the daemon does not take the request",
            "see the log; SIGTERM ends it in time, whatever it does",
        )
    }

    pub fn defect() -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "defect",
            "a defect in roomwarden",
            "see the log, and report it",
        )
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        // What others said is in it, and may be anything.
        let mut message = self.message.replace(char::is_control, "\u{fffd}");
        if let Some((cut, _)) = message.char_indices().nth(MAX_SAID) {
            message.truncate(cut);
        }
        let body = ErrorBody {
            error: ErrorSaid {
                code: self.code.into(),
                message,
                fix: self.fix,
            },
        };
        let mut response = (self.status, Json(body)).into_response();
        let (name, value) = match self.header {
            Extra::None => return response,
            Extra::Bearer => (header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer")),
            Extra::RetryAfter(seconds) => (header::RETRY_AFTER, seconds.into()),
        };
        response.headers_mut().insert(name, value);
        response
    }
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> Self {
        let (status, code, fix) = match refused {
            Refused::NoSuchRoom | Refused::NoSuchParticipant | Refused::NoSuchTrack => (
                StatusCode::NOT_FOUND,
                "not_found",
                "GET /api/v1/rooms lists what there is",
            ),
            Refused::TooManyClosed => (
                StatusCode::CONFLICT,
                "too_many_closed",
                "close the room instead, or reopen somebody",
            ),
            Refused::Closing => (
                StatusCode::CONFLICT,
                "closing",
                "wait for its end, or for the daemon's next start",
            ),
        };
        Self::new(status, code, refused.to_string(), fix)
    }
}

impl From<room::api::ApiError> for ApiError {
    fn from(error: room::api::ApiError) -> Self {
        match error {
            room::api::ApiError::Argument { .. } => {
                Self::bad_request(error.to_string(), "ask for something that LiveKit takes")
            }
            error => Self::new(
                StatusCode::BAD_GATEWAY,
                "livekit",
                error.to_string(),
                "see what LiveKit says, and ask again",
            ),
        }
    }
}

impl From<QueryRejection> for ApiError {
    fn from(rejection: QueryRejection) -> Self {
        let fix = "GET /api/v1/openapi.json says which parameters there are";
        Self::bad_request(rejection.body_text(), fix)
    }
}

impl From<PathRejection> for ApiError {
    fn from(rejection: PathRejection) -> Self {
        let fix = "GET /api/v1/rooms and /api/v1/streams list names and numbers";
        Self::bad_request(rejection.body_text(), fix)
    }
}

impl From<JsonRejection> for ApiError {
    fn from(rejection: JsonRejection) -> Self {
        match rejection {
            JsonRejection::MissingJsonContentType(_) => Self::not_json(),
            JsonRejection::BytesRejection(rejection) => rejection.into(),
            other => Self::bad_request(
                other.body_text(),
                "GET /api/v1/openapi.json says what the body is to be",
            ),
        }
    }
}

impl From<BytesRejection> for ApiError {
    fn from(rejection: BytesRejection) -> Self {
        match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => Self::too_large(),
            _ => Self::bad_request("the body could not be read", "send it whole"),
        }
    }
}
