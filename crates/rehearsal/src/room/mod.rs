//! LiveKit-compatible room server: audio and data on one node, in memory.
//!
//! It speaks to genuine LiveKit clients, with two peer connections (`/rtc`) or a single one
//! (`/rtc/v1`), to agent workers (`/agent`), and serves the RoomService and the
//! AgentDispatchService. It forwards audio undecoded; video is negotiated but not forwarded. What
//! it saw for itself is its [`Witness`], in process or at `GET /witness`.
//!
//! One actor task owns all state (`core`); websocket, HTTP and TCP tasks send it commands.
//! Everything a client sends is bounded, and a client that does not keep up is dropped.

mod agents;
mod api;
mod auth;
mod connection;
mod core;
mod faults;
mod http;
mod media;
mod participant;
mod rebase;
mod requests;
mod rooms;
mod sdp;
mod signal;
mod speakers;
mod tracks;
mod twirp;
mod webhooks;
mod witness;

pub use agents::{Answer, AskRecord, JobRecord, JobStatus, UpdateRecord, WorkerRecord};
pub use faults::{Faults, Mishap, Whom};
pub use webhooks::{Delivery, DeliveryOutcome, WebhookRecord};
pub use witness::{ParticipantRecord, RoomRecord, Spell, Stamp, TrackRecord, Witness};

use auth::Keys;
use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::{runtime, sync::watch, task::JoinHandle, time::timeout};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};

/// How long participants get to read that the server is shutting down.
const FAREWELL: Duration = Duration::from_millis(500);

/// How a [`Server`] runs.
#[derive(Clone)]
pub struct Config {
    /// Address to listen on. Default 127.0.0.1. Clients are told this address for media, so it
    /// must be one that they can reach.
    pub bind: IpAddr,
    /// TCP port for HTTP, websockets and ICE-TCP; 0 (the default) takes a free one.
    pub port: u16,
    /// UDP port for media; 0 (the default) takes a free one.
    pub media_port: u16,
    /// Whether clients may use UDP; without it they use ICE-TCP. Default true.
    pub udp: bool,
    /// Default `devkey`.
    pub api_key: String,
    /// Default: random for each `Config::default()`. At least 32 characters, as clients demand.
    pub api_secret: String,
    /// A room that nobody has held open ends after this. Default 300 s. Agents and recorders do
    /// not hold a room open.
    pub empty_timeout: Duration,
    /// A room that everybody has left ends after this. Default 20 s. Agents that are still there
    /// are sent ROOM_CLOSED.
    pub departure_timeout: Duration,
    /// A participant whose media has no path is removed after this (CONNECTION_TIMEOUT).
    /// Default 5 s, and the loss takes some seconds to be noticed.
    pub media_timeout: Duration,
    /// A participant without websocket whose media still flows is removed after this
    /// (SIGNAL_CLOSE). Default 30 s; without media it is removed at once.
    pub signal_timeout: Duration,
    /// A participant whose media has never come up is removed after this (JOIN_FAILURE).
    /// Default 60 s.
    pub join_timeout: Duration,
    /// A job that no agent worker has taken after this is lost. Default 3 s. LiveKit's server
    /// gives each worker 10 s, but its request for the whole job ends after 3.
    pub job_timeout: Duration,
    /// How often participants get a new token, apart from when they join or their permissions
    /// or metadata change. Default 5 min.
    pub token_refresh: Duration,
    /// Where webhooks go. Default nowhere; only `http://`.
    pub webhook_urls: Vec<String>,
    /// The pause before a webhook is sent a second time; it doubles up to 30 s, and the fifth
    /// failure is the last. Default 1 s.
    pub webhook_retry: Duration,
    /// A webhook that has waited longer for its turn is dropped. Default 30 s.
    pub webhook_max_age: Duration,
    /// Whether clients may use a single peer connection (`/rtc/v1`). Default true.
    pub single_peer_connection: bool,
    /// Whether MutePublishedTrack may unmute. Default false, as in LiveKit.
    pub remote_unmute: bool,
}

