//! A participant who vanishes: that nothing comes any more is known long before the room server tells.

use rehearsal::room;
use roomwarden::{daemon::Daemon, transcripts::Sinks};

use crate::stage::{LIMIT, Stage};

#[tokio::test(flavor = "multi_thread")]
async fn a_participant_vanishes_and_comes_back() {
    let stage = Stage::new().await;
    let mut config = stage.config();
    config.stt.idle_after_ms = 5000;
    let daemon = Daemon::start(config, Sinks::default());
    let ann = stage.speaker("r", "ann").await;
    let bob = stage.speaker("r", "bob").await;
    stage.streaming(2).await;

    ann.vanish(&stage.rooms).await;
    stage
        .witnessed("her stream ends, bob's goes on", |w| w.open_now == 1)
        .await;
    let noticed = |w: &room::Witness| {
        let ann = w.room("r").and_then(|room| room.participant("ann"));
        ann.is_some_and(|ann| ann.left.is_some())
    };
    assert!(!noticed(&stage.rooms.witness()), "nobody has told us");
    stage.rooms.wait_for(noticed, LIMIT).await.expect("noticed");
    let ann = stage.speaker("r", "ann").await;
    stage.streaming(2).await;

    ann.leave().await;
    bob.leave().await;
    stage.all_acknowledged(3).await;
    let reasons: Vec<_> = (daemon.account().receipts.iter())
        .map(|receipt| {
            (
                receipt.key.participant.to_string(),
                receipt.reason.to_string(),
            )
        })
        .collect();
    let idle = "no audio from the participant";
    assert_eq!(reasons[0], ("ann".into(), idle.into()));
    assert_eq!(reasons.len(), 3, "{reasons:?}");
    drop(daemon);
    stage.end().await;
}
