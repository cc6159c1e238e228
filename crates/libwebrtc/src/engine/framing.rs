//! Messages in a stream of bytes: datagrams with their lengths before them (RFC 4571, used by ICE
//! over TCP), and what a TURN server sends over a stream (RFC 8656, 12.5).

use std::ops::Range;

/// Longest message that is taken, far more than any datagram of a session. A longer one means that
/// the stream can't be followed any more.
pub(crate) const MAX_MESSAGE: usize = 8 << 10;
/// One unfinished message, and what came with its end.
const BUFFER: usize = 2 * MAX_MESSAGE;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Framing {
    Datagrams,
    Turn,
}

/// Where the first message lies in the bytes, and how many bytes it takes up with all that belongs
/// to it.
#[derive(Debug, PartialEq, Eq)]
struct Frame {
    message: Range<usize>,
    len: usize,
}

/// The stream can't be followed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Broken(pub &'static str);

impl Framing {
    /// None if there is not enough to tell, or the message is not complete.
    fn first(self, bytes: &[u8]) -> Result<Option<Frame>, Broken> {
        let number = |at: usize| {
            let pair = bytes.get(at..at + 2)?;
            Some(usize::from(u16::from_be_bytes([pair[0], pair[1]])))
        };
        let frame = match self {
            Framing::Datagrams => number(0).map(|len| Frame {
                message: 2..2 + len,
                len: 2 + len,
            }),
            Framing::Turn => match bytes.first().map(|first| first >> 6) {
                // A STUN message.
                Some(0) => match number(2) {
                    Some(len) if len % 4 != 0 => return Err(Broken("odd STUN length")),
                    len => len.map(|len| Frame {
                        message: 0..20 + len,
                        len: 20 + len,
                    }),
                },
                // Channel data, padded.
                Some(1) => number(2).map(|len| Frame {
                    message: 0..4 + len,
                    len: 4 + len.next_multiple_of(4),
                }),
                Some(_) => return Err(Broken("neither STUN nor channel data")),
                None => None,
            },
        };
        match frame {
            Some(frame) if frame.len > MAX_MESSAGE => Err(Broken("message too long")),
            Some(frame) if frame.len <= bytes.len() => Ok(Some(frame)),
            _ => Ok(None),
        }
    }

    /// Appends a message as it goes into the stream. False if it is too long for that.
    pub(crate) fn append(self, message: &[u8], stream: &mut Vec<u8>) -> bool {
        if message.len() + 2 > MAX_MESSAGE {
            return false;
        }
        match self {
            Framing::Datagrams => {
                stream.extend_from_slice(&(message.len() as u16).to_be_bytes());
                stream.extend_from_slice(message);
            }
            Framing::Turn => {
                stream.extend_from_slice(message);
                let padding = message.len().next_multiple_of(4) - message.len();
                stream.extend_from_slice(&[0; 3][..padding]);
            }
        }
        true
    }
}

/// Bytes as they come from a stream, cut into messages.
pub(crate) struct Inbound {
    framing: Framing,
    bytes: Box<[u8]>,
    filled: Range<usize>,
}

impl Inbound {
    pub(crate) fn new(framing: Framing) -> Self {
        Self {
            framing,
            bytes: vec![0; BUFFER].into(),
            filled: 0..0,
        }
    }

    /// Where to read into; never empty once all messages have been taken.
    pub(crate) fn space(&mut self) -> &mut [u8] {
        if self.filled.is_empty() {
            self.filled = 0..0;
        } else if self.filled.end > BUFFER - MAX_MESSAGE {
            self.bytes.copy_within(self.filled.clone(), 0);
            self.filled = 0..self.filled.len();
        }
        &mut self.bytes[self.filled.end..]
    }

    /// So many bytes were read into the space.
    pub(crate) fn fill(&mut self, len: usize) {
        self.filled.end = (self.filled.end + len).min(BUFFER);
    }

