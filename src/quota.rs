//! `roomwarden quota` and `roomwarden audit`: what the ledger says beside what the provider says.

mod management;

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Write},
};

use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use clap::Args;
use serde::Serialize;

use self::management::{Balance, Management, ProviderUsage, Request};
use crate::{
    cli::{ConfigArgs, EXIT_CHECK, EXIT_OK, EXIT_UNACKNOWLEDGED},
    config::LogFormat,
    store::{Interval, Receipt, UsageRow},
    table::{
        Align::{Left, Right},
        Table,
    },
    usage::{self, Failed, done, failed, minutes, money, month_of},
};

/// Seconds of audio by which two accounts of one stream may differ: a page.
const TOLERANCE: f64 = 0.05;
const ORPHANED: &str = "orphaned";
const MANY_DAYS: f64 = 1000.0;
/// Before so much of a month is over, nothing is made of it.
const MIN_ELAPSED: f64 = 0.001;

#[derive(Args)]
pub(crate) struct QuotaArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub(crate) struct AuditArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Only streams from then on: a day (2026-11-01), today, or so many days back (7d); UTC. Left
    /// out: this month
    #[arg(long, value_name = "WHEN", value_parser = usage::since)]
    since: Option<DateTime<Utc>>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What is used of this month, and how much is left.
#[derive(Serialize)]
struct Quota {
    /// Months are those of UTC.
    month: String,
    /// 0 to 1: how much of it is over.
    elapsed: f64,
    used: UsageRow,
    /// At the same rate to its end; none at its very beginning.
    projection: Option<Projection>,
    open_now: Option<usize>,
    /// The most streams at once, this month.
    peak: u64,
    /// What the account allows (stt.max_streams); none if nobody said.
    limit: Option<u64>,
    provider: Option<Provider>,
    /// Why the provider's account is not known.
    provider_error: Option<String>,
}

#[derive(Serialize)]
struct Projection {
    audio_seconds: f64,
    connection_seconds: f64,
    cost: Option<f64>,
}

/// As the provider has it. It lags: what ended in the last minutes may not be in it.
#[derive(Serialize)]
struct Provider {
    /// When it was asked.
    asked_at: String,
    /// How long ago that is now, in seconds.
    age_seconds: f64,
    project: String,
    balances: Vec<Balance>,
    usage: ProviderUsage,
    /// Days that the balance lasts at this month's rate of cost.
    days_left: Option<f64>,
}

pub(crate) async fn quota(args: QuotaArgs, format: Option<LogFormat>) -> u8 {
    done(print_quota(&args, format).await)
}

async fn print_quota(args: &QuotaArgs, format: Option<LogFormat>) -> Result<u8, Failed> {
    let config = usage::load(&args.config, format)?;
    let reader = usage::reader(&config)?;
    let now = Utc::now();
    let (first, next) = month_of(now);
    let month = usage::from(Some(first));
    let used = reader.usage(&[], month, None).map_err(failed)?;
    let used = used.into_iter().next().unwrap_or_default();
    let peak = reader.peak(month).map_err(failed)?;
    // Only the database's own view is to be held, not while the provider is asked.
    drop(reader);
    let elapsed = (now - first).as_seconds_f64() / (next - first).as_seconds_f64();
    let projection = (elapsed > MIN_ELAPSED).then(|| Projection {
        audio_seconds: used.audio_seconds / elapsed,
        connection_seconds: used.connection_seconds / elapsed,
        cost: used.cost.map(|cost| cost / elapsed),
    });
    let asked = async {
        let management = Management::connect(&config).await?;
        let balances = management.balances().await?;
        let usage = management.usage(first, now).await?;
        Ok::<_, String>((management.project, balances, usage))
    };
    let asked_at = Utc::now();
    let (provider, provider_error) = match asked.await {
        Ok((project, balances, usage)) => {
            let a_day = used
                .cost
                .map(|cost| cost / (now - first).as_seconds_f64() * 86_400.0);
            let usd: f64 = balances
                .iter()
                .filter(|b| b.units == "usd")
                .map(|b| b.amount)
                .sum();
            let provider = Provider {
                asked_at: asked_at.to_rfc3339_opts(SecondsFormat::Secs, true),
                age_seconds: (Utc::now() - asked_at).as_seconds_f64(),
                project,
                // Only where both are in the same money.
                days_left: a_day
                    .filter(|a_day| *a_day > 0.0 && used.currency.as_deref() == Some("USD"))
                    .map(|a_day| usd / a_day),
                balances,
                usage,
            };
            (Some(provider), None)
        }
        Err(said) => (None, Some(said)),
    };
    let open = usage::present(&config)?.filter(|present| present.daemon_runs == Some(true));
    let quota = Quota {
        month: first.format("%Y-%m").to_string(),
        elapsed,
        used,
        projection,
        open_now: open.map(|present| present.open.len()),
        peak,
        limit: Some(config.stt.max_streams as u64).filter(|limit| *limit > 0),
        provider,
        provider_error,
    };
    let mut out = io::BufWriter::new(anstream::stdout().lock());
    if args.json {
        serde_json::to_writer_pretty(&mut out, &quota).map_err(io::Error::from)?;
        writeln!(out)?;
    } else {
        quota.print(&mut out)?;
    }
    out.flush()?;
    Ok(match quota.provider_error {
        None => EXIT_OK,
        Some(_) => EXIT_CHECK,
    })
}

