//! Two sessions joined by a wire that is made of vectors, in a time of its own.

use std::{
    net::SocketAddr,
    sync::Weak,
    time::{Duration, Instant},
};

use str0m::{Candidate, net::Protocol};

use super::{
    Of,
    faults::Fault,
    network::{News, Received},
    runtime,
    session::{Event, NetworkRequest, Output, Session},
};
use crate::{
    MediaType, RtcErrorType,
    audio_track::RtcAudioTrack,
    data_channel::{DataChannel, DataChannelInit, DataChannelState},
    media_stream_track::{MediaStreamTrack, RtcTrackState},
    peer_connection::{OfferOptions, PeerConnectionState, SignalingState},
    rtp_sender::EncodedPacket,
    rtp_transceiver::{RtpTransceiver, RtpTransceiverDirection as Direction, RtpTransceiverInit},
    session_description::{SdpType, SessionDescription},
    stats::{DtlsTransportState, IceCandidateType, IceTransportState, RtcStats},
};

/// In the time of the wire, not of the test.
const LIMIT: Duration = Duration::from_secs(60);

struct Side {
    session: Session,
    addr: SocketAddr,
    /// An address that it had: nothing comes from there any more.
    lost: Option<SocketAddr>,
    output: Output,
    events: Vec<Event>,
}

impl Side {
    fn new(addr: &str, now: Instant) -> Self {
        let rtc = runtime::shared().unwrap().stack(true, now);
        Self {
            session: Session::new(rtc, Weak::new()),
            addr: addr.parse().unwrap(),
            lost: None,
            output: Output::default(),
            events: Vec::new(),
        }
    }

    fn state(&self) -> PeerConnectionState {
        self.session.connection_state()
    }

    fn add_audio(&mut self, direction: Direction, track: &str) -> RtpTransceiver {
        let init = RtpTransceiverInit {
            direction,
            stream_ids: vec![],
            send_encodings: vec![],
        };
        let transceiver = self
            .session
            .add_transceiver(MediaType::Audio, init)
            .unwrap();
        if direction.sends() {
            let track = RtcAudioTrack::new(track.to_owned(), None);
            transceiver
                .sender()
                .set_track(Some(MediaStreamTrack::Audio(track)))
                .unwrap();
        }
        transceiver
    }

    fn add_channel(&mut self, label: &str) -> DataChannel {
        self.session
            .create_channel(label, &DataChannelInit::default())
            .unwrap()
    }

    fn offer(&mut self) -> SessionDescription {
        self.session.create_offer(&OfferOptions::default()).unwrap()
    }

    fn send(&mut self, transceiver: &RtpTransceiver, sequence: u64) -> bool {
        let packet = EncodedPacket {
            payload: [0xf8, sequence as u8].into(),
            samples: 960,
            level: Some(-20),
        };
        let Some(mid) = transceiver.bound_mid() else {
            return false;
        };
        self.session
            .send_audio(mid, sequence, sequence as u32 * 960, false, packet)
    }

    /// Sequence numbers of the packets that came on the track, taken out.
    fn take_audio(&mut self, track: &MediaStreamTrack) -> Vec<u64> {
        let mut heard = Vec::new();
        self.events.retain(|event| match event {
            Event::Audio(on, frame) if on.id() == track.id() => {
                assert_eq!(frame.payload[..], [0xf8, frame.sequence as u8]);
                assert_eq!(frame.rtp_timestamp, frame.sequence as u32 * 960);
                assert_eq!(frame.audio_level, Some(-20));
                heard.push(frame.sequence);
                false
            }
            _ => true,
        });
        heard
    }

    fn messages(&self) -> Vec<&[u8]> {
        fn message(event: &Event) -> Option<&[u8]> {
            match event {
                Event::ChannelMessage(_, data, _) => Some(data),
                _ => None,
            }
        }
        self.events.iter().filter_map(message).collect()
    }

    fn opened(&self) -> Vec<DataChannel> {
        let opened = |event: &Event| match event {
            Event::Channel(channel) => Some(channel.clone()),
            _ => None,
        };
        self.events.iter().filter_map(opened).collect()
    }
}

struct Wire {
    a: Side,
    b: Side,
    now: Instant,
    /// Nothing gets through.
    cut: bool,
    /// In a row, that ended with a deadline that was over.
    idle_turns: u32,
}

impl Wire {
    fn new() -> Self {
        let now = Instant::now();
        let (a, b) = (
            Side::new("10.0.0.1:1000", now),
            Side::new("10.0.0.2:2000", now),
        );
        Self {
            a,
            b,
            now,
            cut: false,
            idle_turns: 0,
        }
    }

    /// With an application section and whatever `prepare` adds.
    fn connected(prepare: impl FnOnce(&mut Wire)) -> Self {
        let mut wire = Self::new();
        wire.a.add_channel("first");
        prepare(&mut wire);
        wire.negotiate();
        wire.until(|wire| {
            [&wire.a, &wire.b]
                .iter()
                .all(|side| side.session.connection_state() == PeerConnectionState::Connected)
        });
        wire
    }

    /// Connected, and A sends audio to B.
    fn one_way() -> (Self, RtpTransceiver) {
        let mut sending = None;
        let wire = Self::connected(|wire| {
            sending = Some(wire.a.add_audio(Direction::SendOnly, "of-a"));
        });
        (wire, sending.unwrap())
    }

    /// A offers, B answers.
    fn negotiate(&mut self) {
        self.negotiate_with(&OfferOptions::default());
    }

    fn negotiate_with(&mut self, options: &OfferOptions) {
        let offer = self.a.session.create_offer(options).unwrap();
        self.a.session.set_local_description(offer.clone()).unwrap();
        self.b.session.set_remote_description(offer).unwrap();
        let answer = self.b.session.create_answer().unwrap();
        self.b
            .session
            .set_local_description(answer.clone())
            .unwrap();
        self.a.session.set_remote_description(answer).unwrap();
    }

