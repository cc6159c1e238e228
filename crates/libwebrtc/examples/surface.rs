//! Every part of the genuine crate's API that this one claims to have, in use. Compiles with both
//! (`tests/genuine`); run, it lets a tone pass from one peer connection to another.
#![allow(clippy::disallowed_methods, reason = "the bans are about the daemon")]

use std::time::Duration;

use libwebrtc::{
    audio_source::native::NativeAudioSource,
    audio_stream::native::{NativeAudioStream, NativeAudioStreamOptions},
    native::{
        create_random_uuid,
        frame_cryptor::{EncryptionAlgorithm, EncryptionState, FrameCryptor, KeyProvider},
    },
    peer_connection::TrackEvent,
    peer_connection_factory::native::PeerConnectionFactoryExt,
    prelude::*,
    stats::RtcStats,
    video_source::native::NativeVideoSource,
    video_stream::native::{NativeVideoStream, NativeVideoStreamOptions},
};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let factory = PeerConnectionFactory::default();
    let mut configuration = RtcConfiguration::default();
    configuration.ice_servers = vec![IceServer {
        urls: vec![],
        username: String::new(),
        password: String::new(),
    }];
    configuration.continual_gathering_policy = ContinualGatheringPolicy::GatherOnce;
    configuration.ice_transport_type = IceTransportsType::All;
    let a = factory
        .create_peer_connection(configuration.clone())
        .unwrap();
    let b = factory
        .create_peer_connection(configuration.clone())
        .unwrap();
    for (from, to) in [(&a, &b), (&b, &a)] {
        let (sender, mut candidates) = mpsc::unbounded_channel::<IceCandidate>();
        from.on_ice_candidate(Some(Box::new(move |candidate| _ = sender.send(candidate))));
        let to = to.clone();
        tokio::spawn(async move {
            while let Some(candidate) = candidates.recv().await {
                let candidate = IceCandidate::parse(
                    &candidate.sdp_mid(),
                    candidate.sdp_mline_index(),
                    &candidate.candidate(),
                );
                // Before the description it is too early.
                tokio::time::sleep(Duration::from_millis(300)).await;
                to.add_ice_candidate(candidate.unwrap()).await.unwrap();
            }
        });
    }
    let (sender, mut tracks) = mpsc::unbounded_channel::<TrackEvent>();
    b.on_track(Some(Box::new(move |event| _ = sender.send(event))));
    b.on_connection_state_change(Some(Box::new(|state| println!("{state:?}"))));
    let channel = a
        .create_data_channel(
            "data",
            DataChannelInit {
                ordered: true,
                ..DataChannelInit::default()
            },
        )
        .unwrap();
    channel.on_message(Some(Box::new(|message| {
        println!("{} bytes", message.data.len())
    })));

    let source = NativeAudioSource::new(AudioSourceOptions::default(), 48_000, 1, 100);
    let track = factory.create_audio_track(&create_random_uuid(), source.clone());
    let init = RtpTransceiverInit {
        direction: RtpTransceiverDirection::SendOnly,
        stream_ids: vec!["stream".to_owned()],
        send_encodings: vec![RtpEncodingParameters {
            max_bitrate: Some(64_000),
            ..RtpEncodingParameters::default()
        }],
    };
    let transceiver = a.add_transceiver(track.clone().into(), init).unwrap();
    let offer = a.create_offer(OfferOptions::default()).await.unwrap();
    a.set_local_description(offer.clone()).await.unwrap();
    b.set_remote_description(offer).await.unwrap();
    let answer = b.create_answer(AnswerOptions::default()).await.unwrap();
    b.set_local_description(answer.clone()).await.unwrap();
    a.set_remote_description(answer).await.unwrap();

    let event = tracks.recv().await.unwrap();
    println!("{:?} in {:?}", event.track.id(), event.transceiver.mid());
    match event.track {
        MediaStreamTrack::Audio(track) => hear(track, &source).await,
        MediaStreamTrack::Video(track) => drop(NativeVideoStream::new(track)),
    }
    for report in [
        a.get_stats().await.unwrap(),
        transceiver.sender().get_stats().await.unwrap(),
        event.receiver.get_stats().await.unwrap(),
    ] {
        report.iter().for_each(show);
    }
    track.set_enabled(false);
    a.remove_track(transceiver.sender()).unwrap();
    a.close();
    b.close();
}

