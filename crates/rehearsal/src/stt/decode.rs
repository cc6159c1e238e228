//! Audio as it comes over the socket -> 48 kHz mono PCM, a bounded piece at a time.

use std::ptr::NonNull;

use ogg::reading::{BasePacketReader, PageParser};
use unsafe_libopus::{OPUS_INVALID_PACKET, opus_decode, opus_decoder_create, opus_decoder_destroy};

use super::vad::SAMPLE_RATE;

/// Longest Opus packet (RFC 6716, 3.2.5): 120 ms.
const MAX_OPUS_SAMPLES: usize = SAMPLE_RATE as usize * 120 / 1000;
/// Longest packet within Ogg, over all pages that it spans; only comments can be long.
const MAX_OGG_PACKET: usize = 256 * 1024;
/// Fixed part of an Ogg page's header (RFC 3533, 6).
const OGG_HEADER: usize = 27;
/// Input frames of raw PCM that one step converts.
const PCM_STEP: usize = 4096;

/// How the client said that its audio is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// Nothing was said: the audio is in a container. Ogg-Opus is the one that is understood.
    Container,
    /// 16-bit little-endian PCM, channels interleaved.
    Linear16 { sample_rate: u32, channels: u32 },
    /// One Opus packet a message.
    Opus,
}

/// Why audio cannot be decoded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DecodeError {
    #[error("not a container that this server knows")]
    UnknownContainer,
    #[error("damaged Ogg: {0}")]
    Ogg(String),
    #[error("not Opus, or of a kind that this server doesn't know")]
    NotOpus,
    #[error("damaged Opus packet ({0})")]
    OpusPacket(i32),
    #[error("no Opus decoder ({0})")]
    NoDecoder(i32),
}

/// Feed it with [`push`](Self::push), then call [`next`](Self::next) until it gives nothing more.
pub(super) enum Decoder {
    Ogg(Box<OggOpus>),
    Linear16(Linear16),
    Opus(RawOpus),
}

impl Decoder {
    pub(super) fn new(format: Format) -> Result<Self, DecodeError> {
        Ok(match format {
            Format::Container => Self::Ogg(Box::default()),
            Format::Linear16 {
                sample_rate,
                channels,
            } => Self::Linear16(Linear16::new(sample_rate, channels)),
            Format::Opus => Self::Opus(RawOpus {
                packet: None,
                decoder: OpusDecoder::new()?,
            }),
        })
    }

    /// Takes one binary message.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        match self {
            Self::Ogg(ogg) => ogg.buffer.extend_from_slice(bytes),
            Self::Linear16(pcm) => pcm.buffer.extend_from_slice(bytes),
            Self::Opus(raw) => raw.packet = Some(bytes.to_vec()),
        }
    }

    /// Appends the next piece of audio to `pcm`; `false` if more input is needed. A piece is no
    /// longer than 120 ms of Opus or 4096 frames of PCM input.
    pub(super) fn next(&mut self, pcm: &mut Vec<i16>) -> Result<bool, DecodeError> {
        match self {
            Self::Ogg(ogg) => ogg.next(pcm),
            Self::Linear16(linear) => Ok(linear.next(pcm)),
            Self::Opus(raw) => match raw.packet.take() {
                Some(packet) => raw.decoder.decode(&packet, pcm).map(|()| true),
                None => Ok(false),
            },
        }
    }
}

/// Raw Opus: the message is the packet.
pub(super) struct RawOpus {
    packet: Option<Vec<u8>>,
    decoder: OpusDecoder,
}

/// Ogg-Opus (RFC 7845), one logical stream at a time; streams may be chained.
#[derive(Default)]
pub(super) struct OggOpus {
    /// Input that no page has been made of yet.
    buffer: Vec<u8>,
    /// How much of `buffer` has been used.
    used: usize,
    stream: Option<OggStream>,
}

struct OggStream {
    serial: [u8; 4],
    packets: BasePacketReader,
    /// Bytes of pages since a packet was last completed.
    incomplete: usize,
    /// Decoder, once OpusHead has come.
    decoder: Option<OpusDecoder>,
    tags_seen: bool,
    /// Samples still to be dropped from the start.
    pre_skip: usize,
}

impl OggOpus {
    fn next(&mut self, pcm: &mut Vec<i16>) -> Result<bool, DecodeError> {
        loop {
            if let Some(stream) = &mut self.stream
                && let Some(packet) = stream.packets.read_packet()
            {
                stream.incomplete = 0;
                if stream.packet(&packet.data, pcm)? {
                    return Ok(true);
                }
                continue;
            }
            if !self.next_page()? {
                self.buffer.drain(..self.used);
                self.used = 0;
                return Ok(false);
            }
        }
    }