    /// Lets both sides do what they have to now. Returns whether that was nothing.
    fn settle(&mut self) -> bool {
        let idle = pump(&mut self.a, &mut self.b, self.now, self.cut);
        pump(&mut self.b, &mut self.a, self.now, self.cut) & idle
    }

    /// One round; if there is nothing to do, time passes until one of them wants more.
    fn turn(&mut self) {
        if self.settle() {
            let deadlines = [self.a.output.deadline, self.b.output.deadline];
            let next = deadlines.into_iter().flatten().min().unwrap_or(self.now);
            // A driver with nothing to do would not rest either.
            self.idle_turns = if next > self.now {
                0
            } else {
                self.idle_turns + 1
            };
            assert!(
                self.idle_turns < 10,
                "nothing to do, and no time until then"
            );
            self.now = next.clamp(self.now + Duration::from_millis(1), self.now + LIMIT);
        }
    }

    fn until(&mut self, done: impl Fn(&Wire) -> bool) {
        let start = self.now;
        while !done(self) {
            self.turn();
            assert!(self.now < start + LIMIT, "not in {LIMIT:?}");
        }
        // What it was known by may not have been reported yet.
        self.settle();
    }

    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.turn();
        }
    }
}

/// One side's step, and what it sends to the other. Returns whether there was nothing to do.
fn pump(from: &mut Side, to: &mut Side, now: Instant, cut: bool) -> bool {
    let mut idle = true;
    from.session.step(now, &mut from.output);
    for request in from.output.network.drain(..) {
        let host = |addr| Candidate::host(addr, Protocol::Udp).unwrap();
        match (request, from.lost) {
            (NetworkRequest::Gather, _) => {
                from.session.take_news(News::Candidate(host(from.addr)));
                from.session.take_news(News::Gathered);
            }
            (NetworkRequest::Restart, Some(lost)) => {
                from.session.take_news(News::Withdrawn(host(lost)));
                from.session.take_news(News::Candidate(host(from.addr)));
            }
            _ => {}
        }
        idle = false;
    }
    for event in from.output.events.drain(..) {
        if let Event::Candidate(candidate) = &event {
            // Refused only before there is a description, and after the end.
            let _ = to.session.add_remote_candidate(&candidate.candidate());
        }
        from.events.push(event);
        idle = false;
    }
    for transmit in from.output.transmits.drain(..) {
        let alive = transmit.source == from.addr;
        assert!(alive || from.lost == Some(transmit.source));
        if alive && !cut && transmit.destination == to.addr {
            let received = Received {
                protocol: Protocol::Udp,
                source: from.addr,
                local: to.addr,
                arrived: now,
                bytes: &transmit.contents,
            };
            to.session.receive(now, &received);
        }
        idle = false;
    }
    idle
}

fn states(events: &[Event]) -> Vec<PeerConnectionState> {
    let state = |event: &Event| match event {
        Event::Connection(state) => Some(*state),
        _ => None,
    };
    events.iter().filter_map(state).collect()
}

#[test]
fn who_has_nothing_to_do_rests() {
    let mut wire = Wire::new();
    wire.a.add_channel("first");
    // Nothing negotiated, then no answer, then a remote side that is not there.
    wire.pass(Duration::from_secs(30));
    wire.cut = true;
    let offer = wire.a.offer();
    wire.a.session.set_local_description(offer.clone()).unwrap();
    wire.pass(Duration::from_secs(30));
    wire.b.session.set_remote_description(offer).unwrap();
    let answer = wire.b.session.create_answer().unwrap();
    wire.b
        .session
        .set_local_description(answer.clone())
        .unwrap();
    wire.a.session.set_remote_description(answer).unwrap();
    wire.pass(Duration::from_secs(60));
    assert_eq!(wire.a.state(), PeerConnectionState::Failed);
}

#[test]
fn audio_passes_both_ways_undamaged_and_in_order() {
    let mut ends = None;
    let mut wire = Wire::connected(|wire| {
        ends = Some((
            wire.a.add_audio(Direction::SendRecv, "of-a"),
            wire.b.add_audio(Direction::SendRecv, "of-b"),
        ));
    });
    let (at_a, at_b) = ends.unwrap();
    assert_eq!(at_b.current_direction(), Some(Direction::SendRecv));
    let (from_b, from_a) = (
        at_a.receiver().track().unwrap(),
        at_b.receiver().track().unwrap(),
    );
    assert_eq!(
        (from_a.id(), from_b.id()),
        ("of-a".to_owned(), "of-b".to_owned())
    );

    for sequence in 1..=100 {
        assert!(wire.a.send(&at_a, sequence));
        assert!(wire.b.send(&at_b, sequence));
        wire.pass(Duration::from_millis(20));
    }
    assert_eq!(wire.b.take_audio(&from_a), (1..=100).collect::<Vec<_>>());
    assert_eq!(wire.a.take_audio(&from_b), (1..=100).collect::<Vec<_>>());
}

