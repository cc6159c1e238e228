//! What may be asked, and what is answered. The OpenAPI description is made from what is here.

use std::{
    collections::{BTreeSet, HashSet},
    sync::Arc,
    time::Duration,
};

use axum::{
    Json, Router,
    extract::{
        FromRequest, Path, Query, Request as HttpRequest, State as AppState,
        rejection::{PathRejection, QueryRejection},
    },
    http::StatusCode,
    middleware,
    response::IntoResponse,
};
use chrono::SecondsFormat;
use clap::ValueEnum;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;
use tokio::{sync::watch, time::Instant};
use utoipa::{
    OpenApi as _,
    openapi::{
        OpenApi, SecurityRequirement,
        security::{Http, HttpAuthScheme, SecurityScheme},
    },
};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    App, ErrorBody, access,
    error::ApiError,
    events, force_close, metrics, query,
    view::{
        self, Closed, Dispatch, Dispatched, LogFilter, Ready, Receipt, Room, State, Status, Stream,
        Streams, Usage,
    },
};
use crate::{
    close::{CloseOrder, now},
    config,
    domain::CloseReason,
    overrides::Overrides,
    registry::OpenStream,
    requests::{Refused, Request, Scope},
    store::Dimension,
    usage, webhooks,
};

/// Receipts and failures at once.
const MAX_LAST: usize = 1000;
const DEFAULT_LAST: usize = 100;
/// Of usage: a ledger grows, an answer is held in memory.
const MAX_ROWS: u32 = 10_000;
/// A filter of the log, in bytes.
const MAX_FILTER: usize = 4096;
/// For an order to be taken.
const ASK_LIMIT: Duration = Duration::from_secs(10);
/// What a close may take beyond the time that its streams have: to leave a room.
const BEYOND_GRACE: Duration = Duration::from_secs(5);

type Answer<T> = Result<Json<T>, ApiError>;

pub(super) fn router(app: Arc<App>) -> Router {
    let (router, _) = documented().split_for_parts();
    let webhooks = webhooks::router(&app.daemon.config().livekit, app.daemon.hints());
    router
        .fallback(not_found)
        .method_not_allowed_fallback(wrong_method)
        .layer(axum::extract::DefaultBodyLimit::max(access::MAX_BODY))
        .layer(middleware::from_fn_with_state(app.clone(), access::guard))
        .with_state(app)
        // LiveKit has no token of ours, and signs what it sends.
        .merge(webhooks)
        .method_not_allowed_fallback(wrong_method)
}

/// The rest is from Cargo.toml.
#[derive(utoipa::OpenApi)]
#[openapi(info(
    title = "roomwarden",
    contact(),
    description = "The control API. Errors have one shape, {\"error\": {\"code\", \"message\", \"fix\"}}. Who asks over TCP sends a token, if one is configured."
))]
struct Description;

fn documented() -> OpenApiRouter<Arc<App>> {
    let mut description = Description::openapi();
    let components = description.components.get_or_insert_default();
    let bearer = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
    components.add_security_scheme("token", bearer);
    // Without one, where none is configured.
    let token = SecurityRequirement::new("token", [""; 0]);
    description.security = Some(vec![token, SecurityRequirement::default()]);
    OpenApiRouter::with_openapi(description)
        .routes(routes!(healthz))
        .routes(routes!(readyz))
        .routes(routes!(metrics::metrics))
        .routes(routes!(openapi))
        .routes(routes!(status))
        .routes(routes!(rooms))
        .routes(routes!(streams))
        .routes(routes!(receipts))
        .routes(routes!(errors))
        .routes(routes!(usage_of))
        .routes(routes!(events::events))
        .routes(routes!(close_stream))
        .routes(routes!(close_room))
        .routes(routes!(reopen_room))
        .routes(routes!(force_close::room))
        .routes(routes!(force_close::rooms))
        .routes(routes!(dispatch))
        .routes(routes!(close_participant))
        .routes(routes!(reopen_participant))
        .routes(routes!(drain))
        .routes(routes!(undrain))
        .routes(routes!(log))
}

async fn not_found() -> ApiError {
    ApiError::not_found(
        "there is no such path",
        "GET /api/v1/openapi.json lists what there is",
    )
}

async fn wrong_method() -> ApiError {
    ApiError::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "wrong_method",
        "this path does not take that method",
        "GET /api/v1/openapi.json lists what there is",
    )
}

