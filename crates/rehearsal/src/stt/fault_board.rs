//! Which faults are in force, for all streams or for one, and how they are told over HTTP.

use std::collections::HashMap;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{HeaderValue, Response, header};
use axum::routing::get;
use axum::{Json, Router};
use tokio::sync::watch;

use super::faults::Faults;
use super::reject::Reject;
use super::server::Shared;

/// See the module's description.
pub(super) struct FaultBoard {
    board: watch::Sender<Board>,
}

struct Board {
    all: Faults,
    /// By request id, of open streams only.
    streams: HashMap<String, Faults>,
}

/// What befalls one handshake.
#[derive(Default)]
pub(super) struct Handshake {
    pub held: bool,
    pub rejected: Option<Reject>,
}

/// One stream's view of the board.
pub(super) struct FaultWatch {
    board: watch::Receiver<Board>,
    request_id: String,
}

impl FaultBoard {
    pub(super) fn new(all: Faults) -> Self {
        let streams = HashMap::new();
        Self {
            board: watch::Sender::new(Board { all, streams }),
        }
    }

    /// The faults of streams that have none of their own.
    pub(super) fn all(&self) -> Faults {
        self.board.borrow().all.clone()
    }

    pub(super) fn set_all(&self, faults: Faults) {
        self.board.send_modify(|board| board.all = faults);
    }

    /// What a new handshake meets; it counts as struck.
    pub(super) fn handshake(&self) -> Handshake {
        let mut met = Handshake::default();
        self.board.send_if_modified(|board| {
            let all = &mut board.all;
            let strikes = all.hold_handshake || all.reject_with.is_some();
            if !strikes || all.handshakes == Some(0) {
                return false;
            }
            met.held = all.hold_handshake;
            met.rejected = all.reject_with.clone().filter(|_| !met.held);
            all.handshakes = all.handshakes.map(|left| left - 1);
            all.handshakes.is_some()
        });
        met
    }

    /// Waits until no handshake is held any more. Cancel safe.
    pub(super) async fn released(&self) {
        let mut board = self.board.subscribe();
        // It can't be closed: this is its sender.
        let _ = board.wait_for(|board| !board.all.hold_handshake).await;
    }

    /// The faults of this stream.
    pub(super) fn of(&self, request_id: &str) -> Faults {
        self.board.borrow().of(request_id).clone()
    }

    /// Gives the stream faults of its own, or takes them away. Whoever sets them sees to it that
    /// they are taken away when the stream ends.
    pub(super) fn set(&self, request_id: &str, faults: Option<Faults>) {
        self.board.send_if_modified(|board| match faults {
            Some(faults) => {
                board.streams.insert(request_id.to_owned(), faults);
                true
            }
            None => board.streams.remove(request_id).is_some(),
        });
    }

    #[cfg(test)]
    pub(super) fn streams_with_their_own(&self) -> usize {
        self.board.borrow().streams.len()
    }

    pub(super) fn watch(&self, request_id: &str) -> FaultWatch {
        FaultWatch {
            board: self.board.subscribe(),
            request_id: request_id.to_owned(),
        }
    }
}

impl Board {
    fn of(&self, request_id: &str) -> &Faults {
        self.streams.get(request_id).unwrap_or(&self.all)
    }
}

impl FaultWatch {
    /// The stream's faults as of now.
    pub(super) fn current(&mut self) -> Faults {
        self.board.borrow_and_update().of(&self.request_id).clone()
    }

    /// Waits until something has changed since [`current`](Self::current), for this stream or
    /// another; for ever once the board is gone. Cancel safe.
    pub(super) async fn changed(&mut self) {
        if self.board.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// `/faults` and `/faults/{request_id}`. Open to all, as the witness is: the server is not meant
/// for production.
pub(super) fn routes() -> Router<Arc<Shared>> {
    Router::new()
        .route("/faults", get(show_all).put(put_all).delete(clear_all))
        .route("/faults/{request_id}", get(show).put(put).delete(clear))
}

async fn show_all(State(shared): State<Arc<Shared>>) -> Response<Body> {
    respond(Ok(shared.faults.all()))
}

async fn put_all(State(shared): State<Arc<Shared>>, body: Bytes) -> Response<Body> {
    respond(parse(&body).inspect(|faults| shared.faults.set_all(faults.clone())))
}

async fn clear_all(State(shared): State<Arc<Shared>>) -> Response<Body> {
    shared.faults.set_all(Faults::default());
    respond(Ok(Faults::default()))
}

async fn show(State(shared): State<Arc<Shared>>, Path(id): Path<String>) -> Response<Body> {
    let open = shared.book.is_open(&id);
    respond(open.then(|| shared.faults.of(&id)).ok_or_else(not_open))
}

async fn put(
    State(shared): State<Arc<Shared>>,
    Path(id): Path<String>,
    body: Bytes,
) -> Response<Body> {
    respond(parse(&body).and_then(|faults| {
        let set = shared.set_stream_faults(&id, Some(faults.clone()));
        set.then_some(faults).ok_or_else(not_open)
    }))
}

async fn clear(State(shared): State<Arc<Shared>>, Path(id): Path<String>) -> Response<Body> {
    let cleared = shared.set_stream_faults(&id, None);
    respond(cleared.then(|| shared.faults.all()).ok_or_else(not_open))
}

/// The error names the field.
fn parse(body: &[u8]) -> Result<Faults, Reject> {
    match Json::<Faults>::from_bytes(body) {
        Ok(Json(faults)) => Ok(faults),
        Err(error) => Err(Reject::bad_request(error.body_text())),
    }
}

fn not_open() -> Reject {
    Reject {
        code: "NOT_FOUND".to_owned(),
        ..Reject::status(404).message("No such stream is open.")
    }
}

/// The faults that are now in force.
fn respond(faults: Result<Faults, Reject>) -> Response<Body> {
    let json = faults.and_then(|faults| {
        serde_json::to_string(&faults).map_err(|error| {
            tracing::error!(%error, "faults cannot be written as JSON");
            Reject::status(500)
        })
    });
    match json {
        Ok(json) => {
            let mut response = Response::new(Body::from(json));
            let json = HeaderValue::from_static("application/json");
            response.headers_mut().insert(header::CONTENT_TYPE, json);
            response
        }
        Err(reject) => reject.response(""),
    }
}
