//! When the cause of a failure is gone, everybody is transcribed again without anybody's help; what it
//! cost in requests is the provider's own count. The sessions are real, and so is the STT server.

use std::{
    net::{IpAddr, Ipv4Addr, TcpListener},
    time::Duration,
};

use rehearsal::stt::{self, CloseWith, Faults, Reject};
use roomwarden::{
    failure::Cause,
    stt::gate::{Gate, Limits},
};
use tokio::time::timeout;

use crate::{
    limits::{Sessions, quickly},
    stage::{LIMIT, Stage, on_a_port_of_its_own},
};

const PEOPLE: usize = 50;
/// How long it lasts, for tries that should not be made.
const WHILE: Duration = Duration::from_secs(4);

async fn trouble(gate: &Gate, cause: Cause) {
    let mut troubles = gate.trouble();
    let troubled = timeout(LIMIT, troubles.wait_for(Option::is_some)).await;
    let troubled = troubled.expect("trouble in time").expect("a gate").clone();
    assert_eq!(troubled.expect("trouble").failure.cause, cause);
}

async fn recovered(stage: &Stage, sessions: Sessions) {
    let streaming = |w: &stt::Witness| {
        let live = w.streams.iter().filter(|stream| stream.end.is_none());
        live.filter(|stream| stream.audio_seconds > 0.1).count() == PEOPLE
    };
    stage.witnessed("everybody has a stream", streaming).await;
    let mut troubles = sessions.gate.trouble();
    let over = timeout(LIMIT, troubles.wait_for(Option::is_none)).await;
    over.expect("it is said to be over").expect("a gate");
    sessions.close().await;
    stage.witnessed("none open", |w| w.open_now == 0).await;
}

/// What a new start of everything would cost: a request each.
async fn refused(reject: Reject, cause: Cause, most: usize) {
    let stage = Stage::new().await;
    stage.stt.set_faults(Faults {
        reject_with: Some(reject.clone()),
        ..Default::default()
    });
    let settings = quickly(&stage);
    let sessions = Sessions::start(&settings, PEOPLE, LIMIT * 10);
    trouble(&sessions.gate, cause).await;
    tokio::time::sleep(WHILE).await;
    let rejections = stage.stt.witness().rejections();
    println!("{cause:?}: {rejections} requests of {PEOPLE} in {WHILE:?}");
    assert!(rejections <= most as u64, "{reject:?}: {rejections}");
    stage.stt.set_faults(Faults::default());
    if matches!(
        cause,
        Cause::Authentication | Cause::Permission | Cause::BadRequest
    ) {
        // The operator has changed something, and says so.
        sessions.gate.renew(Limits::new(&settings));
    }
    recovered(&stage, sessions).await;
    let witness = stage.stt.witness();
    assert_eq!(witness.opened, PEOPLE as u64, "{cause:?}");
    stage.all_acknowledged(PEOPLE).await;
    stage.end().await;
}

/// A wrong key, or a wrong request, costs one request each and no more, until the configuration is
/// read anew.
#[tokio::test(flavor = "multi_thread")]
async fn what_only_a_change_can_cure_is_not_tried_again() {
    for (status, cause) in [
        (401, Cause::Authentication),
        (403, Cause::Permission),
        (400, Cause::BadRequest),
    ] {
        refused(Reject::status(status), cause, PEOPLE).await;
    }
}

/// Nor when one room alone asks for what is refused, and so nobody else is to wait.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_room_asks_for_on_its_own_is_not_tried_again_at_once() {
    let stage = Stage::new().await;
    stage.stt.set_faults(Faults {
        reject_with: Some(Reject::status(400)),
        ..Default::default()
    });
    let sessions = Sessions::with_own_settings(&quickly(&stage), PEOPLE, LIMIT * 10);
    let all = |w: &stt::Witness| w.rejections() >= PEOPLE as u64;
    stage.witnessed("everybody is refused", all).await;
    tokio::time::sleep(WHILE).await;
    assert_eq!(stage.stt.witness().rejections(), PEOPLE as u64);
    assert!(sessions.gate.trouble().borrow().is_none());
    sessions.close().await;
    stage.all_acknowledged(0).await;
    stage.end().await;
}

/// One try for all, after a quarter of a minute at most.
#[tokio::test(flavor = "multi_thread")]
async fn a_used_up_quota_is_tried_once_now_and_then() {
    refused(Reject::status(402), Cause::Quota, PEOPLE).await;
}