#[test]
fn what_is_lost_is_told_with_the_next_packet_and_counted_on_both_sides() {
    let (mut wire, at_a) = Wire::one_way();
    let at_b = wire.b.session.transceivers()[0].clone();
    let mut missing = Vec::new();
    for sequence in 1..=1000 {
        wire.cut = matches!(sequence, 300..303 | 500);
        assert!(wire.a.send(&at_a, sequence));
        wire.settle();
        wire.cut = false;
        wire.pass(Duration::from_millis(20));
        wire.b.events.retain(|event| match event {
            Event::Audio(_, frame) => {
                missing.extend((frame.missing > 0).then_some((frame.sequence, frame.missing)));
                false
            }
            _ => true,
        });
    }
    assert_eq!(missing, [(303, 3), (501, 1)]);

    // Of the receiver: what it saw.
    let receiver = at_b.receiver();
    let report = wire.b.session.stats(Of::Receiver(&receiver));
    let inbound = report.iter().find_map(|stats| match stats {
        RtcStats::InboundRtp(inbound) => Some(inbound),
        _ => None,
    });
    let inbound = inbound.unwrap();
    assert_eq!(inbound.inbound.track_identifier, "of-a");
    assert_eq!(inbound.received.packets_received, 996);
    assert_eq!(inbound.received.packets_lost, 4);
    assert_eq!(inbound.inbound.bytes_received, 2 * 996);
    assert!((inbound.inbound.audio_level - 0.1).abs() < 0.001);
    assert!(!report.iter().any(|s| matches!(s, RtcStats::DataChannel(_))));
    assert!(wire.b.session.stats(Of::Sender(&at_b.sender())).len() < report.len());

    // Of the sender: what it was told.
    let report = wire.a.session.stats(Of::All);
    let mut seen = [false; 5];
    for stats in &report {
        match stats {
            RtcStats::RemoteInboundRtp(remote) => {
                assert_eq!(remote.received.packets_lost, 4);
                assert!(remote.remote_inbound.round_trip_time < 0.1);
                seen[0] = true;
            }
            RtcStats::Transport(transport) => {
                assert_eq!(
                    transport.transport.dtls_state,
                    Some(DtlsTransportState::Connected)
                );
                let linked = [IceTransportState::Connected, IceTransportState::Completed];
                assert!(linked.contains(&transport.transport.ice_state.unwrap()));
                assert!(transport.transport.packets_sent > 1000);
                assert!(transport.transport.bytes_sent > 40_000);
                seen[1] = true;
            }
            RtcStats::CandidatePair(pair) => {
                assert!(pair.candidate_pair.nominated);
                assert!(pair.candidate_pair.responses_received > 0);
                seen[2] = true;
            }
            RtcStats::LocalCandidate(local) => {
                assert_eq!(local.local_candidate.address, "10.0.0.1");
                assert_eq!(local.local_candidate.port, 1000);
                let kind = local.local_candidate.candidate_type;
                assert_eq!(kind, Some(IceCandidateType::Host));
                seen[3] = true;
            }
            RtcStats::RemoteCandidate(remote) => {
                assert_eq!(remote.remote_candidate.address, "10.0.0.2");
                seen[4] = true;
            }
            _ => {}
        }
    }
    assert_eq!(seen, [true; 5], "{report:#?}");
    wire.a.session.close();
    assert!(wire.a.session.stats(Of::Sender(&at_a.sender())).len() <= 5);
}

#[test]
fn messages_pass_both_ways_and_the_buffer_empties() {
    let mut wire = Wire::connected(|_| {});
    wire.until(|wire| !wire.b.opened().is_empty());
    let theirs = wire.b.opened().remove(0);
    assert_eq!(
        (theirs.label(), theirs.state()),
        ("first".to_owned(), DataChannelState::Open)
    );
    let mine = wire.a.session.channels[0].clone();

    let long = vec![7; 200_000];
    assert!(wire.a.session.send_message(&mine, b"one", true));
    assert!(wire.a.session.send_message(&mine, &long, true));
    assert!(wire.b.session.send_message(&theirs.inner, b"back", false));
    assert_eq!(mine.buffered(), 200_003);
    wire.until(|wire| wire.b.messages().len() == 2 && !wire.a.messages().is_empty());
    assert_eq!(wire.b.messages(), [b"one", &long[..]]);
    assert_eq!(wire.a.messages(), [b"back"]);

    wire.until(|wire| wire.a.session.channels[0].buffered() == 0);
    let sent = |event: &Event| match event {
        Event::ChannelSent(_, bytes) => *bytes,
        _ => 0,
    };
    assert_eq!(wire.a.events.iter().map(sent).sum::<u64>(), 200_003);
}

#[test]
fn a_lossy_channel_gives_up_on_messages_and_their_bytes() {
    let mut wire = Wire::connected(|_| {});
    let init = DataChannelInit {
        ordered: false,
        max_retransmits: Some(0),
        ..Default::default()
    };
    let lossy = wire.a.session.create_channel("lossy", &init).unwrap();
    wire.until(|_| lossy.state() == DataChannelState::Open);
    wire.until(|wire| wire.b.opened().len() == 2);

    wire.cut = true;
    assert!(wire.a.session.send_message(&lossy.inner, &[1; 5000], true));
    wire.pass(Duration::from_millis(200));
    wire.cut = false;
    wire.until(|_| lossy.buffered_amount() == 0);
    assert!(wire.a.session.send_message(&lossy.inner, b"next", true));
    wire.until(|wire| wire.b.messages() == [b"next"]);
}

#[test]
fn channels_made_later_open_without_an_exchange() {
    let mut wire = Wire::connected(|_| {});
    let late = wire.a.add_channel("late");
    wire.until(|wire| wire.b.opened().len() == 2);
    assert_eq!(late.state(), DataChannelState::Open);
    assert!(late.id() >= 0);

    wire.a.session.close_channel(&late.inner);
    let closed = |event: &Event| {
        matches!(event, Event::ChannelState(channel, DataChannelState::Closed)
            if channel.config.label == "late")
    };
    wire.until(|wire| wire.b.events.iter().any(closed));
    assert_eq!(wire.b.session.channels.len(), 1);
    wire.until(|wire| wire.a.session.channels.len() == 1);
}

/// What the SDK does with servers that do not know negotiated channels.
#[test]
fn channels_swapped_between_offer_and_answer_stay_swapped() {
    let mut wire = Wire::new();
    let negotiated = |id| DataChannelInit {
        negotiated: true,
        id,
        ..Default::default()
    };
    let early: Vec<_> = [100, 101]
        .map(|id| {
            wire.a
                .session
                .create_channel("early", &negotiated(id))
                .unwrap()
        })
        .into();
    let offer = wire.a.offer();
    early
        .iter()
        .for_each(|channel| wire.a.session.close_channel(&channel.inner));
    wire.a.add_channel("swapped");
    wire.a.session.set_local_description(offer.clone()).unwrap();
    wire.b.session.set_remote_description(offer).unwrap();
    let answer = wire.b.session.create_answer().unwrap();
    wire.b
        .session
        .set_local_description(answer.clone())
        .unwrap();
    wire.a.session.set_remote_description(answer).unwrap();

    wire.until(|wire| !wire.b.opened().is_empty());
    wire.pass(Duration::from_secs(5));
    let labels: Vec<_> = wire.b.opened().iter().map(DataChannel::label).collect();
    assert_eq!(labels, ["swapped"]);
    assert!(wire.a.opened().is_empty());
    assert_eq!(wire.a.session.channels.len(), 1);
}