/// Whether the process lives: answered as long as it does.
#[utoipa::path(get, path = "/healthz", responses((status = 200, description = "It lives", body = State)))]
async fn healthz(AppState(app): AppState<Arc<App>>) -> Json<State> {
    Json(state(&app))
}

fn state(app: &App) -> State {
    let phase = app.daemon.registry().board().phase();
    State {
        state: phase.name().to_owned(),
    }
}

/// Whether it is ready to transcribe. Not while it starts, drains or closes, and not while LiveKit
/// or the provider refuses.
#[utoipa::path(get, path = "/readyz", responses(
    (status = 200, description = "Ready", body = Ready),
    (status = 503, description = "Not ready, and why", body = Ready),
))]
async fn readyz(AppState(app): AppState<Arc<App>>) -> impl IntoResponse {
    let reason = view::not_ready(&app.daemon);
    let status = match reason {
        None => StatusCode::OK,
        Some(_) => StatusCode::SERVICE_UNAVAILABLE,
    };
    let ready = reason.is_none();
    (status, Json(Ready { ready, reason }))
}

/// This description.
#[utoipa::path(get, path = "/api/v1/openapi.json", responses(
    (status = 200, description = "OpenAPI", body = Object),
    (status = "4XX", description = "Refused", body = ErrorBody),
))]
async fn openapi() -> Json<OpenApi> {
    Json(documented().into_openapi())
}

/// How the daemon is.
#[utoipa::path(get, path = "/api/v1/status", responses(
    (status = 200, description = "How it is", body = Status),
    (status = "4XX", description = "Refused", body = ErrorBody),
))]
async fn status(AppState(app): AppState<Arc<App>>) -> Json<Status> {
    let config = app.daemon.config();
    Json(Status::new(&app.daemon, &config, app.open()))
}

/// The rooms that it is in, who in them is transcribed, and what is done with each track.
#[utoipa::path(get, path = "/api/v1/rooms", responses(
    (status = 200, description = "Rooms", body = Vec<Room>),
    (status = "4XX", description = "Refused", body = ErrorBody),
))]
async fn rooms(AppState(app): AppState<Arc<App>>) -> Json<Vec<Room>> {
    let registry = app.daemon.registry();
    let streams = registry.open();
    let rooms = registry.board().rooms();
    Json(rooms.iter().map(|room| Room::new(room, &streams)).collect())
}

/// The streams that are open, and the tracks that have none though they may.
#[utoipa::path(get, path = "/api/v1/streams", responses(
    (status = 200, description = "Streams", body = Streams),
    (status = "4XX", description = "Refused", body = ErrorBody),
))]
async fn streams(AppState(app): AppState<Arc<App>>) -> Json<Streams> {
    Json(Streams::new(&app.daemon))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Last {
    last: Option<usize>,
}

fn last(given: Result<Query<Last>, QueryRejection>) -> Result<usize, ApiError> {
    let last = given?.0.last.unwrap_or(DEFAULT_LAST);
    match last {
        1..=MAX_LAST => Ok(last),
        _ => Err(ApiError::bad_request(
            format!("last is {last}"),
            format!("give a number from 1 to {MAX_LAST}"),
        )),
    }
}

/// The last streams that are over, of this run, latest first: how each ended.
#[utoipa::path(get, path = "/api/v1/receipts",
    params(("last" = Option<usize>, Query, description = "So many", minimum = 1, maximum = 1000)),
    responses(
        (status = 200, description = "Receipts", body = Vec<Receipt>),
        (status = "4XX", description = "Refused", body = ErrorBody),
    )
)]
async fn receipts(
    AppState(app): AppState<Arc<App>>,
    given: Result<Query<Last>, QueryRejection>,
) -> Answer<Vec<Receipt>> {
    let last = last(given)?;
    let receipts = app.daemon.registry().ledger().receipts();
    let latest = receipts.iter().rev().take(last);
    Ok(Json(
        latest.map(|settled| Receipt::from(&**settled)).collect(),
    ))
}

