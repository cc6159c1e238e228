//! What the ledger says, for commands: read only, while a daemon writes or not.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use rusqlite::{Connection, OpenFlags, Row, params, types::ValueRef};
use serde::Serialize;
use serde_json::{Map, Value};

use super::{StoreError, schema};

/// What usage is summed by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Dimension {
    Room,
    Participant,
    Model,
    /// UTC, of the permit
    Day,
    /// UTC, of the permit
    Month,
}

impl Dimension {
    pub fn name(self) -> &'static str {
        match self {
            Self::Room => "room",
            Self::Participant => "participant",
            Self::Model => "model",
            Self::Day => "day",
            Self::Month => "month",
        }
    }

    fn sql(self) -> &'static str {
        match self {
            Self::Room => "room",
            Self::Participant => "participant",
            Self::Model => "model",
            Self::Day => "strftime('%Y-%m-%d', opened_at_ms / 1000, 'unixepoch')",
            Self::Month => "strftime('%Y-%m', opened_at_ms / 1000, 'unixepoch')",
        }
    }
}

/// Streams by the moment of their permit, in Unix milliseconds: from the first, before the second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interval {
    pub from_ms: i64,
    pub before_ms: i64,
}

impl Interval {
    pub const ALL: Self = Self {
        from_ms: i64::MIN,
        before_ms: i64::MAX,
    };
}

/// Streams together. What is not known of orphaned ones is not in the sums.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct UsageRow {
    /// A value for each dimension.
    #[serde(skip)]
    pub of: Vec<String>,
    /// Permits; attempts that never became a stream are among them.
    pub streams: u64,
    pub acknowledged: u64,
    pub timed_out: u64,
    pub peer_gone: u64,
    pub never_opened: u64,
    pub orphaned: u64,
    /// Streams whose track had one before.
    pub reconnects: u64,
    pub connection_seconds: f64,
    pub audio_seconds: f64,
    /// As the provider said (`Metadata.duration`).
    pub provider_seconds: f64,
    pub audio_bytes: u64,
    /// None if no stream has a price, or if they have several currencies.
    pub cost: Option<f64>,
    pub currency: Option<String>,
}

/// A stream that is over.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Receipt {
    pub receipt: String,
    pub room: String,
    pub participant: String,
    pub request_id: Option<String>,
    pub opened_at_ms: u64,
    pub settled_at_ms: u64,
    pub connection_seconds: Option<f64>,
    pub audio_seconds: Option<f64>,
    pub outcome: String,
    pub cause: Option<String>,
    pub reason: String,
}

/// All that is known of a stream, as it is exported: the name of a column, and its expression.
const EXPORT: [(&str, &str); 25] = [
    ("receipt", "receipt"),
    ("daemon", "daemon"),
    ("room", "room"),
    ("participant", "participant"),
    ("track", "track"),
    ("provider", "provider"),
    ("model", "model"),
    ("language", "language"),
    ("encoding", "encoding"),
    ("request_id", "request_id"),
    (
        "opened_at",
        "strftime('%Y-%m-%dT%H:%M:%fZ', opened_at_ms / 1000.0, 'unixepoch')",
    ),
    (
        "settled_at",
        "strftime('%Y-%m-%dT%H:%M:%fZ', settled_at_ms / 1000.0, 'unixepoch')",
    ),
    ("wall_seconds", "wall_seconds"),
    ("close_seconds", "close_seconds"),
    ("connection_seconds", "connection_seconds"),
    ("audio_seconds", "audio_seconds"),
    ("provider_seconds", "provider_seconds"),
    ("audio_bytes", "audio_bytes"),
    ("reconnects", "reconnects"),
    ("outcome", "outcome"),
    ("cause", "cause"),
    ("reason", "reason"),
    ("cost", "cost"),
    ("currency", "currency"),
    ("seq", "seq"),
];

pub(super) fn columns() -> String {
    let columns = EXPORT.map(|(name, sql)| format!("{sql} AS {name}"));
    columns.join(", ")
}