#[test]
fn a_negotiated_channel_id_is_taken_once() {
    let mut wire = Wire::new();
    let init = |id| DataChannelInit {
        negotiated: true,
        id,
        ..Default::default()
    };
    wire.a.session.create_channel("one", &init(7)).unwrap();
    for id in [7, -1, 65_535, 70_000] {
        let err = wire
            .a
            .session
            .create_channel("again", &init(id))
            .unwrap_err();
        assert_eq!(err.error_type, RtcErrorType::InvalidState);
    }
    // An offer that is dropped takes the id with it, as the stack can't give it back.
    wire.a.offer();
    let mine = wire.a.session.channels[0].clone();
    wire.a.session.close_channel(&mine);
    wire.a.add_channel("carrier");
    wire.a.offer();
    assert!(wire.a.session.create_channel("again", &init(7)).is_err());
    wire.negotiate();
    wire.until(|wire| !wire.b.opened().is_empty());
}

#[test]
fn tracks_come_and_go_and_a_section_is_used_again() {
    let mut slot = None;
    let mut wire = Wire::connected(|wire| slot = Some(wire.a.add_audio(Direction::RecvOnly, "")));
    let slot = slot.unwrap();
    let idle = slot.receiver().track().unwrap();
    assert!(slot.receiver().streams().is_empty());

    // B publishes into the section that A offered.
    let theirs = wire.b.session.transceivers()[0].clone();
    let publish = |wire: &mut Wire, id: &str| {
        theirs.set_direction(Direction::SendOnly);
        let track = RtcAudioTrack::new(id.to_owned(), None);
        theirs
            .sender()
            .set_track(Some(MediaStreamTrack::Audio(track)))
            .unwrap();
        wire.negotiate();
        slot.receiver().track().unwrap()
    };
    let first = publish(&mut wire, "first");
    assert_eq!(
        (first.id(), first.state()),
        ("first".to_owned(), RtcTrackState::Live)
    );
    assert_eq!(slot.receiver().stream_ids(), ["-"]);
    assert_eq!(idle.state(), RtcTrackState::Ended);
    assert!(wire.b.send(&theirs, 1));
    wire.pass(Duration::from_millis(50));
    assert_eq!(wire.a.take_audio(&first), [1]);

    // The same again changes nothing.
    wire.negotiate();
    assert_eq!(first.state(), RtcTrackState::Live);
    assert!(wire.b.send(&theirs, 2));
    wire.pass(Duration::from_millis(50));
    assert_eq!(wire.a.take_audio(&first), [2]);

    wire.b.session.remove_track(&theirs.sender()).unwrap();
    wire.negotiate();
    assert_eq!(first.state(), RtcTrackState::Ended);
    assert!(slot.receiver().streams().is_empty());
    assert!(!wire.b.send(&theirs, 3));

    let second = publish(&mut wire, "second");
    assert_eq!(second.state(), RtcTrackState::Live);
    assert!(wire.b.send(&theirs, 4));
    wire.pass(Duration::from_millis(50));
    assert_eq!(wire.a.take_audio(&second), [4]);
    assert!(wire.a.take_audio(&first).is_empty());

    // Straight from one to another.
    let third = publish(&mut wire, "third");
    assert_eq!(
        (second.state(), third.state()),
        (RtcTrackState::Ended, RtcTrackState::Live)
    );
    wire.settle();
    let tracks = |event: &&Event| matches!(event, Event::Track(_));
    assert_eq!(wire.a.events.iter().filter(tracks).count(), 3);
}

#[test]
fn nothing_is_sent_unless_it_can_arrive() {
    let mut wire = Wire::new();
    let mine = wire.a.add_audio(Direction::SendOnly, "mine");
    assert!(!wire.a.send(&mine, 1));
    wire.a.add_channel("first");
    wire.negotiate();
    assert!(!wire.a.send(&mine, 1));
    wire.until(|wire| wire.a.state() == PeerConnectionState::Connected);
    assert!(wire.a.send(&mine, 1));
    wire.a.session.close();
    assert!(!wire.a.send(&mine, 2));
}

#[test]
fn an_offer_is_made_even_if_nothing_changed() {
    let mut wire = Wire::connected(|wire| {
        wire.a.add_audio(Direction::RecvOnly, "");
    });
    for _ in 0..3 {
        wire.negotiate();
    }
    assert_eq!(wire.a.state(), PeerConnectionState::Connected);
    // Without a media section too.
    let mut wire = Wire::connected(|_| {});
    let last = wire.a.session.local_description().unwrap().to_string();
    assert_eq!(wire.a.offer().to_string(), last);
    wire.negotiate();
}

#[test]
fn states_are_enforced() {
    let mut wire = Wire::new();
    let state = |err: Result<_, crate::RtcError>| err.unwrap_err().error_type;
    assert_eq!(
        state(wire.a.session.create_answer()),
        RtcErrorType::InvalidState
    );
    let nothing = wire.a.session.create_offer(&OfferOptions::default());
    assert_eq!(state(nothing), RtcErrorType::InvalidState);
    wire.a.add_channel("first");
    let offer = wire.a.offer();
    let answer = SessionDescription::new(offer.as_str(), SdpType::Answer);
    let early = wire.a.session.set_remote_description(answer).unwrap_err();
    assert_eq!(early.error_type, RtcErrorType::InvalidState);
    wire.a.session.set_local_description(offer).unwrap();
    assert_eq!(
        wire.a.session.signaling_state(),
        SignalingState::HaveLocalOffer
    );
    let second = wire.a.session.create_offer(&OfferOptions::default());
    assert_eq!(state(second), RtcErrorType::InvalidState);

    let rollback = SessionDescription::new("", SdpType::Rollback);
    wire.a.session.set_local_description(rollback).unwrap();
    assert_eq!(wire.a.session.signaling_state(), SignalingState::Stable);
    wire.negotiate();
    wire.a.session.close();
    let closed = wire.a.session.create_offer(&OfferOptions::default());
    assert_eq!(state(closed), RtcErrorType::InvalidState);
}

