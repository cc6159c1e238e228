//! The one TCP port: HTTP, websockets and ICE-TCP.

use super::{
    agents,
    auth::{JoinRequest, Keys, Query as Params, Refusal},
    core::{Command, Handle},
    faults::{Faults, Mishap},
    signal,
    twirp::{self, Code, TwirpError},
    witness::Witness,
};
use axum::{
    Json, Router,
    body::Bytes,
    extract::{
        OriginalUri, Path, Query, Request, State, WebSocketUpgrade,
        ws::rejection::WebSocketUpgradeRejection,
    },
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use livekit_token::Claims;
use serde::Deserialize;
use std::{io, net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
    task::JoinSet,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// TCP connections open at a time.
const MAX_CONNECTIONS: usize = 4_096;
/// A signalling message is at most this long. LiveKit's limit.
const MAX_SIGNAL: usize = 2 << 20;
/// How long a client may take for its first byte, and then for the rest of the head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// How long requests in progress may go on when the server stops.
const DRAIN: Duration = Duration::from_millis(500);
/// ICE-TCP packets that may wait for a client to read them.
const MAX_TCP_PACKETS: usize = 512;

pub(super) struct App {
    pub core: Handle,
    pub keys: Keys,
    pub witness: watch::Receiver<Witness>,
    /// Off: `/rtc/v1` does not exist, as on older servers.
    pub single_peer_connection: bool,
    pub faults: watch::Receiver<Faults>,
    pub cancel: CancellationToken,
    /// Cancelled before `cancel` if the server is to go without a word.
    pub killed: CancellationToken,
    /// Counts websocket tasks, which outlive the connections they came on.
    pub websockets: TaskTracker,
}

type Shared = State<Arc<App>>;

/// Accepts connections until cancelled; returns when all of them have ended.
pub(super) async fn serve(listener: TcpListener, app: Arc<App>) {
    let router = router(app.clone());
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = app.cancel.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) if connections.len() < MAX_CONNECTIONS => {
                    let (app, router) = (app.clone(), router.clone());
                    connections.spawn(connection(stream, peer, app, router));
                }
                Ok((_, peer)) => tracing::warn!("too many connections: {peer} refused"),
                Err(e) => {
                    // Out of file descriptors, most likely: it passes.
                    tracing::warn!("accept: {e}");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
    drop(listener);
    let drained = async { while connections.join_next().await.is_some() {} };
    let drained = app.killed.run_until_cancelled(timeout(2 * DRAIN, drained));
    if !matches!(drained.await, Some(Ok(()))) {
        connections.shutdown().await;
    }
    app.websockets.close();
    app.websockets.wait().await;
}

fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/", get(async || "OK"))
        .route("/rtc", get(rtc))
        .route("/rtc/v1", get(rtc))
        .route("/rtc/validate", get(validate))
        .route("/rtc/v1/validate", get(validate))
        .route("/agent", get(agent))
        .route("/twirp/{service}/{method}", post(api))
        .route("/witness", get(witness))
        .route(
            "/faults",
            get(faults)
                .put(set_faults)
                .delete(clear_faults)
                .post(befall),
        )
        .layer(middleware::from_fn(cors))
        .with_state(app)
}

/// Tells ICE-TCP from HTTP by the first byte: RFC 4571 begins with the length of a STUN check,
/// whose high byte is far below any letter.
async fn connection(stream: TcpStream, peer: SocketAddr, app: Arc<App>, router: Router) {
    let mut first = [0];
    let peeked = tokio::select! {
        peeked = timeout(HEAD_TIMEOUT, stream.peek(&mut first)) => peeked,
        () = app.cancel.cancelled() => return,
    };
    let Ok(Ok(1)) = peeked else { return };
    // Without it small packets wait for acknowledgements.
    let _ = stream.set_nodelay(true);
    if first[0].is_ascii_alphabetic() {
        http(stream, &app.cancel, router).await;
    } else {
        let ended = tokio::select! {
            ended = ice_tcp(stream, peer, &app.core) => ended,
            () = app.cancel.cancelled() => Ok(()),
        };
        if let Err(e) = ended {
            tracing::debug!("ice-tcp {peer}: {e}");
        }
        let _ = app.core.send(Command::TcpClosed { peer }).await;
    }
}

async fn http(stream: TcpStream, cancel: &CancellationToken, router: Router) {
    let service = TowerToHyperService::new(router);
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = cancel.cancelled() => {
            connection.as_mut().graceful_shutdown();
            timeout(DRAIN, connection).await.unwrap_or(Ok(()))
        }
    };
    if let Err(e) = ended {
        tracing::debug!("http: {e}");
    }
}

