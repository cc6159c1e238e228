//! `roomwarden usage` and `roomwarden streams`: what the ledger and the journal say, whether or not
//! a daemon runs.

use std::io::{self, Write};

use chrono::{DateTime, Datelike, NaiveDate, SecondsFormat, TimeDelta, Utc};
use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::{
    cli::{self, ConfigArgs, EXIT_FAILURE, EXIT_OK, EXIT_USAGE},
    config::{Config, LogFormat},
    control::{command, view},
    journal::{self, Present},
    registry::OpenStream,
    store::{Dimension, Interval, Reader, Receipt, StoreError, UsageRow, receipt},
    table::{
        Align::{Left, Right},
        Table,
    },
};

#[derive(Args)]
pub(crate) struct UsageArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// What is summed by; several, separated by commas, in their order
    #[arg(long, value_enum, value_delimiter = ',', default_value = "month")]
    by: Vec<Dimension>,
    /// Only streams from then on: a day (2026-11-01), today, or so many days back (7d); UTC
    #[arg(long, value_name = "WHEN", value_parser = since)]
    since: Option<DateTime<Utc>>,
    /// Print one JSON object
    #[arg(long, conflicts_with = "export")]
    json: bool,
    /// Print every stream with all that is known of it, instead of sums
    #[arg(long, value_name = "FORMAT", value_enum)]
    export: Option<Format>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    Csv,
    /// JSON lines
    Jsonl,
}

#[derive(Args)]
pub(crate) struct StreamsArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// So many of those that are over, latest first
    #[arg(long, value_name = "COUNT", default_value_t = 20)]
    last: u32,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Why a command has nothing to print, and the exit code.
pub(crate) struct Failed(pub u8, pub String);

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        Self(EXIT_FAILURE, format!("cannot print: {error}"))
    }
}

/// The exit code, once what went wrong is said. A reader that has had enough is nothing wrong.
pub(crate) fn done(result: Result<u8, Failed>) -> u8 {
    match result {
        Ok(code) => code,
        Err(Failed(code, said)) => cli::complain(code, &said),
    }
}

/// The configuration, in which secrets may be missing.
pub(crate) fn load(args: &ConfigArgs, format: Option<LogFormat>) -> Result<Config, Failed> {
    args.load_without_secrets(format)
        .map_err(|error| Failed(EXIT_USAGE, error.to_string()))
}

/// The ledger of the configuration.
pub(crate) fn reader(config: &Config) -> Result<Reader, Failed> {
    if !config.ledger.enabled {
        let said = "no ledger is kept: ledger.enabled is false".to_owned();
        return Err(Failed(EXIT_USAGE, said));
    }
    let path = config.ledger_file().ok_or_else(|| {
        let said = "there is no directory for a ledger: set state.dir or ledger.file";
        Failed(EXIT_USAGE, said.to_owned())
    })?;
    Reader::open(&path).map_err(failed)
}

pub(crate) fn failed(error: impl ToString) -> Failed {
    Failed(EXIT_FAILURE, error.to_string())
}

/// A moment that is given as a day or as days back.
pub(crate) fn since(text: &str) -> Result<DateTime<Utc>, String> {
    since_at(text, Utc::now())
}

fn since_at(text: &str, now: DateTime<Utc>) -> Result<DateTime<Utc>, String> {
    let day = match text.strip_suffix('d').map(str::parse::<u16>) {
        _ if text == "today" => Some(now.date_naive()),
        Some(Ok(days)) => Some(now.date_naive() - TimeDelta::days(days.into())),
        _ => text.parse::<NaiveDate>().ok(),
    };
    day.map(start_of).ok_or_else(|| {
        "expected a day such as 2026-11-01, today, or so many days back such as 7d".to_owned()
    })
}

fn start_of(day: NaiveDate) -> DateTime<Utc> {
    day.and_time(chrono::NaiveTime::MIN).and_utc()
}

/// From then on.
pub(crate) fn from(since: Option<DateTime<Utc>>) -> Interval {
    Interval {
        from_ms: since.map_or(i64::MIN, |since| since.timestamp_millis()),
        ..Interval::ALL
    }
}