/// What the SDK does before it restarts ICE.
#[test]
fn the_last_answer_again_withdraws_an_offer() {
    let mut wire = Wire::connected(|wire| {
        wire.a.add_audio(Direction::RecvOnly, "");
    });
    let fresh = wire.a.add_audio(Direction::RecvOnly, "");
    let offer = wire.a.offer();
    wire.a.session.set_local_description(offer).unwrap();
    let mid = fresh.mid();
    assert!(mid.is_some());
    let last = wire.a.session.remote_description().unwrap();
    wire.a.session.set_remote_description(last).unwrap();
    assert_eq!(wire.a.session.signaling_state(), SignalingState::Stable);
    assert_eq!(fresh.current_direction(), None);
    wire.negotiate();
    assert_eq!(fresh.mid(), mid);
    assert!(fresh.current_direction().is_some());
}

#[test]
fn an_offer_whose_answer_was_lost_is_made_again_with_the_same_sections() {
    let mut wire = Wire::connected(|wire| {
        wire.a.add_audio(Direction::SendOnly, "first");
    });
    let last = wire.a.session.remote_description().unwrap();
    let second = wire.a.add_audio(Direction::SendOnly, "second");
    let offer = wire.a.offer();
    wire.a.session.set_local_description(offer.clone()).unwrap();
    wire.b.session.set_remote_description(offer).unwrap();
    let lost = wire.b.session.create_answer().unwrap();
    wire.b.session.set_local_description(lost).unwrap();

    wire.a.session.set_remote_description(last).unwrap();
    assert_eq!(wire.a.session.signaling_state(), SignalingState::Stable);
    let restart = OfferOptions {
        ice_restart: true,
        ..OfferOptions::default()
    };
    wire.negotiate_with(&restart);
    wire.until(|wire| wire.a.state() == PeerConnectionState::Connected);
    assert_eq!(second.current_direction(), Some(Direction::SendOnly));
    let mut tracks = wire.b.events.iter().filter_map(|event| match event {
        Event::Track(event) => Some(event.track.clone()),
        _ => None,
    });
    let track = tracks.next_back().unwrap();
    assert_eq!(track.id(), "second");
    for sequence in 1..=10 {
        assert!(wire.a.send(&second, sequence));
        wire.pass(Duration::from_millis(20));
    }
    assert_eq!(wire.b.take_audio(&track), (1..=10).collect::<Vec<_>>());
}

#[test]
fn video_is_offered_only_when_it_is_asked_for() {
    let mut wire = Wire::new();
    wire.a.add_channel("first");
    let add_video = |side: &mut Side| {
        let init = RtpTransceiverInit {
            direction: Direction::RecvOnly,
            stream_ids: vec![],
            send_encodings: vec![],
        };
        side.session
            .add_transceiver(MediaType::Video, init)
            .unwrap()
    };
    let in_advance = add_video(&mut wire.a);
    wire.a.add_audio(Direction::RecvOnly, "");
    wire.negotiate();
    let offers = |wire: &Wire| wire.a.session.local_description().unwrap().to_string();
    assert!(!offers(&wire).contains("m=video"));

    let asked_for = add_video(&mut wire.a);
    wire.negotiate();
    assert_eq!(offers(&wire).matches("m=video").count(), 1);
    assert!(asked_for.mid().is_some() && in_advance.mid().is_none());
    wire.pass(Duration::from_secs(1));
    assert_eq!(wire.a.state(), PeerConnectionState::Connected);
}

#[test]
fn a_section_that_only_received_has_no_source_until_it_sends() {
    let mut ends = None;
    let mut wire = Wire::connected(|wire| {
        ends = Some(wire.a.add_audio(Direction::RecvOnly, ""));
        wire.b.add_audio(Direction::SendOnly, "of-b");
    });
    let (at_a, at_b) = (ends.unwrap(), wire.b.session.transceivers()[0].clone());
    let mid = at_a.bound_mid().unwrap();
    let has_source = |side: &mut Side| {
        let mut api = side.session.rtc.as_mut().unwrap().direct_api();
        api.stream_tx_by_mid(mid, None).is_some()
    };
    assert!(!has_source(&mut wire.a) && has_source(&mut wire.b));

    let track = RtcAudioTrack::new("of-a".to_owned(), None);
    let track = Some(MediaStreamTrack::Audio(track));
    at_a.sender().set_track(track).unwrap();
    at_a.set_direction(Direction::SendRecv);
    at_b.set_direction(Direction::SendRecv);
    let offer = wire.a.offer();
    assert!(offer.as_str().contains("a=ssrc:"), "{}", offer.as_str());
    wire.negotiate();
    let heard = at_b.receiver().track().unwrap();
    for sequence in 1..=10 {
        assert!(wire.a.send(&at_a, sequence));
        wire.pass(Duration::from_millis(20));
    }
    assert_eq!(wire.b.take_audio(&heard), (1..=10).collect::<Vec<_>>());
}

