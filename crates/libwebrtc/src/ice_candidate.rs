use std::fmt;

use crate::session_description::SdpParseError;

/// Longest candidate line that is looked at, in bytes.
const MAX_LEN: usize = 1024;

/// One ICE candidate as it is trickled (RFC 8838, RFC 8839).
pub struct IceCandidate {
    sdp_mid: String,
    sdp_mline_index: i32,
    candidate: String,
}

impl IceCandidate {
    /// Takes `candidate:...`, with or without a leading `a=`. The empty string means "no more
    /// candidates". Addresses are looked at when the candidate is added, not here.
    pub fn parse(
        sdp_mid: &str,
        sdp_mline_index: i32,
        sdp: &str,
    ) -> Result<IceCandidate, SdpParseError> {
        let candidate = sdp.trim();
        let candidate = candidate.strip_prefix("a=").unwrap_or(candidate);
        if candidate.len() > MAX_LEN {
            return Err(SdpParseError {
                line: candidate.chars().take(64).collect(),
                description: format!("longer than {MAX_LEN} bytes"),
            });
        }
        if !candidate.is_empty() && !candidate.starts_with("candidate:") {
            return Err(SdpParseError {
                line: candidate.to_owned(),
                description: "does not start with candidate:".to_owned(),
            });
        }
        Ok(Self {
            sdp_mid: sdp_mid.to_owned(),
            sdp_mline_index,
            candidate: candidate.to_owned(),
        })
    }

    pub(crate) fn new(sdp_mid: String, sdp_mline_index: i32, candidate: String) -> Self {
        Self {
            sdp_mid,
            sdp_mline_index,
            candidate,
        }
    }

    pub fn sdp_mid(&self) -> String {
        self.sdp_mid.clone()
    }

    pub fn sdp_mline_index(&self) -> i32 {
        self.sdp_mline_index
    }

    /// The line without `a=`.
    pub fn candidate(&self) -> String {
        self.candidate.clone()
    }
}

impl fmt::Display for IceCandidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.candidate)
    }
}

impl fmt::Debug for IceCandidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IceCandidate")
            .field("candidate", &self.candidate)
            .finish()
    }
}
