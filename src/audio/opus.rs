//! The one thing that is done with Opus besides passing it on: decoding it, for providers that
//! don't take it.

use std::ptr::NonNull;

use unsafe_libopus::{OpusDecoder, opus_decode, opus_decoder_create, opus_decoder_destroy};

/// What speech models work with.
pub const RATE: u32 = 16_000;
/// The longest Opus packet, 120 ms (RFC 6716, section 3.2.5), at [`RATE`].
const MAX_SAMPLES: usize = RATE as usize * 120 / 1000;

/// libopus, decoding to mono whatever the packets hold.
pub struct Decoder {
    state: NonNull<OpusDecoder>,
    samples: Box<[i16; MAX_SAMPLES]>,
}

// SAFETY: the state is owned by this value alone and libopus keeps none of it elsewhere.
unsafe impl Send for Decoder {}

impl Decoder {
    /// `None` when there is no memory for it.
    pub fn new() -> Option<Self> {
        let mut error = 0;
        // SAFETY: `error` outlives the call; rate and channel count are valid.
        let state = unsafe { opus_decoder_create(RATE as i32, 1, &mut error) };
        Some(Self {
            state: NonNull::new(state)?,
            samples: Box::new([0; MAX_SAMPLES]),
        })
    }

    /// The samples of a packet, or none if it is not one.
    pub fn decode(&mut self, packet: &[u8]) -> &[i16] {
        // An empty packet would be taken for a lost one, of any length, and so is one without a frame,
        // which says that nothing is to be heard. Of such, this version of libopus makes noise at full
        // scale (its concealment has lost a sign in translation); they are silence.
        let Ok(length @ 3..) = i32::try_from(packet.len()) else {
            return &[];
        };
        // SAFETY: the state is valid until drop; `packet` has `length` bytes and `samples` room for
        // as many as announced, which libopus does not exceed.
        let decoded = unsafe {
            opus_decode(
                self.state.as_ptr(),
                packet.as_ptr(),
                length,
                self.samples.as_mut_ptr(),
                MAX_SAMPLES as i32,
                0,
            )
        };
        let decoded = usize::try_from(decoded).unwrap_or(0);
        self.samples.get(..decoded).unwrap_or_default()
    }
}

impl Drop for Decoder {
    fn drop(&mut self) {
        // SAFETY: made by `opus_decoder_create` and not used after this.
        unsafe { opus_decoder_destroy(self.state.as_ptr()) };
    }
}