impl Quota {
    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let currency = self.used.currency.as_deref();
        let used = |audio, connection, cost| {
            format!(
                "{} min of audio, {} min connected, cost {}",
                minutes(audio),
                minutes(connection),
                money(cost, currency)
            )
        };
        let mut line = |name: &str, said: String| {
            // The provider's words are in it.
            let said = said.replace(char::is_control, "\u{fffd}");
            writeln!(out, "{name:<15} {said}")
        };
        let over = self.elapsed * 100.0;
        line(
            "month",
            format!("{} (UTC), {over:.1} % of it over", self.month),
        )?;
        let UsageRow {
            audio_seconds,
            connection_seconds,
            cost,
            ..
        } = self.used;
        let sum = used(audio_seconds, connection_seconds, cost);
        line("used here", format!("{} streams, {sum}", self.used.streams))?;
        line(
            "month's end",
            match &self.projection {
                Some(p) => used(p.audio_seconds, p.connection_seconds, p.cost),
                None => "too early to tell".to_owned(),
            },
        )?;
        let limit = match self.limit {
            Some(limit) => format!("of {limit} allowed"),
            None => "limit not known (stt.max_streams)".to_owned(),
        };
        let open = match self.open_now {
            Some(open) => format!("{open} open now"),
            None => "no daemon runs".to_owned(),
        };
        line(
            "at once",
            format!("{open}, {} at most this month, {limit}", self.peak),
        )?;
        let Some(provider) = &self.provider else {
            let said = self.provider_error.as_deref().unwrap_or_default();
            return line("provider", format!("not known: {said}"));
        };
        let age = provider.age_seconds;
        for Balance { amount, units } in &provider.balances {
            let left = match provider.days_left {
                Some(days) if units == "usd" && days > MANY_DAYS => {
                    ", enough for years like this month".to_owned()
                }
                Some(days) if units == "usd" => format!(", enough for {days:.0} days like these"),
                _ => String::new(),
            };
            line(
                "left",
                format!("{amount:.2} {}{left}", units.to_uppercase()),
            )?;
        }
        let ProviderUsage { requests, hours } = provider.usage;
        line(
            "provider says",
            format!(
                "{requests} streams, {} min of audio this month",
                minutes(hours * 3600.0)
            ),
        )?;
        line(
            "",
            format!(
                "asked {age:.1} s ago, project {}; it lags by minutes",
                provider.project
            ),
        )
    }
}

/// Where the accounts differ, by the provider's request id.
#[derive(Debug, Default, PartialEq, Serialize)]
struct Audit {
    since: String,
    ours: usize,
    theirs: usize,
    /// The same in both.
    same: usize,
    differences: Vec<Difference>,
}