    /// Takes the next complete message.
    pub(crate) fn next(&mut self) -> Result<Option<&[u8]>, Broken> {
        let bytes = &self.bytes[self.filled.clone()];
        let Some(frame) = self.framing.first(bytes)? else {
            return Ok(None);
        };
        self.filled.start += frame.len;
        Ok(Some(&bytes[frame.message]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_messages() {
        use Framing::{Datagrams, Turn};
        let whole = |message, len| Ok(Some(Frame { message, len }));
        let mut stun = vec![0, 1, 0, 4];
        stun.resize(24, 7);
        for (framing, bytes, expected) in [
            (Datagrams, &[][..], Ok(None)),
            (Datagrams, &[0], Ok(None)),
            (Datagrams, &[0, 0], whole(2..2, 2)),
            (Datagrams, &[0, 2, 7], Ok(None)),
            (Datagrams, &[0, 2, 7, 8, 9], whole(2..4, 4)),
            (Datagrams, &[0xff, 0xff], Err(Broken("message too long"))),
            (Turn, &[], Ok(None)),
            (Turn, &[0x40], Ok(None)),
            (Turn, &[0x40, 0, 0, 0], whole(0..4, 4)),
            (Turn, &[0x40, 0, 0, 1, 9], Ok(None)),
            (Turn, &[0x40, 0, 0, 1, 9, 0, 0, 0], whole(0..5, 8)),
            (Turn, &[0x7f, 0, 0xff, 0], Err(Broken("message too long"))),
            (Turn, &[0x80], Err(Broken("neither STUN nor channel data"))),
            (
                Turn,
                &[0xff; 4],
                Err(Broken("neither STUN nor channel data")),
            ),
            (Turn, &[0, 1, 0, 3], Err(Broken("odd STUN length"))),
            (Turn, &stun[..23], Ok(None)),
            (Turn, &stun, whole(0..24, 24)),
        ] {
            assert_eq!(framing.first(bytes), expected, "{framing:?} {bytes:?}");
        }
    }

    /// Reproducible numbers (splitmix64).
    fn numbers(mut state: u64) -> impl FnMut() -> u64 {
        move || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^ (mixed >> 31)
        }
    }

    #[test]
    fn messages_survive_any_cutting_of_the_stream() {
        for seed in 0..200 {
            let mut number = numbers(seed);
            let framing = [Framing::Datagrams, Framing::Turn][seed as usize % 2];
            let messages: Vec<Vec<u8>> = (0..50)
                .map(|_| {
                    let len = number() as usize % (MAX_MESSAGE - 32);
                    let mut message: Vec<u8> = (0..len).map(|_| number() as u8).collect();
                    if framing == Framing::Turn {
                        // As channel data.
                        let mut framed = vec![0x40, 1];
                        framed.extend_from_slice(&(len as u16).to_be_bytes());
                        framed.append(&mut message);
                        message = framed;
                    }
                    message
                })
                .collect();
            let mut stream = Vec::new();
            for message in &messages {
                assert!(framing.append(message, &mut stream));
            }
            let (mut inbound, mut rest, mut seen) = (Inbound::new(framing), &stream[..], vec![]);
            while !rest.is_empty() {
                let space = inbound.space();
                assert!(!space.is_empty());
                let len = (number() as usize % 3000 + 1)
                    .min(rest.len())
                    .min(space.len());
                space[..len].copy_from_slice(&rest[..len]);
                inbound.fill(len);
                rest = &rest[len..];
                while let Some(message) = inbound.next().unwrap() {
                    seen.push(message.to_vec());
                }
            }
            assert!(seen == messages, "seed {seed}");
        }
    }

    #[test]
    fn noise_never_panics_and_never_grows() {
        for seed in 0..2000 {
            let mut number = numbers(seed);
            let framing = [Framing::Datagrams, Framing::Turn][seed as usize % 2];
            let mut inbound = Inbound::new(framing);
            'stream: for _ in 0..100 {
                let space = inbound.space();
                assert!(!space.is_empty());
                let len = number() as usize % (space.len() + 1);
                space[..len].fill_with(|| (number() >> (number() % 8)) as u8 & 0x4f);
                inbound.fill(len);
                loop {
                    match inbound.next() {
                        Ok(Some(message)) => assert!(message.len() <= MAX_MESSAGE),
                        Ok(None) => break,
                        Err(_) => break 'stream,
                    }
                }
            }
            assert_eq!(inbound.bytes.len(), BUFFER);
        }
    }

    #[test]
    fn what_is_too_long_is_not_sent() {
        let mut stream = Vec::new();
        assert!(!Framing::Datagrams.append(&[0; MAX_MESSAGE], &mut stream));
        assert!(stream.is_empty());
    }
}
