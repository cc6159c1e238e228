//! Extension: the Opus packets of a remote audio track as they were on the wire, undecoded.
//!
//! The `livekit` SDK re-exports this crate, so its users write
//! `livekit::webrtc::encoded_audio::EncodedAudioStream::new(&remote_audio_track.rtc_track(), 64)`.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use tokio_stream::Stream;

use crate::{audio_track::RtcAudioTrack, queue::Queue};

/// When packets are read from the network, where they flow: every so often since that instant, for
/// all tracks of the process. Who looks for packets at moments of its own finds the latest ones
/// shortly after these.
#[cfg(feature = "encoded-audio")]
pub fn beats() -> (Instant, std::time::Duration) {
    crate::engine::beats()
}

/// Has packets be read every so often (see [`beats`]), 5 to 100 ms, from now on. It is 20 ms at first.
/// Packets, also those of PCM streams, wait half of it on average; the longer it is, the less a track
/// costs.
#[cfg(feature = "encoded-audio")]
pub fn read_every(period: std::time::Duration) {
    crate::engine::set_beat(period);
}

/// One Opus packet with what its RTP header said.
#[derive(Debug, Clone)]
pub struct EncodedAudioFrame {
    /// The Opus packet (RFC 6716), shared with the engine, not copied.
    pub payload: Arc<[u8]>,
    /// RTP time: 48,000 a second whatever the audio's own rate (RFC 7587), from an arbitrary
    /// start; wraps.
    pub rtp_timestamp: u32,
    /// RTP sequence number, extended so that it does not wrap. Packets come in the order of
    /// arrival, each once.
    pub sequence: u64,
    /// How many packets right before this one had not arrived when it did: 0 mostly, and for one
    /// that comes late itself. They are lost, or come later, out of order. A pause of the sender
    /// (DTX, mute) is none: there only `rtp_timestamp` jumps. Counts what the network lost, not
    /// what a full queue dropped.
    pub missing: u32,
    /// RTP synchronisation source.
    pub ssrc: u32,
    /// Level of this packet's audio in dBov, from 0 (loudest) to -127 (RFC 6464), if the sender
    /// told it.
    pub audio_level: Option<i8>,
    /// Whether the sender thinks that it contains voice (RFC 6464), if it told that.
    pub voice_activity: Option<bool>,
    /// When the datagram came to this machine, where the kernel tells that (Linux does); else, and over
    /// TCP, when it was read.
    pub received_at: Instant,
}

/// The packets of one track, in a bounded queue that drops the oldest.
///
/// Ends when the remote side withdraws the track (unpublished, or unsubscribed from) and when the
/// peer connection is closed; packets queued before come out first. Reading is cancel safe: a
/// packet leaves the queue only in the poll that returns it. Any number of streams can be made of
/// a track, and each gets every packet from then on.
pub struct EncodedAudioStream {
    queue: Arc<Queue<EncodedAudioFrame>>,
}

impl EncodedAudioStream {
    /// `capacity` is in packets (mostly of 20 ms), at least 1.
    pub fn new(track: &RtcAudioTrack, capacity: usize) -> Self {
        let queue = Queue::new(capacity.max(1));
        track.attach(&queue);
        Self { queue }
    }

    /// How many packets were dropped so far because the queue was full.
    pub fn dropped(&self) -> u64 {
        self.queue.dropped()
    }
}

impl Stream for EncodedAudioStream {
    type Item = EncodedAudioFrame;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.queue.poll(cx)
    }
}

