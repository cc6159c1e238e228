//! What happens, as it happens: server-sent events. Each listener reads the board's feed at its own
//! pace, from where it left off; who is too slow is told what it missed, and nobody waits for it.

use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

use axum::{
    extract::State,
    http::{HeaderMap, StatusCode},
    response::{
        IntoResponse, Response, Sse,
        sse::{self, KeepAlive},
    },
};
use futures_util::stream;
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, watch};

use super::{
    App,
    error::ApiError,
    view::{Receipt, Stream, Trouble, time},
};
use crate::board::{Board, Event, What};

/// A comment, so that both ends notice when the other is gone.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Events that are taken from the feed at once.
const AT_ONCE: usize = 64;

/// Events as they happen, as server-sent events: `room_joined`, `room_left`, `session_begun`,
/// `session_ended`, `stream_opening`, `stream_open`, `stream_closing`, `stream_settled` (with the
/// receipt), `trouble_begun`, `trouble_over`, `drain_begun`, `drain_ended` and `closing`, each with
/// a JSON object. With `Last-Event-ID`, those after that event come first, as far as they are kept;
/// `gap` says that some are not, and how many, if that is known.
#[utoipa::path(
    get,
    path = "/api/v1/events",
    params(("Last-Event-ID" = Option<String>, Header, description = "Of the last event that was read")),
    responses(
        (status = 200, description = "Events", content_type = "text/event-stream", body = String),
        (status = "4XX", description = "Refused", body = super::ErrorBody),
    )
)]
pub(super) async fn events(State(app): State<Arc<App>>, headers: HeaderMap) -> Response {
    let Ok(permit) = app.listeners.clone().try_acquire_owned() else {
        let said = "as many listen to events as may";
        let fix = "end one of them, or ask again later";
        let refused = ApiError::new(
            StatusCode::TOO_MANY_REQUESTS,
            "too_many_listeners",
            said,
            fix,
        );
        return refused.into_response();
    };
    let board = app.daemon.registry().board().clone();
    let last = headers.get("last-event-id");
    let last = last.map(|last| last.to_str().unwrap_or_default().to_owned());
    let (at, gap) = match last.as_deref().map(|last| position(&board, last)) {
        None => (board.last_event(), None),
        Some(Some(at)) => (at, None),
        // From another run, or made up: all there is.
        Some(None) => (0, Some(None)),
    };
    let listener = Listener {
        changes: board.changes(),
        board,
        at,
        gap,
        ready: VecDeque::new(),
        app,
        _permit: permit,
    };
    let events = stream::unfold(listener, async |mut listener| {
        let event = listener.next().await?;
        Some((Ok::<_, Infallible>(event), listener))
    });
    let alive = KeepAlive::new().interval(KEEP_ALIVE).text("alive");
    Sse::new(events).keep_alive(alive).into_response()
}

/// The number of the event with this id, if it is one of this run.
fn position(board: &Board, id: &str) -> Option<u64> {
    let (run, number) = id.split_once('-')?;
    let (run, number): (u64, u64) = (run.parse().ok()?, number.parse().ok()?);
    (run == board.run() && number <= board.last_event()).then_some(number)
}

struct Listener {
    board: Board,
    changes: watch::Receiver<u64>,
    /// The last event that was taken.
    at: u64,
    /// That some were missed, and how many if that is known, is still to be told.
    gap: Option<Option<u64>>,
    ready: VecDeque<Arc<Event>>,
    app: Arc<App>,
    _permit: OwnedSemaphorePermit,
}

impl Listener {
    /// None when the API ends and all was told.
    async fn next(&mut self) -> Option<sse::Event> {
        loop {
            if let Some(missed) = self.gap.take() {
                let data = json!({ "missed": missed });
                return Some(sse::Event::default().event("gap").data(data.to_string()));
            }
            if let Some(event) = self.ready.pop_front() {
                let id = format!("{}-{}", self.board.run(), event.number);
                let new = sse::Event::default().id(id).event(event.what.name());
                return Some(new.data(said(&event).to_string()));
            }
            self.changes.mark_unchanged();
            let unread = self.board.after(self.at, AT_ONCE);
            if let Some(last) = unread.events.last() {
                self.at = last.number;
                self.gap = (unread.missed > 0).then_some(Some(unread.missed));
                self.ready.extend(unread.events);
                continue;
            }
            let ended = self.app.ended.clone();
            ended
                .run_until_cancelled(self.changes.changed())
                .await?
                .ok()?;
        }
    }
}

/// An event's data.
fn said(event: &Event) -> Value {
    let mut said = match &event.what {
        What::RoomJoined { room, sid } => json!({ "room": room, "sid": sid }),
        What::RoomLeft { room, sid, reason } => {
            json!({ "room": room, "sid": sid, "reason": reason })
        }
        What::SessionBegun {
            room,
            participant,
            sid,
        }
        | What::SessionEnded {
            room,
            participant,
            sid,
        } => json!({ "room": room, "participant": participant, "sid": sid }),
        What::Stream(stream) => json!({ "stream": Stream::at(stream, event.at_ms) }),
        What::Settled(settled) => json!({ "receipt": Receipt::from(&**settled) }),
        What::TroubleBegun(trouble) => json!({ "trouble": Trouble::from(&**trouble) }),
        What::TroubleOver(cause) => json!({ "cause": cause.name() }),
        What::DrainBegun | What::DrainEnded | What::Closing => json!({}),
    };
    said["at"] = time(event.at_ms).into();
    said
}
