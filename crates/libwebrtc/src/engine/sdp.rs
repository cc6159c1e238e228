//! The bits of SDP that the stack does not show, or prints otherwise than peers expect.

use std::{borrow::Cow, fmt::Write};

use crate::{
    rtp_receiver::Msid, rtp_sender::Wish, rtp_transceiver::RtpTransceiverDirection as Direction,
};

/// What a media section says. Unknown lines are skipped; what is missing has its default.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Section<'a> {
    /// `audio`, `video`, `application`...
    pub kind: &'a str,
    pub mid: &'a str,
    /// Port 0: refused, or stopped.
    pub rejected: bool,
    pub direction: Direction,
    pub msid: Option<Msid>,
    pub ssrcs: Vec<u32>,
    /// Of the Opus that is to be sent there.
    pub wish: Wish,
}

pub(crate) fn sections(sdp: &str) -> Vec<Section<'_>> {
    let mut sections: Vec<Section> = Vec::new();
    // Payload type of Opus in the present section.
    let mut opus = None;
    for line in sdp.lines() {
        if let Some(media) = line.strip_prefix("m=") {
            let mut words = media.split(' ');
            sections.push(Section {
                kind: words.next().unwrap_or_default(),
                mid: "",
                rejected: words.next() == Some("0"),
                direction: Direction::SendRecv,
                msid: None,
                ssrcs: Vec::new(),
                wish: Wish::default(),
            });
            opus = None;
            continue;
        }
        let Some(section) = sections.last_mut() else {
            continue;
        };
        if let Some(direction) = direction(line) {
            section.direction = direction;
        } else if let Some(mid) = line.strip_prefix("a=mid:") {
            section.mid = mid.trim_end();
        } else if let Some(msid) = line.strip_prefix("a=msid:") {
            let (stream, track) = msid
                .trim_end()
                .split_once(' ')
                .unwrap_or((msid.trim_end(), ""));
            section.msid = Some(Msid {
                stream: stream.to_owned(),
                track: track.to_owned(),
            });
        } else if let Some(ssrc) = line.strip_prefix("a=ssrc:")
            && let Some(Ok(ssrc)) = ssrc.split(' ').next().map(str::parse)
            && section.ssrcs.len() < MAX_SSRCS
            && !section.ssrcs.contains(&ssrc)
        {
            section.ssrcs.push(ssrc);
        } else if let Some((pt, codec)) = attribute(line, "a=rtpmap:")
            && codec.starts_with("opus/")
        {
            opus = opus.or(Some(pt));
        } else if let Some((pt, parameters)) = attribute(line, "a=fmtp:")
            && opus == Some(pt)
        {
            section.wish = wish(parameters);
        }
    }
    sections
}

/// A payload type and what is said of it.
fn attribute<'a>(line: &'a str, name: &str) -> Option<(&'a str, &'a str)> {
    line.strip_prefix(name)?.trim_end().split_once(' ')
}

fn wish(parameters: &str) -> Wish {
    let mut wish = Wish::default();
    for parameter in parameters.split(';') {
        match parameter.trim().split_once('=') {
            Some(("stereo", value)) => wish.stereo = value == "1",
            Some(("usedtx", value)) => wish.dtx = value == "1",
            Some(("useinbandfec", value)) => wish.fec = value == "1",
            Some(("maxaveragebitrate", value)) => wish.max_bitrate = value.parse().ok(),
            _ => {}
        }
    }
    wish
}

/// Of a section, where a peer has two.
const MAX_SSRCS: usize = 64;

/// The text without the candidates beyond so many, which the stack would take, and compare each with
/// each.
pub(super) fn with_few_candidates(sdp: &str, most: usize) -> Cow<'_, str> {
    if candidates(sdp).nth(most).is_none() {
        return sdp.into();
    }
    let mut seen = 0;
    let kept = sdp.split_inclusive('\n').filter(|line| {
        let is_candidate = line.starts_with("a=candidate:");
        seen += usize::from(is_candidate);
        !is_candidate || seen <= most
    });
    kept.collect::<String>().into()
}

/// The values of all `a=candidate` lines, from `candidate:` on.
pub(crate) fn candidates(sdp: &str) -> impl Iterator<Item = &str> {
    sdp.lines()
        .filter_map(|line| line.strip_prefix("a="))
        .filter(|l| l.starts_with("candidate:"))
}

