/// Hertz.
pub const DEFAULT_SAMPLE_RATE: u32 = 48_000;
pub const DEFAULT_NUM_CHANNELS: u32 = 1;

/// Processing of captured PCM. Kept for the API; packets are never touched.
#[derive(Default, Debug)]
pub struct AudioSourceOptions {
    pub echo_cancellation: bool,
    pub noise_suppression: bool,
    pub auto_gain_control: bool,
}

#[non_exhaustive]
#[derive(Debug, Clone)]
pub enum RtcAudioSource {
    /// Fed by the program.
    Native(native::NativeAudioSource),
    /// A recording device; silent, as this engine has no devices.
    Device,
}

impl RtcAudioSource {
    pub fn set_audio_options(&self, options: AudioSourceOptions) {
        match self {
            RtcAudioSource::Native(source) => source.set_audio_options(options),
            RtcAudioSource::Device => {}
        }
    }

    pub fn audio_options(&self) -> AudioSourceOptions {
        match self {
            RtcAudioSource::Native(source) => source.audio_options(),
            RtcAudioSource::Device => AudioSourceOptions::default(),
        }
    }

    pub fn sample_rate(&self) -> u32 {
        match self {
            RtcAudioSource::Native(source) => source.sample_rate(),
            RtcAudioSource::Device => DEFAULT_SAMPLE_RATE,
        }
    }

    pub fn num_channels(&self) -> u32 {
        match self {
            RtcAudioSource::Native(source) => source.num_channels(),
            RtcAudioSource::Device => DEFAULT_NUM_CHANNELS,
        }
    }
}

pub mod native {
    use std::{
        fmt,
        sync::{Arc, Weak},
        time::{Duration, Instant},
    };

    use parking_lot::Mutex;
    use tokio::{sync::Notify, time::sleep_until};

    use super::AudioSourceOptions;
    use crate::{
        RtcError,
        audio_frame::AudioFrame,
        engine,
        pcm::{self, Pcm},
        rtp_sender::SenderInner,
    };
    #[cfg(feature = "encoded-audio")]
    use crate::{opus, rtp_sender::EncodedPacket};

    /// Longest time that one Opus packet can hold (RFC 6716, 3.2.5).
    #[cfg(feature = "encoded-audio")]
    const MAX_DURATION: Duration = Duration::from_millis(120);
    const PACKET: Duration = Duration::from_millis(20);
    /// A source that was quiet for longer than this made a pause: receivers are told by the RTP
    /// time. Less is the jitter of whoever captures.
    const PAUSE: Duration = Duration::from_millis(200);

    /// Audio that the program feeds to every sender which a track of this source is attached to:
    /// PCM, or (feature `encoded-audio`) Opus packets. One of the two at a time.
    #[derive(Clone)]
    pub struct NativeAudioSource {
        inner: Arc<Inner>,
    }

    struct Inner {
        sample_rate: u32,
        num_channels: u32,
        /// Zero: what is captured leaves at once.
        queue: Duration,
        senders: Mutex<Vec<Weak<SenderInner>>>,
        capture: Mutex<Capture>,
        /// There is room in the queue.
        drained: Notify,
    }

    struct Capture {
        intake: Option<pcm::Intake>,
        /// A task takes packets out of the queue.
        pumping: bool,
        /// When what was sent so far will have been played.
        until: Option<Instant>,
    }

