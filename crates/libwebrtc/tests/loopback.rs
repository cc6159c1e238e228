//! Two peer connections of the public API, joined by hand over real sockets.
#![cfg(feature = "encoded-audio")]
#![allow(clippy::disallowed_methods, reason = "the bans are about the daemon")]

mod signal;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use libwebrtc::{
    audio_source::native::NativeAudioSource,
    audio_stream::native::{NativeAudioStream, NativeAudioStreamOptions},
    encoded_audio::EncodedAudioStream,
    peer_connection_factory::native::PeerConnectionFactoryExt,
    prelude::*,
    stats::RtcStats,
};
use tokio::{
    sync::mpsc::{self, UnboundedReceiver},
    time::{interval, timeout},
};
use tokio_stream::StreamExt;

/// Generous: a test that gets here has failed.
const LIMIT: Duration = Duration::from_secs(30);
const PACKET: Duration = Duration::from_millis(20);

struct End {
    pc: PeerConnection,
    candidates: UnboundedReceiver<IceCandidate>,
    states: UnboundedReceiver<PeerConnectionState>,
    channels: UnboundedReceiver<DataChannel>,
    tracks: UnboundedReceiver<libwebrtc::peer_connection::TrackEvent>,
}

impl End {
    fn new() -> Self {
        let factory = PeerConnectionFactory::default();
        let pc = factory
            .create_peer_connection(RtcConfiguration::default())
            .unwrap();
        let (candidate, candidates) = mpsc::unbounded_channel();
        let (state, states) = mpsc::unbounded_channel();
        let (channel, channels) = mpsc::unbounded_channel();
        let (track, tracks) = mpsc::unbounded_channel();
        pc.on_ice_candidate(Some(Box::new(move |new| _ = candidate.send(new))));
        pc.on_connection_state_change(Some(Box::new(move |new| _ = state.send(new))));
        pc.on_data_channel(Some(Box::new(move |new| _ = channel.send(new))));
        pc.on_track(Some(Box::new(move |new| _ = track.send(new))));
        Self {
            pc,
            candidates,
            states,
            channels,
            tracks,
        }
    }

    async fn connected(&mut self) {
        while next(&mut self.states).await != PeerConnectionState::Connected {}
    }
}

/// Of a kind, the first.
macro_rules! pick {
    ($report:expr, $kind:ident) => {
        $report
            .iter()
            .find_map(|stats| match stats {
                RtcStats::$kind(found) => Some(found.clone()),
                _ => None,
            })
            .unwrap_or_else(|| panic!("no {} in {:#?}", stringify!($kind), $report))
    };
}

async fn next<T>(queue: &mut UnboundedReceiver<T>) -> T {
    timeout(LIMIT, queue.recv())
        .await
        .expect("in time")
        .expect("not ended")
}

/// True if the queue ends, which is when the callback that feeds it is dropped.
async fn ends<T>(queue: &mut UnboundedReceiver<T>) -> bool {
    timeout(LIMIT, async { while queue.recv().await.is_some() {} })
        .await
        .is_ok()
}

async fn negotiate(a: &PeerConnection, b: &PeerConnection) {
    let offer = a.create_offer(OfferOptions::default()).await.unwrap();
    a.set_local_description(offer.clone()).await.unwrap();
    b.set_remote_description(offer).await.unwrap();
    let answer = b.create_answer(AnswerOptions::default()).await.unwrap();
    b.set_local_description(answer.clone()).await.unwrap();
    a.set_remote_description(answer).await.unwrap();
}

/// Negotiates and trickles one candidate each way.
async fn connect(a: &mut End, b: &mut End) {
    negotiate(&a.pc, &b.pc).await;
    b.pc.add_ice_candidate(next(&mut a.candidates).await)
        .await
        .unwrap();
    a.pc.add_ice_candidate(next(&mut b.candidates).await)
        .await
        .unwrap();
    a.connected().await;
    b.connected().await;
}