#[test]
fn packets_that_are_read_late_have_the_time_and_the_jitter_that_they_came_with() {
    const PACE: Duration = Duration::from_millis(20);
    let (mut wire, at_a) = Wire::one_way();
    let mut sent = Vec::new();
    for sequence in 1..=100 {
        wire.now += PACE;
        assert!(wire.a.send(&at_a, sequence));
        wire.a.session.step(wire.now, &mut wire.a.output);
        let transmits = wire.a.output.transmits.drain(..);
        sent.extend(transmits.map(|transmit| (wire.now, transmit)));
        // Those of five together.
        if sequence % 5 == 0 {
            for (arrived, transmit) in sent.drain(..) {
                let received = Received {
                    protocol: Protocol::Udp,
                    source: wire.a.addr,
                    local: wire.b.addr,
                    arrived,
                    bytes: &transmit.contents,
                };
                wire.b.session.receive(wire.now, &received);
            }
            wire.settle();
        }
    }
    let arrived = wire.b.events.iter().filter_map(|event| match event {
        Event::Audio(_, frame) => Some(frame.received_at),
        _ => None,
    });
    let arrived: Vec<_> = arrived.collect();
    assert_eq!(arrived.len(), 100);
    for pair in arrived.windows(2) {
        assert!((pair[1] - pair[0]).abs_diff(PACE) < Duration::from_millis(1));
    }
    let receiver = wire.b.session.transceivers()[0].receiver();
    let report = wire.b.session.stats(Of::Receiver(&receiver));
    let jitter = report.iter().find_map(|stats| match stats {
        RtcStats::InboundRtp(inbound) => Some(inbound.received.jitter),
        _ => None,
    });
    assert!(jitter.unwrap() < 1e-3, "{jitter:?} s");
}

#[test]
fn no_audio_is_missed_while_ice_is_restarted() {
    let (mut wire, at_a) = Wire::one_way();
    let track = wire.b.session.transceivers()[0].receiver().track().unwrap();
    let restart = OfferOptions {
        ice_restart: true,
        ..OfferOptions::default()
    };
    for sequence in 1..=200 {
        if sequence == 50 {
            wire.negotiate_with(&restart);
            // Before the first check has come back.
            wire.cut = true;
            wire.settle();
            wire.cut = false;
            assert_eq!(wire.a.state(), PeerConnectionState::Connecting);
        }
        assert!(wire.a.send(&at_a, sequence));
        wire.pass(Duration::from_millis(20));
    }
    assert_eq!(wire.a.state(), PeerConnectionState::Connected);
    assert_eq!(wire.b.take_audio(&track), (1..=200).collect::<Vec<_>>());
}

#[test]
fn directions_that_were_edited_in_the_text_are_kept() {
    let mut wire = Wire::new();
    let mine = wire.a.add_audio(Direction::Inactive, "");
    let offer = wire.a.offer();
    let edited = offer.as_str().replace("a=inactive", "a=recvonly");
    wire.a
        .session
        .set_local_description(SessionDescription::new(&edited, SdpType::Offer))
        .unwrap();
    assert_eq!(mine.direction(), Direction::RecvOnly);
}

#[test]
fn a_restart_of_ice_keeps_the_connection() {
    let mut wire = Wire::connected(|_| {});
    let before = wire.a.session.local_description().unwrap();
    wire.a.session.restart_ice();
    wire.negotiate();
    let restarted = wire.a.session.local_description().unwrap();
    assert_ne!(credentials(&before), credentials(&restarted));
    wire.pass(Duration::from_secs(20));
    wire.until(|wire| wire.a.state() == PeerConnectionState::Connected);
    wire.until(|wire| wire.b.state() == PeerConnectionState::Connected);
    // Once only.
    wire.negotiate();
    let again = wire.a.session.local_description().unwrap();
    assert_eq!(credentials(&restarted), credentials(&again));
}

#[test]
fn a_restart_of_ice_finds_another_address() {
    let mut wire = Wire::connected(|_| {});
    wire.a.lost = Some(wire.a.addr);
    wire.a.addr = "10.0.0.9:1009".parse().unwrap();
    wire.until(|wire| wire.a.state() == PeerConnectionState::Disconnected);
    wire.a.session.restart_ice();
    wire.negotiate();
    wire.until(|wire| wire.a.state() == PeerConnectionState::Connected);
    wire.until(|wire| wire.b.state() == PeerConnectionState::Connected);

    let mine = wire.a.session.channels[0].clone();
    assert!(wire.a.session.send_message(&mine, b"from there", true));
    wire.until(|wire| wire.b.messages() == [b"from there"]);
    let (_, local, remote) = wire.a.session.path().unwrap();
    assert_eq!((local, remote), (wire.a.addr, wire.b.addr));
}

#[test]
fn a_connection_whose_candidate_is_withdrawn_ends_at_once() {
    let mut wire = Wire::connected(|_| {});
    let host = Candidate::host(wire.a.addr, Protocol::Udp).unwrap();
    let start = wire.now;
    wire.a.session.take_news(News::Withdrawn(host));
    wire.until(|wire| wire.a.state() == PeerConnectionState::Disconnected);
    assert!(wire.now - start < Duration::from_secs(1));
}

/// With the same addresses as before, told one by one, as servers do.
#[test]
fn candidates_are_taken_again_after_a_restart_of_ice() {
    let mut wire = Wire::connected(|_| {});
    let host = |addr| {
        Candidate::host(addr, Protocol::Udp)
            .unwrap()
            .to_sdp_string()
    };
    let (at_a, at_b) = (host(wire.a.addr), host(wire.b.addr));
    wire.a.session.restart_ice();
    let bare = |text: SessionDescription| {
        let lines = text.as_str().lines();
        let kept: Vec<_> = lines
            .filter(|line| !line.starts_with("a=candidate"))
            .collect();
        SessionDescription::new(&(kept.join("\r\n") + "\r\n"), text.sdp_type())
    };
    let offer = wire.a.offer();
    wire.a.session.set_local_description(offer.clone()).unwrap();
    wire.b.session.set_remote_description(bare(offer)).unwrap();
    let answer = wire.b.session.create_answer().unwrap();
    wire.b
        .session
        .set_local_description(answer.clone())
        .unwrap();
    wire.a.session.set_remote_description(bare(answer)).unwrap();
    wire.a.session.add_remote_candidate(&at_b).unwrap();
    wire.b.session.add_remote_candidate(&at_a).unwrap();
    wire.pass(Duration::from_secs(20));
    assert_eq!(wire.a.state(), PeerConnectionState::Connected);
    assert_eq!(wire.b.state(), PeerConnectionState::Connected);
}

