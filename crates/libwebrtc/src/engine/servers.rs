//! URLs of STUN and TURN servers (RFC 7064, RFC 7065).

use std::{fmt, net::Ipv6Addr};

use crate::peer_connection_factory::IceServer;

/// Servers of one configuration that are used; services hand out a handful.
const MAX_SERVERS: usize = 8;
/// Bytes of a URL; a host name has at most 253.
const MAX_URL: usize = 512;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    Udp,
    Tcp,
    Tls,
}

/// What one URL says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    /// TURN; else STUN only.
    pub relay: bool,
    pub transport: Transport,
    /// Name or address, without brackets.
    pub host: String,
    pub port: u16,
}

#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Server {
    pub url: String,
    pub target: Target,
    pub username: String,
    pub password: String,
}

impl fmt::Debug for Server {
    // Without the credentials.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.url)
    }
}

/// The usable servers, and the URLs that can't be used, each with the reason.
pub(crate) fn servers(config: &[IceServer]) -> (Vec<Server>, Vec<(String, &'static str)>) {
    let (mut usable, mut refused) = (Vec::new(), Vec::new());
    for server in config {
        for url in &server.urls {
            match parse(url) {
                Ok(_) if usable.len() >= MAX_SERVERS => {
                    refused.push((url.clone(), "too many servers"));
                }
                Ok(target) => usable.push(Server {
                    url: url.clone(),
                    target,
                    username: server.username.clone(),
                    password: server.password.clone(),
                }),
                Err(reason) => refused.push((url.chars().take(MAX_URL).collect(), reason)),
            }
        }
    }
    (usable, refused)
}

fn parse(url: &str) -> Result<Target, &'static str> {
    if url.len() > MAX_URL {
        return Err("too long");
    }
    let (scheme, rest) = url.split_once(':').ok_or("no scheme")?;
    let (authority, query) = match rest.split_once('?') {
        Some((authority, query)) => (authority, Some(query)),
        None => (rest, None),
    };
    let (relay, secure) = match scheme.to_ascii_lowercase().as_str() {
        "stun" => (false, false),
        "turn" => (true, false),
        "turns" => (true, true),
        "stuns" => return Err("STUN over TLS is not supported"),
        _ => return Err("not a STUN or TURN URL"),
    };
    let transport = match (query, secure) {
        (None, false) => Transport::Udp,
        (None, true) => Transport::Tls,
        (Some(_), _) if !relay => return Err("a STUN URL has no query"),
        (Some("transport=udp"), false) => Transport::Udp,
        (Some("transport=tcp"), false) => Transport::Tcp,
        (Some("transport=tcp"), true) => Transport::Tls,
        (Some("transport=udp"), true) => return Err("TURN over DTLS is not supported"),
        (Some(_), _) => return Err("unknown query"),
    };
    let (host, port) = host_and_port(authority)?;
    let port = port.unwrap_or(if secure { 5349 } else { 3478 });
    Ok(Target {
        relay,
        transport,
        host: host.to_owned(),
        port,
    })
}

fn host_and_port(authority: &str) -> Result<(&str, Option<u16>), &'static str> {
    let (host, port) = if let Some(rest) = authority.strip_prefix('[') {
        let (host, rest) = rest.split_once(']').ok_or("no closing bracket")?;
        host.parse::<Ipv6Addr>()
            .map_err(|_| "not an IPv6 address")?;
        match rest.strip_prefix(':') {
            Some(port) => (host, Some(port)),
            None if rest.is_empty() => (host, None),
            None => return Err("text after the address"),
        }
    } else {
        let (host, port) = match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        };
        let name = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
        if host.is_empty() || !host.bytes().all(name) {
            return Err("not a host");
        }
        (host, port)
    };
    let port = match port.map(str::parse) {
        None => None,
        Some(Ok(0)) | Some(Err(_)) => return Err("not a port"),
        Some(Ok(port)) => Some(port),
    };
    Ok((host, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        use Transport::{Tcp, Tls, Udp};
        for (url, relay, transport, host, port) in [
            ("stun:a.example", false, Udp, "a.example", 3478),
            ("stun:a.example:19302", false, Udp, "a.example", 19302),
            ("STUN:192.0.2.1", false, Udp, "192.0.2.1", 3478),
            ("turn:a", true, Udp, "a", 3478),
            ("turn:a?transport=udp", true, Udp, "a", 3478),
            ("turn:a:443?transport=tcp", true, Tcp, "a", 443),
            ("turns:a", true, Tls, "a", 5349),
            ("turns:a:443?transport=tcp", true, Tls, "a", 443),
            ("turn:[2001:db8::1]", true, Udp, "2001:db8::1", 3478),
            ("turn:[::1]:7?transport=tcp", true, Tcp, "::1", 7),
        ] {
            let expected = Target {
                relay,
                transport,
                host: host.to_owned(),
                port,
            };
            assert_eq!(parse(url), Ok(expected), "{url}");
        }
        for url in [
            "",
            "turn",
            "turn:",
            "turn:?transport=udp",
            "http://a",
            "turn://a",
            "stuns:a",
            "turns:a?transport=udp",
            "turn:a?transport=sctp",
            "turn:a?",
            "stun:a?transport=udp",
            "turn:a:",
            "turn:a:0",
            "turn:a:65536",
            "turn:a:b",
            "turn:a:1:2",
            "turn:a b",
            "turn:[::1",
            "turn:[a]",
            "turn:[::1]x",
            "turn:user@a",
        ] {
            assert!(parse(url).is_err(), "{url}");
        }
        assert!(parse(&format!("stun:{}", "a".repeat(MAX_URL))).is_err());
    }

    #[test]
    fn a_bad_url_does_not_spoil_the_others_and_their_number_is_bounded() {
        let urls = |urls: &[&str]| IceServer {
            urls: urls.iter().map(|url| (*url).to_owned()).collect(),
            username: "u".to_owned(),
            password: "secret".to_owned(),
        };
        let (usable, refused) = servers(&[urls(&["stuns:a", "turn:b"]), urls(&["stun:c"; 20])]);
        assert_eq!(usable.len(), MAX_SERVERS);
        assert_eq!(usable[0].target.host, "b");
        assert_eq!(refused.len(), 1 + 21 - MAX_SERVERS);
        assert!(!format!("{usable:?}").contains("secret"));
    }
}
