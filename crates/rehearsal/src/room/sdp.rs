//! Text-level work on session descriptions, where str0m's SDP interface has no say: which
//! section of a client's offer carries which track, and which of our sections announce one.

use std::collections::HashMap;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Audio,
    Video,
    Application,
}

/// One media section of a client's description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Section {
    pub kind: Kind,
    pub mid: String,
    /// The client sends media here.
    pub sends: bool,
    /// The client takes media here.
    pub receives: bool,
    /// The msid's stream id, empty if there is none.
    pub stream: String,
    /// The msid's track id, empty if there is none. LiveKit's "cid" is this.
    pub track: String,
}

/// How one of the server's sections names the track it carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Msid {
    pub stream: String,
    pub track: String,
}

/// The sections of a description. Rejected ones neither send nor receive; sections of unknown
/// kinds are left out.
pub(super) fn sections(sdp: &str) -> Vec<Section> {
    split(sdp).1.iter().filter_map(|s| section(s)).collect()
}

/// Makes the server's description tell the truth about what it sends: the section of each mid in
/// `tracks` announces that track, every other one sends nothing.
///
/// str0m invents an msid for each section it answers and marks every section that the client
/// would receive on as sending.
pub(super) fn announce(sdp: &str, tracks: &HashMap<String, Msid>) -> String {
    let (session, sections) = split(sdp);
    let mut out = String::with_capacity(sdp.len() + 64 * tracks.len());
    let mut push = |line: &str| {
        out.push_str(line);
        out.push_str("\r\n");
    };
    for line in session {
        if !line.starts_with("a=msid-semantic") {
            push(line);
        }
    }
    push("a=msid-semantic: WMS *");
    for lines in sections {
        let mid = attribute(&lines, "a=mid:").unwrap_or_default();
        let track = tracks.get(mid).filter(|_| sends(&lines));
        let application = lines[0].starts_with("m=application");
        for line in lines {
            match line {
                _ if application => push(line),
                "a=sendonly" if track.is_none() => push("a=inactive"),
                "a=sendrecv" if track.is_none() => push("a=recvonly"),
                _ if line.starts_with("a=msid:") => {}
                _ if line.starts_with("a=ssrc") && track.is_none() => {}
                _ if line.starts_with("a=ssrc:") && line.contains(" msid:") => {}
                _ => push(line),
            }
            if let (true, Some(t)) = (line.starts_with("a=mid:") && !application, track) {
                push(&format!("a=msid:{} {}", t.stream, t.track));
            }
        }
    }
    out
}

/// Appends to the parameters of Opus in the section of each mid in `wanted`.
pub(super) fn tune(sdp: &str, wanted: &HashMap<String, String>) -> String {
    let (session, sections) = split(sdp);
    let mut out = String::with_capacity(sdp.len() + 64 * wanted.len());
    let mut push = |line: &str, more: &str| out.extend([line, more, "\r\n"]);
    session.iter().for_each(|line| push(line, ""));
    for lines in sections {
        let more = attribute(&lines, "a=mid:").and_then(|mid| wanted.get(mid));
        let opus = lines.iter().find_map(|line| {
            let (number, codec) = line.strip_prefix("a=rtpmap:")?.split_once(' ')?;
            codec
                .starts_with("opus/")
                .then(|| format!("a=fmtp:{number} "))
        });
        for line in lines {
            match (more, &opus) {
                (Some(more), Some(opus)) if line.starts_with(opus) => push(line, more),
                _ => push(line, ""),
            }
        }
    }
    out
}

fn section(lines: &[&str]) -> Option<Section> {
    let mut media = lines[0].strip_prefix("m=")?.split(' ');
    let kind = match media.next()? {
        "audio" => Kind::Audio,
        "video" => Kind::Video,
        "application" => Kind::Application,
        _ => return None,
    };
    // Port 0 rejects a section, unless it only waits for its bundle.
    let rejected = media.next() == Some("0") && !lines.contains(&"a=bundle-only");
    let msid = attribute(lines, "a=msid:").unwrap_or_default();
    let (stream, track) = msid.split_once(' ').unwrap_or((msid, ""));
    Some(Section {
        kind,
        mid: attribute(lines, "a=mid:").unwrap_or_default().to_owned(),
        sends: sends(lines) && !rejected,
        receives: !lines.contains(&"a=sendonly") && !lines.contains(&"a=inactive") && !rejected,
        stream: stream.to_owned(),
        track: track.to_owned(),
    })
}

/// RFC 8866: a section without a direction attribute is sendrecv.
fn sends(lines: &[&str]) -> bool {
    !lines.contains(&"a=recvonly") && !lines.contains(&"a=inactive")
}

