//! What the server can be told to do wrong.

use std::num::NonZeroU32;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::reject::Reject;

/// Misbehaviour on demand; the default is none. [`Server::set_faults`] applies it to new streams
/// and to those that are running, [`Server::set_stream_faults`] to one of them; so do `PUT /faults`
/// and `PUT /faults/{request_id}`. As JSON, times are in milliseconds and their names end in `_ms`;
/// what is left out is not committed.
///
/// [`Server::set_faults`]: super::Server::set_faults
/// [`Server::set_stream_faults`]: super::Server::set_stream_faults
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Faults {
    /// CloseStream is read, and from then on nothing is sent but pongs: no results, no Metadata, no
    /// answer to a close frame. Taking the fault back sends the answer that was held.
    pub never_answer_close: bool,
    /// How long the answer to CloseStream takes; overrides [`Config::close_delay`].
    ///
    /// [`Config::close_delay`]: super::Config::close_delay
    #[serde(rename = "close_delay_ms", with = "milliseconds::option")]
    pub close_delay: Option<Duration>,
    /// How long a final Results is held back after it was due. What follows it waits with it.
    #[serde(rename = "final_delay_ms", with = "milliseconds")]
    pub final_delay: Duration,
    /// Answers every new handshake with this instead of opening a stream. Has no effect on a
    /// stream that is open.
    pub reject_with: Option<Reject>,
    /// Leaves every new handshake without an answer until this is taken back; then it is dealt with
    /// as usual. Has no effect on a stream that is open.
    pub hold_handshake: bool,
    /// How many handshakes are still to be held or rejected, if not all; counts down.
    pub handshakes: Option<u32>,
    /// Resets the TCP connection when the stream is this old, without a close frame.
    #[serde(rename = "drop_after_ms", with = "milliseconds::option")]
    pub drop_after: Option<Duration>,
    /// Closes the stream with a close frame of the server's own.
    pub close_with: Option<CloseWith>,
    /// Half-open: the server neither reads nor writes, yet keeps the connection.
    pub stall: bool,
    /// Sends an error message within the stream, once, and goes on.
    pub error: Option<ErrorWith>,
    /// How often to send something that the protocol doesn't have: no JSON, unknown types,
    /// messages without their fields, binary messages, pings. Not more often than every 10 ms.
    #[serde(rename = "garbage_every_ms", with = "milliseconds::option")]
    pub garbage_every: Option<Duration>,
    /// Sends a websocket frame of a reserved opcode when the stream is this old, which a client
    /// must take for a broken connection (RFC 6455, 5.2).
    #[serde(rename = "bad_frame_after_ms", with = "milliseconds::option")]
    pub bad_frame_after: Option<Duration>,
    /// Reads no faster than this. What the kernel has buffered must fill up before the client
    /// feels it.
    pub read_bytes_per_second: Option<NonZeroU32>,
}

/// A close frame sent by the server when the stream is `after` old.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CloseWith {
    /// Websocket close code; one that may not be sent (RFC 6455, 7.4) is sent as 1011.
    pub code: u16,
    /// Cut to what a close frame can hold.
    #[serde(default)]
    pub reason: String,
    /// Age of the stream.
    #[serde(default, rename = "after_ms", with = "milliseconds")]
    pub after: Duration,
}

/// An error message sent by the server when the stream is `after` old.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ErrorWith {
    /// Deepgram's `variant`, such as `NET-0000`.
    pub variant: String,
    /// Deepgram's `description`.
    pub description: String,
    /// The `message` of both protocols.
    pub message: String,
    /// LiveKit Inference's `code`.
    pub code: u32,
    /// Age of the stream.
    #[serde(rename = "after_ms", with = "milliseconds")]
    pub after: Duration,
}

/// Durations as whole milliseconds.
mod milliseconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(duration: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(whole(*duration))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        u64::deserialize(from).map(Duration::from_millis)
    }

    fn whole(duration: Duration) -> u64 {
        u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
    }

    pub mod option {
        use super::{Deserialize, Deserializer, Duration, Serializer, whole};

        pub fn serialize<S: Serializer>(
            duration: &Option<Duration>,
            to: S,
        ) -> Result<S::Ok, S::Error> {
            match duration {
                Some(duration) => to.serialize_some(&whole(*duration)),
                None => to.serialize_none(),
            }
        }

        pub fn deserialize<'de, D: Deserializer<'de>>(
            from: D,
        ) -> Result<Option<Duration>, D::Error> {
            Ok(Option::<u64>::deserialize(from)?.map(Duration::from_millis))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_and_back_is_the_same() {
        let faults = Faults {
            never_answer_close: true,
            close_delay: Some(Duration::from_millis(1)),
            final_delay: Duration::from_millis(2),
            reject_with: Some(Reject::quota("MaxGatewayCredits").retry_after(Duration::MAX)),
            hold_handshake: true,
            handshakes: Some(9),
            drop_after: Some(Duration::from_millis(3)),
            close_with: Some(CloseWith {
                code: 1011,
                reason: "NET-0000".to_owned(),
                after: Duration::from_millis(4),
            }),
            stall: true,
            error: Some(ErrorWith {
                code: 5,
                ..ErrorWith::default()
            }),
            garbage_every: Some(Duration::from_millis(6)),
            bad_frame_after: Some(Duration::from_millis(7)),
            read_bytes_per_second: NonZeroU32::new(8),
        };
        let json = serde_json::to_string(&faults).expect("JSON");
        let mut read_back: Faults = serde_json::from_str(&json).expect(&json);
        if let Some(reject) = &mut read_back.reject_with {
            // Whole seconds are all that is ever sent.
            reject.retry_after = Some(Duration::MAX);
        }
        assert_eq!(read_back, faults);
        assert!(
            json.contains(r#""close_delay_ms":1,"final_delay_ms":2"#),
            "{json}"
        );
        let none: Faults = serde_json::from_str("{}").expect("no faults");
        assert_eq!(none, Faults::default());
    }

    #[test]
    fn a_rejection_needs_no_more_than_its_status() {
        let json = r#"{"reject_with": {"status": 429, "retry_after_s": 5}}"#;
        let faults: Faults = serde_json::from_str(json).expect("faults");
        let expected = Reject::status(429).retry_after(Duration::from_secs(5));
        assert_eq!(faults.reject_with, Some(expected));
    }
}