/// The last streams that the provider or the network refused or ended, of this run, latest first.
#[utoipa::path(get, path = "/api/v1/errors",
    params(("last" = Option<usize>, Query, description = "So many", minimum = 1, maximum = 1000)),
    responses(
        (status = 200, description = "Receipts with a failure each", body = Vec<Receipt>),
        (status = "4XX", description = "Refused", body = ErrorBody),
    )
)]
async fn errors(
    AppState(app): AppState<Arc<App>>,
    given: Result<Query<Last>, QueryRejection>,
) -> Answer<Vec<Receipt>> {
    let last = last(given)?;
    let failed = app.daemon.registry().board().failed();
    let latest = failed.iter().rev().take(last);
    Ok(Json(
        latest.map(|settled| Receipt::from(&**settled)).collect(),
    ))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct UsageOf {
    by: Option<String>,
    since: Option<String>,
}

/// What was used, from the ledger, as `roomwarden usage --json` has it; of up to 10000 rows.
#[utoipa::path(get, path = "/api/v1/usage",
    params(
        ("by" = Option<String>, Query, description = "What is summed by: room, participant, model, day, month; several, separated by commas. Left out: month"),
        ("since" = Option<String>, Query, description = "A day (2026-11-01), today, or so many days back (7d); UTC"),
    ),
    responses(
        (status = 200, description = "Sums", body = Usage),
        (status = "4XX", description = "Refused", body = ErrorBody),
        (status = 503, description = "The ledger can't be read", body = ErrorBody),
    )
)]
async fn usage_of(
    AppState(app): AppState<Arc<App>>,
    given: Result<Query<UsageOf>, QueryRejection>,
) -> Answer<Usage> {
    let Query(UsageOf { by, since }) = given?;
    let by = by.as_deref().unwrap_or("month");
    let dimension = |name: &str| Dimension::from_str(name, false);
    let by: Result<Vec<_>, _> = by.split(',').map(dimension).collect();
    let by = by
        .ok()
        .filter(|by| by.len() <= Dimension::value_variants().len());
    let by = by.ok_or_else(|| {
        let fix = "give some of room, participant, model, day, month, separated by commas";
        ApiError::bad_request("by is something else", fix)
    })?;
    let since = since.as_deref().map(usage::since).transpose();
    let since = since.map_err(|fix| ApiError::bad_request("since is no day", fix))?;
    let asked =
        move |reader: crate::store::Reader| usage::summed(&reader, &by, since, Some(MAX_ROWS));
    let (rows, total) = query(&app, asked).await?;
    Ok(Json(Usage {
        since: since.map(|at| at.to_rfc3339_opts(SecondsFormat::Secs, true)),
        rows,
        total,
    }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wait {
    wait: Option<bool>,
}

type Waits = Result<Query<Wait>, QueryRejection>;

/// Closes the stream with this number, in order. Its track is not transcribed again until it is
/// published anew, or its participant is reopened.
#[utoipa::path(post, path = "/api/v1/streams/{id}/close",
    params(
        ("id" = u64, Path, description = "Its number"),
        ("wait" = Option<bool>, Query, description = "Whether to answer when it is closed; left out: true"),
    ),
    responses(
        (status = 200, description = "Closed", body = Closed),
        (status = 202, description = "The order is given", body = Closed),
        (status = "4XX", description = "Refused", body = ErrorBody),
    )
)]
async fn close_stream(
    AppState(app): AppState<Arc<App>>,
    id: Result<Path<u64>, PathRejection>,
    wait: Waits,
) -> Result<(StatusCode, Json<Closed>), ApiError> {
    let Path(id) = id?;
    let open = app.daemon.registry().open();
    let stream = open.into_iter().find(|stream| stream.id.0 == id);
    let stream = stream.ok_or_else(|| {
        let fix = "GET /api/v1/streams lists those that are open";
        ApiError::not_found(format!("no stream with the number {id} is open"), fix)
    })?;
    let key = stream.key;
    let scope = Scope::Track {
        room: key.room,
        identity: key.participant,
        track: key.track,
    };
    let mut closing = Closing::new(scope, &app);
    if closing.cards.is_empty() {
        // Of the gateway, where several have one name.
        closing.streams = [id].into();
    }
    close(&app, closing, wait).await
}

/// Closes all streams of a room, in order, and leaves it. It is not joined again while it lives,
/// unless it is reopened.
#[utoipa::path(post, path = "/api/v1/rooms/{room}/close",
    params(
        ("room" = String, Path, description = "Its name"),
        ("wait" = Option<bool>, Query, description = "Whether to answer when it is closed; left out: true"),
    ),
    responses(
        (status = 200, description = "Closed", body = Closed),
        (status = 202, description = "The order is given", body = Closed),
        (status = "4XX", description = "Refused", body = ErrorBody),
    )
)]
async fn close_room(
    AppState(app): AppState<Arc<App>>,
    room: Result<Path<String>, PathRejection>,
    wait: Waits,
) -> Result<(StatusCode, Json<Closed>), ApiError> {
    let Path(room) = room?;
    close(&app, Closing::new(Scope::Room(room), &app), wait).await
}

