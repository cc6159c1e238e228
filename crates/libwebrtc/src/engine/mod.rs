//! The engine behind the API: what is shared between the handles that a program holds and the task
//! that drives a peer connection.

mod callback;
mod channels;
mod driver;
mod faults;
pub(crate) mod framing;
mod interfaces;
mod link;
mod links;
mod media;
mod negotiation;
mod network;
#[cfg(all(test, feature = "encoded-audio"))]
mod network_tests;
mod received;
mod reflexive;
mod relay;
mod runtime;
pub(crate) mod sdp;
pub(crate) mod servers;
mod session;
mod sockets;
mod stats;
#[cfg(test)]
mod tests;

use std::{
    sync::{Arc, Weak},
    time::Instant,
};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;

pub(crate) use callback::Callback;
use network::Network;
pub(crate) use runtime::beats;
#[cfg(feature = "encoded-audio")]
pub(crate) use runtime::set_beat;
pub(crate) use session::Session;
pub(crate) use stats::Of;

use crate::{
    RtcError,
    peer_connection::{
        OnConnectionChange, OnDataChannel, OnIceCandidate, OnIceCandidateError,
        OnIceConnectionChange, OnIceGatheringChange, OnNegotiationNeeded, OnSignalingChange,
        OnTrack,
    },
    peer_connection_factory::RtcConfiguration,
};

/// One peer connection: its protocol state, its callbacks, and the bell for its driver.
///
/// The driver task holds it until it is closed; handles of tracks and channels hold it weakly.
pub(crate) struct Peer {
    session: Mutex<Session>,
    bell: Notify,
    pub(crate) callbacks: Callbacks,
}

#[derive(Default)]
pub(crate) struct Callbacks {
    pub connection: Callback<OnConnectionChange>,
    pub data_channel: Callback<OnDataChannel>,
    pub candidate: Callback<OnIceCandidate>,
    pub candidate_error: Callback<OnIceCandidateError>,
    pub ice_connection: Callback<OnIceConnectionChange>,
    pub gathering: Callback<OnIceGatheringChange>,
    pub negotiation: Callback<OnNegotiationNeeded>,
    pub signaling: Callback<OnSignalingChange>,
    pub track: Callback<OnTrack>,
}

impl Peer {
    /// Makes a peer and starts its driver, which ends when the peer is closed.
    pub(crate) fn start(config: &RtcConfiguration) -> Result<Arc<Self>, RtcError> {
        Self::start_on(Network::new(config, None), config)
    }

    fn start_on(network: Network, config: &RtcConfiguration) -> Result<Arc<Self>, RtcError> {
        let shared = runtime::shared()?;
        let rtc = shared.stack(config.enable_sctp_snap, Instant::now());
        let peer = Arc::new_cyclic(|peer: &Weak<Peer>| Peer {
            session: Mutex::new(Session::new(rtc, peer.clone())),
            bell: Notify::new(),
            callbacks: Callbacks::default(),
        });
        shared.spawn(driver::drive(peer.clone(), network));
        Ok(peer)
    }

    /// Must not be held while foreign code runs: callbacks, wakers, destructors of callbacks.
    pub(crate) fn session(&self) -> MutexGuard<'_, Session> {
        self.session.lock()
    }

    /// To be called after each change of the session, so that the driver acts on it.
    pub(crate) fn wake(&self) {
        self.bell.notify_one();
    }

    pub(crate) fn close(&self) {
        self.session().close();
        self.wake();
    }
}

/// Runs a task on the engine's threads, detached: it has to end by itself.
pub(crate) fn spawn(task: impl Future<Output = ()> + Send + 'static) -> Result<(), RtcError> {
    runtime::shared()?.spawn(task);
    Ok(())
}

impl Callbacks {
    /// Lets go of all callbacks for ever: what they hold may lead back to this peer.
    fn seal(&self) {
        self.connection.seal();
        self.data_channel.seal();
        self.candidate.seal();
        self.candidate_error.seal();
        self.ice_connection.seal();
        self.gathering.seal();
        self.negotiation.seal();
        self.signaling.seal();
        self.track.seal();
    }
}