/// The row of [`EXPORT`] as JSON.
pub(super) fn object(row: &Row<'_>) -> rusqlite::Result<Map<String, Value>> {
    let field = |(n, (name, _)): (usize, &(&str, &str))| {
        let value = match row.get_ref(n)? {
            ValueRef::Integer(number) => number.into(),
            ValueRef::Real(number) => number.into(),
            ValueRef::Text(text) => String::from_utf8_lossy(text).into(),
            ValueRef::Null | ValueRef::Blob(_) => Value::Null,
        };
        Ok(((*name).to_owned(), value))
    };
    EXPORT.iter().enumerate().map(field).collect()
}

/// A ledger that is read.
pub struct Reader {
    connection: Connection,
    path: PathBuf,
}

impl Reader {
    /// # Errors
    /// There is none, it can't be read, or it is of another version.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let found = std::fs::metadata(path);
        if !found.is_ok_and(|found| found.len() > 0) {
            return Err(StoreError::Missing {
                path: path.to_owned(),
            });
        }
        let said = StoreError::of(path);
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(path, flags).map_err(said)?;
        connection.busy_timeout(schema::BUSY).map_err(said)?;
        let version = schema::version(&connection, path, schema::known())?;
        let path = path.to_owned();
        if version < schema::known() {
            return Err(StoreError::Older { path, version });
        }
        Ok(Self { connection, path })
    }

    /// What was used, a row for each combination of the dimensions' values, in their order; with
    /// `most`, so many rows at most.
    ///
    /// # Errors
    /// It can't be read, or there are more rows.
    pub fn usage(
        &self,
        by: &[Dimension],
        Interval { from_ms, before_ms }: Interval,
        most: Option<u32>,
    ) -> Result<Vec<UsageRow>, StoreError> {
        // One more shows that there are more; to SQLite, less than nothing is no limit.
        let limit = most.map_or(-1, |most| i64::from(most) + 1);
        let dimensions: Vec<_> = by.iter().map(|dimension| dimension.sql()).collect();
        let numbers: Vec<_> = (1..=by.len()).map(|n| n.to_string()).collect();
        let (select, group) = match by.is_empty() {
            true => (String::new(), "HAVING count(*) > 0".to_owned()),
            false => (
                format!("{}, ", dimensions.join(", ")),
                format!("GROUP BY {0} ORDER BY {0}", numbers.join(", ")),
            ),
        };
        let sql = format!(
            "SELECT {select}count(*), sum(outcome = 'acknowledged'), sum(outcome = 'timed_out'),
                sum(outcome = 'peer_gone'), sum(outcome = 'never_opened'),
                sum(outcome = 'orphaned'), sum(reconnects > 0), total(connection_seconds),
                total(audio_seconds), total(provider_seconds), coalesce(sum(audio_bytes), 0),
                sum(cost), count(DISTINCT currency), max(currency)
            FROM streams WHERE opened_at_ms >= ?1 AND opened_at_ms < ?2 {group} LIMIT ?3"
        );
        let after = by.len();
        let row = |row: &Row<'_>| {
            let one_currency = row.get::<_, i64>(after + 12)? == 1;
            let of = (0..after).map(|n| row.get(n)).collect::<Result<_, _>>()?;
            Ok(UsageRow {
                of,
                streams: row.get(after)?,
                acknowledged: row.get(after + 1)?,
                timed_out: row.get(after + 2)?,
                peer_gone: row.get(after + 3)?,
                never_opened: row.get(after + 4)?,
                orphaned: row.get(after + 5)?,
                reconnects: row.get(after + 6)?,
                connection_seconds: row.get(after + 7)?,
                audio_seconds: row.get(after + 8)?,
                provider_seconds: row.get(after + 9)?,
                audio_bytes: row.get(after + 10)?,
                cost: row
                    .get::<_, Option<f64>>(after + 11)?
                    .filter(|_| one_currency),
                currency: row
                    .get::<_, Option<String>>(after + 13)?
                    .filter(|_| one_currency),
            })
        };
        let rows = self.all(&sql, params![from_ms, before_ms, limit], row)?;
        match most.filter(|most| rows.len() > *most as usize) {
            Some(most) => Err(StoreError::TooManyRows { most }),
            None => Ok(rows),
        }
    }

    /// The last streams that are over, latest first.
    pub fn latest(&self, count: u32) -> Result<Vec<Receipt>, StoreError> {
        let sql = "SELECT receipt, room, participant, request_id, opened_at_ms, settled_at_ms,
                connection_seconds, audio_seconds, outcome, cause, reason
            FROM streams ORDER BY seq DESC LIMIT ?1";
        self.all(sql, params![count], receipt)
    }

    /// Those with a request id, by the moment of their permit.
    pub fn requests(
        &self,
        Interval { from_ms, before_ms }: Interval,
    ) -> Result<Vec<Receipt>, StoreError> {
        let sql = "SELECT receipt, room, participant, request_id, opened_at_ms, settled_at_ms,
                connection_seconds, audio_seconds, outcome, cause, reason
            FROM streams WHERE opened_at_ms >= ?1 AND opened_at_ms < ?2
                AND request_id IS NOT NULL ORDER BY seq";
        self.all(sql, params![from_ms, before_ms], receipt)
    }

    /// The most streams that were open at once.
    pub fn peak(&self, Interval { from_ms, before_ms }: Interval) -> Result<u64, StoreError> {
        // Each is one more when it opens and one less when it ends; who ends goes first.
        let sql = "SELECT coalesce(max(open), 0) FROM (
                SELECT sum(step) OVER (ORDER BY at, step ROWS UNBOUNDED PRECEDING) AS open FROM (
                    SELECT opened_at_ms AS at, 1 AS step FROM streams
                        WHERE opened_at_ms >= ?1 AND opened_at_ms < ?2
                        AND outcome <> 'never_opened'
                    UNION ALL
                    SELECT max(settled_at_ms, opened_at_ms), -1 FROM streams
                        WHERE opened_at_ms >= ?1 AND opened_at_ms < ?2
                        AND outcome <> 'never_opened'))";
        let peak = self.all(sql, params![from_ms, before_ms], |row| row.get(0))?;
        Ok(peak.first().copied().unwrap_or(0))
    }

    /// The names of what [`Reader::export`] gives.
    pub fn columns() -> impl Iterator<Item = &'static str> {
        EXPORT.iter().map(|(name, _)| *name)
    }

    /// All that is known of each stream, in the order of settlement, until `each` returns an error.
    pub fn export<E>(
        &self,
        Interval { from_ms, before_ms }: Interval,
        mut each: impl FnMut(Map<String, Value>) -> Result<(), E>,
    ) -> Result<Result<(), E>, StoreError> {
        let said = StoreError::of(&self.path);
        let sql = format!(
            "SELECT {} FROM streams WHERE opened_at_ms >= ?1 AND opened_at_ms < ?2 ORDER BY seq",
            columns()
        );
        let mut statement = self.connection.prepare(&sql).map_err(said)?;
        let mut rows = statement.query(params![from_ms, before_ms]).map_err(said)?;
        while let Some(row) = rows.next().map_err(said)? {
            if let Err(error) = each(object(row).map_err(said)?) {
                return Ok(Err(error));
            }
        }
        Ok(Ok(()))
    }

    fn all<T>(
        &self,
        sql: &str,
        parameters: impl rusqlite::Params,
        read: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Vec<T>, StoreError> {
        let said = StoreError::of(&self.path);
        let mut statement = self.connection.prepare(sql).map_err(said)?;
        let rows = statement.query_map(parameters, read).map_err(said)?;
        rows.collect::<Result<_, _>>().map_err(said)
    }
}

fn receipt(row: &Row<'_>) -> rusqlite::Result<Receipt> {
    Ok(Receipt {
        receipt: row.get(0)?,
        room: row.get(1)?,
        participant: row.get(2)?,
        request_id: row.get(3)?,
        opened_at_ms: row.get(4)?,
        settled_at_ms: row.get(5)?,
        connection_seconds: row.get(6)?,
        audio_seconds: row.get(7)?,
        outcome: row.get(8)?,
        cause: row.get(9)?,
        reason: row.get(10)?,
    })
}