fn attribute<'a>(lines: &[&'a str], name: &str) -> Option<&'a str> {
    lines.iter().find_map(|l| l.strip_prefix(name))
}

/// Session-level lines, and the lines of each section; a section's first line is its m-line.
fn split(sdp: &str) -> (Vec<&str>, Vec<Vec<&str>>) {
    let (mut session, mut sections) = (Vec::new(), Vec::<Vec<&str>>::new());
    for line in sdp.lines().map(str::trim_end).filter(|l| !l.is_empty()) {
        if line.starts_with("m=") {
            sections.push(vec![line]);
        } else if let Some(section) = sections.last_mut() {
            section.push(line);
        } else {
            session.push(line);
        }
    }
    (session, sections)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OFFER: &str = "v=0\r\na=msid-semantic: WMS\r\n\
        m=application 9 UDP/DTLS/SCTP webrtc-datachannel\r\na=mid:0\r\n\
        m=audio 9 UDP/TLS/RTP/SAVPF 111\r\na=mid:1\r\na=sendrecv\r\na=msid:stream cid-1\r\n\
        m=audio 0 UDP/TLS/RTP/SAVPF 111\r\na=mid:2\r\na=bundle-only\r\na=recvonly\r\n\
        m=video 0 UDP/TLS/RTP/SAVPF 96\r\na=mid:3\r\na=sendonly\r\n\
        m=image 9 udptl t38\r\na=mid:4\r\n";

    #[test]
    fn finds_what_a_client_sends_and_takes() {
        let found = sections(OFFER);
        let summary: Vec<_> = found
            .iter()
            .map(|s| (s.kind, s.mid.as_str(), s.sends, s.receives))
            .collect();
        assert_eq!(
            summary,
            [
                (Kind::Application, "0", true, true),
                (Kind::Audio, "1", true, true),
                (Kind::Audio, "2", false, true),
                (Kind::Video, "3", false, false),
            ]
        );
        assert_eq!(
            (found[1].stream.as_str(), found[1].track.as_str()),
            ("stream", "cid-1")
        );
    }

    #[test]
    fn announces_only_assigned_sections() {
        let answer = "v=0\r\na=msid-semantic: WMS xx\r\n\
            m=audio 9 UDP/TLS/RTP/SAVPF 111\r\na=mid:1\r\na=sendonly\r\na=msid:xx yy\r\n\
            a=ssrc:7 cname:c\r\na=ssrc:7 msid:xx yy\r\n\
            m=audio 9 UDP/TLS/RTP/SAVPF 111\r\na=mid:2\r\na=sendrecv\r\na=msid:xx zz\r\n\
            a=ssrc:8 cname:c\r\n\
            m=application 9 UDP/DTLS/SCTP webrtc-datachannel\r\na=mid:3\r\n";
        let msid = Msid {
            stream: "PA_a|TR_b".into(),
            track: "TR_b".into(),
        };
        let text = announce(answer, &HashMap::from([("1".to_owned(), msid)]));
        assert_eq!(
            text,
            "v=0\r\na=msid-semantic: WMS *\r\n\
             m=audio 9 UDP/TLS/RTP/SAVPF 111\r\na=mid:1\r\na=msid:PA_a|TR_b TR_b\r\na=sendonly\r\n\
             a=ssrc:7 cname:c\r\n\
             m=audio 9 UDP/TLS/RTP/SAVPF 111\r\na=mid:2\r\na=recvonly\r\n\
             m=application 9 UDP/DTLS/SCTP webrtc-datachannel\r\na=mid:3\r\n"
        );
    }

    #[test]
    fn tunes_opus_in_the_sections_that_are_named() {
        let audio = |mid: &str, more: &str| {
            format!(
                "m=audio 9 UDP/TLS/RTP/SAVPF 63 111\r\na=mid:{mid}\r\na=rtpmap:63 red/48000/2\r\n\
                 a=fmtp:63 111/111\r\na=rtpmap:111 opus/48000/2\r\na=fmtp:111 minptime=10{more}\r\n"
            )
        };
        let text = |more| format!("v=0\r\n{}{}", audio("1", ""), audio("2", more));
        let wanted = HashMap::from([("2".to_owned(), ";usedtx=1".to_owned())]);
        assert_eq!(tune(&text(""), &wanted), text(";usedtx=1"));
    }

    #[test]
    fn tolerates_nonsense() {
        for text in ["", "m=", "m=audio", "\n\n", "a=mid:0", "m=audio 9\na=msid:"] {
            let _ = sections(text);
            let _ = announce(text, &HashMap::new());
            let _ = tune(text, &HashMap::from([("0".into(), ";x=1".into())]));
        }
    }
}