fn source_with_track(id: &str) -> (NativeAudioSource, RtcAudioTrack) {
    let source = NativeAudioSource::new(AudioSourceOptions::default(), 48_000, 1, 0);
    let track = PeerConnectionFactory::default().create_audio_track(id, source.clone());
    (source, track)
}

/// An Opus packet of 20 ms (one CELT frame) that says its number.
fn opus(number: u8) -> Vec<u8> {
    let mut packet = vec![0xf8, number];
    packet.resize(20 + usize::from(number) * 3, number ^ 0x55);
    packet
}

#[tokio::test]
async fn audio_passes_both_ways_and_streams_end_at_close() {
    let (mut a, mut b) = (End::new(), End::new());
    let (source_a, track_a) = source_with_track("from-a");
    let (source_b, track_b) = source_with_track("from-b");
    a.pc.add_track(track_a.clone().into(), &["stream-a"])
        .unwrap();
    b.pc.add_track(track_b.into(), &["stream-b"]).unwrap();
    connect(&mut a, &mut b).await;

    let at_b = next(&mut b.tracks).await;
    let at_a = next(&mut a.tracks).await;
    assert_eq!(
        (at_b.track.id(), at_b.streams[0].id()),
        ("from-a".into(), "stream-a".into())
    );
    assert_eq!(
        (at_a.track.id(), at_a.streams[0].id()),
        ("from-b".into(), "stream-b".into())
    );
    let mut streams = [&at_b.track, &at_a.track].map(|track| match track {
        MediaStreamTrack::Audio(track) => EncodedAudioStream::new(track, 256),
        MediaStreamTrack::Video(_) => panic!("not audio"),
    });

    let feeder = tokio::spawn(async move {
        let mut ticks = interval(PACKET);
        for number in 0..=100 {
            ticks.tick().await;
            // Muted in between: time passes, but nothing is sent.
            track_a.set_enabled(!(40..60).contains(&number));
            source_a
                .capture_encoded(&opus(number), PACKET, Some(-30))
                .unwrap();
            source_b
                .capture_encoded(&opus(number), PACKET, None)
                .unwrap();
        }
    });
    for (stream, count, level) in [(0, 81, Some(-30)), (1, 101, None)] {
        let mut frames = Vec::new();
        while frames.len() < count {
            frames.push(
                timeout(LIMIT, streams[stream].next())
                    .await
                    .unwrap()
                    .unwrap(),
            );
        }
        for frame in &frames {
            let number = frame.payload[1];
            assert_eq!(frame.payload[..], opus(number));
            assert_eq!(frame.audio_level, level);
            let time = frame.rtp_timestamp.wrapping_sub(frames[0].rtp_timestamp);
            assert_eq!(time, u32::from(number) * 960);
        }
        let gapless = frames
            .windows(2)
            .all(|pair| pair[1].sequence == pair[0].sequence + 1);
        assert!(gapless, "packets lost or out of order");
        assert_eq!(streams[stream].dropped(), 0);
    }
    feeder.await.unwrap();

    a.pc.close();
    assert!(timeout(LIMIT, streams[1].next()).await.unwrap().is_none());
    assert_eq!(at_a.track.state(), RtcTrackState::Ended);
    b.pc.close();
    assert!(timeout(LIMIT, streams[0].next()).await.unwrap().is_none());
}

