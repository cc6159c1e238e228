//! What the streams used, as Deepgram's management API puts it.
//!
//! Pure: computed from the records of the witness. Audio is booked on the day (UTC) on which its
//! stream was opened. Streams that the witness has forgotten are in the balance, but no longer
//! in these lists.
//!
//! Source: <https://developers.deepgram.com/reference/manage/usage/breakdown/get>,
//! <https://developers.deepgram.com/reference/manage/requests/list>

use std::collections::BTreeMap;

use chrono::{DateTime, Days, NaiveDate, SecondsFormat, TimeDelta, Utc};
use serde_json::{Value, json};

use super::witness::{Protocol, StreamRecord};

/// Model of streams that named none; Deepgram's default at the time of writing.
const DEFAULT_MODEL: &str = "base-general";
/// Longest range that is answered, in days.
const MAX_DAYS: u64 = 366;

/// From one day to another, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Period {
    start: NaiveDate,
    end: NaiveDate,
}

/// By what [`breakdown`] tells results apart, beside the day.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Grouping {
    #[default]
    Day,
    Accessor,
    Models,
    Tags,
    /// Endpoint, method or deployment: the same for every stream.
    Constant,
}

/// What the records are read with.
pub(super) struct Books<'a> {
    pub project_id: &'a str,
    pub started: DateTime<Utc>,
    pub usd_per_minute: f64,
}

#[derive(Default)]
struct Sum {
    seconds: f64,
    requests: u64,
}

impl Period {
    /// Days as YYYY-MM-DD, with or without a time; without an end up to today, without a start
    /// the year before the end. The error names the parameter.
    pub(super) fn parse(
        start: Option<&str>,
        end: Option<&str>,
        today: NaiveDate,
    ) -> Result<Self, String> {
        let day = |name: &str, text: &str| {
            text.get(..10)
                .and_then(|day| day.parse::<NaiveDate>().ok())
                .ok_or_else(|| format!("{name}: expected YYYY-MM-DD"))
        };
        let end = end.map_or(Ok(today), |text| day("end", text))?;
        let earliest = end.checked_sub_days(Days::new(MAX_DAYS - 1)).unwrap_or(end);
        let start = start.map_or(Ok(earliest), |text| day("start", text))?;
        if start > end {
            return Err("start: is after the end".to_owned());
        }
        if start < earliest {
            return Err(format!("start: more than {MAX_DAYS} days before the end"));
        }
        Ok(Self { start, end })
    }

    fn contains(self, day: NaiveDate) -> bool {
        (self.start..=self.end).contains(&day)
    }

    fn json(self, results: Vec<Value>) -> Value {
        json!({
            "start": self.start.to_string(),
            "end": self.end.to_string(),
            "resolution": {"units": "day", "amount": 1},
            "results": results,
        })
    }
}

impl Grouping {
    /// The parameter's value; the error names the parameter.
    pub(super) fn parse(text: Option<&str>) -> Result<Self, String> {
        match text {
            None | Some("feature_set") => Ok(Self::Day),
            Some("accessor") => Ok(Self::Accessor),
            Some("models") => Ok(Self::Models),
            Some("tags") => Ok(Self::Tags),
            Some("endpoint" | "method" | "deployment") => Ok(Self::Constant),
            Some(_) => Err(
                "grouping: expected one of accessor, endpoint, feature_set, models, method, tags, \
                 deployment"
                    .to_owned(),
            ),
        }
    }

    fn key(self, record: &StreamRecord) -> Vec<String> {
        match self {
            Self::Day | Self::Constant => Vec::new(),
            Self::Accessor => vec![record.key.clone()],
            Self::Models => vec![model(record).to_owned()],
            Self::Tags => tags(record),
        }
    }
}