fn requests(wire: &mut Wire, until: Duration) -> Vec<(Duration, String)> {
    let start = wire.now;
    let mut seen = Vec::new();
    while wire.now < start + until {
        wire.a.session.step(wire.now, &mut wire.a.output);
        wire.a.output.transmits.clear();
        for request in wire.a.output.network.drain(..) {
            seen.push((wire.now - start, format!("{request:?}")));
        }
        let next = wire.a.output.deadline.unwrap();
        wire.now = next.max(wire.now + Duration::from_millis(1));
    }
    seen.retain(|(_, request)| request.starts_with("Tcp") || request == "Streams");
    seen
}

#[test]
fn connections_are_made_when_datagrams_had_their_time() {
    const TCP: &str = "candidate:1 1 tcp 1 10.0.0.2 7881 typ host tcptype passive";
    const UDP: &str = "candidate:1 1 udp 1 10.0.0.2 7882 typ host";
    let cases: [(&[&str], u64); 4] = [
        (&[TCP], 100),
        (&[TCP, UDP], 2000),
        (&[UDP, TCP, TCP], 2000),
        (&[UDP], 2000),
    ];
    for (lines, expected) in cases {
        let mut wire = Wire::new();
        wire.a.add_channel("first");
        wire.cut = true;
        let offer = wire.a.offer();
        wire.a.session.set_local_description(offer.clone()).unwrap();
        wire.b.session.set_remote_description(offer).unwrap();
        let answer = wire.b.session.create_answer().unwrap();
        wire.a.session.set_remote_description(answer).unwrap();
        for line in lines {
            wire.a.session.add_remote_candidate(line).unwrap();
        }
        let seen = requests(&mut wire, Duration::from_secs(10));
        let wanted: &[&str] = match lines.contains(&TCP) {
            true => &["Tcp(10.0.0.2:7881)", "Streams"],
            false => &["Streams"],
        };
        let names: Vec<&str> = seen.iter().map(|(_, name)| name.as_str()).collect();
        assert_eq!(names, wanted, "{lines:?}");
        for (at, _) in seen {
            let late = at.as_millis() as u64 - expected;
            assert!(late < 20, "{lines:?}: {late} ms late");
        }
        // One that comes later is not kept waiting.
        let late = TCP.replace("7881", "7883");
        wire.a.session.add_remote_candidate(&late).unwrap();
        let seen = requests(&mut wire, Duration::from_millis(10));
        assert_eq!(seen[0].1, "Tcp(10.0.0.2:7883)");
        assert_eq!(seen.len(), 1);
    }
}

#[test]
fn not_every_candidate_for_tcp_is_connected_to() {
    let mut wire = Wire::connected(|_| {});
    for port in 1..20 {
        let line = format!("candidate:1 1 tcp 1 10.0.0.2 {port} typ host tcptype passive");
        wire.a.session.add_remote_candidate(&line).unwrap();
    }
    wire.cut = true;
    assert_eq!(requests(&mut wire, Duration::from_secs(30)).len(), 4 + 1);
}

#[test]
fn no_connection_is_made_while_datagrams_pass_but_when_they_stop() {
    let mut wire = Wire::connected(|_| {});
    let line = "candidate:1 1 tcp 1 10.0.0.2 7881 typ host tcptype passive";
    wire.a.session.add_remote_candidate(line).unwrap();
    for other in [
        "candidate:1 1 tcp 1 10.0.0.2 9 typ host tcptype active",
        "candidate:1 1 tcp 1 10.0.0.2 7882 typ host",
    ] {
        wire.a.session.add_remote_candidate(other).unwrap();
    }
    for _ in 0..10 {
        wire.pass(Duration::from_secs(1));
        assert_eq!(wire.a.state(), PeerConnectionState::Connected);
    }
    assert!(!wire.a.session.streams());
    wire.cut = true;
    let seen = requests(&mut wire, Duration::from_secs(30));
    let names: Vec<&str> = seen.iter().map(|(_, name)| name.as_str()).collect();
    assert_eq!(names, ["Tcp(10.0.0.2:7881)", "Streams"]);
}

fn credentials(description: &SessionDescription) -> Option<&str> {
    description
        .as_str()
        .lines()
        .find(|line| line.starts_with("a=ice-ufrag:"))
}

#[test]
fn silence_is_a_disconnect_then_a_failure_and_may_end() {
    let mut wire = Wire::connected(|_| {});
    wire.a.events.clear();
    wire.cut = true;
    let start = wire.now;
    wire.until(|wire| wire.a.state() == PeerConnectionState::Disconnected);
    assert!(
        wire.now - start <= Duration::from_secs(7),
        "{:?}",
        wire.now - start
    );
    wire.until(|wire| wire.a.state() == PeerConnectionState::Failed);
    assert!(
        wire.now - start <= Duration::from_secs(23),
        "{:?}",
        wire.now - start
    );

    // Only the remote side's checks can bring it back by itself; a restart surely does.
    wire.cut = false;
    wire.a.session.restart_ice();
    wire.negotiate();
    wire.until(|wire| wire.a.state() == PeerConnectionState::Connected);
}

#[test]
fn a_peer_that_is_never_reached_is_a_failure() {
    let mut wire = Wire::new();
    wire.a.add_channel("first");
    wire.cut = true;
    let start = wire.now;
    wire.negotiate();
    wire.until(|wire| wire.a.state() == PeerConnectionState::Failed);
    assert!(wire.now - start >= Duration::from_secs(15));
    use PeerConnectionState::{Connecting, Failed};
    assert_eq!(states(&wire.a.events), [Connecting, Failed]);
}

#[test]
fn a_peer_that_closes_is_a_disconnect_then_a_failure() {
    let mut wire = Wire::connected(|_| {});
    wire.until(|wire| !wire.b.opened().is_empty());
    let start = wire.now;
    wire.b.session.close();
    wire.until(|wire| wire.a.state() == PeerConnectionState::Disconnected);
    let closed = |event: &Event| matches!(event, Event::ChannelState(_, DataChannelState::Closed));
    assert!(wire.a.events.iter().any(closed));
    wire.until(|wire| wire.a.state() == PeerConnectionState::Failed);
    assert!(wire.now - start <= Duration::from_secs(4));
    // Candidates that cross the farewell are no error.
    let late = "candidate:1 1 udp 1 10.0.0.9 5 typ host";
    wire.a.session.add_remote_candidate(late).unwrap();
    assert!(
        wire.a
            .session
            .create_offer(&OfferOptions::default())
            .is_err()
    );
}

