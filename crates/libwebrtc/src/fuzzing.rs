//! What is fuzzed (`fuzz/`): each function takes any bytes, and panics if what it tries does not
//! hold. Ordinary tests replay the corpus, and seeded random bytes.

use std::time::{Duration, Instant};

use crate::{
    engine::{
        framing::{Framing, Inbound},
        sdp, servers,
    },
    opus::{self, Decoder},
    peer_connection_factory::IceServer,
    playout::{Packet, Playout},
};

/// Descriptions: text that is rewritten says the same, and rewritten again it stays as it is.
pub fn description(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let sections = sdp::sections(&text);
    sdp::candidates(&text).for_each(drop);
    let once = sdp::rewrite(&text, |_| None);
    let again = sdp::sections(&once);
    assert_eq!(sections.len(), again.len());
    for (before, after) in sections.iter().zip(&again) {
        assert_eq!((before.kind, before.mid), (after.kind, after.mid));
        assert_eq!(before.direction, after.direction);
        if before.direction.sends() {
            assert_eq!((&before.msid, &before.ssrcs), (&after.msid, &after.ssrcs));
        }
    }
    assert_eq!(sdp::rewrite(&once, |_| None), once);
    // Whatever an offer adds to a last answer, no section of it is lost or there twice.
    let halves = (text.get(..text.len() / 2), text.get(text.len() / 2..));
    if let (Some(last), Some(more)) = halves {
        let offer = format!("{last}\r\n{more}");
        let last = sdp::rewrite(last, |_| None);
        if let Some(answer) = sdp::unchanged(&offer, &last) {
            let expected = sdp::sections(&offer).len();
            assert_eq!(sdp::sections(&answer).len(), expected);
        }
    }
}

/// What comes over a stream, in pieces: what is put in comes out, and what makes no sense is told.
pub fn stream(data: &[u8]) {
    for framing in [Framing::Datagrams, Framing::Turn] {
        pieces(framing, data, |_| {});

        // Of channel data as much as each first byte says; datagrams may be anything.
        let mut messages: Vec<Vec<u8>> = Vec::new();
        let mut rest = data;
        while let Some((length, following)) = rest.split_first() {
            let (payload, next) = following.split_at(following.len().min((*length).into()));
            rest = next;
            messages.push(match framing {
                Framing::Datagrams => payload.to_vec(),
                Framing::Turn => [&[0x40, 0, 0, payload.len() as u8], payload].concat(),
            });
        }
        let mut stream = Vec::new();
        for message in &messages {
            assert!(framing.append(message, &mut stream));
        }
        let mut expected = messages.iter();
        assert!(pieces(framing, &stream, |message| {
            assert_eq!(Some(message), expected.next().map(Vec::as_slice));
        }));
        assert_eq!(expected.next(), None);
    }
}

/// Reads in pieces of growing length. Returns whether the stream could be followed.
fn pieces(framing: Framing, mut data: &[u8], mut take: impl FnMut(&[u8])) -> bool {
    let mut inbound = Inbound::new(framing);
    for length in (1..).map(|n| n * n) {
        if data.is_empty() {
            break;
        }
        let space = inbound.space();
        let length = space.len().min(length).min(data.len());
        assert!(length > 0, "no room");
        let (piece, rest) = data.split_at(length);
        space[..length].copy_from_slice(piece);
        data = rest;
        inbound.fill(length);
        loop {
            match inbound.next() {
                Ok(Some(message)) => take(message),
                Ok(None) => break,
                Err(_) => return false,
            }
        }
    }
    true
}

/// URLs of servers: what is taken is a host and a port.
pub fn server(data: &[u8]) {
    let url = String::from_utf8_lossy(data).into_owned();
    let config = IceServer {
        urls: vec![url.clone(), format!("turn:{url}"), format!("stun:[{url}]")],
        username: String::new(),
        password: String::new(),
    };
    let (usable, refused) = servers::servers(&[config]);
    assert_eq!(usable.len() + refused.len(), 3);
    for server in usable {
        let target = &server.target;
        assert!(target.port > 0 && !target.host.is_empty());
        assert!(target.host.is_ascii() && !target.host.contains(['/', '@', ' ', '[', ']']));
    }
}

/// Packets: as much comes out as a packet says that it holds, or nothing.
pub fn opus(data: &[u8]) {
    let mut decoders = [(8_000, 1), (16_000, 1), (48_000, 2)]
        .map(|(rate, channels)| Decoder::new(rate, channels).expect("memory"));
    let mut rest = data;
    while let Some((length, following)) = rest.split_first() {
        let (packet, next) = following.split_at(following.len().min((*length).into()));
        rest = next;
        for decoder in &mut decoders {
            let mut out = Vec::new();
            let decoded = decoder.decode(packet, &mut out);
            let ticks = opus::ticks(packet).filter(|_| decoded).unwrap_or(0);
            assert_eq!(out.len(), decoder.samples(ticks));
            if opus::repeats(packet)
                && let Some(ticks) = opus::ticks(packet)
            {
                decoder.recover(packet, ticks, &mut out);
            }
        }
    }
}

/// The jitter buffer, a packet and a pull every 12 bytes: whatever arrives, what comes out is in
/// step with the time that passed, give or take the five seconds by which a sender's first packet
/// may have been late, and there is an end.
pub fn playout(data: &[u8]) {
    let start = Instant::now();
    let mut now = start;
    let mut playout = Playout::new(16_000, 1).expect("memory");
    let mut frames = 0;
    for step in data.chunks_exact(12) {
        now += Duration::from_millis(u64::from(step[0]) / 4);
        let far = step[1] < 8;
        let number = |bytes: &[u8]| bytes.iter().fold(0, |n, b| n << 8 | u32::from(*b));
        playout.push(Packet {
            payload: step[6..6 + usize::from(step[2] % 7)].into(),
            timestamp: number(if far { &step[2..6] } else { &step[3..5] }),
            sequence: number(&step[4..6]).into(),
            ssrc: u32::from(step[5] < 4),
            arrival: now,
        });
        while playout.pull(now).is_some() {
            frames += 1;
        }
        assert!(playout.deadline().is_none_or(|deadline| deadline > now));
    }
    let elapsed = (now - start).as_millis();
    assert!(
        frames <= elapsed / 10 + 500,
        "{frames} frames in {elapsed} ms"
    );
    playout.finish();
    let far = now + Duration::from_secs(3600);
    while playout.pull(far).is_some() {
        frames += 1;
        assert!(frames < 400_000, "no end");
    }
    assert_eq!(playout.deadline(), None);
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    fn replay(target: &str, run: fn(&[u8])) {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("fuzz/corpus")
            .join(target);
        let mut files = 0;
        for entry in fs::read_dir(corpus).unwrap() {
            run(&fs::read(entry.unwrap().path()).unwrap());
            files += 1;
        }
        assert!(files > 0, "no corpus");
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        for round in 0..60 {
            let bytes = (0..round * 40).map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 56) as u8
            });
            run(&bytes.collect::<Vec<_>>());
        }
    }

    #[test]
    fn descriptions() {
        replay("description", description);
    }

    #[test]
    fn streams() {
        replay("stream", stream);
    }

    #[test]
    fn servers_of_a_configuration() {
        replay("server", server);
    }

    #[test]
    fn opus_packets() {
        replay("opus", opus);
    }

    #[test]
    fn arrivals() {
        replay("playout", playout);
    }
}
