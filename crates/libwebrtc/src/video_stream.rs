pub mod native {
    use std::{
        fmt,
        pin::Pin,
        task::{Context, Poll},
    };

    use tokio_stream::Stream;

    use crate::{
        native::packet_trailer::PacketTrailerHandler, video_frame::BoxVideoFrame,
        video_track::RtcVideoTrack,
    };

    /// Kept for the API: there are no frames to queue.
    #[derive(Clone, Debug, Default)]
    pub struct NativeVideoStreamOptions {
        pub queue_size_frames: Option<usize>,
    }

    /// Ends at once, with an error logged: this engine does not decode video.
    pub struct NativeVideoStream {
        track: RtcVideoTrack,
    }

    impl fmt::Debug for NativeVideoStream {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.debug_struct("NativeVideoStream")
                .field("track", &self.track)
                .finish()
        }
    }

    impl NativeVideoStream {
        pub fn new(track: RtcVideoTrack) -> Self {
            Self::with_options(track, NativeVideoStreamOptions::default())
        }

        pub fn with_options(track: RtcVideoTrack, _options: NativeVideoStreamOptions) -> Self {
            log::error!(
                "the track {:?} can't be decoded: video is not supported by this engine",
                track.id()
            );
            Self { track }
        }

        pub fn set_packet_trailer_handler(&self, handler: PacketTrailerHandler) {
            self.track.set_packet_trailer_handler(handler);
        }

        pub fn track(&self) -> RtcVideoTrack {
            self.track.clone()
        }

        pub fn close(&mut self) {}
    }

    impl Stream for NativeVideoStream {
        type Item = BoxVideoFrame;

        fn poll_next(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
            Poll::Ready(None)
        }
    }
}