impl std::fmt::Debug for EncodedAudioStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EncodedAudioStream")
            .field("queued", &self.queue.len())
            .field("dropped", &self.queue.dropped())
            .field("closed", &self.queue.is_closed())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Wake, Waker};

    use super::*;

    fn frame(sequence: u64) -> EncodedAudioFrame {
        EncodedAudioFrame {
            payload: Arc::from([sequence as u8]),
            rtp_timestamp: sequence as u32 * 960,
            sequence,
            missing: 0,
            ssrc: 1,
            audio_level: None,
            voice_activity: None,
            received_at: Instant::now(),
        }
    }

    fn poll(stream: &mut EncodedAudioStream) -> Poll<Option<u64>> {
        let mut cx = Context::from_waker(Waker::noop());
        Pin::new(stream)
            .poll_next(&mut cx)
            .map(|frame| frame.map(|frame| frame.sequence))
    }

    #[test]
    fn a_full_queue_drops_the_oldest_and_counts() {
        let track = RtcAudioTrack::new("a".to_owned(), None);
        let mut stream = EncodedAudioStream::new(&track, 2);
        (1..=5).for_each(|sequence| track.deliver(frame(sequence)));
        assert_eq!(stream.dropped(), 3);
        assert_eq!(poll(&mut stream), Poll::Ready(Some(4)));
        assert_eq!(poll(&mut stream), Poll::Ready(Some(5)));
        assert_eq!(poll(&mut stream), Poll::Pending);
    }

    #[test]
    fn what_is_queued_comes_out_before_the_end() {
        let track = RtcAudioTrack::new("a".to_owned(), None);
        let mut stream = EncodedAudioStream::new(&track, 8);
        track.deliver(frame(1));
        track.end();
        track.deliver(frame(2));
        assert_eq!(poll(&mut stream), Poll::Ready(Some(1)));
        assert_eq!(poll(&mut stream), Poll::Ready(None));
        assert_eq!(poll(&mut stream), Poll::Ready(None));
    }

    #[test]
    fn a_stream_of_an_ended_track_is_empty() {
        let track = RtcAudioTrack::new("a".to_owned(), None);
        track.end();
        assert_eq!(
            poll(&mut EncodedAudioStream::new(&track, 8)),
            Poll::Ready(None)
        );
    }

    #[test]
    fn every_stream_gets_every_packet_and_a_dropped_one_is_forgotten() {
        let track = RtcAudioTrack::new("a".to_owned(), None);
        let mut first = EncodedAudioStream::new(&track, 8);
        let gone = EncodedAudioStream::new(&track, 8);
        drop(gone);
        let mut second = EncodedAudioStream::new(&track, 8);
        track.deliver(frame(1));
        assert_eq!(poll(&mut first), Poll::Ready(Some(1)));
        assert_eq!(poll(&mut second), Poll::Ready(Some(1)));
    }

    #[test]
    fn a_waiting_consumer_is_woken_by_a_packet_and_by_the_end() {
        struct Count(std::sync::atomic::AtomicUsize);
        impl Wake for Count {
            fn wake(self: Arc<Self>) {
                self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            }
        }
        let count = Arc::new(Count(Default::default()));
        let waker = Waker::from(count.clone());
        let mut cx = Context::from_waker(&waker);
        let track = RtcAudioTrack::new("a".to_owned(), None);
        let mut stream = EncodedAudioStream::new(&track, 8);

        assert!(Pin::new(&mut stream).poll_next(&mut cx).is_pending());
        track.deliver(frame(1));
        assert_eq!(count.0.load(std::sync::atomic::Ordering::SeqCst), 1);
        assert!(Pin::new(&mut stream).poll_next(&mut cx).is_ready());
        assert!(Pin::new(&mut stream).poll_next(&mut cx).is_pending());
        track.end();
        assert_eq!(count.0.load(std::sync::atomic::Ordering::SeqCst), 2);
    }

    #[test]
    fn a_disabled_track_drops_what_arrives() {
        let track = RtcAudioTrack::new("a".to_owned(), None);
        let mut stream = EncodedAudioStream::new(&track, 8);
        assert!(track.set_enabled(false));
        track.deliver(frame(1));
        assert!(track.set_enabled(true));
        track.deliver(frame(2));
        assert_eq!(poll(&mut stream), Poll::Ready(Some(2)));
    }
}
