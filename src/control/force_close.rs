//! Rooms are ended for everybody, as `roomwarden force-close` does, by a daemon that leaves them itself
//! first.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Json,
    extract::{
        Path, Query, Request as HttpRequest, State,
        rejection::{PathRejection, QueryRejection},
    },
    http::StatusCode,
};
use futures_util::FutureExt;
use serde::Deserialize;

use super::{
    App, ErrorBody,
    api::{Closing, body},
    error::ApiError,
    view::ForceClose,
};
use crate::{
    cli::EXIT_OK,
    force_close::{Leave, Order, Ours, Receipt, close_rooms},
    requests::Scope,
};

const DEFAULT_DEADLINE_MS: u64 = 30_000;
const LEAST_DEADLINE_MS: u64 = 1000;
const MOST_DEADLINE_MS: u64 = 3_600_000;
/// In bytes.
const MAX_PATTERN: usize = 1024;

type Answer = Result<(StatusCode, Json<Receipt>), ApiError>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct How {
    dry_run: Option<bool>,
    deadline_ms: Option<u64>,
}

/// Ends a room for everybody, whether or not the daemon is in it, as `roomwarden force-close` does:
/// the daemon leaves it, then everybody is removed, the room is deleted, and LiveKit is asked until it
/// has it no more. It may be asked again at any time, and goes on when nobody waits for the answer.
#[utoipa::path(post, path = "/api/v1/rooms/{room}/force-close",
    params(
        ("room" = String, Path, description = "Its name"),
        ("dry_run" = Option<bool>, Query, description = "Only to say who is in it; left out: false"),
        ("deadline_ms" = Option<u64>, Query, description = "By when everything is over; left out: 30000", minimum = 1000, maximum = 3_600_000),
    ),
    responses(
        (status = 200, description = "It is gone, or was not there", body = Receipt),
        (status = 504, description = "It is left, at the deadline or since LiveKit refuses", body = Receipt),
        (status = 503, description = "The daemon has ended before it was done", body = ErrorBody),
        (status = "4XX", description = "Refused", body = ErrorBody),
    )
)]
pub(super) async fn room(
    State(app): State<Arc<App>>,
    room: Result<Path<String>, PathRejection>,
    how: Result<Query<How>, QueryRejection>,
) -> Answer {
    let Path(room) = room?;
    let Query(How {
        dry_run,
        deadline_ms,
    }) = how?;
    let order = Order {
        rooms: [room].into(),
        patterns: Vec::new(),
        dry_run: dry_run.unwrap_or(false),
        deadline: deadline(deadline_ms)?,
    };
    force_close(app, order).await
}

/// Ends all rooms whose name fits for everybody.
#[utoipa::path(post, path = "/api/v1/force-close", request_body = ForceClose,
    responses(
        (status = 200, description = "They are gone", body = Receipt),
        (status = 504, description = "One is left", body = Receipt),
        (status = 502, description = "LiveKit does not list its rooms", body = ErrorBody),
        (status = 503, description = "The daemon has ended before it was done", body = ErrorBody),
        (status = "4XX", description = "Refused", body = ErrorBody),
    )
)]
pub(super) async fn rooms(State(app): State<Arc<App>>, request: HttpRequest) -> Answer {
    let ForceClose {
        pattern,
        dry_run,
        deadline_ms,
    } = body(request).await?;
    if pattern.is_empty() || pattern.len() > MAX_PATTERN {
        let said = format!("pattern has {} bytes, of 1 to {MAX_PATTERN}", pattern.len());
        return Err(ApiError::bad_request(said, "give one such as test-*, or *"));
    }
    let order = Order {
        rooms: BTreeSet::new(),
        patterns: vec![pattern],
        dry_run,
        deadline: deadline(deadline_ms)?,
    };
    force_close(app, order).await
}

fn deadline(given_ms: Option<u64>) -> Result<Duration, ApiError> {
    let ms = given_ms.unwrap_or(DEFAULT_DEADLINE_MS);
    match ms {
        LEAST_DEADLINE_MS..=MOST_DEADLINE_MS => Ok(Duration::from_millis(ms)),
        _ => Err(ApiError::bad_request(
            format!("deadline_ms is {ms}"),
            format!("give a number from {LEAST_DEADLINE_MS} to {MOST_DEADLINE_MS}"),
        )),
    }
}

async fn force_close(app: Arc<App>, order: Order) -> Answer {
    let Ok(permit) = app.forced.clone().try_acquire_owned() else {
        return Err(ApiError::new(
            StatusCode::TOO_MANY_REQUESTS,
            "too_many_force_closes",
            "as many rooms are being force-closed as may be",
            "wait for one of them, or close several by one pattern",
        ));
    };
    // A task of its own: half of it done, for who went away, would be the worst of all.
    let tasks = app.tasks.clone();
    let closing = async move {
        let _permit = permit;
        let leave = |room, by| leave(&app, room, by).boxed();
        let leave: &Leave<'_> = &leave;
        let closing = close_rooms(&app.livekit, order, Some(leave));
        app.ended.run_until_cancelled(closing).await
    };
    let closed = tasks.spawn(closing).await;
    let receipt = closed.map_err(|_| ApiError::defect())?;
    let receipt = receipt.ok_or_else(ApiError::ended)??;
    let status = match receipt.exit_code {
        EXIT_OK => StatusCode::OK,
        _ => StatusCode::GATEWAY_TIMEOUT,
    };
    Ok((status, Json(receipt)))
}

/// By the order that everything else gives.
async fn leave(app: &App, room: String, by: Instant) -> Option<Ours> {
    let board = app.daemon.registry().board();
    let mut rooms = board.rooms().into_iter();
    let info = rooms.find(|info| info.name == room);
    let mut closing = Closing::new(Scope::Room(room), app);
    // Also if it is only about to join it again.
    // What is refused ends by itself; whether it has is seen below.
    let _ = closing.order(app).await;
    let info = info?;
    let closed = closing.over(app, Some(by.into())).await;
    let open = closed.still_open.len();
    Some(Ours {
        identity: info.identity,
        sid: info.sid,
        left: match closed.closed {
            true => Ok(()),
            false => Err(format!("it is not left yet, and {open} streams are open")),
        },
    })
}