#[derive(Debug, PartialEq, Serialize)]
struct Difference {
    request_id: String,
    /// Of the receipt, if there is one.
    receipt: Option<String>,
    outcome: Option<String>,
    our_seconds: Option<f64>,
    their_seconds: Option<f64>,
    what: What,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum What {
    /// There is a receipt, and the provider does not list it.
    OnlyHere,
    /// The provider lists it, and there is no receipt.
    OnlyThere,
    /// Both have it, with other seconds of audio.
    Seconds,
    /// The daemon was killed, so that it is not known here how much was sent.
    Unmeasured,
}

impl What {
    fn name(self) -> &'static str {
        match self {
            Self::OnlyHere => "not listed by the provider",
            Self::OnlyThere => "no receipt here",
            Self::Seconds => "other seconds",
            Self::Unmeasured => "not measured here",
        }
    }
}

pub(crate) async fn audit(args: AuditArgs, format: Option<LogFormat>) -> u8 {
    done(print_audit(&args, format).await)
}

async fn print_audit(args: &AuditArgs, format: Option<LogFormat>) -> Result<u8, Failed> {
    let config = usage::load(&args.config, format)?;
    let now = Utc::now();
    let since = args.since.unwrap_or_else(|| month_of(now).0);
    // The provider first: what ends meanwhile is then only here, and is left out by its time.
    let unknown = |said| Failed(EXIT_CHECK, said);
    let management = Management::connect(&config).await.map_err(unknown)?;
    let theirs = management.requests(since, now).await.map_err(unknown)?;
    let open = usage::present(&config)?.map_or(Vec::new(), |present| present.open);
    let open: BTreeSet<String> = open
        .into_iter()
        .filter_map(|(_, stream)| stream.request_id)
        .collect();
    let interval = Interval {
        from_ms: since.timestamp_millis(),
        before_ms: now.timestamp_millis(),
    };
    let ours = usage::reader(&config)?.requests(interval).map_err(failed)?;
    let audit = compare(since, now, &ours, theirs, &open);
    let mut out = io::BufWriter::new(anstream::stdout().lock());
    if args.json {
        serde_json::to_writer_pretty(&mut out, &audit).map_err(io::Error::from)?;
        writeln!(out)?;
    } else {
        audit.print(&mut out)?;
    }
    out.flush()?;
    Ok(match audit.differences.is_empty() {
        true => EXIT_OK,
        false => EXIT_UNACKNOWLEDGED,
    })
}

/// What was settled after the provider was asked, and what is still open here, is no difference.
fn compare(
    since: DateTime<Utc>,
    asked: DateTime<Utc>,
    ours: &[Receipt],
    theirs: Vec<Request>,
    open: &BTreeSet<String>,
) -> Audit {
    let asked_ms = asked.timestamp_millis().cast_unsigned();
    let mut there: BTreeMap<String, Request> = theirs
        .into_iter()
        .map(|request| (request.id.clone(), request))
        .collect();
    let mut audit = Audit {
        since: since.to_rfc3339_opts(SecondsFormat::Secs, true),
        theirs: there.len(),
        ..Audit::default()
    };
    // An orphan's time is that by which the provider has let go of it, which may be to come.
    let before = |ours: &&Receipt| ours.settled_at_ms < asked_ms || ours.outcome == ORPHANED;
    for receipt in ours.iter().filter(before) {
        let Some(id) = receipt.request_id.clone() else {
            continue;
        };
        let found = there.remove(&id);
        // A handshake that was refused has an id as well, and no stream.
        if found.is_none() && receipt.outcome == "never_opened" {
            continue;
        }
        audit.ours += 1;
        let their_seconds = found.as_ref().and_then(|request| request.seconds);
        let what = match (&found, receipt.audio_seconds, their_seconds) {
            (None, ..) => What::OnlyHere,
            (Some(_), None, _) => What::Unmeasured,
            (Some(_), Some(here), Some(there)) if (here - there).abs() > TOLERANCE => What::Seconds,
            (Some(_), Some(_), _) => {
                audit.same += 1;
                continue;
            }
        };
        audit.differences.push(Difference {
            request_id: id,
            receipt: Some(receipt.receipt.clone()),
            outcome: Some(receipt.outcome.clone()),
            our_seconds: receipt.audio_seconds,
            their_seconds,
            what,
        });
    }
    let late: BTreeSet<_> = ours
        .iter()
        .filter_map(|ours| ours.request_id.as_deref())
        .collect();
    // The provider's days are whole ones; a moment for the difference between the clocks.
    let from = since + TimeDelta::seconds(1);
    for request in there.into_values() {
        let id = request.id.as_str();
        let early = request.created.is_some_and(|created| created < from);
        if early || open.contains(id) || late.contains(id) {
            continue;
        }
        audit.differences.push(Difference {
            request_id: request.id,
            receipt: None,
            outcome: None,
            our_seconds: None,
            their_seconds: request.seconds,
            what: What::OnlyThere,
        });
    }
    audit
}

