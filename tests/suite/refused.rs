//! What a user meets who has something wrong: the real binary says what, and still ends in order.

use roomwarden::cli::EXIT_USAGE;

use crate::stage::{Binary, Stage};

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_livekit_secret_ends_it_at_once_and_is_named() {
    let stage = Stage::new().await;
    let wrong = [("LIVEKIT_API_SECRET", "not-the-secret-of-this-server-at-all")];
    let (status, log) = Binary::run(&stage, &wrong).exit().await;
    assert_eq!(status.code(), Some(EXIT_USAGE.into()), "{log}");
    assert!(log.contains("LIVEKIT_API_SECRET"), "{log}");
    assert!(!log.contains("not-the-secret"), "{log}");
    stage.end().await;
}

/// Of a key that is known and may not do this, the server says so in Twirp's form.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_the_api_refuses_ends_it_at_once_and_is_named() {
    let stage = Stage::new().await;
    stage.faults(|f| f.api_refused = true).await;
    let (status, log) = Binary::run(&stage, &[]).exit().await;
    assert_eq!(status.code(), Some(EXIT_USAGE.into()), "{log}");
    assert!(
        log.contains("(permissions denied): check LIVEKIT_API_KEY"),
        "{log}"
    );
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_stt_key_is_named_and_nothing_is_open_at_the_end() {
    let stage = Stage::new().await;
    let wrong = [("DEEPGRAM_API_KEY", "not-the-key-of-this-server")];
    let mut binary = Binary::run(&stage, &wrong);
    let alice = stage.speaker("r", "alice").await;
    binary.logged("check stt.api_key (DEEPGRAM_API_KEY)").await;
    binary.signal("TERM");
    let (status, log) = binary.exit().await;
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(!log.contains("not-the-key"), "{log}");
    let witness = stage.stt.witness();
    assert_eq!((witness.opened, witness.open_now), (0, 0));
    assert!(witness.rejected.contains_key(&401), "{witness:?}");
    alice.leave().await;
    stage.end().await;
}