#[test]
fn closing_ends_tracks_and_channels_and_is_the_last_step() {
    let mut wire = Wire::connected(|wire| {
        wire.a.add_audio(Direction::RecvOnly, "");
    });
    let track = wire.a.session.transceivers()[0].receiver().track().unwrap();
    let channel = wire.a.session.channels[0].clone();
    wire.a.session.close();
    wire.a.session.close();
    assert_eq!(track.state(), RtcTrackState::Ended);
    assert_eq!(channel.state(), DataChannelState::Closed);
    assert_eq!(wire.a.state(), PeerConnectionState::Closed);
    wire.a.session.step(wire.now, &mut wire.a.output);
    assert!(wire.a.output.deadline.is_none());
    assert!(!wire.a.output.transmits.is_empty(), "no farewell");
    assert!(wire.a.session.check_open().is_err());
}

#[test]
fn nonsense_is_an_error_or_ignored() {
    let mut wire = Wire::connected(|_| {});
    let from = wire.b.addr;
    for length in [0, 1, 2, 12, 20, 100, 1500] {
        for first in [0, 1, 20, 22, 64, 128, 200, 255] {
            let mut bytes = vec![0x5a; length];
            bytes.iter_mut().take(1).for_each(|byte| *byte = first);
            for source in [from, "9.9.9.9:9".parse().unwrap()] {
                for protocol in [Protocol::Udp, Protocol::Tcp] {
                    let received = Received {
                        protocol,
                        source,
                        local: wire.a.addr,
                        arrived: wire.now,
                        bytes: &bytes,
                    };
                    wire.a.session.receive(wire.now, &received);
                }
            }
        }
    }
    assert!(wire.a.session.faults().count(Fault::Datagram) > 0);
    for line in [
        "candidate:",
        "candidate:1 1 udp x 1.2.3.4 5 typ host",
        "candidate:\u{0}",
    ] {
        assert!(wire.a.session.add_remote_candidate(line).is_err(), "{line}");
    }
    let ignored = [
        "",
        "candidate:1 1 tcp 1 1.2.3.4 5 typ host tcptype passive",
        "candidate:1 1 udp 1 4f5d.local 5 typ host",
    ];
    for line in ignored {
        wire.a.session.add_remote_candidate(line).unwrap();
    }
    for number in 0..1000 {
        let line = format!(
            "candidate:1 1 udp 1 10.1.{}.{} 5 typ host",
            number / 200,
            number % 200
        );
        wire.a.session.add_remote_candidate(&line).unwrap();
    }
    wire.a.session.step(wire.now, &mut wire.a.output);
    let asked = wire.a.output.network.len();
    assert!((1..100).contains(&asked), "{asked} addresses are asked for");
    wire.pass(Duration::from_secs(1));
    assert_eq!(wire.a.state(), PeerConnectionState::Connected);
}

/// Every line of real descriptions left out, doubled or cut; whatever is made of it, no panic.
#[test]
fn damaged_descriptions_do_no_harm() {
    let prepare = |wire: &mut Wire| {
        wire.a.add_channel("first");
        wire.a.add_audio(Direction::SendRecv, "of-a");
        wire.b.add_audio(Direction::SendRecv, "of-b");
    };
    let damaged = |text: &str| -> Vec<String> {
        let lines: Vec<&str> = text.lines().collect();
        let join = |lines: &[&str]| lines.iter().map(|line| format!("{line}\r\n")).collect();
        let mut texts: Vec<String> = vec![String::new(), "\u{0}".to_owned(), "v=0".to_owned()];
        for at in 0..lines.len() {
            let mut less = lines.clone();
            less.remove(at);
            let mut more = lines.clone();
            more.insert(at, lines[at]);
            let mut cut = lines.clone();
            cut[at] = &lines[at][..lines[at].len() / 2];
            texts.extend([join(&less), join(&more), join(&cut), join(&lines[..at])]);
        }
        texts
    };
    let mut wire = Wire::new();
    prepare(&mut wire);
    let offer = wire.a.offer();
    wire.a.session.set_local_description(offer.clone()).unwrap();
    wire.b
        .session
        .set_remote_description(offer.clone())
        .unwrap();
    let answer = wire.b.session.create_answer().unwrap();

    let mut refused = 0;
    for text in damaged(offer.as_str()) {
        let mut wire = Wire::new();
        prepare(&mut wire);
        let description = SessionDescription::new(&text, SdpType::Offer);
        match wire.b.session.set_remote_description(description) {
            Ok(()) => {
                let answer = wire.b.session.create_answer().unwrap();
                wire.b.session.set_local_description(answer).unwrap();
            }
            Err(_) => refused += 1,
        }
        wire.pass(Duration::from_secs(2));
    }
    for text in damaged(answer.as_str()) {
        let mut wire = Wire::new();
        prepare(&mut wire);
        let offer = wire.a.offer();
        // Its names are random: the answer's have to be put in their place.
        let mids = |text: &str| -> Vec<String> {
            let mid = |line: &str| line.strip_prefix("a=mid:").map(str::to_owned);
            text.lines().filter_map(mid).collect()
        };
        let text = mids(answer.as_str())
            .iter()
            .zip(mids(offer.as_str()))
            .fold(text, |text, (theirs, ours)| text.replace(theirs, &ours));
        wire.a.session.set_local_description(offer).unwrap();
        let description = SessionDescription::new(&text, SdpType::Answer);
        refused += usize::from(wire.a.session.set_remote_description(description).is_err());
        wire.pass(Duration::from_secs(2));
        assert!(
            wire.a
                .session
                .set_local_description(wire_rollback())
                .is_ok()
        );
    }
    assert!(refused > 20, "only {refused} were refused");
}

fn wire_rollback() -> SessionDescription {
    SessionDescription::new("", SdpType::Rollback)
}
