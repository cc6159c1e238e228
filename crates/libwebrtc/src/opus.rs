//! libopus, transpiled to Rust, behind safe types. Samples are interleaved.

use std::ptr::{self, NonNull};

/// RTP time units a second, whatever the audio's own rate (RFC 7587).
pub(crate) const CLOCK: u32 = 48_000;
/// The longest Opus packet, in RTP time: 120 ms (RFC 6716, 3.2.5).
pub(crate) const MAX_TICKS: u32 = CLOCK / 1000 * 120;
/// Concealment is made in steps of 2.5 ms.
pub(crate) const STEP_TICKS: u32 = CLOCK / 400;
/// What an encoder makes of each packet's worth of samples: 20 ms.
pub(crate) const PACKET_TICKS: u32 = CLOCK / 50;
/// Longest packet that an encoder may make, in bytes: the longest single frame (RFC 6716, 3.4).
pub(crate) const MAX_PACKET: usize = 1275;

/// Packets of this length or less say that nothing is to be heard for now.
pub(crate) const DTX_LEN: usize = 2;

/// The rates that libopus itself converts to and from.
pub(crate) fn is_native_rate(rate: u32) -> bool {
    matches!(rate, 8_000 | 12_000 | 16_000 | 24_000 | 48_000)
}

/// How long a packet plays, in RTP time. None if it is not Opus.
pub(crate) fn ticks(packet: &[u8]) -> Option<u32> {
    let len = i32::try_from(packet.len()).ok().filter(|len| *len > 0)?;
    // SAFETY: reads within `len` bytes.
    let samples =
        unsafe { unsafe_libopus::opus_packet_get_nb_samples(packet.as_ptr(), len, CLOCK as i32) };
    u32::try_from(samples)
        .ok()
        .filter(|samples| (1..=MAX_TICKS).contains(samples))
}

pub(crate) struct Decoder {
    state: NonNull<unsafe_libopus::OpusDecoder>,
    rate: u32,
    channels: usize,
}

// SAFETY: the state is owned by this value alone and libopus keeps none of it elsewhere.
unsafe impl Send for Decoder {}

impl Decoder {
    /// `rate` must be native, `channels` 1 or 2. None if there is no memory for it.
    pub(crate) fn new(rate: u32, channels: usize) -> Option<Self> {
        let mut error = 0;
        // SAFETY: `error` outlives the call; libopus checks the other arguments.
        let state = unsafe {
            unsafe_libopus::opus_decoder_create(rate as i32, channels as i32, &mut error)
        };
        Some(Self {
            state: NonNull::new(state)?,
            rate,
            channels,
        })
    }

    /// Samples of all channels in that time.
    pub(crate) fn samples(&self, ticks: u32) -> usize {
        (ticks / (CLOCK / self.rate)) as usize * self.channels
    }

    /// Appends what the packet holds. False if it can't be decoded; nothing is appended then.
    pub(crate) fn decode(&mut self, packet: &[u8], out: &mut Vec<i16>) -> bool {
        let Some(total) = ticks(packet) else {
            return false;
        };
        let start = out.len();
        let end = start + self.samples(total);
        match packet[0] & 3 {
            0 => self.decode_frame(packet, total, out),
            _ => self.decode_frames(packet, total, out),
        }
        // What is damaged is silent.
        let whole = out.len() == end;
        out.resize(if whole { end } else { start }, 0);
        whole
    }

    /// Appends the end of what was lost before this packet, as far as it repeats that (in-band
    /// FEC): see [`repeats`], without which it screams. `ticks` is the packet's own length.
    pub(crate) fn recover(&mut self, next: &[u8], ticks: u32, out: &mut Vec<i16>) -> bool {
        self.run(next, ticks, true, out)
    }

    /// Several frames, one by one.
    fn decode_frames(&mut self, packet: &[u8], ticks: u32, out: &mut Vec<i16>) {
        let mut frames = [ptr::null(); 48];
        let mut sizes = [0; 48];
        let (mut toc, mut offset) = (0, 0);
        // SAFETY: reads within the packet; writes at most 48 frames, which point into it.
        let count = unsafe {
            unsafe_libopus::opus_packet_parse(
                packet.as_ptr(),
                packet.len() as i32,
                &mut toc,
                frames.as_mut_ptr(),
                sizes.as_mut_ptr(),
                &mut offset,
            )
        };
        let mut single = Vec::with_capacity(MAX_PACKET + 1);
        for (frame, size) in frames
            .iter()
            .zip(sizes)
            .take(usize::try_from(count).unwrap_or(0))
        {
            // SAFETY: as libopus has just found.
            let frame = unsafe { std::slice::from_raw_parts(*frame, size as usize) };
            single.clear();
            single.push(toc & !3);
            single.extend_from_slice(frame);
            self.decode_frame(&single, ticks / count as u32, out);
        }
    }

