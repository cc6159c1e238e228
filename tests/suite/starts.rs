//! The daemon is started and told to stop at a random moment, over and over, while people speak.
//! ROOMWARDEN_STARTS sets how often (default 12, a short run of what is meant for 2000), and
//! ROOMWARDEN_SEED the moments.

use std::{os::unix::process::ExitStatusExt, time::Duration};

use rehearsal::stt::{self, End};
use roomwarden::cli::{EXIT_ABANDONED, EXIT_UNACKNOWLEDGED};

use crate::stage::{Binary, Stage};

const SIGINT: u32 = 2;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|n| n.parse().ok())
}

fn ignores_sigint() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask & (1 << (SIGINT - 1)) != 0)
}

#[tokio::test(flavor = "multi_thread")]
async fn starts_and_stops_at_random_moments_leave_nothing() {
    let starts = number("ROOMWARDEN_STARTS").unwrap_or(12);
    let seed = number("ROOMWARDEN_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("ROOMWARDEN_SEED={seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    // An answer that takes a while, so that signals meet closes that are under way.
    let answering = stt::Config::default().close_delay(Duration::from_millis(100));
    let stage = Stage::with(answering).await;
    let people = [
        stage.speaker("r", "alice").await,
        stage.speaker("r", "bob").await,
        stage.speaker("other", "carol").await,
    ];
    // Who started us may have SIGINT ignored, as shells do with what runs in the background; then it is
    // lost as long as the daemon does not listen.
    let signals_there_are = match ignores_sigint() {
        true => &["TERM"][..],
        false => &["INT", "TERM"],
    };
    let (mut before_it_listened, mut streams) = (0, 0);
    for n in 0..starts {
        let last = stage.stt.witness().streams.last().map_or(0, |s| s.id);
        let binary = Binary::run(&stage, &[]);
        let signals = [1, 1, 1, 2, 3][rng.usize(0..5)];
        for _ in 0..signals {
            let most = [50_000, 1_500_000][rng.usize(0..2)];
            let moment = Duration::from_micros(rng.u64(0..most));
            tokio::time::sleep(moment).await;
            binary.signal(signals_there_are[rng.usize(0..signals_there_are.len())]);
        }
        let (status, log) = binary.exit().await;
        let said =
            || format!("start {n}, {signals} signals, ROOMWARDEN_SEED={seed}: {status}\n{log}");
        let witness = stage.open(0).await;
        let new: Vec<_> = witness.streams.iter().filter(|s| s.id > last).collect();
        streams += new.len();
        match status.code().and_then(|code| u8::try_from(code).ok()) {
            Some(0) => {
                let acknowledged = new.iter().filter(|s| s.end == Some(End::Acknowledged));
                assert_eq!(acknowledged.count(), new.len(), "{new:#?}\n{}", said());
            }
            Some(EXIT_ABANDONED | EXIT_UNACKNOWLEDGED) => assert_eq!(signals, 3, "{}", said()),
            // Before it listens to signals nothing has been started.
            None if status.signal().is_some() => {
                before_it_listened += 1;
                assert!(new.is_empty(), "{new:#?}\n{}", said());
            }
            _ => panic!("{}", said()),
        }
        stage.without("roomwarden").await;
    }
    println!(
        "{starts} starts, {streams} streams, {before_it_listened} ended before they listened to signals"
    );
    for speaker in people {
        speaker.leave().await;
    }
    stage.end().await;
}
