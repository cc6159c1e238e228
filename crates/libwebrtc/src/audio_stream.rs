pub mod native {
    use std::{
        fmt,
        future::pending,
        pin::{Pin, pin},
        sync::Arc,
        task::{Context, Poll},
        time::Instant,
    };

    use tokio::{
        sync::Notify,
        time::{Instant as TokioInstant, sleep_until},
    };
    use tokio_stream::{Stream, StreamExt};

    use crate::{
        audio_frame::AudioFrame,
        audio_track::RtcAudioTrack,
        encoded_audio::{EncodedAudioFrame, EncodedAudioStream},
        engine,
        playout::{Packet, Playout},
        queue::Queue,
    };

    const DEFAULT_QUEUE: usize = 10;
    /// Packets that wait for the decoder, which only a stalled machine makes them do.
    const PACKETS: usize = 256;
    /// Hertz.
    const RATES: std::ops::RangeInclusive<i32> = 1_000..=384_000;
    /// Beyond, a frame is not meant.
    const MAX_CHANNELS: i32 = 32;

    #[derive(Clone, Debug, Default)]
    pub struct NativeAudioStreamOptions {
        /// How many frames of 10 ms wait for the consumer at most; then the oldest are dropped.
        /// None is 10; `Some(0)` is without limit.
        pub queue_size_frames: Option<usize>,
    }

    /// Decoded audio of a track, in frames of 10 ms at the pace of its sender.
    ///
    /// Starts with the first packet and keeps to the sender's clock (RTP time): as much audio comes
    /// out as time passed there. What is lost, or late by more than the network's usual jitter, is
    /// concealed for up to 60 ms and then silent, as are pauses (DTX, mute). For that packets wait
    /// as long as the slowest of the last seconds needed, 60 ms at first and 400 ms at most.
    ///
    /// Ends, with an error logged, on a track that can't be decoded: one that is end-to-end
    /// encrypted, or a local one. Otherwise ends when the track does, after what arrived of it.
    /// Reading is cancel safe. Decoding takes place on the engine's threads, for as long as the
    /// stream is open, once for each stream.
    pub struct NativeAudioStream {
        track: RtcAudioTrack,
        outlet: Arc<Outlet>,
    }

    /// What the stream and its decoding task share.
    struct Outlet {
        frames: Arc<Queue<AudioFrame<'static>>>,
        closed: Notify,
    }

    impl Outlet {
        fn close(&self) {
            self.frames.close();
            self.closed.notify_one();
        }
    }

    impl fmt::Debug for NativeAudioStream {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.debug_struct("NativeAudioStream")
                .field("track", &self.track)
                .finish()
        }
    }

    impl NativeAudioStream {
        /// `sample_rate` is in hertz, 1,000 to 384,000; `num_channels` is 1 to 32, of which those
        /// after the second repeat left and right. With others the stream logs an error and ends.
        pub fn new(track: RtcAudioTrack, sample_rate: i32, num_channels: i32) -> Self {
            Self::with_options(track, sample_rate, num_channels, Default::default())
        }

        pub fn with_options(
            track: RtcAudioTrack,
            sample_rate: i32,
            num_channels: i32,
            options: NativeAudioStreamOptions,
        ) -> Self {
            let capacity = match options.queue_size_frames.unwrap_or(DEFAULT_QUEUE) {
                0 => usize::MAX,
                frames => frames,
            };
            let outlet = Arc::new(Outlet {
                frames: Queue::new(capacity),
                closed: Notify::new(),
            });
            if let Err(reason) = start(&track, sample_rate, num_channels, &outlet) {
                log::error!("the track {:?} can't be decoded: {reason}", track.id());
                outlet.close();
            }
            Self { track, outlet }
        }

        pub fn track(&self) -> RtcAudioTrack {
            self.track.clone()
        }

        /// Ends the stream. Frames that wait still come out; dropping it lets go of them too.
        pub fn close(&mut self) {
            self.outlet.close();
        }
    }

    impl Drop for NativeAudioStream {
        fn drop(&mut self) {
            self.outlet.close();
        }
    }

    impl Stream for NativeAudioStream {
        type Item = AudioFrame<'static>;

        fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
            self.outlet.frames.poll(cx)
        }
    }

    fn start(
        track: &RtcAudioTrack,
        rate: i32,
        channels: i32,
        outlet: &Arc<Outlet>,
    ) -> Result<(), String> {
        if track.is_barred() {
            return Err("end-to-end encryption is not supported by this engine".to_owned());
        }
        if track.source().is_some() {
            return Err("it is a local one".to_owned());
        }
        if !RATES.contains(&rate) || !(1..=MAX_CHANNELS).contains(&channels) {
            return Err(format!("{rate} Hz in {channels} channels"));
        }
        let (rate, channels) = (rate as u32, channels as u32);
        let playout = Playout::new(rate, channels as usize).ok_or("out of memory")?;
        let player = Player {
            track: track.clone(),
            playout,
            outlet: outlet.clone(),
            rate,
            channels,
        };
        let packets = EncodedAudioStream::new(track, PACKETS);
        engine::spawn(player.run(packets)).map_err(|err| err.to_string())
    }

    /// Closes the outlet when it goes, be it by a panic of the decoder.
    struct Player {
        track: RtcAudioTrack,
        playout: Playout,
        outlet: Arc<Outlet>,
        rate: u32,
        channels: u32,
    }

    impl Player {
        async fn run(mut self, mut packets: EncodedAudioStream) {
            let mut timer = pin!(sleep_until(TokioInstant::now()));
            let mut ended = false;
            while !self.outlet.frames.is_closed() {
                self.play(Instant::now());
                let deadline = self.playout.deadline();
                match deadline {
                    Some(deadline) => timer.as_mut().reset(deadline.into()),
                    None if ended => return,
                    None => {}
                }
                let due = async {
                    match deadline {
                        Some(_) => timer.as_mut().await,
                        None => pending().await,
                    }
                };
                tokio::select! {
                    packet = packets.next(), if !ended => match packet {
                        Some(packet) => self.push(packet),
                        None => {
                            ended = true;
                            self.playout.finish();
                            if self.track.is_barred() {
                                log::error!(
                                    "the track {:?} is end-to-end encrypted: its stream ends",
                                    self.track.id()
                                );
                                return;
                            }
                        }
                    },
                    () = due => {}
                    () = self.outlet.closed.notified() => return,
                }
            }
        }

        fn push(&mut self, frame: EncodedAudioFrame) {
            self.playout.push(Packet {
                payload: frame.payload,
                timestamp: frame.rtp_timestamp,
                sequence: frame.sequence,
                ssrc: frame.ssrc,
                arrival: frame.received_at,
            });
        }

        fn play(&mut self, now: Instant) {
            let mut played = false;
            while let Some(data) = self.playout.pull(now) {
                played = true;
                self.outlet.frames.push(AudioFrame {
                    samples_per_channel: data.len() as u32 / self.channels,
                    data: data.into(),
                    sample_rate: self.rate,
                    num_channels: self.channels,
                });
            }
            if played {
                self.track.set_playout(self.playout.stats());
            }
        }
    }

    impl Drop for Player {
        fn drop(&mut self) {
            self.outlet.frames.close();
        }
    }
}
