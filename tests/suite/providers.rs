//! What every provider has to pass: open, stream, finish, close, lose, refuse. The other side is the
//! STT server, in each one's protocol.

use std::time::Duration;

use rehearsal::stt::{self, CloseWith, End, Faults, Protocol, Reject};
use roomwarden::{
    config::{Config, Encoding, ProviderKind},
    daemon::Daemon,
    domain::{Outcome, Phase},
    failure::Cause,
};

use crate::stage::{Kept, LIMIT, Stage, stop};

const ALL: [ProviderKind; 3] = [
    ProviderKind::Deepgram,
    ProviderKind::DeepgramFlux,
    ProviderKind::LivekitInference,
];

fn protocol(kind: ProviderKind) -> Protocol {
    match kind {
        ProviderKind::Deepgram => Protocol::Listen,
        ProviderKind::DeepgramFlux => Protocol::Flux,
        ProviderKind::LivekitInference => Protocol::Inference,
    }
}

/// As a user sets it: the rest follows.
fn config(stage: &Stage, kind: ProviderKind) -> Config {
    let name = match kind {
        ProviderKind::Deepgram => "deepgram",
        ProviderKind::DeepgramFlux => "deepgram_flux",
        ProviderKind::LivekitInference => "livekit_inference",
    };
    let (key, secret) = stage.stt.inference_keys();
    let mut environment = stage.environment();
    if kind == ProviderKind::LivekitInference {
        environment.remove("DEEPGRAM_API_KEY");
    }
    environment.extend(
        [
            ("ROOMWARDEN__STT__PROVIDER", name.to_owned()),
            (
                "ROOMWARDEN__STT__URL",
                format!("ws://{}", stage.stt.address()),
            ),
            ("LIVEKIT_INFERENCE_API_KEY", key.to_owned()),
            ("LIVEKIT_INFERENCE_API_SECRET", secret.to_owned()),
        ]
        .map(|(name, value)| (name.to_owned(), value)),
    );
    Config::load_from(None, environment).expect("configuration")
}

