//! The address that a server listens on: an IP address, or a host name that is resolved when the server binds.

use std::{
    fmt, io,
    net::{SocketAddr, ToSocketAddrs as _},
    str::FromStr,
};

use serde::{Deserialize, Deserializer};

use super::{InvalidValue, units};

/// The longest name of a host that DNS knows.
const LONGEST_NAME: usize = 253;

/// The address that a server listens on, written `IP:PORT` or `HOST:PORT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// An IP address and a port.
    Address(SocketAddr),
    /// A host that is looked up when the server binds.
    Host {
        /// The host's name.
        name: String,
        /// The port; 0 takes a free one.
        port: u16,
    },
}

impl Listen {
    /// Looks the host up, if it is one, and returns the first of its addresses. For `localhost` it
    /// prefers 127.0.0.1 over ::1, which clients that try only one address expect.
    pub fn resolve(&self) -> io::Result<SocketAddr> {
        match self {
            Listen::Address(address) => Ok(*address),
            Listen::Host { name, port } => {
                let addresses: Vec<_> = (name.as_str(), *port).to_socket_addrs()?.collect();
                let none = || io::Error::new(io::ErrorKind::NotFound, "the lookup found none");
                choose(name, &addresses).ok_or_else(none)
            }
        }
    }
}

/// Chooses one of a host's addresses.
fn choose(host: &str, addresses: &[SocketAddr]) -> Option<SocketAddr> {
    let first_v4 = addresses.iter().find(|address| address.is_ipv4());
    let preferred = first_v4.filter(|_| host.eq_ignore_ascii_case("localhost"));
    preferred.or(addresses.first()).copied()
}

impl From<SocketAddr> for Listen {
    fn from(address: SocketAddr) -> Self {
        Listen::Address(address)
    }
}

impl FromStr for Listen {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        if let Ok(address) = text.parse() {
            return Ok(Listen::Address(address));
        }
        let is_name = |name: &str| {
            (1..=LONGEST_NAME).contains(&name.len())
                && name.starts_with(|c: char| c.is_ascii_alphanumeric())
                && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
                // A name whose last label is a number is a misspelt IP address.
                && !name.rsplit('.').next().is_some_and(|last| last.bytes().all(|b| b.is_ascii_digit()))
        };
        let host =
            text.rsplit_once(':').filter(|(name, port)| is_name(name) && port.bytes().all(|b| b.is_ascii_digit()));
        let parsed =
            host.and_then(|(name, port)| Some(Listen::Host { name: name.to_owned(), port: port.parse().ok()? }));
        let wanted = "an address to listen on: give HOST:PORT, such as 127.0.0.1:50051 or localhost:50051";
        parsed.ok_or_else(|| units::invalid(text, wanted))
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Listen::Address(address) => address.fmt(f),
            Listen::Host { name, port } => write!(f, "{name}:{port}"),
        }
    }
}

impl<'de> Deserialize<'de> for Listen {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
        units::from_text(source, str::parse)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_an_ip_or_a_host_and_a_port() {
        for text in ["127.0.0.1:0", "[::1]:50051", "0.0.0.0:65535"] {
            assert!(matches!(text.parse(), Ok(Listen::Address(_))), "{text}");
        }
        for text in ["localhost:50051", "a-b.example_1:0", "1host:1"] {
            let listen: Listen = text.parse().expect(text);
            assert!(matches!(listen, Listen::Host { .. }) && listen.to_string() == text, "{text}");
        }
        for text in [
            "",
            "localhost",
            ":1",
            "localhost:",
            "localhost:x",
            "localhost:65536",
            "localhost:+1",
            "::1:1",
            "a b:1",
            "-a:1",
            "http://a:1",
            "a/b:1",
            "ü:1",
            "1.2.3:5",
            "999.1.1.1:5",
            "7:1",
        ] {
            assert!(text.parse::<Listen>().is_err(), "{text}");
        }
        assert!(format!("{}:1", "a".repeat(254)).parse::<Listen>().is_err());
    }

    #[test]
    fn the_first_address_is_taken_and_ipv4_for_localhost() {
        let [v4, other, v6] = ["127.0.0.1:1", "10.0.0.1:1", "[::1]:1"].map(|text| text.parse().expect("an address"));
        for (host, addresses, chosen) in [
            ("localhost", &[v6, v4, other][..], Some(v4)),
            ("LocalHost", &[v6, v4], Some(v4)),
            ("localhost", &[v6], Some(v6)),
            ("host", &[v6, v4], Some(v6)),
            ("host", &[other, v4], Some(other)),
            ("host", &[], None),
        ] {
            assert_eq!(choose(host, addresses), chosen, "{host} {addresses:?}");
        }
    }
}