    /// Moves one page from the buffer into the packet reader.
    fn next_page(&mut self) -> Result<bool, DecodeError> {
        let input = &self.buffer[self.used..];
        let known = input.len().min(4);
        if input[..known] != b"OggS"[..known] {
            return Err(if self.stream.is_none() {
                DecodeError::UnknownContainer
            } else {
                DecodeError::Ogg("page lost its capture pattern".to_owned())
            });
        }
        let Some(header) = input.first_chunk::<OGG_HEADER>() else {
            return Ok(false);
        };
        let (mut parser, segments) = PageParser::new(*header).map_err(ogg_error)?;
        let Some(table) = input.get(OGG_HEADER..OGG_HEADER + segments) else {
            return Ok(false);
        };
        let body = parser.parse_segments(table.to_vec());
        let start = OGG_HEADER + segments;
        let Some(data) = input.get(start..start + body) else {
            return Ok(false);
        };
        let page = parser.parse_packet_data(data.to_vec()).map_err(ogg_error)?;

        let (begins, serial) = (header[5] & 2 != 0, [14, 15, 16, 17].map(|i| header[i]));
        self.used += start + body;
        if begins {
            self.stream = Some(OggStream {
                serial,
                packets: BasePacketReader::new(),
                incomplete: 0,
                decoder: None,
                tags_seen: false,
                pre_skip: 0,
            });
        }
        let stream = self
            .stream
            .as_mut()
            .filter(|stream| stream.serial == serial)
            .ok_or_else(|| DecodeError::Ogg("page of a stream that never began".to_owned()))?;
        stream.incomplete += body;
        if stream.incomplete > MAX_OGG_PACKET {
            return Err(DecodeError::Ogg("packet is too long".to_owned()));
        }
        stream.packets.push_page(page).map_err(ogg_error)?;
        Ok(true)
    }
}

impl OggStream {
    /// Takes one packet; `true` if it was audio.
    fn packet(&mut self, data: &[u8], pcm: &mut Vec<i16>) -> Result<bool, DecodeError> {
        let Some(decoder) = &mut self.decoder else {
            self.pre_skip = parse_opus_head(data)?;
            self.decoder = Some(OpusDecoder::new()?);
            return Ok(false);
        };
        if !self.tags_seen {
            if !data.starts_with(b"OpusTags") {
                return Err(DecodeError::NotOpus);
            }
            self.tags_seen = true;
            return Ok(false);
        }
        let before = pcm.len();
        decoder.decode(data, pcm)?;
        let skipped = self.pre_skip.min(pcm.len() - before);
        pcm.drain(before..before + skipped);
        self.pre_skip -= skipped;
        Ok(true)
    }
}

/// The pre-skip of an identification header (RFC 7845, 5.1).
fn parse_opus_head(data: &[u8]) -> Result<usize, DecodeError> {
    let head = data
        .strip_prefix(b"OpusHead")
        .and_then(|rest| rest.first_chunk::<11>())
        .ok_or(DecodeError::NotOpus)?;
    let (version, channels, mapping_family) = (head[0], head[1], head[10]);
    if version & 0xf0 != 0 || !matches!(channels, 1 | 2) || mapping_family != 0 {
        return Err(DecodeError::NotOpus);
    }
    Ok(usize::from(u16::from_le_bytes([head[2], head[3]])))
}

fn ogg_error(error: ogg::OggReadError) -> DecodeError {
    DecodeError::Ogg(error.to_string())
}

/// 16-bit PCM at any rate.
pub(super) struct Linear16 {
    buffer: Vec<u8>,
    /// Bytes of one frame: a sample of each channel.
    frame: usize,
    resampler: Resampler,
}

impl Linear16 {
    fn new(sample_rate: u32, channels: u32) -> Self {
        Self {
            buffer: Vec::new(),
            frame: 2 * channels.max(1) as usize,
            resampler: Resampler::new(sample_rate),
        }
    }

    fn next(&mut self, pcm: &mut Vec<i16>) -> bool {
        let frames = (self.buffer.len() / self.frame).min(PCM_STEP);
        if frames == 0 {
            return false;
        }
        let bytes = frames * self.frame;
        for frame in self.buffer[..bytes].chunks_exact(self.frame) {
            let sum: i32 = frame
                .chunks_exact(2)
                .map(|sample| i32::from(i16::from_le_bytes([sample[0], sample[1]])))
                .sum();
            let mean = sum / (self.frame / 2) as i32;
            self.resampler.push(mean as i16, pcm);
        }
        self.buffer.drain(..bytes);
        true
    }
}

/// Linear interpolation: enough for a level meter, and exact in the number of samples.
struct Resampler {
    rate: u64,
    taken: u64,
    given: u64,
    last: Option<i16>,
}