/// Somebody speaks with a daemon of this provider's, and is heard.
async fn heard(
    stage: &Stage,
    kind: ProviderKind,
    kept: &Kept,
) -> (Daemon, rehearsal::speaker::Speaker) {
    let daemon = Daemon::start(config(stage, kind), kept.sinks());
    let ann = stage.speaker("r", "ann").await;
    // Within the first phrase of the recording, so that its final result is still to come.
    let speaking = |w: &stt::Witness| w.streams.iter().any(|s| s.audio_seconds > 1.0);
    let witness = stage.witnessed("speech", speaking).await;
    assert_eq!(witness.streams[0].protocol, protocol(kind));
    (daemon, ann)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_opened_is_heard_finished_and_acknowledged() {
    for kind in ALL {
        let stage =
            Stage::with(stt::Config::default().close_delay(Duration::from_millis(300))).await;
        let kept = Kept::default();
        let (daemon, ann) = heard(&stage, kind, &kept).await;
        ann.leave().await;
        let witness = stage.open(0).await;
        stage.all_acknowledged(1).await;
        let report = stop(&daemon).await;
        let (theirs, ours) = (&witness.streams[0], &report.receipts[0]);
        assert_eq!(ours.outcome, Outcome::Acknowledged, "{kind:?}");
        assert_eq!(
            (ours.totals.request_id.as_ref(), ours.totals.audio_bytes),
            (Some(&theirs.request_id), theirs.audio_bytes),
            "{kind:?}"
        );
        // What is in a page at the end of an Opus stream is known to the decoder alone.
        let differ = (ours.totals.audio_seconds - theirs.audio_seconds).abs();
        assert!(differ < 0.02, "{kind:?}: {ours:#?} {theirs:#?}");
        let finals = kept.finals();
        let said = finals.iter().filter(|said| said.text.contains("speech"));
        assert!(said.count() > 0, "{kind:?}: {finals:#?}");
        assert_eq!(theirs.texts.other, 0, "{kind:?}: {theirs:#?}");
        stage.end().await;
    }
}

/// Whatever ends a stream, another one goes on, and no word is lost.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_lost_is_opened_again() {
    let faults = [
        Faults {
            drop_after: Some(Duration::from_millis(1500)),
            ..Faults::default()
        },
        Faults {
            close_with: Some(CloseWith {
                code: 1011,
                reason: "NET-0000".into(),
                after: Duration::from_millis(1500),
            }),
            ..Faults::default()
        },
    ];
    for kind in ALL {
        for fault in &faults {
            let stage = Stage::new().await;
            let kept = Kept::default();
            stage.stt.set_faults(fault.clone());
            let daemon = Daemon::start(config(&stage, kind), kept.sinks());
            let ann = stage.speaker("r", "ann").await;
            let again = |w: &stt::Witness| w.opened == 2;
            stage.witnessed("opened again", again).await;
            stage.stt.set_faults(Faults::default());
            let last = |w: &stt::Witness| {
                let last = w.streams.last().expect("a stream");
                last.end.is_none() && last.audio_seconds > 1.0
            };
            let witness = stage.witnessed("streaming again", last).await;
            ann.leave().await;
            stage.open(0).await;
            let report = stop(&daemon).await;
            let [first, .., second] = &report.receipts[..] else {
                panic!("{kind:?}: {report:#?}")
            };
            let lost = matches!(&first.outcome, Outcome::PeerGone { failure: Some(failure), .. }
                if matches!(failure.cause, Cause::Reset | Cause::ProviderFault));
            assert!(lost, "{kind:?}: {first:#?}");
            assert_eq!(second.outcome, Outcome::Acknowledged, "{kind:?}");
            assert_eq!(witness.streams.len(), 2, "{kind:?}");
            let heard = kept
                .finals()
                .iter()
                .any(|said| said.text.contains("speech"));
            assert!(heard, "{kind:?}: {:#?}", kept.finals());
            stage.end().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_has_its_cause() {
    for kind in ALL {
        let quota = match kind {
            ProviderKind::LivekitInference => Reject::quota("MaxGatewayCredits"),
            _ => Reject::status(402),
        };
        let concurrency = match kind {
            ProviderKind::LivekitInference => Reject::quota("MaxConcurrentGatewaySTT"),
            _ => Reject::status(429),
        };
        for (reject, cause) in [
            (None, Cause::Authentication),
            (Some(quota), Cause::Quota),
            (Some(concurrency), Cause::Concurrency),
            (Some(Reject::status(500)), Cause::ProviderFault),
        ] {
            let stage = Stage::new().await;
            let mut config = config(&stage, kind);
            match reject {
                Some(reject) => stage.stt.set_faults(Faults {
                    reject_with: Some(reject),
                    ..Faults::default()
                }),
                None => {
                    config.stt.api_key = "wrong-and-secret".into();
                    config.stt.inference_api_secret = "wrong-and-secret".into();
                }
            }
            let daemon = Daemon::start(config, Kept::default().sinks());
            let ann = stage.speaker("r", "ann").await;
            stage.witnessed("refused", |w| w.rejections() > 0).await;
            let report = stop(&daemon).await;
            let Outcome::NeverOpened {
                failure: Some(failure),
                ..
            } = &report.receipts[0].outcome
            else {
                panic!("{kind:?}: {report:#?}")
            };
            assert_eq!(failure.cause, cause, "{kind:?}: {failure:?}");
            assert!(!failure.said.contains("wrong-and-secret"), "{failure:?}");
            stage.all_acknowledged(0).await;
            ann.leave().await;
            stage.end().await;
        }
    }
}

/// Nobody says that a stream is closed when the provider has not.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_acknowledged_is_said_to_be_so() {
    for kind in ALL {
        let stage = Stage::new().await;
        let (daemon, ann) = heard(&stage, kind, &Kept::default()).await;
        stage.stt.set_faults(Faults {
            never_answer_close: true,
            ..Faults::default()
        });
        ann.leave().await;
        let ended = |w: &stt::Witness| w.streams[0].end.as_ref().is_some_and(End::is_abrupt);
        stage.witnessed("cut", ended).await;
        let report = stop(&daemon).await;
        let phase = Phase::AwaitingAnswer;
        assert_eq!(
            report.receipts[0].outcome,
            Outcome::TimedOut { phase },
            "{kind:?}"
        );
        stage.end().await;
    }
}

/// Longer than the provider waits for audio.
#[tokio::test(flavor = "multi_thread")]
async fn who_says_nothing_for_long_costs_no_stream_its_life() {
    for kind in ALL {
        let stage = Stage::new().await;
        let kept = Kept::default();
        let (daemon, ann) = heard(&stage, kind, &kept).await;
        ann.mute();
        match kind {
            ProviderKind::Deepgram => {
                let kept_alive = |w: &stt::Witness| w.streams[0].texts.keep_alive >= 3;
                stage.witnessed("KeepAlive", kept_alive).await;
            }
            ProviderKind::DeepgramFlux => {
                stage.open(0).await;
            }
            ProviderKind::LivekitInference => {
                tokio::time::sleep(Duration::from_secs(11)).await;
            }
        }
        ann.unmute();
        let seconds = |w: &stt::Witness| w.streams.iter().map(|s| s.audio_seconds).sum::<f64>();
        let before = seconds(&stage.stt.witness());
        let goes_on = |w: &stt::Witness| seconds(w) > before + 1.0;
        let heard = stage.stt.wait_for(goes_on, LIMIT).await;
        let streams = heard.expect("audio again").streams.len();
        let expected = if kind == ProviderKind::DeepgramFlux {
            2
        } else {
            1
        };
        assert_eq!(streams, expected, "{kind:?}");
        stop(&daemon).await;
        stage.all_acknowledged(expected).await;
        ann.leave().await;
        stage.end().await;
    }
}

#[test]
fn what_does_not_go_together_is_named() {
    let with = |settings: &[(&str, &str)]| {
        let keys = [("LIVEKIT_API_KEY", "key"), ("LIVEKIT_API_SECRET", "secret")];
        let set = keys.iter().chain(settings);
        let set = set.map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Config::load_from(None, set.collect())
    };
    const FLUX: (&str, &str) = ("ROOMWARDEN__STT__PROVIDER", "deepgram_flux");
    const INFERENCE: (&str, &str) = ("ROOMWARDEN__STT__PROVIDER", "livekit_inference");
    const KEY: (&str, &str) = ("DEEPGRAM_API_KEY", "key");

    let config = with(&[INFERENCE]).expect("no key of Deepgram's is needed");
    assert_eq!(config.stt.encoding, Encoding::Linear16);
    assert_eq!(config.stt.model, "deepgram/nova-3");
    assert_eq!(
        config.stt.url.as_str(),
        "wss://agent-gateway.livekit.cloud/"
    );
    assert_eq!(config.stt.inference_api_key, "key");
    let config = with(&[FLUX, KEY]).expect("good");
    assert_eq!(config.stt.model, "flux-general-en");
    assert!(config.stt.park_after_ms > 0);

    for (settings, words) in [
        (&[FLUX][..], "stt.api_key is not set"),
        (
            &[FLUX, KEY, ("ROOMWARDEN__STT__PARAMETERS__DIARIZE", "true")],
            "stt.parameters.diarize is true: deepgram_flux has no such parameter",
        ),
        (
            &[FLUX, KEY, ("ROOMWARDEN__STT__PARK_AFTER_MS", "0")],
            "it must not be 0",
        ),
        (
            &[INFERENCE, ("ROOMWARDEN__STT__ENCODING", "ogg-opus")],
            "livekit_inference takes linear16 alone",
        ),
        (
            &[INFERENCE, ("LIVEKIT_INFERENCE_API_KEY", "key")],
            "belong together",
        ),
        (
            &[("ROOMWARDEN__STT__PROVIDER", "whisper"), KEY],
            "deepgram, deepgram_flux, livekit_inference",
        ),
    ] {
        let said = with(settings).expect_err(words).to_string();
        assert!(said.contains(words), "{words}: {said}");
    }
}
