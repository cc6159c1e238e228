//! Video frames, as far as the API needs the types: this engine neither encodes nor decodes video.

use std::fmt::Debug;

#[derive(Debug, Copy, Clone, PartialEq, Eq)]
pub enum VideoRotation {
    VideoRotation0 = 0,
    VideoRotation90 = 90,
    VideoRotation180 = 180,
    VideoRotation270 = 270,
}

/// What a sender attached to a video frame.
#[derive(Debug, Clone)]
pub struct FrameMetadata {
    /// Microseconds since the Unix epoch.
    pub user_timestamp: Option<u64>,
    pub frame_id: Option<u32>,
    pub user_data: Option<Vec<u8>>,
}

#[derive(Debug)]
pub struct VideoFrame<T>
where
    T: AsRef<dyn VideoBuffer>,
{
    pub rotation: VideoRotation,
    /// Capture time in microseconds.
    pub timestamp_us: i64,
    pub frame_metadata: Option<FrameMetadata>,
    pub buffer: T,
}

impl<T: AsRef<dyn VideoBuffer>> VideoFrame<T> {
    pub fn new(rotation: VideoRotation, buffer: T) -> Self {
        Self {
            rotation,
            timestamp_us: 0,
            frame_metadata: None,
            buffer,
        }
    }
}

pub type BoxVideoBuffer = Box<dyn VideoBuffer>;
pub type BoxVideoFrame = VideoFrame<BoxVideoBuffer>;

/// Pixels of a frame.
pub trait VideoBuffer: Debug + Send + Sync {
    fn width(&self) -> u32;
    fn height(&self) -> u32;
}

/// Pixels in planes: Y for each pixel, U and V for each square of four. To be written only, since
/// no frame is sent.
#[derive(Debug)]
pub struct I420Buffer {
    width: u32,
    height: u32,
    planes: [Vec<u8>; 3],
}

impl I420Buffer {
    /// A black picture.
    pub fn new(width: u32, height: u32) -> Self {
        let (columns, rows) = (width as usize, height as usize);
        let colour = vec![128; columns.div_ceil(2) * rows.div_ceil(2)];
        Self {
            width,
            height,
            planes: [vec![0; columns * rows], colour.clone(), colour],
        }
    }

    /// Y, U and V, row by row without padding.
    pub fn data_mut(&mut self) -> (&mut [u8], &mut [u8], &mut [u8]) {
        let [y, u, v] = &mut self.planes;
        (y, u, v)
    }
}

impl VideoBuffer for I420Buffer {
    fn width(&self) -> u32 {
        self.width
    }

    fn height(&self) -> u32 {
        self.height
    }
}

impl AsRef<dyn VideoBuffer> for I420Buffer {
    fn as_ref(&self) -> &(dyn VideoBuffer + 'static) {
        self
    }
}