/// The ICE user name of the first section, as all are bundled; another one is a restart of ICE.
pub(super) fn ufrag(sdp: &str) -> Option<&str> {
    sdp.lines()
        .find_map(|line| line.strip_prefix("a=ice-ufrag:"))
        .map(str::trim_end)
}

/// How a section of a local description is to look.
pub(crate) struct Shown {
    pub direction: Direction,
    /// Replaces the one in the text, if the section sends.
    pub msid: Option<Msid>,
}

/// Rewrites a local description that the stack printed. It names a track in every section, and
/// servers would take one in a section that does not send for a publication.
pub(crate) fn rewrite(sdp: &str, shown: impl Fn(&str) -> Option<Shown>) -> String {
    let mut sections = sections(sdp)
        .into_iter()
        .map(|section| {
            shown(section.mid).unwrap_or(Shown {
                direction: section.direction,
                msid: None,
            })
        })
        .collect::<Vec<_>>()
        .into_iter();
    let mut section: Option<Shown> = None;
    let mut out = String::with_capacity(sdp.len());
    for line in sdp.lines() {
        if line.starts_with("m=") {
            section = sections.next();
        }
        let Some(section) = &section else {
            let _ = write!(out, "{line}\r\n");
            continue;
        };
        let is_msid = line.starts_with("a=msid:");
        let is_source = line.starts_with("a=ssrc:") || line.starts_with("a=ssrc-group:");
        let _ = if (is_msid || is_source) && !section.direction.sends() {
            Ok(())
        } else if direction(line).is_some() {
            write!(out, "a={}\r\n", name(section.direction))
        } else {
            match &section.msid {
                Some(msid) if is_msid => write!(out, "a=msid:{} {}\r\n", msid.stream, msid.track),
                // The same once more in another form, obsolete.
                Some(_) if is_source && line.contains(" msid:") => Ok(()),
                _ => write!(out, "{line}\r\n"),
            }
        };
    }
    out
}

/// The answer to `offer` of a peer that leaves everything as it was in its `last` answer: what the
/// offer adds to it is inactive. None if the offer adds nothing.
pub(crate) fn unchanged(offer: &str, last: &str) -> Option<String> {
    let known = sections(last).len();
    let added: Vec<&str> = sections(offer).iter().skip(known).map(|s| s.mid).collect();
    if added.is_empty() {
        return None;
    }
    // Of the transport, not of a section: the sections are bundled.
    let transport = |line: &&str| {
        let names = ["a=ice-", "a=fingerprint:", "a=setup:"];
        names.iter().any(|name| line.starts_with(name))
    };
    let first: Vec<&str> = last
        .lines()
        .skip_while(|line| !line.starts_with("m="))
        .skip(1)
        .take_while(|line| !line.starts_with("m="))
        .filter(transport)
        .collect();

    let mut out = String::with_capacity(offer.len());
    for line in last.lines() {
        let _ = match line.strip_prefix("a=group:BUNDLE") {
            Some(mids) => write!(out, "a=group:BUNDLE{mids} {}\r\n", added.join(" ")),
            None => write!(out, "{line}\r\n"),
        };
    }
    let mut section = 0;
    for line in offer.lines() {
        section += usize::from(line.starts_with("m="));
        let names = ["a=msid:", "a=ssrc", "a=candidate:", "a=end-of-candidates"];
        if section <= known || transport(&line) || names.iter().any(|n| line.starts_with(n)) {
            continue;
        }
        let _ = match direction(line) {
            Some(_) => write!(out, "a=inactive\r\n"),
            None => write!(out, "{line}\r\n"),
        };
        if line.starts_with("a=mid:") {
            for line in &first {
                let _ = write!(out, "{line}\r\n");
            }
        }
    }
    Some(out)
}

fn direction(line: &str) -> Option<Direction> {
    match line.trim_end() {
        "a=sendrecv" => Some(Direction::SendRecv),
        "a=sendonly" => Some(Direction::SendOnly),
        "a=recvonly" => Some(Direction::RecvOnly),
        "a=inactive" => Some(Direction::Inactive),
        _ => None,
    }
}