impl Resampler {
    fn new(rate: u32) -> Self {
        Self {
            rate: u64::from(rate.max(1)),
            taken: 0,
            given: 0,
            last: None,
        }
    }

    fn push(&mut self, sample: i16, pcm: &mut Vec<i16>) {
        let full = u64::from(SAMPLE_RATE);
        if self.rate == full {
            pcm.push(sample);
            return;
        }
        let from = i64::from(self.last.unwrap_or(sample));
        self.last = Some(sample);
        self.taken += 1;
        // Output n lies n * rate / full input samples after the start, less the one sample by
        // which interpolating holds everything back.
        while self.given * self.rate < self.taken * full {
            let fraction = self.given * self.rate + full - self.taken * full;
            let step = (i64::from(sample) - from) * fraction as i64 / full as i64;
            pcm.push((from + step) as i16);
            self.given += 1;
        }
        // Anew each second, so that the counts cannot overflow.
        if self.taken == self.rate {
            (self.taken, self.given) = (0, 0);
        }
    }
}

/// libopus, decoding to mono whatever the stream has.
pub(crate) struct OpusDecoder {
    state: NonNull<unsafe_libopus::OpusDecoder>,
    scratch: Box<[i16; MAX_OPUS_SAMPLES]>,
}

// SAFETY: the state is owned by this value alone and libopus keeps none of it elsewhere.
unsafe impl Send for OpusDecoder {}

impl OpusDecoder {
    pub(crate) fn new() -> Result<Self, DecodeError> {
        let mut error = 0;
        // SAFETY: `error` outlives the call; rate and channel count are valid.
        let state = unsafe { opus_decoder_create(SAMPLE_RATE as i32, 1, &mut error) };
        Ok(Self {
            state: NonNull::new(state).ok_or(DecodeError::NoDecoder(error))?,
            scratch: Box::new([0; MAX_OPUS_SAMPLES]),
        })
    }

    pub(crate) fn decode(&mut self, packet: &[u8], pcm: &mut Vec<i16>) -> Result<(), DecodeError> {
        // An empty packet would be taken for a lost one, of any length.
        let len = i32::try_from(packet.len())
            .ok()
            .filter(|&len| len > 0)
            .ok_or(DecodeError::OpusPacket(OPUS_INVALID_PACKET))?;
        // SAFETY: the state is valid until drop; `packet` has `len` bytes and `scratch` room for
        // the samples announced, which libopus does not exceed.
        let decoded = unsafe {
            opus_decode(
                self.state.as_ptr(),
                packet.as_ptr(),
                len,
                self.scratch.as_mut_ptr(),
                MAX_OPUS_SAMPLES as i32,
                0,
            )
        };
        let samples = usize::try_from(decoded)
            .ok()
            .and_then(|samples| self.scratch.get(..samples))
            .ok_or(DecodeError::OpusPacket(decoded))?;
        pcm.extend_from_slice(samples);
        Ok(())
    }
}