/// A running room server. Dropping it stops it without farewell; see [`Server::shutdown`].
pub struct Server {
    address: SocketAddr,
    api_key: String,
    api_secret: String,
    core: core::Handle,
    witness: watch::Receiver<Witness>,
    faults: watch::Receiver<Faults>,
    websockets: TaskTracker,
    deliveries: TaskTracker,
    tasks: Vec<JoinHandle<()>>,
    killed: CancellationToken,
    cancel: DropGuard,
}

impl Server {
    /// Binds the sockets and starts the server's tasks on the current tokio runtime.
    ///
    /// # Errors
    /// A socket can't be bound, a webhook's URL makes no sense, or there is no current tokio
    /// runtime.
    pub fn start(config: Config) -> io::Result<Self> {
        let runtime = runtime::Handle::try_current().map_err(io::Error::other)?;
        let _entered = runtime.enter();
        let listener = std::net::TcpListener::bind((config.bind, config.port))?;
        listener.set_nonblocking(true)?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let address = listener.local_addr()?;
        let udp = std::net::UdpSocket::bind((config.bind, config.media_port))?;
        udp.set_nonblocking(true)?;
        let udp = tokio::net::UdpSocket::from_std(udp)?;

        let keys = || Keys::new(&config.api_key, &config.api_secret);
        let media = media::Media::new(udp, config.udp, address)?;
        let (recorder, witness) = witness::Recorder::new();
        let (core, commands) = core::Handle::new();
        let recorder = Arc::new(recorder);
        let cancel = CancellationToken::new();
        let killed = CancellationToken::new();
        let (websockets, deliveries) = (TaskTracker::new(), TaskTracker::new());
        let (fault_sender, faults) = watch::channel(Faults::default());
        let webhooks = webhooks::Webhooks::new(
            webhooks::Settings {
                urls: config.webhook_urls.clone(),
                retry: config.webhook_retry,
                max_age: config.webhook_max_age,
            },
            Arc::new(keys()),
            recorder.clone(),
            deliveries.clone(),
            cancel.clone(),
        )?;
        let app = Arc::new(http::App {
            core: core.clone(),
            keys: keys(),
            witness: witness.clone(),
            single_peer_connection: config.single_peer_connection,
            faults: faults.clone(),
            cancel: cancel.clone(),
            killed: killed.clone(),
            websockets: websockets.clone(),
        });
        let (api_key, api_secret) = (config.api_key.clone(), config.api_secret.clone());
        let keys = keys();
        let actor = core::Core::new(core::Parts {
            config,
            keys,
            media,
            recorder,
            webhooks,
            faults: fault_sender,
            killed: killed.clone(),
        });
        let tasks = vec![
            runtime.spawn(actor.run(commands, cancel.clone())),
            runtime.spawn(http::serve(listener, app)),
        ];
        Ok(Self {
            address,
            api_key,
            api_secret,
            core,
            witness,
            faults,
            websockets,
            deliveries,
            tasks,
            killed,
            cancel: cancel.drop_guard(),
        })
    }

    /// `ws://address:port`, for clients.
    pub fn url(&self) -> String {
        format!("ws://{}", self.address)
    }

    /// `http://address:port`, for the API and `/witness`.
    pub fn http_url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn api_key(&self) -> &str {
        &self.api_key
    }

    pub fn api_secret(&self) -> &str {
        &self.api_secret
    }

    /// What the server has seen up to now.
    pub fn witness(&self) -> Witness {
        self.witness.borrow().clone()
    }

