//! The running server: its listener, its connections, and what they have in common.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::{Extension, Router};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::audio_store::AudioStore;
use super::auth::Keys;
use super::book::{Book, Entry};
use super::config::Config;
use super::fault_board::FaultBoard;
use super::faults::Faults;
use super::http;
use super::parameters::Parameters;
use super::stream::Stream;
use super::witness::{End, TcpEnd, Witness};

/// TCP connections at once, whatever they are used for; more wait to be accepted.
const MAX_CONNECTIONS: usize = 16_384;
/// For a request's head, and between two requests on one connection.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_HEAD: usize = 64 * 1024;
/// Pause after a failed accept, which is most often a lack of file descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// A running server. Dropping it aborts everything it runs; [`Server::shutdown`] also waits.
pub struct Server {
    address: SocketAddr,
    shared: Arc<Shared>,
    stop: CancellationToken,
    /// The one task that owns all others; aborted when this is dropped.
    listening: JoinSet<()>,
}

/// What the server's connections have in common.
pub(super) struct Shared {
    pub config: Config,
    pub keys: Keys,
    pub book: Arc<Book>,
    pub audio: AudioStore,
    pub faults: FaultBoard,
}

impl Shared {
    /// What is left of [`Config::balance`], in US dollars.
    pub(super) fn balance(&self) -> f64 {
        let used = self.book.listen_seconds() / 60.0 * self.config.usd_per_minute;
        (self.config.balance - used).max(0.0)
    }

    /// See [`Server::set_stream_faults`].
    pub(super) fn set_stream_faults(&self, request_id: &str, faults: Option<Faults>) -> bool {
        if !self.book.is_open(request_id) {
            return false;
        }
        self.faults.set(request_id, faults);
        // It may have ended meanwhile, of the fault itself or before it was set; then there is nobody
        // left to take it away.
        if !self.book.is_open(request_id) {
            self.faults.set(request_id, None);
        }
        true
    }
}

impl Server {
    /// Binds and starts to serve.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub fn start(config: Config) -> io::Result<Self> {
        let listener = std::net::TcpListener::bind((config.bind, config.port))?;
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            keys: Keys::new(&config),
            book: Arc::new(Book::new(config.abrupt_linger)),
            audio: AudioStore::new(config.keep_audio),
            faults: FaultBoard::new(config.faults.clone()),
            config,
        });
        let stop = CancellationToken::new();
        let mut listening = JoinSet::new();
        listening.spawn(listen(listener, Arc::clone(&shared), stop.clone()));
        Ok(Self {
            address,
            shared,
            stop,
            listening,
        })
    }

    /// Where streams are opened: `ws://<address>/v1/listen`.
    pub fn url(&self) -> String {
        format!("ws://{}/v1/listen", self.address)
    }

    /// The base URL of LiveKit Inference, as its clients take it: `http://<address>/v1`, where
    /// sessions are opened at `/stt`.
    pub fn inference_url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    /// The base URL of the management API: `http://<address>`.
    pub fn http_url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The one project of the management API.
    pub fn project_id(&self) -> &str {
        &self.shared.config.project_id
    }

    /// The address that is listened on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The key that is accepted.
    pub fn api_key(&self) -> &str {
        &self.shared.config.api_key
    }

    /// Key and secret of the tokens that LiveKit Inference accepts.
    pub fn inference_keys(&self) -> (&str, &str) {
        let config = &self.shared.config;
        (&config.inference_key, &config.inference_secret)
    }

    /// The account as of now. Also served as JSON: `GET /witness`.
    pub fn witness(&self) -> Witness {
        self.shared.book.snapshot()
    }

    /// Waits until `condition` holds; gives the account for which it does, or after `timeout` the
    /// last one as an error. Cancel safe. `condition` must not call the server: it runs under the
    /// account's lock.
    pub async fn wait_for(
        &self,
        condition: impl FnMut(&Witness) -> bool,
        timeout: Duration,
    ) -> Result<Witness, Witness> {
        self.shared.book.wait_for(condition, timeout).await
    }

    /// The stream's audio as it was decoded: 48 kHz, mono, as much of it as
    /// [`Config::keep_audio`] allows; of many long streams, the oldest may be gone.
    pub fn audio(&self, request_id: &str) -> Option<Vec<i16>> {
        self.shared.audio.get(request_id)
    }

    /// The faults of all streams that have none of their own.
    pub fn faults(&self) -> Faults {
        self.shared.faults.all()
    }

    /// Replaces the faults, for running streams too.
    pub fn set_faults(&self, faults: Faults) {
        self.shared.faults.set_all(faults);
    }

    /// Gives one stream faults of its own instead of the general ones, or takes them away; `false`
    /// if no such stream is open.
    pub fn set_stream_faults(&self, request_id: &str, faults: Option<Faults>) -> bool {
        self.shared.set_stream_faults(request_id, faults)
    }

    /// Ends every stream with [`End::ServerStopped`] and waits for all tasks. Cancelled, it still
    /// ends them, but nobody waits.
    pub async fn shutdown(mut self) {
        self.stop.cancel();
        while let Some(joined) = self.listening.join_next().await {
            report_failure(joined);
        }
    }
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