impl Drop for OpusDecoder {
    fn drop(&mut self) {
        // SAFETY: made by `opus_decoder_create` and not used after this.
        unsafe { opus_decoder_destroy(self.state.as_ptr()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(format: Format, messages: &[&[u8]]) -> Result<Vec<i16>, DecodeError> {
        let mut decoder = Decoder::new(format)?;
        let mut pcm = Vec::new();
        for message in messages {
            decoder.push(message);
            while decoder.next(&mut pcm)? {}
        }
        Ok(pcm)
    }

    fn linear16(sample_rate: u32, channels: u32) -> Format {
        Format::Linear16 {
            sample_rate,
            channels,
        }
    }

    #[test]
    fn linear16_of_every_rate_keeps_its_length_and_level() {
        for rate in [8000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000] {
            let bytes: Vec<u8> = std::iter::repeat_n(1000_i16.to_le_bytes(), 3 * rate as usize)
                .flatten()
                .collect();
            let pcm = decode(linear16(rate, 1), &[&bytes]).expect("PCM");
            assert_eq!(pcm.len(), 144_000, "{rate} Hz");
            assert!(pcm[100..].iter().all(|&s| s == 1000), "{rate} Hz");
        }
    }

    #[test]
    fn linear16_may_be_cut_anywhere_and_channels_are_averaged() {
        let frame: Vec<u8> = [1000_i16, 3000]
            .iter()
            .flat_map(|s| s.to_le_bytes())
            .collect();
        let bytes = frame.repeat(100);
        let cut: Vec<&[u8]> = bytes.chunks(3).collect();
        let pcm = decode(linear16(48_000, 2), &cut).expect("PCM");
        assert_eq!(pcm, vec![2000; 100]);
    }

    #[test]
    fn what_is_not_ogg_is_refused_at_the_first_byte_that_differs() {
        for input in [&b"RIFF"[..], b"Og_", b"\0"] {
            assert_eq!(
                decode(Format::Container, &[input]),
                Err(DecodeError::UnknownContainer)
            );
        }
        assert_eq!(decode(Format::Container, &[b"Og", b"gS"]), Ok(Vec::new()));
    }

    /// One page, its packets as they are.
    fn page(serial: u32, flags: u8, sequence: u32, packets: &[&[u8]]) -> Vec<u8> {
        use ogg::writing::{PacketWriteEndInfo, PacketWriter};
        // The writer sets flags and sequence by itself; only a continued packet needs more.
        assert!(flags == 0 || flags == 2);
        let mut file = Vec::new();
        let mut writer = PacketWriter::new(&mut file);
        if flags == 0 {
            // Uses up the first page of the stream, which has the flag.
            writer
                .write_packet(&b"x"[..], serial, PacketWriteEndInfo::EndPage, 0)
                .expect("written");
        }
        let skipped = writer.inner_mut().len();
        for (index, packet) in packets.iter().enumerate() {
            let end = if index + 1 == packets.len() {
                PacketWriteEndInfo::EndPage
            } else {
                PacketWriteEndInfo::NormalPacket
            };
            writer
                .write_packet(packet.to_vec(), serial, end, u64::from(sequence))
                .expect("written");
        }
        drop(writer);
        file.split_off(skipped)
    }

    fn opus_head(channels: u8, pre_skip: u16) -> Vec<u8> {
        let mut head = b"OpusHead".to_vec();
        head.extend([1, channels]);
        head.extend(pre_skip.to_le_bytes());
        head.extend([0x80, 0xbb, 0, 0, 0, 0, 0]);
        head
    }

    /// 20 ms of silence: CELT, fullband, no data (RFC 6716, 3.1).
    const SILENT_PACKET: &[u8] = &[0xfc, 0xff, 0xfe];
    const TAGS: &[u8] = b"OpusTags\0\0\0\0\0\0\0\0";

    #[test]
    fn pre_skip_is_dropped_once_and_chained_streams_go_on() {
        let link = |serial| {
            let mut link = page(serial, 2, 0, &[&opus_head(2, 1500)]);
            link.extend(page(serial, 0, 1, &[TAGS]));
            link.extend(page(serial, 0, 2, &[SILENT_PACKET; 3]));
            link
        };
        let pcm = decode(Format::Container, &[&link(1), &link(2)]).expect("audio");
        assert_eq!(pcm.len(), 2 * (3 * 960 - 1500));
    }

    #[test]
    fn pages_of_strangers_and_packets_without_end_are_refused() {
        let begin = page(1, 2, 0, &[&opus_head(1, 0)]);
        let stranger = page(2, 0, 1, &[TAGS]);
        assert!(matches!(
            decode(Format::Container, &[&begin, &stranger]),
            Err(DecodeError::Ogg(_))
        ));
        // Comments that never end, over as many pages as they need.
        let endless = page(1, 0, 1, &[&vec![b'O'; 2 * MAX_OGG_PACKET]]);
        assert!(matches!(
            decode(Format::Container, &[&begin, &endless]),
            Err(DecodeError::Ogg(_))
        ));
    }

    #[test]
    fn other_kinds_of_opus_are_refused() {
        let mut surround = opus_head(1, 0);
        surround[18] = 1;
        for head in [
            opus_head(0, 0),
            opus_head(3, 0),
            surround,
            b"OpusHead".to_vec(),
        ] {
            let begin = page(1, 2, 0, &[&head]);
            assert_eq!(
                decode(Format::Container, &[&begin]),
                Err(DecodeError::NotOpus)
            );
        }
    }

    #[test]
    fn damaged_opus_is_an_error() {
        assert!(decode(Format::Opus, &[b""]).is_err());
        // Code 3 with a frame count of zero (RFC 6716, 3.2.5).
        assert!(decode(Format::Opus, &[&[0x03, 0x00]]).is_err());
    }

    #[test]
    fn random_packets_never_panic() {
        use rand::{Rng as _, SeedableRng as _};
        let mut random = rand::rngs::StdRng::seed_from_u64(7);
        let mut decoder = Decoder::new(Format::Opus).expect("decoder");
        let mut pcm = Vec::new();
        for _ in 0..3000 {
            let mut packet = vec![0; random.random_range(0..200)];
            random.fill(packet.as_mut_slice());
            decoder.push(&packet);
            pcm.clear();
            while decoder.next(&mut pcm).is_ok_and(|more| more) {}
        }
    }
}
