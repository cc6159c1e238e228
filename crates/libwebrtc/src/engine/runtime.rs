use std::{
    future::Future,
    sync::{
        Arc, LazyLock, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use str0m::{
    Rtc,
    config::{CryptoProvider, DtlsCert},
    rtp::Extension,
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

/// How often what flows is read, in milliseconds: as often as a voice sends, if nothing else is wanted.
static BEAT_MS: AtomicU64 = AtomicU64::new(20);

/// What all peer connections of the process share.
///
/// The threads are the crate's own: the SDK calls from any thread, also without a runtime, and
/// packets must not wait for what a program does on its runtime.
pub(super) struct Shared {
    runtime: Runtime,
    crypto: Arc<CryptoProvider>,
    certificate: DtlsCert,
}

/// The moments at which all peer connections read what flows: every period since an instant.
pub(crate) fn beats() -> (Instant, Duration) {
    static FIRST: LazyLock<Instant> = LazyLock::new(Instant::now);
    let period = Duration::from_millis(BEAT_MS.load(Ordering::Relaxed));
    (*FIRST, period)
}

/// From 5 to 100 ms.
#[cfg(feature = "encoded-audio")]
pub(crate) fn set_beat(period: Duration) {
    let ms = period.as_millis().clamp(5, 100) as u64;
    BEAT_MS.store(ms, Ordering::Relaxed);
}

/// The first of them after `now`.
pub(super) fn next_beat(now: Instant) -> Instant {
    let (first, period) = beats();
    let into_beat = now.saturating_duration_since(first).as_nanos() % period.as_nanos();
    now + period - Duration::from_nanos(into_beat as u64)
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
        let mut config = Rtc::builder()
            .set_crypto_provider(self.crypto.clone())
            .set_dtls_cert(self.certificate.clone())
            .clear_codecs()
            // Without RED (RFC 2198): the server then strips it, and packets are plain Opus.
            .enable_opus(true, false)
            // Never sent, dropped when received, and offered only if a server asks for sections; but
            // those without a codec in common are refused. So one of these, and of H.264 below, of which
            // every server has at least one.
            .enable_vp8(true)
            // Not the numbers for estimates of bandwidth: voices need none, and a report every 50 ms
            // would be sent for them.
            .clear_extension_map()
            .set_extension(1, Extension::AudioLevel)
            .set_extension(4, Extension::RtpMid)
            .set_rtp_mode(true)
            .set_stats_interval(Some(INTERVAL))
            .set_sctp_max_message_size(MAX_MESSAGE)
            .set_sctp_max_buffered_amount(MAX_BUFFERED)
            .set_snap_enabled(snap);
        let [pt, repair] = [108.into(), 109.into()];
        config
            .codec_config()
            .add_h264(pt, Some(repair), true, 0x42_e01f);
        config.build(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beats_are_the_same_moments_for_all() {
        let (first, period) = beats();
        for beat in 0..3 {
            let last = first + beat * period;
            for into in [Duration::ZERO, period / 3, period - Duration::from_nanos(1)] {
                assert_eq!(next_beat(last + into), last + period);
            }
        }
    }
}