    fn decode_frame(&mut self, packet: &[u8], ticks: u32, out: &mut Vec<i16>) {
        if packet.len() <= DTX_LEN {
            // libopus would conceal, which here can't be had (see `conceal`).
            let end = out.len() + self.samples(ticks);
            return out.resize(end, 0);
        }
        self.run(packet, ticks, false, out);
    }

    fn run(&mut self, packet: &[u8], ticks: u32, recover: bool, out: &mut Vec<i16>) -> bool {
        let start = out.len();
        out.resize(start + self.samples(ticks), 0);
        // SAFETY: the state is valid until drop; `packet` has the announced length, and `out` room
        // for the announced number of samples, which libopus does not exceed.
        let decoded = unsafe {
            unsafe_libopus::opus_decode(
                self.state.as_ptr(),
                packet.as_ptr(),
                packet.len() as i32,
                out[start..].as_mut_ptr(),
                ((out.len() - start) / self.channels) as i32,
                i32::from(recover),
            )
        };
        let decoded = usize::try_from(decoded).unwrap_or(0);
        out.truncate(start + decoded * self.channels);
        decoded > 0
    }
}

/// Whether a packet repeats the end of the one before it (in-band FEC), as far as it is easy to
/// see: one frame of SILK of up to 20 ms, whose second bit tells (RFC 6716, 4.2.3).
pub(crate) fn repeats(packet: &[u8]) -> bool {
    match packet {
        [toc, flags, _, ..] => {
            let celt = toc & 0x80 != 0;
            let long = toc & 0x60 != 0x60 && toc & 0x10 != 0;
            !celt && !long && toc & 3 == 0 && flags & 0x40 != 0
        }
        _ => false,
    }
}

impl Drop for Decoder {
    fn drop(&mut self) {
        // SAFETY: made by `opus_decoder_create` and not used after this.
        unsafe { unsafe_libopus::opus_decoder_destroy(self.state.as_ptr()) };
    }
}

/// What an encoder is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Settings {
    /// Bits per second.
    pub bitrate: u32,
    /// Otherwise channels are mixed down.
    pub stereo: bool,
    /// Hardly anything for silence.
    pub dtx: bool,
    /// Packets repeat the one before, in short.
    pub fec: bool,
}

/// Loss in percent that in-band FEC is made for.
const FEC_LOSS: i32 = 5;
/// Of 10: more costs more time than it gives quality. From 7 on libopus analyses the sound, and DTX
/// goes by that; with less it takes any steady tone for silence.
const COMPLEXITY: i32 = 7;

pub(crate) struct Encoder {
    state: NonNull<unsafe_libopus::OpusEncoder>,
    channels: usize,
    settings: Option<Settings>,
}

// SAFETY: as for the decoder.
unsafe impl Send for Encoder {}

impl Encoder {
    /// `rate` must be native, `channels` 1 or 2. None if there is no memory for it.
    pub(crate) fn new(rate: u32, channels: usize) -> Option<Self> {
        let mut error = 0;
        let application = match channels {
            1 => unsafe_libopus::OPUS_APPLICATION_VOIP,
            _ => unsafe_libopus::OPUS_APPLICATION_AUDIO,
        };
        // SAFETY: `error` outlives the call; libopus checks the other arguments.
        let state = unsafe {
            unsafe_libopus::opus_encoder_create(
                rate as i32,
                channels as i32,
                application,
                &mut error,
            )
        };
        let mut encoder = Self {
            state: NonNull::new(state)?,
            channels,
            settings: None,
        };
        encoder.set(unsafe_libopus::OPUS_SET_COMPLEXITY_REQUEST, COMPLEXITY);
        Some(encoder)
    }