/// Packets with two bytes of length before each (RFC 4571).
async fn ice_tcp(stream: TcpStream, peer: SocketAddr, core: &Handle) -> io::Result<()> {
    let stopped = |_| io::Error::from(io::ErrorKind::NotConnected);
    let (mut reader, mut writer) = stream.into_split();
    let (sender, mut packets) = mpsc::channel::<Bytes>(MAX_TCP_PACKETS);
    let opened = Command::TcpOpened { peer, sender };
    core.send(opened).await.map_err(stopped)?;
    let write = async {
        while let Some(packet) = packets.recv().await {
            let Ok(length) = u16::try_from(packet.len()) else {
                continue;
            };
            writer.write_u16(length).await?;
            writer.write_all(&packet).await?;
        }
        Ok(())
    };
    let read = async {
        loop {
            let length = reader.read_u16().await?;
            let mut packet = vec![0; length.into()];
            reader.read_exact(&mut packet).await?;
            let packet = packet.into();
            let received = Command::TcpReceived { peer, packet };
            core.send(received).await.map_err(stopped)?;
        }
    };
    tokio::select! {
        ended = read => ended,
        ended = write => ended,
    }
}

async fn rtc(
    State(app): Shared,
    OriginalUri(uri): OriginalUri,
    Query(query): Query<Params>,
    headers: HeaderMap,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Response {
    let Ok(upgrade) = upgrade else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let join = match join_request(&app, uri.path(), &query, &headers) {
        Ok(join) => join,
        Err(refusal) => return refusal.into_response(),
    };
    let session = match app.core.join(join).await {
        Ok(Ok(session)) => session,
        Ok(Err(refusal)) => return refusal.into_response(),
        Err(_) => return StatusCode::SERVICE_UNAVAILABLE.into_response(),
    };
    let running = app.websockets.token();
    upgrade
        .max_message_size(MAX_SIGNAL)
        .max_frame_size(MAX_SIGNAL)
        .on_upgrade(async move |socket| {
            let _running = running;
            let (core, faults) = (app.core.clone(), app.faults.clone());
            signal::serve(socket, session, core, faults, app.cancel.clone()).await;
        })
}

async fn agent(
    State(app): Shared,
    Query(query): Query<Params>,
    headers: HeaderMap,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Response {
    let Ok(upgrade) = upgrade else {
        return StatusCode::NOT_FOUND.into_response();
    };
    match app.claims(&headers, &query) {
        Ok(Some(claims)) if claims.video.agent => {}
        Ok(_) => {
            let unauthorized = StatusCode::UNAUTHORIZED;
            return Refusal::new(unauthorized, "permissions denied").into_response();
        }
        Err(refusal) => return refusal.into_response(),
    }
    let running = app.websockets.token();
    upgrade
        .max_message_size(MAX_SIGNAL)
        .max_frame_size(MAX_SIGNAL)
        .on_upgrade(async move |socket| {
            let _running = running;
            agents::serve(socket, app.core.clone(), app.cancel.clone()).await;
        })
}

async fn validate(
    State(app): Shared,
    OriginalUri(uri): OriginalUri,
    Query(query): Query<Params>,
    headers: HeaderMap,
) -> Response {
    match join_request(&app, uri.path(), &query, &headers) {
        Ok(_) => "success".into_response(),
        Err(refusal) => refusal.into_response(),
    }
}

async fn api(
    State(app): Shared,
    Path((service, method)): Path<(String, String)>,
    Query(query): Query<Params>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let faults = app.faults.borrow().clone();
    if faults.api_failing {
        return TwirpError::new(Code::Unavailable, "out of order").into_response();
    }
    if faults.api_refused {
        return TwirpError::new(Code::Unauthenticated, "permissions denied").into_response();
    }
    let claims = match app.claims(&headers, &query) {
        Ok(claims) => claims,
        Err(refusal) => return refusal.into_response(),
    };
    let result = twirp::serve(&app.core, &service, &method, claims, &headers, &body).await;
    result.unwrap_or_else(IntoResponse::into_response)
}

/// Open to all: it has no secrets, and the server is not meant for production.
async fn witness(State(app): Shared) -> Json<Witness> {
    Json(app.witness.borrow().clone())
}

async fn faults(State(app): Shared) -> Json<Faults> {
    Json(app.faults.borrow().clone())
}

async fn set_faults(State(app): Shared, Json(faults): Json<Faults>) -> StatusCode {
    match app.core.call(move |core| core.set_faults(faults)).await {
        Ok(()) => StatusCode::NO_CONTENT,
        Err(_) => StatusCode::SERVICE_UNAVAILABLE,
    }
}

async fn clear_faults(state: Shared) -> StatusCode {
    set_faults(state, Json(Faults::default())).await
}

/// What befalls whom, in JSON: `{"room": "lobby", "identity": "ann", "mishap": "vanish"}`.
#[derive(Deserialize)]
struct Befall {
    room: String,
    identity: String,
    mishap: Mishap,
}

async fn befall(State(app): Shared, Json(request): Json<Befall>) -> StatusCode {
    let Befall {
        room,
        identity,
        mishap,
    } = request;
    let befall = app
        .core
        .call(move |core| core.befall(&room, &identity, mishap));
    match befall.await {
        Ok(true) => StatusCode::NO_CONTENT,
        Ok(false) => StatusCode::NOT_FOUND,
        Err(_) => StatusCode::SERVICE_UNAVAILABLE,
    }
}

impl App {
    /// The claims of a request's token, unless a fault has it that the token is no good.
    fn claims(&self, headers: &HeaderMap, query: &Params) -> Result<Option<Claims>, Refusal> {
        let claims = self.keys.claims(headers, query)?;
        match &claims {
            Some(claims) if self.faults.borrow().tokens_refused.includes(&claims.sub) => {
                let message = "invalid authorization token: token is expired (exp)";
                Err(Refusal::new(StatusCode::UNAUTHORIZED, message))
            }
            _ => Ok(claims),
        }
    }
}

fn join_request(
    app: &App,
    path: &str,
    query: &Params,
    headers: &HeaderMap,
) -> Result<JoinRequest, Refusal> {
    let single = path.starts_with("/rtc/v1");
    if single && !app.single_peer_connection {
        return Err(Refusal::new(StatusCode::NOT_FOUND, "404 page not found"));
    }
    let claims = app.claims(headers, query)?;
    JoinRequest::parse(claims, query, single)
}

/// Any origin may call: tokens are what protects, not cookies.
async fn cors(request: Request, next: Next) -> Response {
    const ANY: HeaderValue = HeaderValue::from_static("*");
    let preflight = request.method() == Method::OPTIONS;
    let mut response = if preflight {
        StatusCode::NO_CONTENT.into_response()
    } else {
        next.run(request).await
    };
    let mut set = |name: HeaderName, value: HeaderValue| {
        response.headers_mut().insert(name, value);
    };
    set(header::ACCESS_CONTROL_ALLOW_ORIGIN, ANY);
    set(header::ACCESS_CONTROL_EXPOSE_HEADERS, ANY);
    if preflight {
        // The wildcard does not cover Authorization.
        let headers = HeaderValue::from_static("authorization, *");
        set(header::ACCESS_CONTROL_ALLOW_HEADERS, headers);
        let methods = HeaderValue::from_static("GET, HEAD, POST, OPTIONS");
        set(header::ACCESS_CONTROL_ALLOW_METHODS, methods);
        set(
            header::ACCESS_CONTROL_MAX_AGE,
            HeaderValue::from_static("86400"),
        );
    }
    response
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.status, self.message).into_response()
    }
}
