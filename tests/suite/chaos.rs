//! Everything at once: rooms that are found, dispatched to and configured, webhooks, the gateway, people
//! and agents who come, vanish and are put out, operators, servers that misbehave, signals and kills.
//! ROOMWARDEN_CHAOS sets for how many seconds (default 15, a short run of what is meant for 1800),
//! ROOMWARDEN_SEED repeats a run as far as the machine's own timing allows. In the end nothing is open,
//! and the ledger is the STT server's account.

use std::{num::NonZeroU32, time::Duration};

use futures_util::{SinkExt, future::join_all};
use rehearsal::{
    room::Whom,
    stt::{self, CloseWith, Faults, Reject},
};
use roomwarden::cli::{EXIT_OK, EXIT_UNACKNOWLEDGED};
use tokio::sync::watch;
use tokio_tungstenite::tungstenite::Message;
use tokio_util::sync::CancellationToken;

use crate::{
    gateway::{LINEAR16, second, try_connect},
    ledger::{PRICE, compare, exported, roomwarden},
    stage::{Binary, Stage},
};

const ROOMS: u64 = 3;
const SPEAKERS: u64 = 5;
const CLIENTS: u64 = 2;
const KEY: &str = "the-gateways-own-key";

fn number(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok();
    value.map(|n| n.parse().expect(name))
}

struct Chaos {
    stage: Stage,
    seed: u64,
    over: CancellationToken,
    /// Of the gateway, as long as there is one.
    gateway: watch::Sender<Option<String>>,
}

impl Chaos {
    async fn pause(&self, random: &mut fastrand::Rng, most: u64) {
        let pause = Duration::from_millis(random.u64(..most));
        let pausing = tokio::time::sleep(pause);
        self.over.run_until_cancelled(pausing).await;
    }

    /// Somebody who speaks, again and again.
    async fn speaker(&self, n: u64) {
        let mut random = fastrand::Rng::with_seed(self.seed + n);
        while !self.over.is_cancelled() {
            let room = format!("room-{}", random.u64(..ROOMS));
            let who = format!("speaker-{n}");
            let Ok(speaker) = self.stage.try_speaker(&room, &who).await else {
                self.pause(&mut random, 200).await;
                continue;
            };
            self.pause(&mut random, 3000).await;
            if random.u8(..3) == 0 {
                speaker.mute();
                self.pause(&mut random, 2000).await;
                speaker.unmute();
                self.pause(&mut random, 1000).await;
            }
            match random.u8(..6) {
                0 => speaker.vanish(&self.stage.rooms).await,
                _ => speaker.leave().await,
            }
            self.pause(&mut random, 300).await;
        }
    }

