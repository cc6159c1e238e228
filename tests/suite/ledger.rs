//! The ledger of the real binary against the STT server's own account, to the sample, over sessions
//! that end in every way. ROOMWARDEN_SESSIONS sets how many (default 8, a short run of what is meant
//! for 1000), ROOMWARDEN_SEED repeats a run as far as the machine's own timing allows.

use std::{
    collections::BTreeMap,
    process::Output,
    time::{Duration, Instant},
};

use rehearsal::stt::{self, End};
use roomwarden::cli::{EXIT_CHECK, EXIT_FAILURE, EXIT_OK, EXIT_UNACKNOWLEDGED, EXIT_USAGE};
use serde_json::Value;

use crate::stage::{Binary, LIMIT, Stage};

const SPEAKERS: usize = 4;
/// In samples a second; what the ledger and the server say must not differ by half a sample.
const RATE: f64 = 48_000.0;
pub const PRICE: (&str, &str) = ("ROOMWARDEN__LEDGER__PRICES__NOVA-3", "0.0077");

/// Runs a command of the binary on the stage, beside the daemon or without one.
pub async fn roomwarden(stage: &Stage, args: &[&str]) -> Output {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_roomwarden"));
    let command = command.args(args).env_clear().envs(stage.environment());
    command.output().await.expect("roomwarden runs")
}

async fn json(stage: &Stage, args: &[&str], code: u8) -> Value {
    let args: Vec<_> = args.iter().copied().chain(["--json"]).collect();
    let output = roomwarden(stage, &args).await;
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code.into()), "{args:?}: {said}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

pub async fn exported(stage: &Stage) -> Vec<Value> {
    let output = roomwarden(stage, &["usage", "--export", "jsonl"]).await;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let lines = String::from_utf8(output.stdout).expect("text");
    let lines = lines.lines().map(serde_json::from_str);
    lines.collect::<Result<_, _>>().expect("JSON lines")
}

fn samples(seconds: f64) -> i64 {
    (seconds * RATE).round() as i64
}

fn number(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok();
    value.map(|n| n.parse().expect(name))
}

/// Compares the ledger with what the STT server saw; how many streams were orphaned.
pub fn compare(rows: &[Value], witness: &stt::Witness) -> usize {
    let text = |row: &Value, name: &str| row[name].as_str().map(str::to_owned);
    let mut by_id = BTreeMap::new();
    let (mut orphaned, mut nameless) = (0, 0);
    let receipts: std::collections::BTreeSet<_> =
        rows.iter().filter_map(|row| text(row, "receipt")).collect();
    assert_eq!(receipts.len(), rows.len(), "each once");
    for row in rows {
        let is_orphan = row["outcome"] == "orphaned";
        orphaned += usize::from(is_orphan);
        match text(row, "request_id") {
            Some(id) => assert!(by_id.insert(id, row).is_none(), "twice: {row}"),
            // Killed before the provider had told its name.
            None => nameless += usize::from(is_orphan),
        }
    }
    let mut unnamed = 0;
    for stream in &witness.streams {
        let Some(row) = by_id.remove(stream.request_id.as_str()) else {
            assert_ne!(
                stream.end,
                Some(End::Acknowledged),
                "not there: {stream:#?}"
            );
            unnamed += 1;
            continue;
        };
        let parameter = stream.parameters.iter().find(|(name, _)| name == "model");
        assert_eq!(
            text(row, "model"),
            parameter.map(|(_, model)| model.clone())
        );
        match row["outcome"].as_str() {
            Some("acknowledged") => {
                // A fault of the server's may have cut the connection after its last word.
                let told = stream.end == Some(End::Acknowledged) || stream.metadata_sent;
                assert!(told, "{row} {stream:#?}");
                let ours = row["audio_seconds"].as_f64().expect("seconds");
                let said = format!("{row} {stream:#?}");
                assert_eq!(samples(ours), samples(stream.audio_seconds), "{said}");
                assert_eq!(row["audio_bytes"], stream.audio_bytes, "{said}");
                let theirs = row["provider_seconds"].as_f64().expect("said");
                assert!((theirs - ours).abs() < 0.01, "{said}");
                let cost = row["cost"].as_f64().expect("a price");
                assert!((cost - ours / 60.0 * 0.0077).abs() < 1e-8, "{said}");
                let connected = row["connection_seconds"].as_f64().expect("seconds");
                let there = stream.ended_ms.expect("ended") - stream.opened_ms;
                assert!(connected + 0.5 > there as f64 / 1000.0, "{said}");
            }
            Some("orphaned") => assert!(row["audio_seconds"].is_null(), "{row}"),
            // What the server had not read when the connection ended is only here.
            Some(_) => {
                let ours = row["audio_seconds"].as_f64().expect("seconds");
                assert!(
                    samples(ours) >= samples(stream.audio_seconds),
                    "{row} {stream:#?}"
                );
            }
            None => panic!("no outcome: {row}"),
        }
    }
    assert!(
        unnamed <= nameless,
        "{unnamed} are missing, {nameless} have no id"
    );
    orphaned
}