impl Books<'_> {
    /// Answer of `/usage`: a result for each day on which there was any.
    pub(super) fn usage(&self, records: &[StreamRecord], period: Period) -> Value {
        let days = self.sums(records, period, Grouping::Day);
        let results = days.into_iter().map(|((day, _), sum)| {
            let mut result = sum.json();
            result["start"] = json!(day.to_string());
            result["end"] = json!(day.to_string());
            result
        });
        period.json(results.collect())
    }

    /// Answer of `/usage/breakdown`: a result for each day and value of the grouping.
    pub(super) fn breakdown(
        &self,
        records: &[StreamRecord],
        period: Period,
        grouping: Grouping,
    ) -> Value {
        let sums = self.sums(records, period, grouping);
        let results = sums.into_iter().map(|((day, key), sum)| {
            let told = |when: Grouping| (grouping == when).then_some(&key);
            let mut result = sum.json();
            result["grouping"] = json!({
                "start": day.to_string(),
                "end": day.to_string(),
                "accessor": told(Grouping::Accessor).and_then(|key| key.first()),
                "endpoint": "listen",
                "feature_set": null,
                "models": told(Grouping::Models),
                "method": "streaming",
                "tags": told(Grouping::Tags),
                "deployment": "hosted",
            });
            result
        });
        period.json(results.collect())
    }

    /// The ended streams of the period, latest first: one page of them.
    pub(super) fn requests(
        &self,
        records: &[StreamRecord],
        period: Period,
        request_id: Option<&str>,
        page: usize,
        limit: usize,
    ) -> Value {
        let requests: Vec<Value> = listened(records)
            .rev()
            .filter(|r| r.end.is_some() && period.contains(self.day(r)))
            .filter(|r| request_id.is_none_or(|id| r.request_id == id))
            .skip(page.saturating_mul(limit))
            .take(limit)
            .map(|r| self.request(r))
            .collect();
        json!({"page": page, "limit": limit, "requests": requests})
    }

    /// One stream.
    pub(super) fn request(&self, record: &StreamRecord) -> Value {
        let config: serde_json::Map<String, Value> = record
            .parameters
            .iter()
            .map(|(name, value)| (name.clone(), json!(value)))
            .collect();
        json!({
            "request_id": record.request_id,
            "project_uuid": self.project_id,
            "created": self.time(record.opened_ms),
            "path": "/v1/listen",
            "api_key_id": record.key,
            "response": {
                "details": {
                    "usd": record.audio_seconds / 60.0 * self.usd_per_minute,
                    "duration": record.audio_seconds,
                    "total_audio": record.audio_seconds,
                    "channels": 1,
                    "streams": 1,
                    "models": [model(record)],
                    "method": "streaming",
                    "tags": tags(record),
                    "features": [],
                    "config": config,
                },
                "code": 200,
                "completed": record.ended_ms.map(|ms| self.time(ms)),
            },
            "code": 200,
            "deployment": "hosted",
            "callback": null,
        })
    }

    fn sums(
        &self,
        records: &[StreamRecord],
        period: Period,
        grouping: Grouping,
    ) -> BTreeMap<(NaiveDate, Vec<String>), Sum> {
        let mut sums: BTreeMap<_, Sum> = BTreeMap::new();
        for record in listened(records) {
            let day = self.day(record);
            if period.contains(day) {
                let sum = sums.entry((day, grouping.key(record))).or_default();
                sum.seconds += record.audio_seconds;
                sum.requests += 1;
            }
        }
        sums
    }

    fn at(&self, ms: u64) -> DateTime<Utc> {
        i64::try_from(ms)
            .ok()
            .and_then(TimeDelta::try_milliseconds)
            .and_then(|after| self.started.checked_add_signed(after))
            .unwrap_or(self.started)
    }

    fn day(&self, record: &StreamRecord) -> NaiveDate {
        self.at(record.opened_ms).date_naive()
    }

    fn time(&self, ms: u64) -> String {
        self.at(ms).to_rfc3339_opts(SecondsFormat::Millis, true)
    }
}

impl Sum {
    fn json(&self) -> Value {
        let hours = self.seconds / 3600.0;
        json!({
            "hours": hours,
            "total_hours": hours,
            "agent_hours": 0.0,
            "tokens_in": 0,
            "tokens_out": 0,
            "tts_characters": 0,
            "requests": self.requests,
        })
    }
}

/// The streams that Deepgram would know of.
fn listened(records: &[StreamRecord]) -> impl DoubleEndedIterator<Item = &StreamRecord> {
    records.iter().filter(|r| r.protocol == Protocol::Listen)
}

fn parameters<'a>(record: &'a StreamRecord, name: &str) -> impl Iterator<Item = &'a str> {
    record
        .parameters
        .iter()
        .filter(move |(key, _)| key == name)
        .map(|(_, value)| value.as_str())
}

fn model(record: &StreamRecord) -> &str {
    parameters(record, "model").next().unwrap_or(DEFAULT_MODEL)
}