#[tokio::test]
async fn messages_pass_both_ways_and_early_ones_wait_for_a_listener() {
    let (mut a, mut b) = (End::new(), End::new());
    let mine =
        a.pc.create_data_channel("chat", DataChannelInit::default())
            .unwrap();
    let (open, mut opened) = mpsc::unbounded_channel();
    let (sent, mut drained) = mpsc::unbounded_channel();
    let (back, mut answers) = mpsc::unbounded_channel();
    mine.on_state_change(Some(Box::new(move |state| _ = open.send(state))));
    mine.on_buffered_amount_change(Some(Box::new(move |bytes| _ = sent.send(bytes))));
    mine.on_message(Some(Box::new(move |message| {
        _ = back.send(message.data.to_vec())
    })));
    connect(&mut a, &mut b).await;
    assert_eq!(next(&mut opened).await, DataChannelState::Open);

    mine.send(b"early", true).unwrap();
    let theirs = next(&mut b.channels).await;
    assert_eq!(theirs.label(), "chat");
    // All of it is acknowledged, so it is there; nobody has listened yet.
    assert_eq!(next(&mut drained).await, 5);
    assert_eq!(mine.buffered_amount(), 0);
    let (heard, mut messages) = mpsc::unbounded_channel();
    theirs.on_message(Some(Box::new(move |message| {
        _ = heard.send((message.data.to_vec(), message.binary));
    })));
    assert_eq!(next(&mut messages).await, (b"early".to_vec(), true));

    let long = "long ".repeat(30_000);
    mine.send(long.as_bytes(), false).unwrap();
    assert_eq!(next(&mut messages).await, (long.into_bytes(), false));
    theirs.send(b"answer", true).unwrap();
    assert_eq!(next(&mut answers).await, b"answer");
    assert!(mine.send(&[0xff], false).is_err(), "not UTF-8");
    let report = a.pc.get_stats().await.unwrap();
    let figures = pick!(report, DataChannel).dc;
    assert_eq!((figures.label.as_str(), figures.messages_sent), ("chat", 2));
    assert_eq!((figures.bytes_sent, figures.bytes_received), (150_005, 6));
    assert_eq!(figures.state, Some(DataChannelState::Open));

    mine.close();
    assert!(mine.send(b"late", true).is_err());
    assert!(
        ends(&mut messages).await,
        "a closed channel keeps its callbacks"
    );
}

