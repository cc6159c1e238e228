//! What a stream costs, by the table of the configuration.

use std::collections::BTreeMap;

use crate::config::{BilledBy, LedgerConfig};

const NANO: f64 = 1e9;
/// Of a model that has no price of its own.
const ANY_MODEL: &str = "*";

/// Prices by model.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Prices {
    by: BilledBy,
    pub currency: String,
    /// A minute.
    table: BTreeMap<String, f64>,
}

impl Prices {
    pub fn new(config: &LedgerConfig) -> Self {
        let price = |(model, text): (&String, &String)| Some((model.clone(), parse(text)?));
        Self {
            by: config.billed_by,
            currency: config.currency.clone(),
            table: config.prices.iter().filter_map(price).collect(),
        }
    }

    /// In units of the currency; none if the model has no price.
    pub fn cost(&self, model: &str, audio_seconds: f64, connection_seconds: f64) -> Option<f64> {
        let price = self.table.get(model).or(self.table.get(ANY_MODEL))?;
        let seconds = match self.by {
            BilledBy::Audio => audio_seconds,
            BilledBy::Connection => connection_seconds,
        };
        // Beyond the smallest price a binary fraction is only noise.
        Some((price * seconds / 60.0 * NANO).round() / NANO)
    }
}

/// The price of a minute, up to 1000.
pub fn parse(text: &str) -> Option<f64> {
    parse_amount(text).filter(|price| *price <= 1000.0)
}

/// An amount of money in digits, with a point or without.
pub fn parse_amount(text: &str) -> Option<f64> {
    let digits = text.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    text.parse().ok().filter(|_| digits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prices(by: BilledBy, table: &[(&str, &str)]) -> Prices {
        let own = |(model, price): &(&str, &str)| (model.to_string(), price.to_string());
        Prices::new(&LedgerConfig {
            billed_by: by,
            prices: table.iter().map(own).collect(),
            ..LedgerConfig::default()
        })
    }

    #[test]
    fn a_minute_costs_what_the_table_says_of_its_model_or_of_all() {
        let table = [("nova-3", "0.0077"), ("*", "1")];
        let by_audio = prices(BilledBy::Audio, &table);
        assert_eq!(by_audio.cost("nova-3", 60.0, 600.0), Some(0.0077));
        assert_eq!(by_audio.cost("other", 30.0, 600.0), Some(0.5));
        let by_connection = prices(BilledBy::Connection, &table[..1]);
        assert_eq!(by_connection.cost("nova-3", 60.0, 600.0), Some(0.077));
        assert_eq!(by_connection.cost("other", 60.0, 600.0), None);
    }

    #[test]
    fn a_price_is_digits() {
        for wrong in ["", "-1", "1e3", "inf", "NaN", "1,5", ".", "1001", "$1"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
        assert_eq!(parse("0.0077"), Some(0.0077));
    }
}