fn tags(record: &StreamRecord) -> Vec<String> {
    parameters(record, "tag").map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::stt::book::{Book, NewStream};
    use crate::stt::witness::{End, TcpEnd};

    const DAY_MS: u64 = 24 * 3600 * 1000;

    fn books() -> Books<'static> {
        Books {
            project_id: "project",
            started: "2026-02-27T23:00:00Z".parse().expect("a time"),
            usd_per_minute: 0.6,
        }
    }

    fn record(protocol: Protocol, opened_ms: u64, seconds: f64, query: &str) -> StreamRecord {
        let book = Arc::new(Book::new(Duration::ZERO));
        let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        let stream = NewStream {
            protocol,
            request_id: format!("id-{opened_ms}"),
            key: "...cdef".to_owned(),
            parameters: pairs
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
        };
        let entry = book.open(1, stream).expect("room");
        entry.audio_decoded(seconds);
        entry.end(End::Acknowledged, TcpEnd::Fin);
        let mut record = book.snapshot().streams.remove(0);
        record.opened_ms = opened_ms;
        record
    }

    fn records() -> Vec<StreamRecord> {
        vec![
            record(Protocol::Listen, 0, 1800.0, "model=nova-3"),
            record(
                Protocol::Listen,
                3_599_999,
                1800.0,
                "model=nova-2&tag=a&tag=b",
            ),
            record(Protocol::Listen, 3_600_000, 3600.0, "model=nova-3"),
            record(Protocol::Inference, 3_600_001, 999.0, "model=nova-3"),
            record(Protocol::Listen, DAY_MS + 3_600_000, 36.0, ""),
        ]
    }

    fn period(start: &str, end: &str) -> Period {
        let today = "2026-03-01".parse().expect("a day");
        Period::parse(Some(start), Some(end), today).expect("a period")
    }

    #[test]
    fn audio_is_summed_by_the_day_on_which_its_stream_opened() {
        let usage = books().usage(&records(), period("2026-02-27", "2026-03-01"));
        let days: Vec<_> = usage["results"]
            .as_array()
            .expect("results")
            .iter()
            .map(|r| {
                (
                    r["start"].as_str(),
                    r["hours"].as_f64(),
                    r["requests"].as_u64(),
                )
            })
            .collect();
        assert_eq!(
            days,
            [
                (Some("2026-02-27"), Some(1.0), Some(2)),
                (Some("2026-02-28"), Some(1.0), Some(1)),
                (Some("2026-03-01"), Some(0.01), Some(1)),
            ]
        );
        let one_day = books().usage(&records(), period("2026-02-28", "2026-02-28"));
        assert_eq!(one_day["results"].as_array().map(Vec::len), Some(1));
        assert_eq!(one_day["resolution"], json!({"units": "day", "amount": 1}));
    }

    #[test]
    fn a_breakdown_tells_models_and_tags_apart() {
        let all = period("2026-02-27", "2026-03-01");
        let by = |grouping| books().breakdown(&records(), all, grouping)["results"].take();
        let models = by(Grouping::Models);
        assert_eq!(models.as_array().map(Vec::len), Some(4));
        assert_eq!(models[0]["grouping"]["models"], json!(["nova-2"]));
        assert_eq!(models[1]["grouping"]["models"], json!(["nova-3"]));
        assert_eq!(models[3]["grouping"]["models"], json!([DEFAULT_MODEL]));
        let tags = by(Grouping::Tags);
        assert_eq!(tags[1]["grouping"]["tags"], json!(["a", "b"]));
        assert_eq!(by(Grouping::Accessor)[0]["grouping"]["accessor"], "...cdef");
    }

    #[test]
    fn requests_are_paged_latest_first() {
        let all = period("2026-02-27", "2026-03-01");
        let page = |page| books().requests(&records(), all, None, page, 3);
        let (first, second) = (page(0), page(1));
        let ids = |page: &Value| -> Vec<Value> {
            let requests = page["requests"].as_array().expect("requests");
            requests.iter().map(|r| r["request_id"].clone()).collect()
        };
        assert_eq!(ids(&first), ["id-90000000", "id-3600000", "id-3599999"]);
        assert_eq!(ids(&second), ["id-0"]);
        assert_eq!(ids(&page(usize::MAX)), [] as [Value; 0]);
        let last = &second["requests"][0];
        assert_eq!(last["created"], "2026-02-27T23:00:00.000Z");
        assert_eq!(last["response"]["details"]["usd"], 18.0);
        assert_eq!(last["response"]["details"]["models"], json!(["nova-3"]));
    }

    #[test]
    fn bad_periods_are_named() {
        let today = "2026-03-01".parse().expect("a day");
        for (start, end, named) in [
            (Some("yesterday"), None, "start"),
            (None, Some("2026-02-30"), "end"),
            (Some("2026-03-02"), None, "start"),
            (Some("1026-03-02"), None, "start"),
            (Some("éééééééééé"), None, "start"),
        ] {
            let error = Period::parse(start, end, today).expect_err(named);
            assert!(error.starts_with(named), "{error}");
        }
        assert!(Period::parse(Some("2026-02-01T00:00:00"), None, today).is_ok());
        assert!(Period::parse(None, Some("-262143-01-01"), today).is_err());
    }
}
