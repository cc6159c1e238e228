//! A room server that speaks LiveKit's protocols and an STT server that speaks Deepgram's, for
//! development and tests. Neither is meant for production: they bind to loopback unless told
//! otherwise and keep everything in memory.
//!
//! Both count for themselves what happened on their own sockets (the *witness*), so that a test
//! of "every stream was closed" need not believe the code under test.

#![allow(clippy::disallowed_methods, reason = "the bans are about the daemon")]

pub mod room;
#[cfg(feature = "speakers")]
pub mod speaker;
pub mod stt;