impl Audit {
    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let different = self.differences.len();
        let Self {
            since,
            ours,
            theirs,
            same,
            ..
        } = self;
        writeln!(
            out,
            "since {since}: {ours} receipts, {theirs} requests by the provider, {same} the same, \
             {different} different"
        )?;
        if self.differences.is_empty() {
            return Ok(());
        }
        let mut table = Table::new([
            ("request", Left),
            ("what", Left),
            ("ours s", Right),
            ("theirs s", Right),
            ("outcome", Left),
            ("receipt", Left),
        ]);
        let dash = || "-".to_owned();
        let seconds = |seconds: Option<f64>| seconds.map_or_else(dash, |s| format!("{s:.2}"));
        for difference in &self.differences {
            table.row([
                difference.request_id.clone(),
                difference.what.name().to_owned(),
                seconds(difference.our_seconds),
                seconds(difference.their_seconds),
                difference.outcome.clone().unwrap_or_else(dash),
                difference.receipt.clone().unwrap_or_else(dash),
            ]);
        }
        table.print(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ours(id: &str, outcome: &str, seconds: Option<f64>) -> Receipt {
        Receipt {
            receipt: format!("me/1/{id}"),
            room: "r".into(),
            participant: "p".into(),
            request_id: Some(id.into()),
            opened_at_ms: 0,
            settled_at_ms: 1000,
            connection_seconds: None,
            audio_seconds: seconds,
            outcome: outcome.into(),
            cause: None,
            reason: String::new(),
        }
    }

    fn theirs(id: &str, seconds: f64) -> Request {
        Request {
            id: id.into(),
            created: DateTime::from_timestamp(100, 0),
            seconds: Some(seconds),
        }
    }

    #[test]
    fn differences_are_told_by_request_and_what_is_under_way_is_none() {
        let at = |seconds| DateTime::from_timestamp(seconds, 0).expect("a time");
        let mut late = ours("late", "acknowledged", Some(1.0));
        late.settled_at_ms = 300_000;
        let here = [
            ours("same", "acknowledged", Some(1.0)),
            ours("more", "peer_gone", Some(2.0)),
            ours("gone", "acknowledged", Some(3.0)),
            ours("killed", "orphaned", None),
            ours("refused", "never_opened", Some(0.0)),
            late,
        ];
        let mut old = theirs("old", 9.0);
        old.created = Some(at(1));
        let there = vec![
            theirs("same", 1.01),
            theirs("more", 1.5),
            theirs("killed", 4.0),
            theirs("other", 5.0),
            theirs("open", 6.0),
            theirs("late", 1.0),
            old,
        ];
        let open = ["open".to_owned()].into();
        let audit = compare(at(50), at(200), &here, there, &open);
        let found: Vec<_> = audit
            .differences
            .iter()
            .map(|d| (d.request_id.as_str(), d.what))
            .collect();
        let expected = [
            ("more", What::Seconds),
            ("gone", What::OnlyHere),
            ("killed", What::Unmeasured),
            ("other", What::OnlyThere),
        ];
        assert_eq!(found, expected);
        assert_eq!((audit.ours, audit.theirs, audit.same), (4, 7, 1));
    }
}
