//! roomwarden joins LiveKit rooms, opens a speech-to-text stream for every participant, and proves
//! that each stream it opened was closed. See ARCHITECTURE.md for how.

pub mod audio;
pub mod board;
mod budget;
mod check;
pub mod cli;
pub mod close;
pub mod config;
mod control;
pub mod daemon;
#[cfg(feature = "rehearsal")]
pub mod demo;
mod dispatch;
pub mod domain;
pub mod failure;
mod force_close;
mod gateway;
pub mod journal;
pub mod kernel;
pub mod ledger;
pub mod lines;
#[cfg(test)]
mod model;
pub mod notify;
pub mod overrides;
mod quota;
mod refusals;
pub mod registry;
pub mod reports;
pub mod requests;
pub mod room;
pub mod session;
pub mod signals;
pub mod store;
pub mod stt;
mod table;
mod tls;
pub mod transcripts;
mod usage;
pub mod watchdog;
pub mod webhooks;
pub mod worker;
