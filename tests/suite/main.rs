//! The promise, tested from outside: in every test the STT server's own account is the witness.
//! One binary, so that the SDK is linked once.

#![allow(clippy::disallowed_methods, reason = "the bans are about the daemon")]

mod agents;
#[cfg(target_os = "linux")]
mod blocked;
mod both_ways;
mod chaos;
mod check;
mod clients;
mod close;
mod command_line;
mod control;
mod cycles;
mod dev;
mod force_close;
#[cfg(target_os = "linux")]
mod frozen;
mod fuzz_api;
mod gateway;
mod killed;
mod ledger;
mod limits;
mod lost;
mod matrix;
#[cfg(target_os = "linux")]
mod parking;
mod pid1;
mod providers;
mod recovery;
mod refused;
mod rehearsal;
mod reload;
mod reports;
mod selection;
mod service;
mod stage;
mod starts;
mod streams;
mod tls;
mod to_room;
mod tone;
mod vanish;
mod webhooks;
mod worker;