/// The first moment of the month, and of the next.
pub(crate) fn month_of(now: DateTime<Utc>) -> (DateTime<Utc>, DateTime<Utc>) {
    let first = now.date_naive() - TimeDelta::days(i64::from(now.day0()));
    // Every month has more days than four weeks, and fewer than two.
    let in_next = first + TimeDelta::days(31);
    let next = in_next - TimeDelta::days(i64::from(in_next.day0()));
    (start_of(first), start_of(next))
}

pub(crate) fn minutes(seconds: f64) -> String {
    format!("{:.2}", seconds / 60.0)
}

pub(crate) fn money(cost: Option<f64>, currency: Option<&str>) -> String {
    match (cost, currency) {
        (Some(cost), Some(currency)) => format!("{cost:.4} {currency}"),
        _ => "-".to_owned(),
    }
}

pub(crate) fn usage(args: UsageArgs, format: Option<LogFormat>) -> u8 {
    done(print_usage(&args, format).map(|()| EXIT_OK))
}

fn print_usage(args: &UsageArgs, format: Option<LogFormat>) -> Result<(), Failed> {
    let config = load(&args.config, format)?;
    let reader = reader(&config)?;
    let interval = from(args.since);
    let mut out = io::BufWriter::new(anstream::stdout().lock());
    if let Some(format) = args.export {
        export(&reader, interval, format, &mut out)?;
        return Ok(out.flush()?);
    }
    if args.json {
        let since = args
            .since
            .map(|at| at.to_rfc3339_opts(SecondsFormat::Secs, true));
        let (rows, total) = summed(&reader, &args.by, args.since, None).map_err(failed)?;
        let said = json!({ "since": since, "rows": rows, "total": total });
        serde_json::to_writer_pretty(&mut out, &said).map_err(io::Error::from)?;
        writeln!(out)?;
        return Ok(out.flush()?);
    }
    let rows = reader.usage(&args.by, interval, None).map_err(failed)?;
    let total = reader.usage(&[], interval, None).map_err(failed)?;
    let total = total.into_iter().next().unwrap_or_default();
    let sums = [
        "streams",
        "failed",
        "reconnects",
        "connected min",
        "audio min",
        "provider min",
    ];
    let sums = sums.into_iter().chain(["cost"]).map(|name| (name, Right));
    let mut table = Table::new(args.by.iter().map(|by| (by.name(), Left)).chain(sums));
    let cells = |of: Vec<String>, row: &UsageRow| {
        let failed = row.streams - row.acknowledged;
        let sums = [
            row.streams.to_string(),
            failed.to_string(),
            row.reconnects.to_string(),
            minutes(row.connection_seconds),
            minutes(row.audio_seconds),
            minutes(row.provider_seconds),
            money(row.cost, row.currency.as_deref()),
        ];
        of.into_iter().chain(sums).collect::<Vec<_>>()
    };
    for row in &rows {
        table.row(cells(row.of.clone(), row));
    }
    let mut of = vec![String::new(); args.by.len()];
    of[0] = "total".to_owned();
    table.row(cells(of, &total));
    table.print(&mut out)?;
    Ok(out.flush()?)
}

/// Rows with the names of what they are summed by, and the sum of all; with `most`, so many rows at
/// most.
pub(crate) fn summed(
    reader: &Reader,
    by: &[Dimension],
    since: Option<DateTime<Utc>>,
    most: Option<u32>,
) -> Result<(Vec<Value>, Value), StoreError> {
    let interval = from(since);
    let named = |row: UsageRow| {
        let names = by.iter().map(|by| by.name().to_owned());
        let mut fields: Map<_, _> = names.zip(row.of.iter().map(|of| json!(of))).collect();
        if let Value::Object(sums) = json!(row) {
            fields.extend(sums);
        }
        Value::Object(fields)
    };
    let rows = reader.usage(by, interval, most)?;
    let rows = rows.into_iter().map(named).collect();
    let total = reader.usage(&[], interval, None)?.into_iter().next();
    Ok((rows, json!(total.unwrap_or_default())))
}