async fn listen(listener: TcpListener, shared: Arc<Shared>, stop: CancellationToken) {
    let router = http::router(Arc::clone(&shared));
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            Some(joined) = connections.join_next() => report_failure(joined),
            () = shared.book.free_next() => {}
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                Ok((tcp, _)) => {
                    let connection =
                        serve(tcp, router.clone(), Arc::clone(&shared), stop.clone());
                    connections.spawn(connection);
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            },
        }
    }
    drop(listener);
    while let Some(joined) = connections.join_next().await {
        report_failure(joined);
    }
}

fn report_failure(joined: Result<(), tokio::task::JoinError>) {
    if let Err(error) = joined {
        tracing::error!(%error, "a task of the STT server failed");
    }
}

/// A stream whose handshake was accepted, on its way from the request's handler to the
/// connection's task, which gets the bare TCP socket back from the HTTP server. That is what lets
/// the witness tell a FIN from a reset.
pub(super) struct Admitted {
    pub upgrade: OnUpgrade,
    pub entry: Entry,
    pub parameters: Parameters,
}

pub(super) type Admission = Arc<Mutex<Option<Admitted>>>;

/// Serves one TCP connection: HTTP, and the websocket that it may become.
async fn serve(tcp: TcpStream, router: Router, shared: Arc<Shared>, stop: CancellationToken) {
    if let Err(error) = tcp.set_nodelay(true) {
        tracing::debug!(%error, "no TCP_NODELAY");
    }
    let admission = Admission::default();
    let service = TowerToHyperService::new(router.layer(Extension(Arc::clone(&admission))));
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(tcp), service)
        .with_upgrades();
    let served = tokio::select! {
        biased;
        () = stop.cancelled() => Ok(()),
        served = connection => served,
    };
    let admitted = admission
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    let Some(admitted) = admitted else {
        return;
    };
    let Admitted {
        upgrade,
        entry,
        parameters,
    } = admitted;
    if stop.is_cancelled() {
        entry.end(End::ServerStopped, TcpEnd::CutByServer);
        return;
    }
    let upgraded = match served {
        Ok(()) => upgrade.await,
        Err(error) => Err(error),
    };
    let upgraded = match upgraded {
        Ok(upgraded) => upgraded,
        Err(error) => {
            tracing::debug!(%error, "the client left before the stream was open");
            entry.end(End::Abrupt, TcpEnd::Reset);
            return;
        }
    };
    // The one IO type that this function put in; anything else ends the entry as lost.
    let Ok(parts) = upgraded.downcast::<TokioIo<TcpStream>>() else {
        return;
    };
    let tcp = parts.io.into_inner();
    match Stream::new(tcp, parts.read_buf, entry, &parameters, shared, stop).await {
        Ok(stream) => stream.run().await,
        Err(error) => tracing::error!(%error, "no decoder"),
    }
}

#[cfg(test)]
mod tests {
    use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    #[tokio::test]
    async fn a_streams_own_faults_go_with_it() {
        let server = Server::start(Config::default()).expect("a server");
        let mut request = server.url().into_client_request().expect("a request");
        let key = format!("Token {}", server.api_key());
        let key = key.parse().expect("a header value");
        request.headers_mut().insert("authorization", key);
        let (client, _) = tokio_tungstenite::connect_async(request)
            .await
            .expect("a stream");
        let id = server.witness().streams[0].request_id.clone();
        assert!(server.set_stream_faults(&id, Some(Faults::default())));
        assert_eq!(server.shared.faults.streams_with_their_own(), 1);
        drop(client);
        let ended = server.wait_for(|w| w.open_now == 0, LIMIT).await;
        ended.expect("the stream ends");
        let forgotten = async {
            while server.shared.faults.streams_with_their_own() > 0 {
                tokio::task::yield_now().await;
            }
        };
        let forgotten = tokio::time::timeout(LIMIT, forgotten).await;
        forgotten.expect("its faults go");
        server.shutdown().await;
    }
}