    /// Waits until what the server has seen satisfies `condition`. Packet counts alone do not
    /// wake it. Cancel safe.
    ///
    /// # Errors
    /// The state of affairs at the time-out.
    pub async fn wait_for(
        &self,
        condition: impl FnMut(&Witness) -> bool,
        limit: Duration,
    ) -> Result<Witness, Witness> {
        let mut receiver = self.witness.clone();
        match timeout(limit, receiver.wait_for(condition)).await {
            Ok(Ok(witness)) => Ok(witness.clone()),
            Ok(Err(_)) | Err(_) => Err(self.witness()),
        }
    }

    /// The faults in force.
    pub fn faults(&self) -> Faults {
        self.faults.borrow().clone()
    }

    /// Replaces the faults in force; they hold when this returns. Also at `/faults` (GET, PUT,
    /// DELETE). If it is cancelled they may hold nevertheless.
    pub async fn set_faults(&self, faults: Faults) {
        // Without an actor there is nobody left to suffer.
        let _ = self.core.call(move |core| core.set_faults(faults)).await;
    }

    /// Brings a mishap upon one participant. False if there is no such. Also at `/faults` (POST).
    pub async fn befall(&self, room: &str, identity: &str, mishap: Mishap) -> bool {
        let (room, identity) = (room.to_owned(), identity.to_owned());
        let befall = self
            .core
            .call(move |core| core.befall(&room, &identity, mishap));
        befall.await.unwrap_or(false)
    }

    /// Drops everything without a word, as a process does that is killed, and waits until all
    /// tasks have ended: the ports are free for another server. The result is the record up to
    /// then, with rooms that have not ended. If it is cancelled the server stops all the same.
    pub async fn kill(self) -> Witness {
        let Self {
            witness,
            websockets,
            deliveries,
            tasks,
            killed,
            cancel,
            ..
        } = self;
        killed.cancel();
        cancel.disarm().cancel();
        for task in tasks {
            if let Err(e) = task.await {
                tracing::error!("room server task: {e}");
            }
        }
        for tracker in [websockets, deliveries] {
            tracker.close();
            tracker.wait().await;
        }
        witness.borrow().clone()
    }

    /// Sends every participant away (SERVER_SHUTDOWN), closes all sockets and waits for all
    /// tasks, a few seconds at most; the result is the final record. If it is cancelled the
    /// server stops without farewell.
    pub async fn shutdown(self) -> Witness {
        let Self {
            core,
            witness,
            websockets,
            deliveries,
            tasks,
            cancel,
            ..
        } = self;
        if core.send(core::Command::Shutdown).await.is_ok() {
            websockets.close();
            if timeout(FAREWELL, websockets.wait()).await.is_err() {
                tracing::warn!("some participants did not read that the server is shutting down");
            }
            // The actor has closed the queues.
            if timeout(FAREWELL, deliveries.wait()).await.is_err() {
                tracing::warn!("some webhooks were not delivered");
            }
        }
        cancel.disarm().cancel();
        for task in tasks {
            if let Err(e) = task.await {
                tracing::error!("room server task: {e}");
            }
        }
        deliveries.close();
        deliveries.wait().await;
        witness.borrow().clone()
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            bind: Ipv4Addr::LOCALHOST.into(),
            port: 0,
            media_port: 0,
            udp: true,
            api_key: "devkey".into(),
            api_secret: auth::random_secret(),
            empty_timeout: Duration::from_secs(300),
            departure_timeout: Duration::from_secs(20),
            media_timeout: Duration::from_secs(5),
            signal_timeout: Duration::from_secs(30),
            join_timeout: Duration::from_secs(60),
            job_timeout: Duration::from_secs(3),
            token_refresh: Duration::from_secs(300),
            webhook_urls: Vec::new(),
            webhook_retry: Duration::from_secs(1),
            webhook_max_age: Duration::from_secs(30),
            single_peer_connection: true,
            remote_unmute: false,
        }
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the secret.
        f.debug_struct("Config")
            .field("bind", &self.bind)
            .field("port", &self.port)
            .field("media_port", &self.media_port)
            .field("api_key", &self.api_key)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}