    impl fmt::Debug for NativeAudioSource {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.debug_struct("NativeAudioSource").finish()
        }
    }

    impl NativeAudioSource {
        /// Rate (hertz, 1,000 to 384,000) and channels (1 to 32) are those of the PCM; packets
        /// carry their own. See [`capture_frame`](Self::capture_frame) for the queue.
        pub fn new(
            _options: AudioSourceOptions,
            sample_rate: u32,
            num_channels: u32,
            queue_size_ms: u32,
        ) -> NativeAudioSource {
            Self {
                inner: Arc::new(Inner {
                    sample_rate,
                    num_channels,
                    queue: Duration::from_millis(queue_size_ms.into()),
                    senders: Mutex::default(),
                    capture: Mutex::new(Capture {
                        intake: pcm::Intake::new(sample_rate, num_channels),
                        pumping: false,
                        until: None,
                    }),
                    drained: Notify::new(),
                }),
            }
        }

        /// Extension: sends one encoded Opus packet as it is on every attached sender.
        ///
        /// `duration` is the time that the packet holds, up to 120 ms: the RTP time advances by it
        /// even while the track is disabled (muted) or not connected, when the packet itself is
        /// not sent. `level` is the audio's level in dBov, 0 (loudest) to -127 (RFC 6464), sent
        /// along for those who tell speakers without decoding; voice is announced unless it is
        /// -127. Packets leave at once: pacing is up to the caller.
        #[cfg(feature = "encoded-audio")]
        pub fn capture_encoded(
            &self,
            packet: &[u8],
            duration: Duration,
            level: Option<i8>,
        ) -> Result<(), RtcError> {
            if packet.is_empty() || packet.len() > opus::MAX_PACKET {
                return Err(RtcError::internal(format!(
                    "an Opus packet of {} bytes can't be sent, only 1 to {}",
                    packet.len(),
                    opus::MAX_PACKET
                )));
            }
            if duration.is_zero() || duration > MAX_DURATION {
                return Err(RtcError::internal(format!(
                    "an Opus packet can't hold {duration:?}, only up to {MAX_DURATION:?}"
                )));
            }
            let packet = EncodedPacket {
                payload: Arc::from(packet),
                samples: (duration.as_micros() * 48 / 1000) as u32,
                level: level.map(|level| level.clamp(-127, 0)),
            };
            self.each_sender(|sender| sender.send(self, packet.clone()));
            Ok(())
        }

        /// Does something with each sender, in one order for all callers. One that says false has
        /// gone on to something else.
        fn each_sender(&self, mut run: impl FnMut(&SenderInner) -> bool) {
            let mut senders = self.inner.senders.lock();
            senders.retain(|sender| sender.upgrade().is_some_and(|sender| run(&sender)));
        }

        pub(crate) fn attach(&self, sender: &Arc<SenderInner>) {
            let mut senders = self.inner.senders.lock();
            let sender = Arc::downgrade(sender);
            senders.retain(|known| known.strong_count() > 0 && !known.ptr_eq(&sender));
            senders.push(sender);
        }

        pub(crate) fn is(&self, other: &NativeAudioSource) -> bool {
            Arc::ptr_eq(&self.inner, &other.inner)
        }

        /// Drops what is queued. Callers that wait for room go on.
        pub fn clear_buffer(&self) {
            if let Some(intake) = &mut self.inner.capture.lock().intake {
                intake.clear();
            }
            self.inner.drained.notify_waiters();
        }

        /// Sends PCM, in Opus packets of 20 ms, on every attached sender.
        ///
        /// With a queue size of 0, packets leave as soon as they are full, within this call, and
        /// pacing is up to the caller: frames of any length, mostly 10 ms, in real time. Otherwise
        /// up to the queue size (in milliseconds) is queued and leaves in real time; this waits
        /// while the queue has no room for the frame, one that is longer than it until it is
        /// empty. Time passes too while the track is disabled (muted) or not connected, when
        /// nothing is sent, and while nothing is captured.
        ///
        /// Fails if rate or channels are not the source's, or there are not as many samples as
        /// announced. Cancel safe: a frame is taken whole, at the end of the wait, or not at all.
        pub async fn capture_frame(&self, frame: &AudioFrame<'_>) -> Result<(), RtcError> {
            if frame.sample_rate != self.inner.sample_rate
                || frame.num_channels != self.inner.num_channels
            {
                return Err(RtcError::invalid_state(format!(
                    "a frame of {} Hz in {} channels for a source of {} Hz in {}",
                    frame.sample_rate,
                    frame.num_channels,
                    self.inner.sample_rate,
                    self.inner.num_channels
                )));
            }
            if frame.data.len() != frame.samples_per_channel as usize * frame.num_channels as usize
            {
                return Err(RtcError::invalid_state(format!(
                    "a frame of {} samples for {} in {} channels",
                    frame.data.len(),
                    frame.samples_per_channel,
                    frame.num_channels
                )));
            }
            loop {
                let drained = self.inner.drained.notified();
                if self.take(frame)? {
                    return Ok(());
                }
                drained.await;
            }
        }

        /// Returns false if there is no room now.
        fn take(&self, frame: &AudioFrame<'_>) -> Result<bool, RtcError> {
            let mut capture = self.inner.capture.lock();
            let Capture {
                intake: Some(intake),
                pumping,
                until,
            } = &mut *capture
            else {
                return Err(RtcError::unsupported(
                    "PCM of this rate or this many channels",
                ));
            };
            if self.inner.queue.is_zero() {
                let now = Instant::now();
                if is_past(*until, now)
                    && let Some(rest) = intake.rest()
                {
                    // It belongs before the pause, and is sent as if there was none yet.
                    self.each_sender(|sender| sender.send_pcm(self, &rest));
                    *until = until.map(|until| until + PACKET);
                }
                intake.push(&frame.data);
                while let Some(packet) = intake.packet() {
                    self.send_pcm(&packet, until, now);
                }
                return Ok(true);
            }
            let length = f64::from(frame.samples_per_channel) / f64::from(frame.sample_rate);
            let queued = intake.queued();
            if !queued.is_zero() && queued + Duration::from_secs_f64(length) > self.inner.queue {
                return Ok(false);
            }
            intake.push(&frame.data);
            if !*pumping {
                engine::spawn(pump(Arc::downgrade(&self.inner)))?;
                *pumping = true;
            }
            Ok(true)
        }

        /// `until` is when what was sent before has been played.
        fn send_pcm(&self, packet: &Pcm, until: &mut Option<Instant>, now: Instant) {
            let start = match *until {
                Some(until) if !is_past(Some(until), now) => until,
                Some(until) => {
                    let samples = (now - until).as_micros() * 48 / 1000;
                    self.each_sender(|sender| sender.skip(self, samples as u32));
                    now
                }
                None => now,
            };
            self.each_sender(|sender| sender.send_pcm(self, packet));
            *until = Some(start + PACKET);
        }

        pub fn set_audio_options(&self, _options: AudioSourceOptions) {}

        pub fn audio_options(&self) -> AudioSourceOptions {
            AudioSourceOptions::default()
        }

        pub fn sample_rate(&self) -> u32 {
            self.inner.sample_rate
        }

        pub fn num_channels(&self) -> u32 {
            self.inner.num_channels
        }
    }

    fn is_past(until: Option<Instant>, now: Instant) -> bool {
        until.is_some_and(|until| now.saturating_duration_since(until) > PAUSE)
    }

    /// Takes packets out of the queue, in real time, until it is empty or the source is gone.
    async fn pump(source: Weak<Inner>) {
        // The first frame is seldom a whole packet.
        let mut next = Instant::now() + PACKET;
        let mut stalled = false;
        loop {
            sleep_until(next.into()).await;
            let Some(inner) = source.upgrade() else {
                return;
            };
            let source = NativeAudioSource { inner };
            if !source.pump_one(next, &mut stalled) {
                return;
            }
            source.inner.drained.notify_waiters();
            next += PACKET;
        }
    }

    impl NativeAudioSource {
        /// Returns false when there is nothing left. What is not a whole packet waits for its rest
        /// until the next time.
        fn pump_one(&self, now: Instant, stalled: &mut bool) -> bool {
            let mut capture = self.inner.capture.lock();
            let Capture {
                intake: Some(intake),
                pumping,
                until,
            } = &mut *capture
            else {
                return false;
            };
            let rest = match intake.queued() {
                queued if queued >= PACKET || !*stalled => None,
                _ => intake.rest(),
            };
            *stalled = intake.queued() < PACKET;
            let packet = match rest {
                Some(rest) => Some(rest),
                None => intake.packet(),
            };
            if let Some(packet) = packet {
                self.send_pcm(&packet, until, now);
            }
            *pumping = !intake.queued().is_zero();
            *pumping
        }
    }
}