fn export(
    reader: &Reader,
    interval: Interval,
    format: Format,
    out: &mut impl Write,
) -> Result<(), Failed> {
    if let Format::Csv = format {
        let names: Vec<_> = Reader::columns().collect();
        write!(out, "{}\r\n", names.join(","))?;
    }
    let each = |row: Map<String, Value>| match format {
        Format::Csv => {
            let cells: Vec<_> = Reader::columns().map(|name| csv(&row[name])).collect();
            write!(out, "{}\r\n", cells.join(","))
        }
        Format::Jsonl => writeln!(out, "{}", Value::Object(row)),
    };
    Ok(reader.export(interval, each).map_err(failed)??)
}

/// A value as RFC 4180 has it.
fn csv(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) if text.contains(['"', ',', '\r', '\n']) => {
            format!("\"{}\"", text.replace('"', "\"\""))
        }
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// What `streams --json` prints.
#[derive(Serialize)]
struct Streams {
    /// None if the system does not tell.
    daemon_runs: Option<bool>,
    /// By the daemon, or if it does not answer by its journal. Without a daemon they are orphaned:
    /// its next start settles them as that.
    open: Vec<view::Stream>,
    /// The rest of what the daemon says; nothing if it does not answer.
    waiting: Vec<view::Idle>,
    parked: Vec<view::Idle>,
    quarantined: Option<usize>,
    /// Left open by an earlier run of it.
    orphaned: Vec<view::Orphan>,
    /// Latest first.
    over: Vec<Receipt>,
}

pub(crate) async fn streams(args: StreamsArgs, format: Option<LogFormat>) -> u8 {
    done(print_streams(&args, format).await.map(|()| EXIT_OK))
}

/// What is open by the journal; none if there is no journal.
pub(crate) fn present(config: &Config) -> Result<Option<Present>, Failed> {
    let Some(dir) = config.state.directory() else {
        return Ok(None);
    };
    journal::present(&dir, &config.rooms.identity).map_err(failed)
}

async fn print_streams(args: &StreamsArgs, format: Option<LogFormat>) -> Result<(), Failed> {
    let config = load(&args.config, format)?;
    // Before the ledger, so that a stream that ends meanwhile is in one of them.
    let told = command::streams(&config).await;
    let present = present(&config)?;
    let over = match reader(&config) {
        Ok(reader) => reader.latest(args.last).map_err(failed)?,
        Err(Failed(..)) if present.is_some() && !config.ledger.enabled => Vec::new(),
        Err(error) => return Err(error),
    };
    let name = |run, stream: &OpenStream| receipt(&config.rooms.identity, (run, stream.id));
    let streams = match (told, present) {
        (Some(told), _) => Streams {
            daemon_runs: Some(true),
            open: told.open,
            waiting: told.waiting,
            parked: told.parked,
            quarantined: Some(told.quarantined),
            orphaned: told.orphaned,
            over,
        },
        (None, present) => {
            let daemon_runs = present.as_ref().and_then(|present| present.daemon_runs);
            let open = present.map_or(Vec::new(), |present| present.open);
            let open = open.into_iter().filter(|(run, stream)| {
                let name = name(*run, stream);
                over.iter().all(|over| over.receipt != name)
            });
            Streams {
                daemon_runs,
                open: open.map(|(_, stream)| (&stream).into()).collect(),
                waiting: Vec::new(),
                parked: Vec::new(),
                quarantined: None,
                orphaned: Vec::new(),
                over,
            }
        }
    };
    let mut out = io::BufWriter::new(anstream::stdout().lock());
    if args.json {
        serde_json::to_writer_pretty(&mut out, &streams).map_err(io::Error::from)?;
        writeln!(out)?;
    } else {
        table(&streams).print(&mut out)?;
        if let Some(held) = streams.quarantined.filter(|held| *held > 0) {
            writeln!(
                out,
                "{held} ended unacknowledged and may still be counted by the provider"
            )?;
        }
    }
    Ok(out.flush()?)
}