/// Closes all streams of a participant, in order. They are not transcribed again until they rejoin,
/// or are reopened.
#[utoipa::path(post, path = "/api/v1/rooms/{room}/participants/{identity}/close",
    params(
        ("room" = String, Path, description = "Its name"),
        ("identity" = String, Path, description = "Of the participant"),
        ("wait" = Option<bool>, Query, description = "Whether to answer when it is closed; left out: true"),
    ),
    responses(
        (status = 200, description = "Closed", body = Closed),
        (status = 202, description = "The order is given", body = Closed),
        (status = "4XX", description = "Refused", body = ErrorBody),
    )
)]
async fn close_participant(
    AppState(app): AppState<Arc<App>>,
    path: Result<Path<(String, String)>, PathRejection>,
    wait: Waits,
) -> Result<(StatusCode, Json<Closed>), ApiError> {
    let Path((room, identity)) = path?;
    let scope = Scope::Participant { room, identity };
    close(&app, Closing::new(scope, &app), wait).await
}

/// Takes back that a room was closed by request: the next look for rooms joins it, if it is there.
#[utoipa::path(post, path = "/api/v1/rooms/{room}/reopen",
    params(("room" = String, Path, description = "Its name")),
    responses(
        (status = 200, description = "Taken back", body = State),
        (status = "4XX", description = "Refused", body = ErrorBody),
    )
)]
async fn reopen_room(
    AppState(app): AppState<Arc<App>>,
    room: Result<Path<String>, PathRejection>,
) -> Answer<State> {
    let Path(room) = room?;
    let scope = Scope::Room(room);
    ask(&app, |answer| Request::Reopen(scope, answer)).await??;
    Ok(Json(state(&app)))
}

/// Takes back that a participant, or a stream of theirs, was closed by request.
#[utoipa::path(post, path = "/api/v1/rooms/{room}/participants/{identity}/reopen",
    params(
        ("room" = String, Path, description = "Its name"),
        ("identity" = String, Path, description = "Of the participant"),
    ),
    responses(
        (status = 200, description = "Taken back", body = State),
        (status = "4XX", description = "Refused", body = ErrorBody),
    )
)]
async fn reopen_participant(
    AppState(app): AppState<Arc<App>>,
    path: Result<Path<(String, String)>, PathRejection>,
) -> Answer<State> {
    let Path((room, identity)) = path?;
    let scope = Scope::Participant { room, identity };
    ask(&app, |answer| Request::Reopen(scope, answer)).await??;
    Ok(Json(state(&app)))
}

/// Dispatches agents to a room, which is made if there is none, as `roomwarden dispatch` does; it is
/// not waited for who takes the job.
#[utoipa::path(post, path = "/api/v1/rooms/{room}/dispatches", request_body = Dispatch,
    params(("room" = String, Path, description = "Its name")),
    responses(
        (status = 201, description = "Dispatched", body = Dispatched),
        (status = "4XX", description = "Refused", body = ErrorBody),
        (status = 502, description = "LiveKit refuses the keys, or can't be asked", body = ErrorBody),
    )
)]
async fn dispatch(
    AppState(app): AppState<Arc<App>>,
    room: Result<Path<String>, PathRejection>,
    request: HttpRequest,
) -> Result<(StatusCode, Json<Dispatched>), ApiError> {
    let Path(room) = room?;
    let new: Dispatch = body(request).await?;
    let config = app.daemon.config();
    let agent_name = match new.agent_name {
        Some(name) if !name.is_empty() => {
            let wrong = config::wrong_text(&name);
            let wrong = wrong.map(|fix| ApiError::bad_request("agent_name can't be that", fix));
            wrong.map_or(Ok(name), Err)?
        }
        Some(none) => none,
        None => config.agent.name.clone().unwrap_or_default(),
    };
    let metadata = new.metadata.map(|fields| Value::Object(fields).to_string());
    let overrides = Overrides::parse(&metadata.unwrap_or_default()).map_err(|said| {
        let fix = "GET /api/v1/openapi.json says what it may have";
        ApiError::bad_request(said, fix)
    })?;
    let made = app
        .livekit
        .create_dispatch(&room, &agent_name, &overrides.to_metadata())
        .await?;
    let dispatched = Dispatched {
        room,
        agent_name,
        dispatch: made.id,
        metadata: made.metadata,
    };
    Ok((StatusCode::CREATED, Json(dispatched)))
}

