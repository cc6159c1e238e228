//! What is served over HTTP, and how a request becomes a stream.

use std::sync::{Arc, PoisonError};

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Extension, Request, State};
use axum::http::{HeaderValue, Response, StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use hyper::upgrade::OnUpgrade;
use tokio_tungstenite::tungstenite::handshake::server::create_response_with_body;
use uuid::Uuid;

use super::book::NewStream;
use super::fault_board;
use super::flux;
use super::inference;
use super::management;
use super::parameters::Parameters;
use super::reject::{self, ErrorBody, Reject};
use super::server::{Admission, Admitted, Shared};
use super::witness::Protocol;

/// Faults, the longest of what is sent here, take a few hundred bytes.
const MAX_BODY: usize = 64 * 1024;

/// Everything that is served.
pub(super) fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/v1/listen", get(listen))
        .route("/v2/listen", get(listen_to_turns))
        .route("/v1/stt", get(stt))
        .route("/witness", get(show_witness))
        .merge(management::routes())
        .merge(fault_board::routes())
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(shared)
}

async fn listen(
    State(shared): State<Arc<Shared>>,
    Extension(admission): Extension<Admission>,
    request: Request,
) -> Response<Body> {
    open_stream(&shared, &admission, request, Protocol::Listen).await
}

async fn listen_to_turns(
    State(shared): State<Arc<Shared>>,
    Extension(admission): Extension<Admission>,
    request: Request,
) -> Response<Body> {
    open_stream(&shared, &admission, request, Protocol::Flux).await
}

async fn stt(
    State(shared): State<Arc<Shared>>,
    Extension(admission): Extension<Admission>,
    request: Request,
) -> Response<Body> {
    open_stream(&shared, &admission, request, Protocol::Inference).await
}

async fn open_stream(
    shared: &Shared,
    admission: &Admission,
    mut request: Request,
    protocol: Protocol,
) -> Response<Body> {
    let request_id = Uuid::new_v4().to_string();
    let met = shared.faults.handshake();
    if met.held {
        shared.book.handshake_held();
        shared.faults.released().await;
    }
    let admitted = match met.rejected {
        Some(reject) => Err(reject),
        None => admit(shared, &mut request, &request_id, protocol).map_err(|reject| Reject {
            body: match protocol {
                Protocol::Listen | Protocol::Flux => reject.body,
                Protocol::Inference => ErrorBody::Inference,
            },
            ..reject
        }),
    };
    match admitted {
        Ok((response, admitted)) => {
            *admission.lock().unwrap_or_else(PoisonError::into_inner) = Some(admitted);
            response
        }
        Err(reject) => {
            let status = reject.sent_status();
            shared.book.rejected(status.as_u16());
            tracing::debug!(%request_id, %status, "handshake refused");
            reject.response(&request_id)
        }
    }
}

/// Checks a handshake and enters the stream into the book. From here on it counts as open.
fn admit(
    shared: &Shared,
    request: &mut Request,
    request_id: &str,
    protocol: Protocol,
) -> Result<(Response<Body>, Admitted), Reject> {
    let (credentials, parameters) = match protocol {
        Protocol::Listen | Protocol::Flux => {
            let credentials = shared.keys.listen(request.headers())?;
            let parameters = match protocol {
                Protocol::Flux => flux::parameters(request.uri())?,
                _ => Parameters::parse(request.uri())?,
            };
            if shared.balance() <= 0.0 {
                return Err(Reject::status(402));
            }
            (credentials, parameters)
        }
        Protocol::Inference => (
            shared.keys.inference(request.headers())?,
            inference::parameters(request.uri())?,
        ),
    };
    let mut response = create_response_with_body(request, Body::empty)
        .map_err(|error| Reject::bad_request(error.to_string()))?;
    let upgrade = request
        .extensions_mut()
        .remove::<OnUpgrade>()
        .ok_or_else(|| Reject::bad_request("the connection cannot be upgraded"))?;
    if let Some(subprotocol) = credentials.subprotocol {
        response
            .headers_mut()
            .insert(header::SEC_WEBSOCKET_PROTOCOL, subprotocol);
    }
    reject::stamp(&mut response, request_id);
    let entry = shared
        .book
        .open(
            shared.config.max_streams,
            NewStream {
                protocol,
                request_id: request_id.to_owned(),
                key: credentials.masked_key,
                parameters: parameters.shown.clone(),
            },
        )
        .ok_or_else(|| Reject {
            retry_after: shared.config.retry_after,
            ..too_many(protocol)
        })?;
    let admitted = Admitted {
        upgrade,
        entry,
        parameters,
    };
    Ok((response, admitted))
}

fn too_many(protocol: Protocol) -> Reject {
    match protocol {
        Protocol::Listen | Protocol::Flux => Reject::status(429),
        Protocol::Inference => Reject::quota(inference::CONCURRENCY),
    }
}

async fn show_witness(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    let json = HeaderValue::from_static("application/json");
    match serde_json::to_string(&shared.book.snapshot()) {
        Ok(body) => (StatusCode::OK, [(header::CONTENT_TYPE, json)], body),
        Err(error) => {
            tracing::error!(%error, "the witness cannot be written as JSON");
            let body = "{}".to_owned();
            let status = StatusCode::INTERNAL_SERVER_ERROR;
            (status, [(header::CONTENT_TYPE, json)], body)
        }
    }
}
