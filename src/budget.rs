//! What may be used in a day and in a month. When it is used up no stream is opened any more; those
//! that are open go on.

use std::{path::PathBuf, sync::Arc, time::Duration};

use chrono::{DateTime, NaiveTime, TimeDelta, Utc};
use tokio::{sync::watch, time::MissedTickBehavior};

use crate::{
    close,
    config::Config,
    failure::{Cause, Failure, Trouble},
    ledger::unix_ms,
    registry::{OpenStream, Registry},
    store::{Interval, Prices, Reader, StoreError, parse_amount},
    stt::gate::Gate,
    usage::month_of,
};

/// How often it is looked at.
const EVERY: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Period {
    Day,
    Month,
}

impl Period {
    /// The first moment of the one that is now, and of the next. UTC, as usage is summed.
    fn of(self, now: DateTime<Utc>) -> (DateTime<Utc>, DateTime<Utc>) {
        match self {
            Self::Day => {
                let first = now.date_naive().and_time(NaiveTime::MIN).and_utc();
                (first, first + TimeDelta::days(1))
            }
            Self::Month => month_of(now),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Day => "day",
            Self::Month => "month",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Measure {
    /// Of audio.
    Minutes,
    Cost,
}

/// One of the configured limits.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Limit {
    period: Period,
    measure: Measure,
    most: f64,
}

impl Limit {
    fn all(config: &Config) -> Vec<Self> {
        let budget = &config.budget;
        let minutes = |minutes: u64| (minutes > 0).then_some(minutes as f64);
        let cost = |text: &Option<String>| text.as_deref().and_then(parse_amount);
        [
            (Period::Day, Measure::Minutes, minutes(budget.day_minutes)),
            (Period::Day, Measure::Cost, cost(&budget.day_cost)),
            (
                Period::Month,
                Measure::Minutes,
                minutes(budget.month_minutes),
            ),
            (Period::Month, Measure::Cost, cost(&budget.month_cost)),
        ]
        .into_iter()
        .filter_map(|(period, measure, most)| {
            Some(Self {
                period,
                measure,
                most: most?,
            })
        })
        .collect()
    }

    /// Such as `12.5 of 10 minutes of audio of this day are used`.
    fn say(self, used: f64, currency: &str) -> String {
        let what = match self.measure {
            Measure::Minutes => "minutes of audio",
            Measure::Cost => currency,
        };
        let (most, period) = (self.most, self.period.name());
        format!("{used:.2} of {most} {what} of this {period} (UTC) are used")
    }
}

/// What was used of a period.
#[derive(Debug, Clone, Copy, Default)]
struct Used {
    minutes: f64,
    cost: f64,
}

impl Used {
    fn of(self, measure: Measure) -> f64 {
        match measure {
            Measure::Minutes => self.minutes,
            Measure::Cost => self.cost,
        }
    }
}

/// Holds the gate while a budget is used up.
pub struct Keeper {
    ledger: PathBuf,
    registry: Registry,
    gate: Gate,
    /// Of which a warning was given, and for the period that begins then.
    warned: Vec<(Limit, DateTime<Utc>)>,
    unreadable: bool,
}

impl Keeper {
    pub fn new(ledger: PathBuf, registry: Registry, gate: Gate) -> Self {
        Self {
            ledger,
            registry,
            gate,
            warned: Vec::new(),
            unreadable: false,
        }
    }

    /// Looks again and again, by the configuration of then, until it is dropped.
    pub async fn run(mut self, mut configs: watch::Receiver<Arc<Config>>) {
        let mut ticks = tokio::time::interval(EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                changed = configs.changed() => if changed.is_err() {
                    return;
                },
                _ = ticks.tick() => {}
            }
            let config = configs.borrow_and_update().clone();
            self.look(&config, Utc::now()).await;
        }
    }

    /// Compares what is used with the limits, and holds the gate or lets go of it.
    pub async fn look(&mut self, config: &Config, now: DateTime<Utc>) {
        let limits = Limit::all(config);
        let mut over = None;
        for limit in limits {
            let (from, next) = limit.period.of(now);
            let used = match self.used(config, from, now).await {
                Ok(used) => used.of(limit.measure),
                Err(error) => {
                    if !std::mem::replace(&mut self.unreadable, true) {
                        tracing::error!("the budget can't be kept for now: {error}");
                    }
                    return;
                }
            };
            self.unreadable = false;
            let said = limit.say(used, &config.ledger.currency);
            if used >= limit.most {
                // The one that holds longest.
                over = over.max(Some((next, said)));
            } else if used >= limit.most * config.budget.warn_at_percent as f64 / 100.0
                && !self.warned.contains(&(limit, from))
            {
                self.warned.retain(|(other, _)| *other != limit);
                self.warned.push((limit, from));
                tracing::warn!("{said}: when they are used up no stream is opened");
            }
        }
        self.gate.hold(over.map(|(next, said)| Trouble {
            failure: Failure::new(Cause::Budget, said),
            until: close::now() + (next - now).to_std().unwrap_or_default(),
        }));
    }

    /// By the ledger, and of streams that are open as if they had had audio all the time.
    async fn used(
        &self,
        config: &Config,
        from: DateTime<Utc>,
        now: DateTime<Utc>,
    ) -> Result<Used, StoreError> {
        let file = self.ledger.clone();
        let interval = Interval {
            from_ms: from.timestamp_millis(),
            ..Interval::ALL
        };
        let read = move || Reader::open(&file)?.usage(&[], interval, None);
        let rows = tokio::task::spawn_blocking(read).await;
        // A read that panicked, or a runtime that ends: nothing more is opened anyway.
        let rows = rows.unwrap_or_else(|_| Ok(Vec::new()))?;
        let (minutes, cost) = rows.first().map_or((0.0, 0.0), |row| {
            (row.audio_seconds / 60.0, row.cost.unwrap_or(0.0))
        });
        let mut used = Used { minutes, cost };
        let prices = Prices::new(&config.ledger);
        for OpenStream {
            service,
            opened_at_ms,
            ..
        } in self.registry.open()
        {
            let since = opened_at_ms.max(unix_ms(from.into()));
            let seconds = unix_ms(now.into()).saturating_sub(since) as f64 / 1000.0;
            used.minutes += seconds / 60.0;
            used.cost += prices.cost(&service.model, seconds, seconds).unwrap_or(0.0);
        }
        Ok(used)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> DateTime<Utc> {
        text.parse().expect("a time")
    }

    #[test]
    fn days_and_months_are_those_of_utc() {
        let now = at("2026-12-31T23:59:59.5Z");
        let new_year = at("2027-01-01T00:00:00Z");
        let day = Period::Day.of(now);
        assert_eq!(day, (at("2026-12-31T00:00:00Z"), new_year));
        let month = Period::Month.of(now);
        assert_eq!(month, (at("2026-12-01T00:00:00Z"), new_year));
    }

    #[test]
    fn what_is_not_set_is_no_limit() {
        let mut config = Config::for_tests();
        assert_eq!(Limit::all(&config), []);
        config.budget.day_minutes = 10;
        config.budget.month_cost = Some("2.5".to_owned());
        let all = Limit::all(&config);
        let said: Vec<_> = all.iter().map(|limit| limit.say(1.25, "USD")).collect();
        assert_eq!(
            said,
            [
                "1.25 of 10 minutes of audio of this day (UTC) are used",
                "1.25 of 2.5 USD of this month (UTC) are used"
            ]
        );
    }
}