    /// A program that uses the gateway, and ends as it likes.
    async fn client(&self, n: u64) {
        let mut random = fastrand::Rng::with_seed(self.seed + 1000 + n);
        while !self.over.is_cancelled() {
            let address = self.gateway.borrow().clone();
            self.pause(&mut random, 300).await;
            let path = match random.u8(..3) {
                0 => String::new(),
                1 => format!("/rooms/room-{}", random.u64(..ROOMS)),
                _ => format!(
                    "/rooms/room-{}/participants/speaker-{}",
                    random.u64(..ROOMS),
                    random.u64(..SPEAKERS)
                ),
            };
            let Some(address) = address else {
                continue;
            };
            let url = format!("ws://{address}{path}/v1/listen?{LINEAR16}");
            let Ok((mut socket, _)) = try_connect(&url, KEY).await else {
                continue;
            };
            for _ in 0..random.u8(..4) {
                for message in second(true) {
                    let _ = socket.send(Message::binary(message)).await;
                }
                self.pause(&mut random, 1000).await;
            }
            match random.u8(..3) {
                0 => drop(
                    socket
                        .send(Message::text(r#"{"type":"CloseStream"}"#))
                        .await,
                ),
                1 => drop(socket.close(None).await),
                _ => {}
            }
        }
    }

    /// What servers do now and then.
    async fn misfortune(&self) {
        let mut random = fastrand::Rng::with_seed(self.seed + 2000);
        while !self.over.is_cancelled() {
            self.pause(&mut random, 3000).await;
            let after = Duration::from_millis(random.u64(..2000));
            let rejected = [400, 401, 402, 429, 500][random.usize(..5)];
            let faults = match random.u8(..8) {
                0 => Faults {
                    drop_after: Some(after),
                    ..Faults::default()
                },
                1 => Faults {
                    close_with: Some(CloseWith {
                        code: 1011,
                        reason: "NET-0000".into(),
                        after,
                    }),
                    ..Faults::default()
                },
                2 => Faults {
                    reject_with: Some(Reject::status(rejected)),
                    handshakes: Some(random.u32(1..4)),
                    ..Faults::default()
                },
                3 => Faults {
                    garbage_every: Some(Duration::from_millis(20)),
                    final_delay: after / 2,
                    ..Faults::default()
                },
                4 => Faults {
                    close_delay: Some(after),
                    read_bytes_per_second: NonZeroU32::new(4000),
                    ..Faults::default()
                },
                _ => Faults::default(),
            };
            self.stage.stt.set_faults(faults);
            let (what, everyone) = (random.u8(..8), || Whom::Everyone);
            self.stage
                .faults(|faults| match what {
                    0 => faults.departures_lost = everyone(),
                    1 => (faults.departures_late, faults.lateness_ms) = (everyone(), 300),
                    2 => faults.departures_twice = everyone(),
                    3 => faults.webhooks_lost = everyone(),
                    4 => faults.api_failing = true,
                    _ => {}
                })
                .await;
        }
        self.stage.stt.set_faults(Faults::default());
        self.stage.faults(|_| {}).await;
    }

    /// What people do who have the keys.
    async fn operator(&self) {
        let mut random = fastrand::Rng::with_seed(self.seed + 3000);
        while !self.over.is_cancelled() {
            self.pause(&mut random, 1500).await;
            let room = format!("room-{}", random.u64(..ROOMS));
            let who = format!("speaker-{}", random.u64(..SPEAKERS));
            // Whoever it is about may be gone, and the daemon as well.
            match random.u8(..8) {
                0 => drop(self.stage.api().remove_participant(&room, &who).await),
                1 => drop(self.stage.api().delete_room(&room).await),
                what => {
                    let args = match what {
                        2 => vec!["close", "room", &room],
                        3 => vec!["close", "participant", &room, &who],
                        4 => vec!["reopen", "room", &room],
                        5 => vec!["dispatch", &room],
                        6 => vec!["force-close", &room, "--deadline", "5"],
                        _ => vec!["undrain"],
                    };
                    roomwarden(&self.stage, &args).await;
                }
            }
        }
    }

    /// The daemon, over and over; how often it was killed, and told to end.
    async fn daemons(&self) -> (u32, u32) {
        let mut random = fastrand::Rng::with_seed(self.seed + 4000);
        let (mut kills, mut ends) = (0, 0);
        loop {
            let binary = self.start().await;
            loop {
                self.pause(&mut random, 8000).await;
                if self.over.is_cancelled() {
                    break;
                }
                match random.u8(..4) {
                    0 => binary.signal("HUP"),
                    1 => drop(roomwarden(&self.stage, &["drain"]).await),
                    _ => break,
                }
            }
            self.gateway.send_replace(None);
            let kill = !self.over.is_cancelled() && random.bool();
            if self.over.is_cancelled() {
                return (kills, ends + self.end(binary).await);
            }
            binary.signal(if kill { "KILL" } else { "TERM" });
            // It may have ended by itself, once drained.
            let (status, log) = binary.exit().await;
            let code = status.code().and_then(|code| u8::try_from(code).ok());
            let good = [EXIT_OK, EXIT_UNACKNOWLEDGED];
            assert!(
                kill || code.is_some_and(|code| good.contains(&code)),
                "seed {}: {status}: {log}",
                self.seed
            );
            (kills, ends) = (kills + u32::from(kill), ends + u32::from(!kill));
        }
    }

    async fn start(&self) -> Binary {
        let variables = [
            PRICE,
            ("ROOMWARDEN__AGENT__ENABLED", "true"),
            ("ROOMWARDEN__AGENT__LOAD_PERCENT", "100"),
            ("ROOMWARDEN__ROOMS__INCLUDE", "room-1"),
            ("ROOMWARDEN__ROOMS__JOIN", "room-2"),
            ("ROOMWARDEN__ROOMS__RECONCILE_INTERVAL_MS", "500"),
            ("ROOMWARDEN__STT__MAX_STREAMS", "6"),
            ("ROOMWARDEN__STT__PARK_AFTER_MS", "1500"),
            ("ROOMWARDEN__STT__RETRY_FIRST_MS", "50"),
            ("ROOMWARDEN__STT__RETRY_MOST_MS", "1000"),
            ("ROOMWARDEN__STT__PROVIDER_IDLE_MS", "1000"),
            ("ROOMWARDEN__GATEWAY__LISTEN", "127.0.0.1:0"),
            ("ROOMWARDEN__GATEWAY__TOKEN", KEY),
        ];
        let mut binary = Binary::run(&self.stage, &variables);
        binary.logged("the gateway listens address=").await;
        let log = binary.log();
        let (_, rest) = log.split_once("the gateway listens address=").expect("it");
        let address = rest.lines().next().expect("an address").trim().to_owned();
        self.gateway.send_replace(Some(address));
        binary
    }

    /// Nobody is there any more, and nothing is wrong: then nothing is left.
    async fn end(&self, binary: Binary) -> u32 {
        self.stage
            .witnessed("all closed", |w| w.open_now == 0)
            .await;
        binary.signal("TERM");
        let (status, log) = binary.exit().await;
        assert_eq!(
            status.code(),
            Some(EXIT_OK.into()),
            "seed {}: {log}",
            self.seed
        );
        1
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_happens_nothing_is_left_open() {
    let seconds = number("ROOMWARDEN_CHAOS").unwrap_or(15);
    let seed = number("ROOMWARDEN_SEED").unwrap_or_else(|| fastrand::u64(..1 << 32));
    println!("{seconds} s of chaos, ROOMWARDEN_SEED={seed}");
    let answering = stt::Config::default().close_delay(Duration::from_millis(50));
    let chaos = Chaos {
        stage: Stage::with(answering).await,
        seed,
        over: CancellationToken::new(),
        gateway: watch::Sender::default(),
    };
    let people = async {
        let speakers = join_all((0..SPEAKERS).map(|n| chaos.speaker(n)));
        let clients = join_all((0..CLIENTS).map(|n| chaos.client(n)));
        tokio::join!(speakers, clients, chaos.misfortune(), chaos.operator());
    };
    let clock = async {
        tokio::time::sleep(Duration::from_secs(seconds)).await;
        chaos.over.cancel();
    };
    let ((), (), (kills, ends)) = tokio::join!(people, clock, chaos.daemons());
    let witness = chaos
        .stage
        .witnessed("none open", |w| w.open_now == 0)
        .await;
    let orphaned = compare(&exported(&chaos.stage).await, &witness);
    let mut by_end = std::collections::BTreeMap::<String, usize>::new();
    for stream in &witness.streams {
        let end = format!("{:?}", stream.end.as_ref().expect("it has ended"));
        *by_end.entry(end).or_default() += 1;
    }
    println!(
        "{} streams, {} refused, {kills} kills, {ends} ends, {orphaned} orphaned: {by_end:?}",
        witness.streams.len(),
        witness.rejections()
    );
    chaos.stage.end().await;
}