/// From now on no new rooms and no new participants; the daemon ends with the last room.
#[utoipa::path(post, path = "/api/v1/drain", responses(
    (status = 200, description = "It drains", body = State),
    (status = "4XX", description = "Refused", body = ErrorBody),
))]
async fn drain(AppState(app): AppState<Arc<App>>) -> Answer<State> {
    ask(&app, Request::Drain).await??;
    Ok(Json(state(&app)))
}

/// Takes the drain back.
#[utoipa::path(post, path = "/api/v1/undrain", responses(
    (status = 200, description = "It runs on", body = State),
    (status = "4XX", description = "Refused", body = ErrorBody),
))]
async fn undrain(AppState(app): AppState<Arc<App>>) -> Answer<State> {
    ask(&app, Request::Undrain).await??;
    Ok(Json(state(&app)))
}

/// Sets what is logged, until the configuration is read anew.
#[utoipa::path(put, path = "/api/v1/log", request_body = LogFilter, responses(
    (status = 200, description = "Set", body = LogFilter),
    (status = "4XX", description = "Refused", body = ErrorBody),
))]
async fn log(AppState(app): AppState<Arc<App>>, request: HttpRequest) -> Answer<LogFilter> {
    let new: LogFilter = body(request).await?;
    let fix = "see EnvFilter of tracing-subscriber: info, or info,roomwarden::stt=debug";
    if new.filter.is_empty() || new.filter.len() > MAX_FILTER {
        let said = format!(
            "filter has {} bytes, of 1 to {MAX_FILTER}",
            new.filter.len()
        );
        return Err(ApiError::bad_request(said, fix));
    }
    (app.refilter)(&new.filter).map_err(|said| ApiError::bad_request(said, fix))?;
    tracing::info!(filter = new.filter, "log.filter is changed by request");
    Ok(Json(new))
}

pub(super) async fn body<T: DeserializeOwned>(request: HttpRequest) -> Result<T, ApiError> {
    let body = Json::<T>::from_request(request, &());
    let body = tokio::time::timeout(access::BODY_LIMIT, body).await;
    let Json(body) = body.map_err(|_| ApiError::too_slow())??;
    Ok(body)
}

/// Asks the daemon, whose root, or a room, may be stuck by a defect.
async fn ask(
    app: &App,
    request: impl FnOnce(crate::requests::Answer) -> Request,
) -> Result<Result<(), Refused>, ApiError> {
    let asked = tokio::time::timeout(ASK_LIMIT, app.daemon.ask(request)).await;
    asked.map_err(|_| ApiError::stuck())
}

/// A part of the tree that is being closed, as far as it is there.
pub(super) struct Closing {
    scope: Scope,
    /// Cards of what is in it.
    cards: HashSet<u64>,
    /// Tracks of it, by SID.
    tracks: HashSet<String>,
    streams: BTreeSet<u64>,
    /// Of the board, from before anything of this was seen.
    changes: watch::Receiver<u64>,
}

impl Closing {
    pub fn new(scope: Scope, app: &App) -> Self {
        let mut new = Self {
            changes: app.daemon.registry().board().changes(),
            scope,
            cards: HashSet::new(),
            tracks: HashSet::new(),
            streams: BTreeSet::new(),
        };
        new.see(app, true);
        // Also those whose owner is lost.
        let open = app.daemon.registry().open();
        let open = open.iter().filter(|stream| new.names(stream));
        let ids: Vec<_> = open.map(|stream| stream.id.0).collect();
        new.streams.extend(ids);
        new
    }

    fn names(&self, stream: &OpenStream) -> bool {
        let key = &stream.key;
        let fits = |wanted: Option<&str>, is: &str| wanted.is_none_or(|wanted| wanted == is);
        self.scope.room() == key.room
            && fits(self.scope.identity(), &key.participant)
            && fits(self.scope.track(), &key.track)
    }

