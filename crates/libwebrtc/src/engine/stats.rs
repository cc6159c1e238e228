//! The report for `get_stats`. While nobody asks, a handful of counters is all it costs: those here
//! and in `received`, and what the stack tells every [`INTERVAL`].

use std::{
    collections::HashMap,
    net::SocketAddr,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use str0m::{
    Candidate, CandidateKind,
    format::Codec,
    media::Mid,
    net::{Protocol, Transmit},
    stats::{MediaEgressStats, MediaIngressStats, PeerStats, RemoteIngressStats},
};

use super::{received::Received, session::Session};
use crate::{
    MediaType,
    data_channel::DataChannelState,
    opus::CLOCK,
    peer_connection::IceConnectionState,
    rtp_receiver::RtpReceiver,
    rtp_sender::{RtpSender, Sent},
    rtp_transceiver::RtpTransceiver,
    stats::{dictionaries as dict, *},
};

/// How old what the stack knows may be: round-trip times and what the remote side reported.
pub(super) const INTERVAL: Duration = Duration::from_secs(5);

const TRANSPORT: &str = "transport";
const PAIR: &str = "candidate-pair";
const LOCAL: &str = "local-candidate";
const REMOTE: &str = "remote-candidate";
const CODEC: &str = "codec-opus";

/// What is asked for.
pub(crate) enum Of<'a> {
    All,
    Sender(&'a RtpSender),
    Receiver(&'a RtpReceiver),
}

#[derive(Default)]
pub(super) struct Figures {
    sent: Traffic,
    received: Traffic,
    path: Option<Path>,
    path_changes: u32,
    candidates: HashMap<SocketAddr, (CandidateKind, u32)>,
    peer: Option<PeerStats>,
    ingress: HashMap<Mid, MediaIngressStats>,
    egress: HashMap<Mid, Egress>,
    channels_opened: u32,
}

#[derive(Default)]
struct Traffic {
    packets: u64,
    bytes: u64,
    last: Option<Instant>,
}

/// What datagrams other than ICE's checks went by last.
#[derive(Clone, Copy, PartialEq)]
struct Path {
    protocol: Protocol,
    local: SocketAddr,
    remote: SocketAddr,
}

struct Egress {
    last: MediaEgressStats,
    round_trips: u64,
    round_trip_time: Duration,
}

impl Traffic {
    fn note(&mut self, now: Instant, bytes: usize) {
        self.packets += 1;
        self.bytes += bytes as u64;
        self.last = Some(now);
    }
}

impl Figures {
    pub(super) fn note_sent(&mut self, now: Instant, transmit: &Transmit) {
        self.sent.note(now, transmit.contents.len());
        self.note_path(
            Path {
                protocol: transmit.proto,
                local: transmit.source,
                remote: transmit.destination,
            },
            &transmit.contents,
        );
    }

    pub(super) fn note_received(
        &mut self,
        now: Instant,
        protocol: Protocol,
        remote: SocketAddr,
        local: SocketAddr,
        bytes: &[u8],
    ) {
        self.received.note(now, bytes.len());
        let path = Path {
            protocol,
            local,
            remote,
        };
        self.note_path(path, bytes);
    }

    fn note_path(&mut self, path: Path, bytes: &[u8]) {
        // Up to here is STUN (RFC 7983).
        if bytes.first().is_none_or(|first| *first < 4) {
            return;
        }
        if self.path != Some(path) {
            self.path = Some(path);
            self.path_changes += 1;
        }
    }

    /// Protocol, local and remote address of what datagrams other than ICE's checks went by last.
    pub(super) fn path(&self) -> Option<(Protocol, SocketAddr, SocketAddr)> {
        let path = self.path?;
        Some((path.protocol, path.local, path.remote))
    }

    pub(super) fn note_candidate(&mut self, candidate: &Candidate) {
        let known = (candidate.kind(), candidate.prio());
        self.candidates.insert(candidate.addr(), known);
    }

    pub(super) fn note_channel(&mut self) {
        self.channels_opened += 1;
    }

    pub(super) fn note_peer(&mut self, stats: PeerStats) {
        self.peer = Some(stats);
    }

    pub(super) fn note_ingress(&mut self, stats: MediaIngressStats) {
        self.ingress.insert(stats.mid, stats);
    }

    pub(super) fn note_egress(&mut self, stats: MediaEgressStats) {
        let before = self.egress.remove(&stats.mid);
        let (round_trips, round_trip_time) =
            before.map_or((0, Duration::ZERO), |e| (e.round_trips, e.round_trip_time));
        // Else it is the one of the report before, once more.
        let measured = stats.rtt.filter(|_| stats.loss.is_some());
        let egress = Egress {
            round_trips: round_trips + u64::from(measured.is_some()),
            round_trip_time: round_trip_time + measured.unwrap_or_default(),
            last: stats,
        };
        self.egress.insert(egress.last.mid, egress);
    }
}

/// A moment, and how to name others in the report.
struct Clock {
    now: Instant,
    unix: Duration,
}

impl Clock {
    fn rtc(&self, id: impl Into<String>) -> dict::RtcStats {
        dict::RtcStats {
            id: id.into(),
            timestamp: i64::try_from(self.unix.as_micros()).unwrap_or(i64::MAX),
        }
    }

    /// Milliseconds since the Unix epoch; 0 for never.
    fn millis(&self, instant: Option<Instant>) -> f64 {
        instant.map_or(0.0, |instant| {
            let age = self.now.saturating_duration_since(instant);
            self.unix.saturating_sub(age).as_secs_f64() * 1000.0
        })
    }
}

impl Session {
    pub(crate) fn stats(&mut self, of: Of<'_>) -> Vec<RtcStats> {
        let clock = Clock {
            now: Instant::now(),
            unix: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default(),
        };
        let mut report = Vec::new();
        for transceiver in self.transceivers.clone() {
            let Some(mid) = transceiver.bound_mid() else {
                continue;
            };
            if transceiver.kind() != MediaType::Audio {
                continue;
            }
            let (sends, receives) = match of {
                Of::All => (true, true),
                Of::Sender(sender) => (transceiver.sender().is(sender), false),
                Of::Receiver(receiver) => (false, transceiver.receiver().is(receiver)),
            };
            if sends {
                self.report_sender(&clock, mid, &transceiver, &mut report);
            }
            if receives {
                self.report_receiver(&clock, mid, &transceiver, &mut report);
            }
        }
        if !report.is_empty() {
            report.push(RtcStats::Codec(CodecStats {
                rtc: clock.rtc(CODEC),
                codec: dict::CodecStats {
                    payload_type: self.payload_type_of_opus(),
                    transport_id: TRANSPORT.into(),
                    mime_type: "audio/opus".into(),
                    clock_rate: CLOCK,
                    channels: 2,
                    sdp_fmtp_line: String::new(),
                },
            }));
        }
        self.report_transport(&clock, &mut report);
        if let Of::All = of {
            self.report_channels(&clock, &mut report);
        }
        report
    }

    /// What Opus goes by; 0 after the end.
    fn payload_type_of_opus(&self) -> u32 {
        let mut known = self.rtc.iter().flat_map(|rtc| rtc.codec_config().iter());
        let opus = known.find(|params| params.spec().codec == Codec::Opus);
        opus.map_or(0, |params| (*params.pt()).into())
    }

    fn report_sender(
        &mut self,
        clock: &Clock,
        mid: Mid,
        transceiver: &RtpTransceiver,
        report: &mut Vec<RtcStats>,
    ) {
        let sender = transceiver.sender();
        let Some(track) = sender.track() else { return };
        let Some(ssrc) = self.rtc.as_mut().and_then(|rtc| {
            let mut api = rtc.direct_api();
            api.stream_tx_by_mid(mid, None).map(|stream| *stream.ssrc())
        }) else {
            return;
        };
        let (sent, active) = (sender.sent(), sender.is_active());
        let (id, remote_id) = (format!("outbound-{ssrc}"), format!("remote-inbound-{ssrc}"));
        let source_id = format!("source-{mid}");
        report.push(RtcStats::MediaSource(MediaSourceStats {
            rtc: clock.rtc(&source_id),
            source: dict::MediaSourceStats {
                track_identifier: track.id(),
                kind: "audio".into(),
            },
            audio: dict::AudioSourceStats {
                audio_level: linear(sent.level),
                ..Default::default()
            },
            video: Default::default(),
        }));
        let egress = self.figures.egress.get(&mid);
        let reported = egress.and_then(|egress| egress.last.remote.as_ref());
        report.push(RtcStats::OutboundRtp(OutboundRtpStats {
            rtc: clock.rtc(&id),
            stream: stream(ssrc),
            sent: dict::SentRtpStreamStats {
                packets_sent: sent.packets,
                bytes_sent: sent.bytes,
            },
            outbound: dict::OutboundRtpStreamStats {
                mid: mid.to_string(),
                nack_count: egress.map_or(0, |egress| egress.last.nacks as u32),
                media_source_id: source_id,
                remote_id: reported.map_or(String::new(), |_| remote_id.clone()),
                target_bitrate: sent.target.into(),
                active,
                ..Default::default()
            },
        }));
        if let (Some(egress), Some(reported)) = (egress, reported) {
            let (received, lost) = received_there(sent, reported);
            report.push(RtcStats::RemoteInboundRtp(RemoteInboundRtpStats {
                rtc: clock.rtc(remote_id),
                stream: stream(ssrc),
                received: dict::ReceivedRtpStreamStats {
                    packets_received: received,
                    packets_lost: lost,
                    jitter: f64::from(reported.jitter) / f64::from(CLOCK),
                },
                remote_inbound: dict::RemoteInboundRtpStreamStats {
                    local_id: id,
                    round_trip_time: seconds(egress.last.rtt),
                    total_round_trip_time: egress.round_trip_time.as_secs_f64(),
                    fraction_lost: egress.last.loss.unwrap_or_default().into(),
                    round_trip_time_measurements: egress.round_trips,
                },
            }));
        }
    }

    fn report_receiver(
        &self,
        clock: &Clock,
        mid: Mid,
        transceiver: &RtpTransceiver,
        report: &mut Vec<RtcStats>,
    ) {
        let receiver = transceiver.receiver();
        for (ssrc, source) in &self.sources {
            let Some(track) = receiver.audio_track(*ssrc) else {
                continue;
            };
            if source.transceiver.bound_mid() != Some(mid) {
                continue;
            }
            let (id, remote_id) = (format!("inbound-{ssrc}"), format!("remote-outbound-{ssrc}"));
            let ingress = self.figures.ingress.get(&mid);
            let sender_report = ingress.and_then(|ingress| ingress.remote.as_ref());
            let received = &source.received;
            let mut inbound = inbound(clock, received);
            inbound.nack_count = ingress.map_or(0, |ingress| ingress.nacks as u32);
            inbound.track_identifier = track.id();
            inbound.mid = mid.to_string();
            inbound.remote_id = sender_report.map_or(String::new(), |_| remote_id.clone());
            if let Some(playout) = track.playout() {
                add_playout(&mut inbound, &playout);
            }
            report.push(RtcStats::InboundRtp(InboundRtpStats {
                rtc: clock.rtc(&id),
                stream: stream(*ssrc),
                received: dict::ReceivedRtpStreamStats {
                    packets_received: received.packets,
                    packets_lost: received.lost(),
                    jitter: received.jitter / f64::from(CLOCK),
                },
                inbound,
            }));
            if let Some(sender_report) = sender_report {
                report.push(RtcStats::RemoteOutboundRtp(RemoteOutboundRtpStats {
                    rtc: clock.rtc(remote_id),
                    stream: stream(*ssrc),
                    sent: dict::SentRtpStreamStats {
                        packets_sent: sender_report.packets,
                        bytes_sent: sender_report.bytes,
                    },
                    remote_outbound: dict::RemoteOutboundRtpStreamStats {
                        local_id: id,
                        ..Default::default()
                    },
                }));
            }
        }
    }

    fn report_transport(&self, clock: &Clock, report: &mut Vec<RtcStats>) {
        let figures = &self.figures;
        let (sent, received) = (&figures.sent, &figures.received);
        let ice_state = match self.ice_connection_state() {
            IceConnectionState::New => IceTransportState::New,
            IceConnectionState::Checking | IceConnectionState::Max => IceTransportState::Checking,
            IceConnectionState::Connected => IceTransportState::Connected,
            IceConnectionState::Completed => IceTransportState::Completed,
            IceConnectionState::Disconnected => IceTransportState::Disconnected,
            IceConnectionState::Failed => IceTransportState::Failed,
            IceConnectionState::Closed => IceTransportState::Closed,
        };
        report.push(RtcStats::Transport(TransportStats {
            rtc: clock.rtc(TRANSPORT),
            transport: dict::TransportStats {
                packets_sent: sent.packets,
                packets_received: received.packets,
                bytes_sent: sent.bytes,
                bytes_received: received.bytes,
                ice_state: Some(ice_state),
                dtls_state: Some(self.dtls_state()),
                selected_candidate_pair_id: figures.path.map_or(String::new(), |_| PAIR.into()),
                selected_candidate_pair_changes: figures.path_changes,
                ..Default::default()
            },
        }));
        let Some(path) = figures.path else { return };
        let stack = figures.peer.as_ref();
        let pair = stack.and_then(|peer| peer.selected_candidate_pair.as_ref());
        report.push(RtcStats::CandidatePair(CandidatePairStats {
            rtc: clock.rtc(PAIR),
            candidate_pair: dict::CandidatePairStats {
                transport_id: TRANSPORT.into(),
                local_candidate_id: LOCAL.into(),
                remote_candidate_id: REMOTE.into(),
                state: Some(match ice_state {
                    IceTransportState::Failed => IceCandidatePairState::Failed,
                    IceTransportState::Checking => IceCandidatePairState::InProgress,
                    _ => IceCandidatePairState::Succeeded,
                }),
                nominated: true,
                packets_sent: sent.packets,
                packets_received: received.packets,
                bytes_sent: sent.bytes,
                bytes_received: received.bytes,
                last_packet_sent_timestamp: clock.millis(sent.last),
                last_packet_received_timestamp: clock.millis(received.last),
                current_round_trip_time: seconds(pair.and_then(|p| p.current_round_trip_time)),
                total_round_trip_time: seconds(pair.map(|pair| pair.total_round_trip_time)),
                responses_received: pair.map_or(0, |pair| pair.responses_received),
                ..Default::default()
            },
        }));
        report.push(RtcStats::LocalCandidate(LocalCandidateStats {
            rtc: clock.rtc(LOCAL),
            local_candidate: figures.candidate(path.protocol, path.local),
        }));
        report.push(RtcStats::RemoteCandidate(RemoteCandidateStats {
            rtc: clock.rtc(REMOTE),
            remote_candidate: figures.candidate(path.protocol, path.remote),
        }));
    }

    fn report_channels(&self, clock: &Clock, report: &mut Vec<RtcStats>) {
        let open = |state: DataChannelState| state == DataChannelState::Open;
        let still_open = self.channels.iter().filter(|channel| open(channel.state()));
        let opened = self.figures.channels_opened;
        report.push(RtcStats::PeerConnection(PeerConnectionStats {
            rtc: clock.rtc("peer-connection"),
            pc: dict::PeerConnectionStats {
                data_channels_opened: opened,
                data_channels_closed: opened.saturating_sub(still_open.count() as u32),
            },
        }));
        for (number, channel) in self.channels.iter().enumerate() {
            let counts = channel.counts();
            report.push(RtcStats::DataChannel(DataChannelStats {
                rtc: clock.rtc(format!("data-channel-{number}")),
                dc: dict::DataChannelStats {
                    label: channel.config.label.clone(),
                    protocol: channel.config.protocol.clone(),
                    data_channel_identifier: channel.stream_id(),
                    state: Some(channel.state()),
                    messages_sent: counts.messages_sent,
                    bytes_sent: counts.bytes_sent,
                    messages_received: counts.messages_received,
                    bytes_received: counts.bytes_received,
                },
            }));
        }
    }
}

impl Figures {
    fn candidate(&self, protocol: Protocol, addr: SocketAddr) -> dict::IceCandidateStats {
        let known = self.candidates.get(&addr);
        dict::IceCandidateStats {
            transport_id: TRANSPORT.into(),
            address: addr.ip().to_string(),
            port: addr.port().into(),
            protocol: match protocol {
                Protocol::Udp => "udp".into(),
                _ => "tcp".into(),
            },
            // One that nobody told of is found by its packets.
            candidate_type: Some(match known.map(|(kind, _)| kind) {
                Some(CandidateKind::Host) => IceCandidateType::Host,
                Some(CandidateKind::ServerReflexive) => IceCandidateType::Srflx,
                Some(CandidateKind::Relayed) => IceCandidateType::Relay,
                Some(CandidateKind::PeerReflexive) | None => IceCandidateType::Prflx,
            }),
            priority: known.map_or(0, |(_, priority)| *priority as i32),
            ..Default::default()
        }
    }
}

fn inbound(clock: &Clock, received: &Received) -> dict::InboundRtpStreamStats {
    dict::InboundRtpStreamStats {
        bytes_received: received.bytes,
        header_bytes_received: received.header_bytes,
        last_packet_received_timestamp: clock.millis(received.last),
        audio_level: linear(received.level),
        ..Default::default()
    }
}

fn add_playout(inbound: &mut dict::InboundRtpStreamStats, playout: &crate::playout::PlayoutStats) {
    inbound.total_samples_received = playout.played;
    inbound.total_samples_duration = playout.played as f64 / f64::from(CLOCK);
    inbound.concealed_samples = playout.concealed;
    inbound.silent_concealed_samples = playout.silent;
    inbound.concealment_events = playout.concealments;
    inbound.packets_discarded = playout.discarded;
    inbound.jitter_buffer_emitted_count = playout.decoded;
    inbound.jitter_buffer_delay = playout.waited.as_secs_f64();
    inbound.jitter_buffer_target_delay = playout.delay.as_secs_f64() * playout.decoded as f64;
    inbound.audio_level = playout.power.sqrt();
    inbound.total_audio_energy = playout.energy;
    inbound.decoder_implementation = "libopus".into();
}

fn stream(ssrc: u32) -> dict::RtpStreamStats {
    dict::RtpStreamStats {
        ssrc,
        kind: "audio".into(),
        transport_id: TRANSPORT.into(),
        codec_id: CODEC.into(),
    }
}

/// Of what we sent, as the other side last reported it: packets that came, and those that did not, of
/// which there are fewer than none if some came twice (RFC 3550, 6.4.1).
fn received_there(sent: Sent, reported: &RemoteIngressStats) -> (u64, i64) {
    let lost = reported.packets_lost as i64;
    let lost = if lost < 1 << 23 {
        lost
    } else {
        lost - (1 << 24)
    };
    let highest = *reported.maximum_sequence_number;
    let first = (sent.last_sequence + 1).saturating_sub(sent.packets);
    let expected = (highest + 1).saturating_sub(first).min(sent.packets);
    (expected.saturating_add_signed(-lost), lost)
}

fn seconds(duration: Option<Duration>) -> f64 {
    duration.unwrap_or_default().as_secs_f64()
}

/// From dBov to a share of the loudest.
fn linear(level: Option<i8>) -> f64 {
    match level {
        None | Some(-127) => 0.0,
        Some(level) => 10_f64.powf(f64::from(level) / 20.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_there_is_told_as_it_was_reported() {
        for (packets, last_sequence, highest, lost, expected) in [
            // Not all that was sent is in the report yet.
            (100_u64, 30_099_u64, 30_079_u64, 3_u64, (77_u64, 3_i64)),
            (100, 30_099, 30_099, 0, (100, 0)),
            // Two came twice.
            (100, 70_099, 70_099, 0xff_fffe, (102, -2)),
            // A report on what was before.
            (5, 30_099, 30_000, 0, (0, 0)),
        ] {
            let sent = Sent {
                packets,
                last_sequence,
                ..Sent::default()
            };
            let reported = RemoteIngressStats {
                jitter: 0,
                maximum_sequence_number: highest.into(),
                packets_lost: lost,
            };
            assert_eq!(received_there(sent, &reported), expected);
        }
    }
}
