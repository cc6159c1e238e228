use std::{
    fmt::{self, Display},
    str::FromStr,
    sync::Arc,
};

use thiserror::Error;

/// Longest description that is looked at, in bytes; a room of hundreds of tracks stays below it.
const MAX_LEN: usize = 4 << 20;

#[derive(Debug, Copy, Clone, PartialEq, Eq)]
pub enum SdpType {
    Offer,
    PrAnswer,
    Answer,
    Rollback,
}

impl FromStr for SdpType {
    type Err = &'static str;

    fn from_str(sdp_type: &str) -> Result<Self, Self::Err> {
        match sdp_type {
            "offer" => Ok(Self::Offer),
            "pranswer" => Ok(Self::PrAnswer),
            "answer" => Ok(Self::Answer),
            "rollback" => Ok(Self::Rollback),
            _ => Err("invalid SdpType"),
        }
    }
}

impl Display for SdpType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SdpType::Offer => "offer",
            SdpType::PrAnswer => "pranswer",
            SdpType::Answer => "answer",
            SdpType::Rollback => "rollback",
        })
    }
}

/// An SDP text with its role in the exchange.
#[derive(Clone)]
pub struct SessionDescription {
    sdp: Arc<str>,
    sdp_type: SdpType,
}

#[derive(Clone, Error, Debug)]
#[error("Failed to parse sdp: {line} - {description}")]
pub struct SdpParseError {
    pub line: String,
    pub description: String,
}

impl SessionDescription {
    /// Only the size is checked here: the SDK unwraps this result, so what is wrong with a
    /// server's text has to surface as the error of `set_remote_description` instead.
    pub fn parse(sdp: &str, sdp_type: SdpType) -> Result<Self, SdpParseError> {
        if sdp.len() > MAX_LEN {
            return Err(SdpParseError {
                line: String::new(),
                description: format!("longer than {MAX_LEN} bytes"),
            });
        }
        Ok(Self::new(sdp, sdp_type))
    }

    pub(crate) fn new(sdp: &str, sdp_type: SdpType) -> Self {
        Self {
            sdp: sdp.into(),
            sdp_type,
        }
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.sdp
    }

    pub fn sdp_type(&self) -> SdpType {
        self.sdp_type
    }
}

impl Display for SessionDescription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sdp)
    }
}

impl fmt::Debug for SessionDescription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SessionDescription")
            .field("sdp_type", &self.sdp_type)
            .finish()
    }
}