    /// `pcm` is one packet's worth. None if libopus refuses.
    pub(crate) fn encode<'a>(
        &mut self,
        settings: Settings,
        pcm: &[i16],
        packet: &'a mut [u8; MAX_PACKET],
    ) -> Option<&'a [u8]> {
        self.apply(settings);
        // SAFETY: the state is valid until drop, `pcm` holds the announced number of samples, and
        // `packet` has the announced length.
        let len = unsafe {
            unsafe_libopus::opus_encode(
                self.state.as_ptr(),
                pcm.as_ptr(),
                (pcm.len() / self.channels) as i32,
                packet.as_mut_ptr(),
                MAX_PACKET as i32,
            )
        };
        packet.get(..usize::try_from(len).ok()?)
    }

    fn apply(&mut self, settings: Settings) {
        if self.settings.replace(settings) == Some(settings) {
            return;
        }
        let channels = match settings.stereo {
            true => unsafe_libopus::OPUS_AUTO,
            false => 1,
        };
        let loss = if settings.fec { FEC_LOSS } else { 0 };
        self.set(
            unsafe_libopus::OPUS_SET_BITRATE_REQUEST,
            settings.bitrate.clamp(6_000, 510_000) as i32,
        );
        self.set(unsafe_libopus::OPUS_SET_FORCE_CHANNELS_REQUEST, channels);
        self.set(
            unsafe_libopus::OPUS_SET_DTX_REQUEST,
            i32::from(settings.dtx),
        );
        self.set(
            unsafe_libopus::OPUS_SET_INBAND_FEC_REQUEST,
            i32::from(settings.fec),
        );
        self.set(unsafe_libopus::OPUS_SET_PACKET_LOSS_PERC_REQUEST, loss);
    }

    fn set(&mut self, request: i32, value: i32) {
        // SAFETY: the state is valid, and each of these requests takes one i32.
        let result =
            unsafe { unsafe_libopus::opus_encoder_ctl!(self.state.as_ptr(), request, value) };
        debug_assert_eq!(
            result,
            unsafe_libopus::OPUS_OK,
            "request {request}: {value}"
        );
    }
}

impl Drop for Encoder {
    fn drop(&mut self) {
        // SAFETY: made by `opus_encoder_create` and not used after this.
        unsafe { unsafe_libopus::opus_encoder_destroy(self.state.as_ptr()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_opus_has_no_duration_and_no_samples() {
        let mut decoder = Decoder::new(48_000, 2).unwrap();
        let mut out = Vec::new();
        // Empty; a count of frames without the byte that says it; 63 frames of 20 ms.
        for bad in [&[][..], &[0x03], &[0xfb, 0x3f]] {
            assert_eq!(ticks(bad), None, "{bad:?}");
            assert!(!decoder.decode(bad, &mut out), "{bad:?}");
        }
        assert!(out.is_empty());
    }

    #[test]
    fn silence_costs_next_to_nothing_only_if_asked() {
        let settings = |dtx| Settings {
            bitrate: 32_000,
            stereo: false,
            dtx,
            fec: false,
        };
        let mut packet = [0; MAX_PACKET];
        for (dtx, small) in [(true, true), (false, false)] {
            let mut encoder = Encoder::new(48_000, 1).unwrap();
            let mut last = 0;
            for _ in 0..50 {
                let encoded = encoder.encode(settings(dtx), &[0; 960], &mut packet);
                last = last.max(encoded.map_or(0, <[u8]>::len));
                if dtx {
                    last = encoded.map_or(0, <[u8]>::len);
                }
            }
            assert_eq!(last <= DTX_LEN, small, "{last} bytes with DTX {dtx}");
        }
    }

    #[test]
    fn a_steady_tone_is_not_silence() {
        let settings = Settings {
            bitrate: 32_000,
            stereo: false,
            dtx: true,
            fec: true,
        };
        let mut packet = [0; MAX_PACKET];
        for hertz in [60.0, 440.0] {
            let mut encoder = Encoder::new(48_000, 1).unwrap();
            for n in 0..250 {
                let at = |i: u32| f64::from(n * 960 + i) * std::f64::consts::TAU * hertz / 48_000.0;
                let tone: Vec<i16> = (0..960).map(|i| (at(i).sin() * 8000.0) as i16).collect();
                let encoded = encoder.encode(settings, &tone, &mut packet).unwrap();
                assert!(encoded.len() > DTX_LEN, "{hertz} Hz, packet {n}");
            }
        }
    }
}