/// A session that ends in one of the ways there are.
async fn session(stage: &Stage, n: usize, random: &mut fastrand::Rng) {
    let (room, who) = (format!("room-{}", n % 2), format!("speaker-{n}"));
    let Ok(speaker) = stage.try_speaker(&room, &who).await else {
        // Another session has deleted the room.
        return;
    };
    tokio::time::sleep(Duration::from_millis(random.u64(300..2500))).await;
    match random.u8(..4) {
        0 => {
            // Gone when the room is: another session may have deleted it.
            let _ = stage.api().remove_participant(&room, &who).await;
            speaker.leave().await;
        }
        1 if random.u8(..3) == 0 => {
            let _ = stage.api().delete_room(&room).await;
            speaker.leave().await;
        }
        _ => speaker.leave().await,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ledger_is_the_stt_servers_account_to_the_sample_whatever_happens() {
    let sessions = number("ROOMWARDEN_SESSIONS").unwrap_or(8);
    let seed = number("ROOMWARDEN_SEED").unwrap_or_else(|| fastrand::u64(..1 << 32));
    println!("{sessions} sessions, ROOMWARDEN_SEED={seed}");
    let answering = stt::Config::default().close_delay(Duration::from_millis(50));
    let stage = Stage::with(answering).await;
    let left = std::sync::atomic::AtomicU64::new(sessions);
    let next = || {
        let taken = |n: u64| n.checked_sub(1);
        let order = std::sync::atomic::Ordering::Relaxed;
        left.fetch_update(order, order, taken).is_ok()
    };
    let speaking = futures_util::future::join_all((0..SPEAKERS).map(async |n| {
        let mut random = fastrand::Rng::with_seed(seed + n as u64);
        while next() {
            session(&stage, n, &mut random).await;
        }
    }));
    let mut random = fastrand::Rng::with_seed(seed);
    let (mut kills, mut ends) = (0, 0);
    let mut log = String::new();
    let mut binary = Binary::run(&stage, &[PRICE]);
    {
        let mut speaking = std::pin::pin!(speaking);
        loop {
            // At least one of each, also in a short run.
            let moment = Duration::from_millis(random.u64(500..4000));
            let over = tokio::time::timeout(moment, &mut speaking).await.is_ok();
            let kill = if kills == 0 { true } else { random.bool() };
            if over && kills > 0 {
                break;
            }
            binary.signal(if kill { "KILL" } else { "TERM" });
            let (status, said) = binary.exit().await;
            log.push_str(&said);
            match kill {
                true => kills += 1,
                false => ends += 1,
            }
            assert!(
                kill || status.code() == Some(EXIT_OK.into()),
                "{status}: {said}"
            );
            binary = Binary::run(&stage, &[PRICE]);
            binary.logged("journal opened").await;
            if over {
                break;
            }
        }
    }
    let witness = stage.witnessed("no stream open", |w| w.open_now == 0).await;
    binary.signal("TERM");
    let (status, said) = binary.exit().await;
    assert_eq!(status.code(), Some(EXIT_OK.into()), "{said}");
    log.push_str(&said);
    let rows = exported(&stage).await;
    let orphaned = compare(&rows, &witness);
    println!(
        "{sessions} sessions, {} streams, {kills} kills, {ends} ends, {orphaned} orphaned",
        witness.streams.len()
    );
    // The sums are those of the rows.
    let usage = json(&stage, &["usage", "--by", "participant"], EXIT_OK).await;
    let sum: f64 = rows
        .iter()
        .filter_map(|row| row["audio_seconds"].as_f64())
        .sum();
    let total = usage["total"]["audio_seconds"].as_f64().expect("a sum");
    assert_eq!(samples(total), samples(sum));
    assert_eq!(usage["total"]["streams"], rows.len());
    assert_eq!(usage["total"]["orphaned"], orphaned);
    for words in [
        "the ledger can't be written",
        "the ledger is damaged",
        "not in the ledger",
    ] {
        assert!(!log.contains(words), "{words}: {log}");
    }
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_work_beside_the_daemon_and_without_it_and_show_no_secret() {
    let stage = Stage::with(stt::Config::default().balance(12.5)).await;
    let none = roomwarden(&stage, &["usage"]).await;
    assert_eq!(none.status.code(), Some(EXIT_FAILURE.into()));
    let said = String::from_utf8_lossy(&none.stderr);
    assert!(said.contains("there is no ledger"), "{said}");

    let binary = Binary::run(&stage, &[PRICE]);
    let alice = stage.speaker("standup", "alice").await;
    let bob = stage.speaker("standup", "bob").await;
    stage.streaming(2).await;
    let streams = json(&stage, &["streams"], EXIT_OK).await;
    assert_eq!(streams["daemon_runs"], true);
    let open = streams["open"].as_array().expect("a list");
    assert_eq!((open.len(), &open[0]["state"]), (2, &"open".into()));
    alice.leave().await;
    stage.witnessed("one left", |w| w.open_now == 1).await;
    let there = async {
        while json(&stage, &["streams"], EXIT_OK).await["over"][0]["participant"] != "alice" {}
    };
    tokio::time::timeout(LIMIT, there).await.expect("settled");
    let quota = json(&stage, &["quota"], EXIT_OK).await;
    let witness = stage.stt.witness();
    assert_eq!((&quota["open_now"], &quota["peak"]), (&1.into(), &1.into()));
    let left = quota["provider"]["balances"][0]["amount"]
        .as_f64()
        .expect("a balance");
    assert!(left < 12.5 && left > 12.4, "{quota}");
    let hours = quota["provider"]["usage"]["hours"].as_f64().expect("hours");
    assert!(hours * 3600.0 <= witness.listen_seconds + 1.0, "{quota}");
    assert!(
        quota["projection"]["cost"].as_f64() >= quota["used"]["cost"].as_f64(),
        "{quota}"
    );
    let audit = json(&stage, &["audit", "--since", "today"], EXIT_OK).await;
    assert_eq!(
        (&audit["ours"], &audit["same"]),
        (&1.into(), &1.into()),
        "{audit}"
    );

    binary.signal("KILL");
    let (_, mut said) = binary.exit().await;
    let mut binary = Binary::run(&stage, &[PRICE]);
    binary.logged("an earlier run was killed").await;
    binary.signal("TERM");
    let (status, log) = binary.exit().await;
    assert_eq!(status.code(), Some(EXIT_OK.into()), "{log}");
    said.push_str(&log);
    stage.witnessed("none left", |w| w.open_now == 0).await;
    let streams = json(&stage, &["streams"], EXIT_OK).await;
    assert_eq!(
        (&streams["daemon_runs"], &streams["open"]),
        (&false.into(), &Value::Array(vec![]))
    );
    // What a killed daemon had sent, it can't say.
    let audit = json(&stage, &["audit"], EXIT_UNACKNOWLEDGED).await;
    let what: Vec<_> = audit["differences"]
        .as_array()
        .expect("a list")
        .iter()
        .collect();
    assert!(what.iter().all(|d| d["what"] == "unmeasured"), "{audit}");
    assert!(!what.is_empty(), "{audit}");

    for args in [
        &["usage"][..],
        &[
            "usage",
            "--by",
            "day,room,participant,model,month",
            "--since",
            "1d",
        ],
        &["usage", "--export", "csv"],
        &["streams", "--last", "100"],
        &["quota"],
        &["audit"],
    ] {
        let output = roomwarden(&stage, args).await;
        let text = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        println!("$ roomwarden {}\n{text}", args.join(" "));
        assert!(
            text.contains("standup") || !args.contains(&"streams"),
            "{text}"
        );
        said.push_str(&text);
    }
    // Nor in what is on disk.
    for file in std::fs::read_dir(stage.state.path()).expect("readable") {
        let bytes = std::fs::read(file.expect("entry").path()).expect("readable");
        said.push_str(&String::from_utf8_lossy(&bytes));
    }
    for secret in [stage.stt.api_key(), stage.rooms.api_secret()] {
        assert!(!said.contains(secret), "a secret is shown");
    }
    bob.leave().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_that_does_not_tell_leaves_what_is_known_here() {
    let stage = Stage::new().await;
    let binary = Binary::run(&stage, &[]);
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(1).await;
    binary.signal("TERM");
    binary.exit().await;
    let command = |args: &'static [&str], variable: (&'static str, &'static str)| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_roomwarden"));
        command.args(args).env_clear().envs(stage.environment());
        command
            .env(variable.0, variable.1)
            .output()
            .expect("it runs")
    };
    for (variable, words) in [
        (("DEEPGRAM_API_KEY", "wrong-and-secret"), "refuses the key"),
        (("DEEPGRAM_API_KEY", ""), "stt.api_key is not set"),
        (
            ("ROOMWARDEN__QUOTA__URL", "http://127.0.0.1:1"),
            "quota.url",
        ),
        (("ROOMWARDEN__QUOTA__PROJECT", "other"), "quota.project"),
    ] {
        let output = command(&["quota"], variable);
        let said = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(EXIT_CHECK.into()), "{said}");
        assert!(
            said.contains("1 streams") && said.contains(words),
            "{words}: {said}"
        );
        assert!(!said.contains("wrong-and-secret"), "{said}");
        let output = command(&["audit"], variable);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(EXIT_CHECK.into()), "{said}");
        assert!(said.contains(words), "{words}: {said}");
    }
    alice.leave().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ledger_that_cannot_be_written_is_told_once_and_the_next_start_has_it_all() {
    let stage = Stage::new().await;
    let elsewhere = stage.state.path().join("ledger");
    std::fs::create_dir(&elsewhere).expect("a directory in its place");
    let path = elsewhere.display().to_string();
    let unusable = [("ROOMWARDEN__LEDGER__FILE", path.as_str())];
    let mut binary = Binary::run(&stage, &unusable);
    binary.logged("the ledger can't be written").await;
    let alice = stage.speaker("r", "alice").await;
    stage.streaming(1).await;
    alice.leave().await;
    stage.witnessed("closed", |w| w.open_now == 0).await;
    let begun = Instant::now();
    binary.signal("TERM");
    let (status, log) = binary.exit().await;
    assert!(begun.elapsed() < LIMIT);
    assert_eq!(status.code(), Some(EXIT_OK.into()), "{log}");
    assert_eq!(
        log.matches("the ledger can't be written").count(),
        1,
        "{log}"
    );
    assert!(
        log.contains("the last receipts are not in the ledger"),
        "{log}"
    );
    stage.all_acknowledged(1).await;

    let mut binary = Binary::run(&stage, &[PRICE]);
    binary.logged("journal opened").await;
    binary.signal("TERM");
    let (status, log) = binary.exit().await;
    assert_eq!(status.code(), Some(EXIT_OK.into()), "{log}");
    assert_eq!(compare(&exported(&stage).await, &stage.stt.witness()), 0);
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ledger_of_another_program_is_refused_before_anything_starts() {
    let stage = Stage::new().await;
    let other = stage.state.path().join("other.db");
    let path = other.display().to_string();
    // The header of a database whose application is another.
    let mut header = b"SQLite format 3\0\x10\0\x01\x01\0\x40\x20\x20".to_vec();
    header.resize(4096, 0);
    header[56..60].copy_from_slice(&[0, 0, 0, 1]);
    header[68..72].copy_from_slice(b"else");
    header[44..48].copy_from_slice(&[0, 0, 0, 4]);
    header[28..32].copy_from_slice(&[0, 0, 0, 1]);
    header[100] = 0x0d;
    header[105..107].copy_from_slice(&[0x10, 0]);
    std::fs::write(&other, &header).expect("written");
    let variables = [("ROOMWARDEN__LEDGER__FILE", path.as_str())];
    let (status, log) = Binary::run(&stage, &variables).exit().await;
    assert_eq!(status.code(), Some(EXIT_USAGE.into()), "{log}");
    for words in [path.as_str(), "no ledger of roomwarden", "ledger.file"] {
        assert!(log.contains(words), "{words}: {log}");
    }
    assert_eq!(std::fs::read(&other).expect("there"), header);
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_damaged_ledger_what_is_readable_is_there_again() {
    let stage = Stage::new().await;
    let run = async |who: &str| {
        let mut binary = Binary::run(&stage, &[PRICE]);
        binary.logged("journal opened").await;
        let speaker = stage.speaker("r", who).await;
        stage.streaming(1).await;
        binary.signal("TERM");
        let (status, log) = binary.exit().await;
        assert_eq!(status.code(), Some(EXIT_OK.into()), "{log}");
        speaker.leave().await;
        log
    };
    run("alice").await;
    let file = stage.state.path().join("roomwarden.db");
    // Takes what is in the log into the file.
    let connection = rusqlite::Connection::open(&file).expect("opens");
    let checkpoint = "PRAGMA wal_checkpoint(TRUNCATE)";
    connection
        .query_row(checkpoint, [], |_| Ok(()))
        .expect("written");
    drop(connection);
    let mut bytes = std::fs::read(&file).expect("there");
    let last = bytes.len() - 4096;
    bytes[last..].fill(0xa5);
    std::fs::write(&file, bytes).expect("damaged");
    let log = run("bob").await;
    for words in [
        "the ledger is damaged",
        "1 receipts are saved",
        "roomwarden.db.damaged-",
    ] {
        assert!(log.contains(words), "{words}: {log}");
    }
    let rows = exported(&stage).await;
    assert_eq!(rows.len(), 2, "{rows:#?}");
    assert_eq!(compare(&rows, &stage.stt.witness()), 0);
    stage.end().await;
}
