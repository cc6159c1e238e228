//! A speech-to-text server that speaks Deepgram's streaming protocol and that of LiveKit
//! Inference, and a witness to how every stream ended. Deepgram's management API tells what was
//! used and what is left.
//!
//! It recognises nothing: its transcripts say what was measured, such as
//! `speech 0.80-2.10 s -18 dBFS` or `tone 440 Hz 0.00-5.00 s -12 dBFS`, on a time line that counts
//! the audio received.
//!
//! On one port it serves `/v1/listen` and `/v1/stt`, `/v1/projects` and `/v1/auth/grant`, the
//! account (`/witness`), and what it is told to do wrong (`/faults`).
//!
//! ```no_run
//! # async fn example() -> std::io::Result<()> {
//! use rehearsal::stt::{Config, Server};
//! use std::time::Duration;
//!
//! let server = Server::start(Config::default())?;
//! println!("{} with key {}", server.url(), server.api_key());
//! let all_closed = server
//!     .wait_for(|w| w.opened > 0 && w.open_now == 0, Duration::from_secs(10))
//!     .await;
//! server.shutdown().await;
//! # Ok(())
//! # }
//! ```

mod audio_store;
mod auth;
mod book;
mod config;
mod decode;
mod dialect;
mod fault_board;
mod faults;
mod flux;
mod http;
mod inference;
mod management;
mod messages;
mod parameters;
mod reject;
mod server;
mod socket;
mod stream;
mod transcript;
mod usage;
mod vad;
mod witness;

pub use config::{
    Config, DEFAULT_API_KEY, DEFAULT_INFERENCE_KEY, DEFAULT_INFERENCE_SECRET, DEFAULT_PROJECT_ID,
};
#[cfg(feature = "speakers")]
pub(crate) use decode::OpusDecoder;
pub use faults::{CloseWith, ErrorWith, Faults};
pub use reject::{ErrorBody, Quota, Reject};
pub use server::Server;
pub use witness::{End, Protocol, StreamRecord, TcpEnd, TextCounts, Witness};