async fn hear(track: RtcAudioTrack, source: &NativeAudioSource) {
    let options = NativeAudioStreamOptions {
        queue_size_frames: Some(100),
    };
    let mut stream = NativeAudioStream::with_options(track, 16_000, 2, options);
    let mut time = 0_u32;
    while time < 200 {
        let tone = |n: u32| ((f64::from(time * 480 + n) * 0.06).sin() * 10_000.0) as i16;
        let mut frame = AudioFrame::new(48_000, 1, 480);
        frame.data = (0..480).map(tone).collect::<Vec<i16>>().into();
        source.capture_frame(&frame).await.unwrap();
        time += 1;
    }
    let mut loudest = 0;
    for _ in 0..100 {
        let frame = stream.next().await.unwrap();
        assert_eq!((frame.sample_rate, frame.num_channels), (16_000, 2));
        loudest = frame
            .data
            .iter()
            .fold(loudest, |max, s| s.unsigned_abs().max(max));
    }
    println!("loudest: {loudest}");
    stream.close();
    source.clear_buffer();
}

fn show(stats: &RtcStats) {
    match stats {
        RtcStats::InboundRtp(s) => println!(
            "{}: {} packets, {} lost, {} bytes, jitter {} s, {} of {} samples concealed",
            s.rtc.id,
            s.received.packets_received,
            s.received.packets_lost,
            s.inbound.bytes_received,
            s.received.jitter,
            s.inbound.concealed_samples,
            s.inbound.total_samples_received,
        ),
        RtcStats::OutboundRtp(s) => println!(
            "{}: {} packets, {} bytes of {} bit/s",
            s.stream.kind, s.sent.packets_sent, s.sent.bytes_sent, s.outbound.target_bitrate
        ),
        RtcStats::RemoteInboundRtp(s) => println!(
            "{} s, {} lost",
            s.remote_inbound.round_trip_time, s.received.packets_lost
        ),
        RtcStats::CandidatePair(s) => println!(
            "{:?}: {} s",
            s.candidate_pair.state, s.candidate_pair.current_round_trip_time
        ),
        RtcStats::LocalCandidate(s) => println!("from {}", s.local_candidate.address),
        RtcStats::RemoteCandidate(s) => println!("to {}", s.remote_candidate.port),
        RtcStats::Transport(s) => println!("{:?}", s.transport.dtls_state),
        RtcStats::DataChannel(s) => println!("{} {:?}", s.dc.label, s.dc.state),
        RtcStats::Codec(s) => println!("{}", s.codec.mime_type),
        RtcStats::MediaSource(s) => println!("level {}", s.audio.audio_level),
        RtcStats::PeerConnection(s) => println!("{} channels", s.pc.data_channels_opened),
        RtcStats::RemoteOutboundRtp(s) => println!("{} sent", s.sent.packets_sent),
        _ => {}
    }
}

/// Inert here, but there.
#[allow(dead_code)]
fn unsupported(
    factory: &PeerConnectionFactory,
    keys: KeyProvider,
    receiver: RtpReceiver,
    track: RtcVideoTrack,
) {
    let source = NativeVideoSource::new(VideoResolution::default(), false);
    let frame = VideoFrame {
        rotation: VideoRotation::VideoRotation0,
        buffer: I420Buffer::new(16, 16),
        timestamp_us: 0,
        frame_metadata: None,
    };
    source.capture_frame(&frame);
    drop(factory.create_video_track("video", source));
    drop(NativeVideoStream::with_options(
        track,
        NativeVideoStreamOptions::default(),
    ));
    let cryptor = FrameCryptor::new_for_rtp_receiver(
        factory,
        String::new(),
        EncryptionAlgorithm::AesGcm,
        keys,
        receiver,
    );
    cryptor.on_state_change(Some(Box::new(|_, state| {
        println!("{}", state == EncryptionState::Ok);
    })));
}