/// One each, and from then on one at a time, half a second to a second apart; before the pause was
/// known, some had a second try.
#[tokio::test(flavor = "multi_thread")]
async fn a_provider_that_is_busy_or_down_is_not_stormed() {
    let most = 2 * PEOPLE;
    let busy = Reject::status(429).message("Rate limit exceeded.");
    let busy = busy.retry_after(Duration::from_secs(2));
    refused(Reject::status(503), Cause::ProviderFault, most).await;
    refused(busy, Cause::RateLimit, most).await;
    refused(Reject::status(429), Cause::Concurrency, most).await;
}

/// Handshakes that are never answered, and then are.
#[tokio::test(flavor = "multi_thread")]
async fn handshakes_without_an_answer_are_made_up_for() {
    let stage = Stage::new().await;
    stage.stt.set_faults(Faults {
        hold_handshake: true,
        ..Default::default()
    });
    let mut config = quickly(&stage);
    config.connect_timeout_ms = 1000;
    let sessions = Sessions::start(&config, PEOPLE, LIMIT * 10);
    let mut troubles = sessions.gate.trouble();
    let troubled = timeout(LIMIT, troubles.wait_for(Option::is_some)).await;
    troubled.expect("trouble in time").expect("a gate");
    stage.stt.set_faults(Faults::default());
    recovered(&stage, sessions).await;
    stage.end().await;
}

/// Streams that are cut, or closed by the provider, soon after they were opened: that they were opened
/// is no success.
#[tokio::test(flavor = "multi_thread")]
async fn streams_that_end_at_once_are_made_up_for() {
    let faults = [
        Faults {
            drop_after: Some(Duration::from_millis(100)),
            ..Default::default()
        },
        Faults {
            close_with: Some(CloseWith {
                code: 1011,
                reason: "NET-0000".to_owned(),
                after: Duration::from_millis(100),
            }),
            ..Default::default()
        },
        Faults {
            close_with: Some(CloseWith {
                code: 1008,
                reason: "DATA-0000".to_owned(),
                after: Duration::from_millis(100),
            }),
            ..Default::default()
        },
        Faults {
            bad_frame_after: Some(Duration::from_millis(100)),
            ..Default::default()
        },
    ];
    for fault in faults {
        let stage = Stage::new().await;
        stage.stt.set_faults(fault.clone());
        let sessions = Sessions::start(&quickly(&stage), PEOPLE, LIMIT * 10);
        let all = |w: &stt::Witness| w.opened >= PEOPLE as u64;
        stage.witnessed("everybody had one", all).await;
        let before = stage.stt.witness().opened;
        tokio::time::sleep(WHILE).await;
        let tries = stage.stt.witness().opened - before;
        println!("{tries} requests of {PEOPLE} in {WHILE:?}: {fault:?}");
        // After a volley, a few at a time; what is one stream's own fault, each on its own: from 0.1 s
        // on its pauses are doubled up to a second, and half of each is by chance.
        let most = match &fault.close_with {
            Some(close) if close.code == 1008 => 10 * PEOPLE,
            _ => PEOPLE,
        };
        assert!(tries <= most as u64, "{fault:?}: {tries}");
        stage.stt.set_faults(Faults::default());
        recovered(&stage, sessions).await;
        stage.end().await;
    }
}

/// A provider whose address nobody listens at, and one who is back.
#[tokio::test(flavor = "multi_thread")]
async fn a_provider_that_comes_up_later_is_found() {
    let stage = Stage::new().await;
    let port =
        on_a_port_of_its_own(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).map(|_| port));
    let mut config = quickly(&stage);
    let url = format!("ws://127.0.0.1:{port}");
    config.url = url.parse().expect("a URL");
    let sessions = Sessions::start(&config, PEOPLE, LIMIT * 10);
    trouble(&sessions.gate, Cause::Unreachable).await;
    let later = stt::Config {
        bind: IpAddr::V4(Ipv4Addr::LOCALHOST),
        port,
        ..stt::Config::default()
    };
    let later = Stage::of(rehearsal::room::Config::default(), later);
    recovered(&later, sessions).await;
    later.all_acknowledged(PEOPLE).await;
    later.end().await;
    stage.end().await;
}