fn table(streams: &Streams) -> Table {
    let columns = [
        ("state", Left),
        ("room", Left),
        ("participant", Left),
        ("opened (UTC)", Left),
        ("connected s", Right),
        ("audio s", Right),
        ("request", Left),
        ("because", Left),
    ];
    let mut table = Table::new(columns);
    let time = |ms: u64| {
        let time = DateTime::<Utc>::from_timestamp_millis(ms.cast_signed());
        time.map_or(String::new(), |time| time.format("%F %T").to_string())
    };
    let dash = || "-".to_owned();
    let id = |request: &Option<String>| request.clone().unwrap_or_else(dash);
    let seconds_of = |rfc3339: &str| rfc3339.get(..19).unwrap_or(rfc3339).replace('T', " ");
    let mut open = |state: &str, stream: &view::Stream, why: String| {
        table.row([
            state.to_owned(),
            stream.room.clone(),
            stream.participant.clone(),
            seconds_of(&stream.opened_at),
            dash(),
            dash(),
            id(&stream.request_id),
            why,
        ]);
    };
    for stream in &streams.open {
        match streams.daemon_runs {
            Some(false) => open("orphaned", stream, "the daemon was killed".to_owned()),
            Some(true) | None => open(&stream.state, stream, dash()),
        }
    }
    for orphan in &streams.orphaned {
        let free_by = seconds_of(&orphan.free_by);
        let why = format!("the daemon was killed; free by {free_by}");
        open("orphaned", &orphan.stream, why);
    }
    for idle in streams.waiting.iter().chain(&streams.parked) {
        table.row([
            idle.state.clone(),
            idle.room.clone(),
            idle.participant.clone(),
            dash(),
            dash(),
            dash(),
            dash(),
            format!("for {:.0} s", idle.age_seconds),
        ]);
    }
    let seconds = |seconds: Option<f64>| seconds.map_or_else(dash, |s| format!("{s:.2}"));
    for over in &streams.over {
        table.row([
            over.outcome.clone(),
            over.room.clone(),
            over.participant.clone(),
            time(over.opened_at_ms),
            seconds(over.connection_seconds),
            seconds(over.audio_seconds),
            id(&over.request_id),
            over.cause.clone().unwrap_or_else(|| over.reason.clone()),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> DateTime<Utc> {
        text.parse().expect("a time")
    }

    #[test]
    fn days_are_those_of_utc() {
        let now = at("2026-03-01T13:00:00Z");
        for (text, expected) in [
            ("today", "2026-03-01T00:00:00Z"),
            ("0d", "2026-03-01T00:00:00Z"),
            ("7d", "2026-02-22T00:00:00Z"),
            ("2026-11-01", "2026-11-01T00:00:00Z"),
        ] {
            assert_eq!(since_at(text, now), Ok(at(expected)), "{text}");
        }
        for wrong in ["", "d", "-1d", "7", "yesterday", "2026-02-30", "70000d"] {
            let error = since_at(wrong, now).expect_err(wrong);
            assert!(
                error.contains("2026-11-01") && error.contains("7d"),
                "{error}"
            );
        }
    }

    #[test]
    fn months_begin_and_end() {
        for (now, first, next) in [
            ("2026-02-28T23:59:59Z", "2026-02-01", "2026-03-01"),
            ("2026-12-31T00:00:00Z", "2026-12-01", "2027-01-01"),
            ("2028-02-01T00:00:00Z", "2028-02-01", "2028-03-01"),
        ] {
            let day = |day: &str| at(&format!("{day}T00:00:00Z"));
            assert_eq!(month_of(at(now)), (day(first), day(next)));
        }
    }

    #[test]
    fn csv_quotes_what_needs_it() {
        for (value, expected) in [
            (json!(null), ""),
            (json!("a"), "a"),
            (json!("a, \"b\"\n"), "\"a, \"\"b\"\"\n\""),
            (json!(1.5), "1.5"),
        ] {
            assert_eq!(csv(&value), expected);
        }
    }
}