    /// Looks at what is there; only at `first` are there any that are new. Whether anything still
    /// is.
    fn see(&mut self, app: &App, first: bool) -> bool {
        let mut there = false;
        let rooms = app.daemon.registry().board().rooms();
        let whole_room = self.scope.identity().is_none();
        for room in rooms.iter().filter(|room| room.name == self.scope.room()) {
            let mut see = |card: u64| {
                if first {
                    self.cards.insert(card);
                }
                let seen = self.cards.contains(&card);
                there |= seen;
                seen
            };
            let room_is = whole_room && see(room.card);
            for session in room.sessions.values() {
                if self
                    .scope
                    .identity()
                    .is_some_and(|wanted| wanted != session.identity)
                {
                    continue;
                }
                let track_wanted = self.scope.track();
                let session_is = !whole_room && track_wanted.is_none() && see(session.card);
                for track in session.tracks.values() {
                    let track_is = track_wanted == Some(&*track.sid) && see(track.card);
                    if room_is || session_is || track_is {
                        self.tracks.insert(track.sid.clone());
                    }
                }
            }
        }
        there
    }

    /// The streams that are still open.
    fn open(&mut self, app: &App) -> Vec<OpenStream> {
        let open = app.daemon.registry().open();
        let ours =
            |stream: &&OpenStream| self.names(stream) && self.tracks.contains(&stream.key.track);
        let new: Vec<_> = open.iter().filter(ours).map(|stream| stream.id.0).collect();
        self.streams.extend(new);
        let ours = |stream: &OpenStream| self.streams.contains(&stream.id.0);
        open.into_iter().filter(ours).collect()
    }

    /// Gives the order: to the rooms, and to streams that are owned by none of them, as those of the
    /// gateway's clients are.
    pub async fn order(&self, app: &App) -> Result<(), ApiError> {
        let there = !self.cards.is_empty() || !self.streams.is_empty();
        let scope = self.scope.clone();
        let registry = app.daemon.registry();
        let order = CloseOrder {
            reason: CloseReason::Requested,
            deadline: now() + grace(app),
        };
        for stream in registry.open() {
            if self.streams.contains(&stream.id.0) && !self.tracks.contains(&stream.key.track) {
                registry.close_one(stream.id, &order);
            }
        }
        match ask(app, |answer| Request::Close(scope, answer)).await? {
            Ok(()) => Ok(()),
            // It is under way already; or its owner is lost, and it is closing by itself.
            Err(Refused::Closing) if there => Ok(()),
            Err(_) if !self.streams.is_empty() => Ok(()),
            Err(refused) => Err(refused.into()),
        }
    }

    /// Waits until all of it is over, until then at most; without a moment it does not wait.
    pub async fn over(&mut self, app: &App, until: Option<Instant>) -> Closed {
        let (closed, open) = loop {
            self.changes.mark_unchanged();
            let there = self.see(app, false);
            let open = self.open(app);
            if !there && open.is_empty() {
                break (true, open);
            }
            let Some(until) = until else {
                break (false, open);
            };
            let changed = app.ended.run_until_cancelled(self.changes.changed());
            let changed = tokio::time::timeout_at(until, changed).await;
            if !matches!(changed, Ok(Some(Ok(())))) {
                break (false, open);
            }
        };
        let receipts = app.daemon.registry().ledger().receipts();
        let ours = receipts
            .iter()
            .filter(|settled| self.streams.contains(&settled.id.0));
        Closed {
            closed,
            receipts: ours.map(|settled| Receipt::from(&**settled)).collect(),
            still_open: open.iter().map(Stream::from).collect(),
        }
    }
}

fn grace(app: &App) -> Duration {
    Duration::from_millis(app.daemon.config().stt.close_grace_ms)
}

/// Gives the order, and waits for the receipts unless that is not wanted.
async fn close(
    app: &App,
    mut closing: Closing,
    wait: Waits,
) -> Result<(StatusCode, Json<Closed>), ApiError> {
    let wait = wait?.0.wait.unwrap_or(true);
    let until = wait.then(|| Instant::now() + grace(app) + BEYOND_GRACE);
    closing.order(app).await?;
    let answer = closing.over(app, until).await;
    let status = match answer.closed {
        true => StatusCode::OK,
        false => StatusCode::ACCEPTED,
    };
    Ok((status, Json(answer)))
}
