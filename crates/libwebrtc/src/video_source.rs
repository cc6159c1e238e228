use crate::enum_dispatch;

#[derive(Debug, Clone)]
pub struct VideoResolution {
    pub width: u32,
    pub height: u32,
}

impl Default for VideoResolution {
    fn default() -> Self {
        VideoResolution {
            width: 1280,
            height: 720,
        }
    }
}

#[non_exhaustive]
#[derive(Debug, Clone)]
pub enum RtcVideoSource {
    Native(native::NativeVideoSource),
}

impl RtcVideoSource {
    enum_dispatch!(
        [Native];
        pub fn video_resolution(self: &Self) -> VideoResolution;
    );
}

pub mod native {
    use std::sync::Once;

    use super::VideoResolution;
    use crate::{
        native::packet_trailer::PacketTrailerHandler,
        video_frame::{VideoBuffer, VideoFrame},
    };

    /// Inert: a track made of it can't be published by this engine.
    #[derive(Debug, Clone, Default)]
    pub struct NativeVideoSource {
        resolution: VideoResolution,
    }

    impl NativeVideoSource {
        pub fn new(resolution: VideoResolution, _is_screencast: bool) -> Self {
            Self { resolution }
        }

        /// Returns false: the frame is not sent. Logs an error, at the first call of the process.
        pub fn capture_frame<T: AsRef<dyn VideoBuffer>>(&self, _frame: &VideoFrame<T>) -> bool {
            static SAID: Once = Once::new();
            SAID.call_once(|| log::error!("sending video is not supported by this engine"));
            false
        }

        pub fn set_packet_trailer_handler(&self, _handler: PacketTrailerHandler) {}

        pub fn video_resolution(&self) -> VideoResolution {
            self.resolution.clone()
        }
    }
}
