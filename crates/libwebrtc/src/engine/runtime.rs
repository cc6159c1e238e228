use std::{future::Future, sync::Arc, sync::OnceLock, thread, time::Instant};

use str0m::{
    Rtc,
    config::{CryptoProvider, DtlsCert},
};
use tokio::runtime::Runtime;

use super::stats::INTERVAL;
use crate::RtcError;

/// Largest data channel message that is taken, as in Chrome; what is sent is limited by the peer.
const MAX_MESSAGE: u32 = 256 << 10;
/// Bytes of messages that a peer connection queues for sending, as in Chrome.
const MAX_BUFFERED: usize = 16 << 20;
/// More would only wait: even thousands of voices are little work.
const MAX_THREADS: usize = 4;

/// What all peer connections of the process share.
///
/// The threads are the crate's own: the SDK calls from any thread, also without a runtime, and
/// packets must not wait for what a program does on its runtime.
pub(super) struct Shared {
    runtime: Runtime,
    crypto: Arc<CryptoProvider>,
    certificate: DtlsCert,
}

/// Starts the threads at the first call; an error is the same for ever.
pub(super) fn shared() -> Result<&'static Shared, RtcError> {
    static SHARED: OnceLock<Result<Shared, String>> = OnceLock::new();
    SHARED
        .get_or_init(Shared::start)
        .as_ref()
        .map_err(RtcError::internal)
}

impl Shared {
    fn start() -> Result<Self, String> {
        let threads = thread::available_parallelism().map_or(1, |n| n.get().min(MAX_THREADS));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(threads)
            .thread_name("webrtc-io")
            .enable_all()
            .build()
            .map_err(|err| format!("the engine's threads can't be started: {err}"))?;
        let crypto = Arc::new(str0m::crypto::from_feature_flags());
        let certificate = crypto
            .dtls_provider
            .generate_certificate()
            .ok_or("a DTLS certificate can't be made")?;
        Ok(Self {
            runtime,
            crypto,
            certificate,
        })
    }

    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        drop(self.runtime.spawn(task));
    }

    /// A fresh protocol stack.
    pub(super) fn stack(&self, snap: bool, now: Instant) -> Rtc {
        Rtc::builder()
            .set_crypto_provider(self.crypto.clone())
            .set_dtls_cert(self.certificate.clone())
            .clear_codecs()
            // Without RED (RFC 2198): the server then strips it, and packets are plain Opus.
            .enable_opus(true, false)
            // Never sent, dropped when received, and never offered unless the SDK adds a section for
            // it; but sections without a codec in common are refused, and the SDK adds some.
            .enable_vp8(true)
            .enable_h264(true)
            .enable_vp9(true)
            .enable_av1(true)
            .set_rtp_mode(true)
            .set_stats_interval(Some(INTERVAL))
            .set_sctp_max_message_size(MAX_MESSAGE)
            .set_sctp_max_buffered_amount(MAX_BUFFERED)
            .set_snap_enabled(snap)
            .build(now)
    }
}