#[tokio::test]
async fn closing_lets_go_of_everything() {
    let (mut a, mut b) = (End::new(), End::new());
    let mine =
        a.pc.create_data_channel("held", DataChannelInit::default())
            .unwrap();
    connect(&mut a, &mut b).await;
    let theirs = next(&mut b.channels).await;

    // Callbacks that hold what holds them.
    let held = Arc::new(());
    for (end, channel) in [(&a, &mine), (&b, &theirs)] {
        let (pc, cycle, token) = (end.pc.clone(), channel.clone(), held.clone());
        channel.on_message(Some(Box::new(move |_| {
            drop((pc.clone(), cycle.clone(), token.clone()))
        })));
        let (pc, token) = (end.pc.clone(), held.clone());
        end.pc
            .on_track(Some(Box::new(move |_| drop((pc.clone(), token.clone())))));
    }
    a.pc.close();
    assert_eq!(a.pc.connection_state(), PeerConnectionState::Closed);
    assert_eq!(mine.state(), DataChannelState::Closed);
    assert!(a.pc.create_offer(OfferOptions::default()).await.is_err());
    assert!(ends(&mut a.candidates).await, "the driver did not end");

    // The other side is told, sees it as gone, and is closed too.
    while next(&mut b.states).await != PeerConnectionState::Disconnected {}
    b.pc.close();
    assert!(ends(&mut b.candidates).await, "the driver did not end");
    assert!(ends(&mut b.states).await && ends(&mut b.tracks).await);
    timeout(LIMIT, async {
        while Arc::strong_count(&held) > 1 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("callbacks are kept after close");
    // And ones that come too late are not kept at all.
    let late = held.clone();
    a.pc.on_track(Some(Box::new(move |_| drop(late.clone()))));
    assert_eq!(Arc::strong_count(&held), 1);
}

#[tokio::test]
async fn dropping_the_last_handle_closes() {
    let mut end = End::new();
    let other = end.pc.clone();
    let channel = end
        .pc
        .create_data_channel("x", DataChannelInit::default())
        .unwrap();
    drop(end.pc);
    assert_eq!(channel.state(), DataChannelState::Connecting);
    drop(other);
    assert_eq!(channel.state(), DataChannelState::Closed);
    assert!(ends(&mut end.candidates).await, "the driver did not end");
}

#[tokio::test]
async fn a_callback_may_use_and_close_what_calls_it() {
    let (mut a, mut b) = (End::new(), End::new());
    let (pc, (done, mut closed)) = (b.pc.clone(), mpsc::unbounded_channel());
    b.pc.on_data_channel(Some(Box::new(move |channel| {
        pc.on_data_channel(None);
        channel.on_message(None);
        pc.close();
        _ = done.send(channel.state());
    })));
    a.pc.create_data_channel("x", DataChannelInit::default())
        .unwrap();
    connect(&mut a, &mut b).await;
    assert_eq!(next(&mut closed).await, DataChannelState::Closed);
    assert!(ends(&mut b.states).await);
}

#[tokio::test]
async fn a_callback_that_panics_closes_its_connection() {
    let (mut a, mut b) = (End::new(), End::new());
    let mine =
        a.pc.create_data_channel("x", DataChannelInit::default())
            .unwrap();
    let held = Arc::new(());
    let token = held.clone();
    mine.on_message(Some(Box::new(move |_| drop(token.clone()))));
    a.pc.on_connection_state_change(Some(Box::new(|state| {
        assert_ne!(state, PeerConnectionState::Connected, "as the test wants");
    })));
    negotiate(&a.pc, &b.pc).await;
    b.pc.add_ice_candidate(next(&mut a.candidates).await)
        .await
        .unwrap();
    a.pc.add_ice_candidate(next(&mut b.candidates).await)
        .await
        .unwrap();
    assert!(ends(&mut a.candidates).await);
    assert_eq!(a.pc.connection_state(), PeerConnectionState::Closed);
    assert_eq!(mine.state(), DataChannelState::Closed);
    timeout(LIMIT, async {
        while Arc::strong_count(&held) > 1 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("callbacks are kept after a panic");
}

#[tokio::test]
async fn what_is_not_supported_says_so() {
    let factory = PeerConnectionFactory::default();
    let says = |err: RtcError| assert!(err.to_string().contains("not supported"), "{err}");
    let pc = factory
        .create_peer_connection(RtcConfiguration::default())
        .unwrap();
    let init = RtpTransceiverInit {
        direction: RtpTransceiverDirection::SendOnly,
        stream_ids: vec![],
        send_encodings: vec![],
    };
    let video = factory.create_video_track("v", Default::default());
    says(pc.add_transceiver(video.into(), init.clone()).unwrap_err());
    says(
        pc.add_transceiver_for_media(MediaType::Video, init.clone())
            .unwrap_err(),
    );
    says(
        pc.add_transceiver_for_media(MediaType::Data, init)
            .unwrap_err(),
    );

    let (source, _) = source_with_track("pcm");
    for (rate, channels, samples) in [(16_000, 1, 160), (48_000, 2, 480), (48_000, 1, 481)] {
        let mut frame = AudioFrame::new(rate, channels, 480);
        frame.samples_per_channel = samples;
        assert!(source.capture_frame(&frame).await.is_err());
    }
    for bad in [
        (vec![], PACKET),
        (vec![0; 1276], PACKET),
        (vec![0], Duration::ZERO),
    ] {
        assert!(source.capture_encoded(&bad.0, bad.1, None).is_err());
    }
}

/// PCM of so many channels that are all the same, or, for two, each of its own.
fn interleaved(rate: u32, channels: u32, seconds: u32) -> (Vec<Vec<i16>>, Vec<i16>) {
    let samples = (rate * seconds) as usize;
    let originals: Vec<Vec<i16>> = (0..channels)
        .map(|channel| signal::speech(rate, samples, u64::from(channel) + 3))
        .collect();
    let interleaved = (0..samples)
        .flat_map(|n| originals.iter().map(move |original| original[n]))
        .collect();
    (originals, interleaved)
}

async fn capture(source: &NativeAudioSource, pcm: &[i16]) {
    let (rate, channels) = (source.sample_rate(), source.num_channels());
    for data in pcm.chunks_exact((rate / 100 * channels) as usize) {
        let frame = AudioFrame {
            data: data.into(),
            sample_rate: rate,
            num_channels: channels,
            samples_per_channel: rate / 100,
        };
        source.capture_frame(&frame).await.unwrap();
    }
}

/// What the SDK writes into its offers, to be sent stereo.
fn wanting(description: SessionDescription, more: &str) -> SessionDescription {
    let text = description
        .to_string()
        .replace("useinbandfec=1", &format!("useinbandfec=1;{more}"));
    SessionDescription::parse(&text, description.sdp_type()).unwrap()
}

/// A connection with one track from `a` to `b`, which asks for what `more` says.
async fn one_way(
    source: &NativeAudioSource,
    more: &str,
) -> (End, End, RtcAudioTrack, RtcAudioTrack) {
    let (mut a, mut b) = (End::new(), End::new());
    let track = PeerConnectionFactory::default().create_audio_track("pcm", source.clone());
    a.pc.add_track(track.clone().into(), &["stream"]).unwrap();
    let offer = a.pc.create_offer(OfferOptions::default()).await.unwrap();
    a.pc.set_local_description(offer.clone()).await.unwrap();
    b.pc.set_remote_description(offer).await.unwrap();
    let answer = b.pc.create_answer(AnswerOptions::default()).await.unwrap();
    b.pc.set_local_description(answer.clone()).await.unwrap();
    a.pc.set_remote_description(wanting(answer, more))
        .await
        .unwrap();
    b.pc.add_ice_candidate(next(&mut a.candidates).await)
        .await
        .unwrap();
    a.pc.add_ice_candidate(next(&mut b.candidates).await)
        .await
        .unwrap();
    a.connected().await;
    b.connected().await;
    let MediaStreamTrack::Audio(remote) = next(&mut b.tracks).await.track else {
        panic!("not audio");
    };
    (a, b, track, remote)
}

/// All that comes until nothing but silence has come for a second. Of the given channel each.
async fn listen(mut stream: NativeAudioStream, rate: u32, channels: u32) -> Vec<Vec<i16>> {
    let mut heard = vec![Vec::new(); channels as usize];
    let mut silent = 0;
    while let Some(frame) = timeout(LIMIT, stream.next()).await.unwrap() {
        assert_eq!((frame.sample_rate, frame.num_channels), (rate, channels));
        assert_eq!(frame.samples_per_channel, rate / 100);
        assert_eq!(frame.data.len(), (rate / 100 * channels) as usize);
        let loud = frame.data.iter().any(|sample| sample.unsigned_abs() > 50);
        silent = if loud { 0 } else { silent + 1 };
        for sample in frame.data.chunks_exact(channels as usize) {
            for (heard, sample) in heard.iter_mut().zip(sample) {
                heard.push(*sample);
            }
        }
        if silent == 100 && heard[0].len() > rate as usize {
            break;
        }
    }
    heard
}

/// Unlimited: a slow machine must not drop frames here.
fn unlimited() -> NativeAudioStreamOptions {
    NativeAudioStreamOptions {
        queue_size_frames: Some(0),
    }
}

async fn pcm_passes(rate: u32, channels: u32, queue: u32, heard_at: (u32, u32)) {
    let source = NativeAudioSource::new(AudioSourceOptions::default(), rate, channels, queue);
    let (_a, _b, _track, remote) = one_way(&source, "stereo=1;maxaveragebitrate=128000").await;
    let (out_rate, out_channels) = heard_at;
    let stream =
        NativeAudioStream::with_options(remote, out_rate as i32, out_channels as i32, unlimited());
    let listener = tokio::spawn(listen(stream, out_rate, out_channels));
    let (_, pcm) = interleaved(rate, channels, 3);
    capture(&source, &pcm).await;
    let heard = timeout(LIMIT, listener).await.unwrap().unwrap();

    // The same, had it been made at the other rate.
    let (originals, _) = interleaved(out_rate, channels, 3);
    for (channel, heard) in heard.iter().enumerate() {
        let original = &originals[channel.min(originals.len() - 1)];
        let from = out_rate as usize / 2;
        let piece = &original[from..2 * out_rate as usize];
        let (at, alike) = signal::find(piece, heard, from, from + out_rate as usize / 10);
        assert!(
            alike >= 0.95,
            "channel {channel}: {alike}, {} late",
            at - from
        );
    }
}

#[tokio::test]
async fn pcm_in_mono_is_heard_as_it_was() {
    pcm_passes(48_000, 1, 100, (48_000, 1)).await;
}

#[tokio::test]
async fn pcm_in_stereo_is_heard_in_stereo() {
    pcm_passes(48_000, 2, 1000, (48_000, 2)).await;
}

#[tokio::test]
async fn pcm_of_one_rate_is_heard_at_another() {
    pcm_passes(16_000, 1, 100, (44_100, 2)).await;
}

#[tokio::test]
async fn pcm_at_a_rate_that_opus_does_not_know_is_heard() {
    pcm_passes(44_100, 1, 100, (16_000, 1)).await;
}

#[tokio::test]
async fn a_mute_and_a_pause_are_silent_and_time_goes_on() {
    let source = NativeAudioSource::new(AudioSourceOptions::default(), 16_000, 1, 100);
    let (_a, b, track, remote) = one_way(&source, "usedtx=1").await;
    let mut packets = EncodedAudioStream::new(&remote, 4096);
    let stream = NativeAudioStream::with_options(remote, 16_000, 1, unlimited());
    let listener = tokio::spawn(async move {
        let mut heard = Vec::new();
        let mut stream = stream;
        while let Some(frame) = timeout(LIMIT, stream.next()).await.unwrap() {
            heard.extend_from_slice(&frame.data);
        }
        heard
    });
    let (originals, pcm) = interleaved(16_000, 1, 6);
    let second = |n: usize| &pcm[n * 16_000..(n + 1) * 16_000];
    capture(&source, second(0)).await;
    // What is queued is still of the time before.
    tokio::time::sleep(Duration::from_millis(150)).await;
    track.set_enabled(false);
    capture(&source, second(1)).await;
    tokio::time::sleep(Duration::from_millis(150)).await;
    track.set_enabled(true);
    capture(&source, second(2)).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    capture(&source, second(4)).await;
    // DTX: silence that is captured is not sent, but for a packet now and then.
    capture(&source, &[0; 32_000]).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    b.pc.close();
    let heard = listener.await.unwrap();

    let place = |n: usize, from: usize, to: usize| {
        let piece = &originals[0][n * 16_000 + 4000..n * 16_000 + 12_000];
        let (at, alike) = signal::find(piece, &heard, from, to);
        assert!(alike > 0.9, "second {n}: {alike} at {at}");
        at
    };
    let first = place(0, 3000, 8000);
    let third = place(2, first + 31_000, first + 37_000);
    let fifth = place(4, third + 28_000, third + 39_000);
    // In between: the mute and two sleeps too short to be told; a long one, in which first the queue
    // was sent.
    let mute = third - first;
    assert!((32_000..36_000).contains(&mute), "{mute} samples");
    let pause = fifth - third;
    assert!((29_000..38_000).contains(&pause), "{pause} samples");
    let quiet = &heard[first + 20_000..first + 26_000];
    assert!(quiet.iter().all(|sample| *sample == 0));

    let mut sizes = Vec::new();
    while let Some(packet) = timeout(LIMIT, packets.next()).await.unwrap() {
        assert_eq!(packet.missing, 0);
        assert!(packet.audio_level.is_some());
        sizes.push(packet.payload.len());
    }
    // Three seconds of sound, the last two of silence nearly for free.
    assert!((150..185).contains(&sizes.len()), "{} packets", sizes.len());
}

#[tokio::test]
async fn figures_are_those_of_what_passed() {
    let source = NativeAudioSource::new(AudioSourceOptions::default(), 48_000, 1, 100);
    let (a, b, _track, remote) = one_way(&source, "stereo=0").await;
    let sender = a.pc.senders().remove(0);
    let mut parameters = sender.parameters();
    parameters.encodings[0].max_bitrate = Some(24_000);
    sender.set_parameters(parameters).unwrap();
    let stream = NativeAudioStream::with_options(remote, 48_000, 1, unlimited());
    let listener = tokio::spawn(listen(stream, 48_000, 1));
    capture(&source, &signal::speech(48_000, 48_000 * 2, 1)).await;
    listener.await.unwrap();

    let report = sender.get_stats().await.unwrap();
    let outbound = pick!(report, OutboundRtp);
    assert_eq!(outbound.outbound.target_bitrate, 24_000.0);
    assert_eq!(outbound.sent.packets_sent, 100);
    let bits = outbound.sent.bytes_sent as f64 * 8.0 / 2.0;
    assert!((12_000.0..40_000.0).contains(&bits), "{bits} bit/s");
    assert_eq!(pick!(report, MediaSource).source.track_identifier, "pcm");

    let report = b.pc.receivers().remove(0).get_stats().await.unwrap();
    let inbound = pick!(report, InboundRtp);
    assert_eq!(inbound.stream.ssrc, outbound.stream.ssrc);
    assert_eq!(inbound.received.packets_received, 100);
    assert_eq!(inbound.inbound.bytes_received, outbound.sent.bytes_sent);
    assert_eq!(inbound.received.packets_lost, 0);
    assert_eq!(inbound.inbound.jitter_buffer_emitted_count, 96_000);
    assert!(inbound.inbound.total_samples_received >= 96_000);
    assert!(inbound.inbound.total_audio_energy > 0.0);
    let waited = inbound.inbound.jitter_buffer_delay / 96_000.0;
    assert!((0.01..0.4).contains(&waited), "{waited} s");

    let whole = b.pc.get_stats().await.unwrap();
    let pair = pick!(whole, CandidatePair);
    assert!(pair.candidate_pair.bytes_received > inbound.inbound.bytes_received);
    assert!(pair.candidate_pair.last_packet_received_timestamp > 1e12);
    pick!(whole, PeerConnection);

    // What the other side reports takes its time.
    let feeder = source.clone();
    let feed = async { capture(&feeder, &vec![0; 48_000 * 60]).await };
    let reported = async {
        loop {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let report = sender.get_stats().await.unwrap();
            let measured = report.into_iter().find_map(|stats| match stats {
                RtcStats::RemoteInboundRtp(remote) => Some(remote),
                _ => None,
            });
            if let Some(remote) = measured
                && remote.remote_inbound.round_trip_time_measurements > 0
            {
                return remote;
            }
        }
    };
    let remote = tokio::select! {
        () = feed => panic!("nothing was reported"),
        remote = reported => remote,
    };
    assert_eq!(remote.received.packets_lost, 0);
    let time = remote.remote_inbound.round_trip_time;
    assert!(time > 0.0 && time < 1.0, "{time} s");
    let whole = a.pc.get_stats().await.unwrap();
    let pair = pick!(whole, CandidatePair).candidate_pair;
    assert!(pair.current_round_trip_time > 0.0 && pair.current_round_trip_time < 1.0);
    a.pc.close();
    drop(a);
    assert!(sender.get_stats().await.is_ok());
}

#[tokio::test]
async fn a_full_queue_makes_wait_and_an_empty_one_does_not() {
    let source = NativeAudioSource::new(AudioSourceOptions::default(), 48_000, 1, 200);
    let frame = AudioFrame::new(48_000, 1, 480);
    let start = Instant::now();
    for _ in 0..20 {
        source.capture_frame(&frame).await.unwrap();
    }
    assert!(
        start.elapsed() < Duration::from_millis(150),
        "{:?}",
        start.elapsed()
    );
    for _ in 0..50 {
        source.capture_frame(&frame).await.unwrap();
    }
    assert!(
        start.elapsed() >= Duration::from_millis(480),
        "{:?}",
        start.elapsed()
    );
    // Cancelled: not taken. Cleared: room at once.
    while timeout(Duration::ZERO, source.capture_frame(&frame))
        .await
        .is_ok()
    {}
    let (waiting, other) = (source.clone(), frame.clone());
    let waits = tokio::spawn(async move { waiting.capture_frame(&other).await });
    tokio::task::yield_now().await;
    source.clear_buffer();
    timeout(LIMIT, waits).await.unwrap().unwrap().unwrap();

    // Longer than the queue, and no queue at all.
    source.clear_buffer();
    let long = AudioFrame::new(48_000, 1, 48_000);
    timeout(LIMIT, source.capture_frame(&long))
        .await
        .unwrap()
        .unwrap();
    let direct = NativeAudioSource::new(AudioSourceOptions::default(), 48_000, 1, 0);
    let start = Instant::now();
    for _ in 0..100 {
        direct.capture_frame(&frame).await.unwrap();
    }
    assert!(
        start.elapsed() < Duration::from_millis(500),
        "{:?}",
        start.elapsed()
    );
}

#[tokio::test]
async fn streams_of_what_is_encrypted_or_makes_no_sense_end() {
    use libwebrtc::native::frame_cryptor::{
        EncryptionAlgorithm, EncryptionState, FrameCryptor, KeyDerivationAlgorithm, KeyProvider,
        KeyProviderOptions,
    };
    let source = NativeAudioSource::new(AudioSourceOptions::default(), 48_000, 1, 100);
    let (_a, b, local, remote) = one_way(&source, "stereo=0").await;
    let ended = async |mut stream: NativeAudioStream| {
        timeout(LIMIT, stream.next()).await.unwrap().is_none()
    };
    assert!(ended(NativeAudioStream::new(local, 48_000, 1)).await);
    for (rate, channels) in [(0, 1), (-1, 1), (48_000, 0), (48_000, 33), (500_000, 1)] {
        assert!(ended(NativeAudioStream::new(remote.clone(), rate, channels)).await);
    }
    let mut closed = NativeAudioStream::new(remote.clone(), 48_000, 1);
    closed.close();
    assert!(ended(closed).await);

    let open = NativeAudioStream::new(remote.clone(), 48_000, 1);
    let mut packets = EncodedAudioStream::new(&remote, 64);
    let keys = KeyProvider::new(KeyProviderOptions {
        shared_key: true,
        ratchet_window_size: 16,
        ratchet_salt: vec![],
        failure_tolerance: -1,
        key_ring_size: 16,
        key_derivation_algorithm: KeyDerivationAlgorithm::PBKDF2,
    });
    let receiver = b.pc.receivers().remove(0);
    let cryptor = FrameCryptor::new_for_rtp_receiver(
        &PeerConnectionFactory::default(),
        "who".to_owned(),
        EncryptionAlgorithm::AesGcm,
        keys,
        receiver,
    );
    let (tell, mut told) = mpsc::unbounded_channel();
    cryptor.on_state_change(Some(Box::new(move |who, state| {
        let _ = tell.send((who, state));
    })));
    let failed = ("who".to_owned(), EncryptionState::DecryptionFailed);
    assert_eq!(timeout(LIMIT, told.recv()).await.unwrap(), Some(failed));
    capture(&source, &signal::speech(48_000, 48_000, 1)).await;
    assert!(ended(open).await);
    assert!(timeout(LIMIT, packets.next()).await.unwrap().is_none());
    assert!(ended(NativeAudioStream::new(remote.clone(), 48_000, 1)).await);
    assert_eq!(remote.state(), RtcTrackState::Ended);
}
