use std::borrow::Cow;

/// Interleaved PCM.
#[derive(Debug, Clone)]
pub struct AudioFrame<'a> {
    pub data: Cow<'a, [i16]>,
    /// Hertz.
    pub sample_rate: u32,
    pub num_channels: u32,
    pub samples_per_channel: u32,
}

impl AudioFrame<'_> {
    /// A silent frame of its own memory.
    pub fn new(sample_rate: u32, num_channels: u32, samples_per_channel: u32) -> Self {
        let samples = num_channels as usize * samples_per_channel as usize;
        Self {
            data: vec![0; samples].into(),
            sample_rate,
            num_channels,
            samples_per_channel,
        }
    }
}