fn name(direction: Direction) -> &'static str {
    match direction {
        Direction::SendRecv => "sendrecv",
        Direction::SendOnly => "sendonly",
        Direction::RecvOnly => "recvonly",
        Direction::Inactive | Direction::Stopped => "inactive",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SDP: &str = "v=0\r\n\
        a=sendonly\r\n\
        m=audio 9 UDP/TLS/RTP/SAVPF 111\r\n\
        a=mid:0\r\n\
        a=sendrecv\r\n\
        a=msid:PA_1|TR_1 TR_1\r\n\
        a=ssrc:17 cname:x\r\n\
        a=ssrc:17 msid:PA_1|TR_1 TR_1\r\n\
        a=ssrc:nonsense cname:x\r\n\
        a=rtpmap:111 opus/48000/2\r\n\
        a=rtpmap:63 red/48000/2\r\n\
        a=fmtp:63 stereo=0\r\n\
        a=fmtp:111 minptime=10; useinbandfec=1;maxaveragebitrate=64000;stereo=1;usedtx=0\r\n\
        a=candidate:1 1 udp 1 10.0.0.1 7 typ host\r\n\
        m=video 0 UDP/TLS/RTP/SAVPF 96\r\n\
        a=mid:1\r\n\
        a=recvonly\r\n\
        a=msid:- stray\r\n\
        a=ssrc:18 cname:x\r\n\
        m=application 9 UDP/DTLS/SCTP webrtc-datachannel\r\n\
        a=mid:2\r\n";

    #[test]
    fn of_many_candidates_and_sources_few_are_looked_at() {
        assert!(matches!(with_few_candidates(SDP, 1), Cow::Borrowed(SDP)));
        let line = "a=candidate:1 1 udp 1 10.0.0.1 7 typ host\r\n";
        assert_eq!(with_few_candidates(SDP, 0), SDP.replace(line, ""));
        let many = SDP.replace(line, &line.repeat(9));
        assert_eq!(with_few_candidates(&many, 1), SDP);
        let sources: String = (0..1000)
            .map(|n| format!("a=ssrc:{n} cname:x\r\n"))
            .collect();
        assert_eq!(
            sections(&format!("{SDP}{sources}"))[2].ssrcs.len(),
            MAX_SSRCS
        );
    }

    fn msid(stream: &str, track: &str) -> Msid {
        Msid {
            stream: stream.to_owned(),
            track: track.to_owned(),
        }
    }

    #[test]
    fn sections_say_what_their_lines_say() {
        let sections = sections(SDP);
        assert_eq!(sections.len(), 3);
        assert_eq!(
            sections[0],
            Section {
                kind: "audio",
                mid: "0",
                rejected: false,
                direction: Direction::SendRecv,
                msid: Some(msid("PA_1|TR_1", "TR_1")),
                ssrcs: vec![17],
                wish: Wish {
                    stereo: true,
                    dtx: false,
                    fec: true,
                    max_bitrate: Some(64_000),
                },
            }
        );
        assert!(sections[1].rejected);
        assert_eq!(sections[1].wish, Wish::default());
        assert_eq!(sections[1].direction, Direction::RecvOnly);
        assert_eq!(sections[2].kind, "application");
    }

    #[test]
    fn nonsense_has_no_sections() {
        assert!(sections("").is_empty());
        assert!(sections("a=mid:0\r\na=ssrc:\r\n").is_empty());
        assert_eq!(sections("m=").len(), 1);
    }

    #[test]
    fn candidates_of_all_sections_are_found() {
        assert_eq!(
            candidates(SDP).collect::<Vec<_>>(),
            ["candidate:1 1 udp 1 10.0.0.1 7 typ host"]
        );
    }

    #[test]
    fn a_section_that_does_not_send_names_no_track() {
        let text = rewrite(SDP, |_| None);
        assert!(text.contains("a=msid:PA_1|TR_1 TR_1\r\n"));
        assert!(text.contains("a=ssrc:17 msid:PA_1|TR_1 TR_1\r\n"));
        assert!(!text.contains("stray"));
        assert!(!text.contains("a=ssrc:18"));
    }

    #[test]
    fn directions_and_tracks_are_replaced() {
        let text = rewrite(SDP, |mid| {
            let track = msid("-", "mine");
            (mid == "0").then_some(Shown {
                direction: Direction::SendOnly,
                msid: Some(track),
            })
        });
        let sections = sections(&text);
        assert_eq!(sections[0].direction, Direction::SendOnly);
        assert_eq!(sections[0].msid, Some(msid("-", "mine")));
        assert!(!text.contains("TR_1"));
        assert_eq!(sections[0].ssrcs, [17]);
        assert_eq!(sections[1].direction, Direction::RecvOnly);

        let muted = rewrite(SDP, |_| {
            Some(Shown {
                direction: Direction::Inactive,
                msid: None,
            })
        });
        assert!(!muted.contains("msid") && !muted.contains("ssrc"));
    }
}
