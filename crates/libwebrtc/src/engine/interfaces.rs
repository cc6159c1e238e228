//! Local addresses: what the kernel would use towards somewhere, and those of the interfaces.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
};

use if_addrs::{IfOperStatus, Interface};

/// Local addresses that are offered at most. More than two families on two networks are virtual
/// networks as a rule, and each is one more socket for every room.
const MAX_ADDRESSES: usize = 4;
/// Stand for "the internet" in a question for the default route; nothing is sent to them
/// (documentation ranges, RFC 5737, RFC 3849).
const ANYWHERE: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
];
/// Any port will do in a question for a route.
const PORT: u16 = 9;

/// The addresses to offer, best first: those of the default routes, then one per interface and
/// family. On a machine without any network that is the loopback interface.
pub(super) fn local_addresses() -> Vec<IpAddr> {
    let routed = ANYWHERE.into_iter().filter_map(|to| towards(to).ok());
    let interfaces = if_addrs::get_if_addrs().unwrap_or_else(|err| {
        log::debug!("no list of interfaces: {err}");
        Vec::new()
    });
    choose(&routed.collect::<Vec<_>>(), &interfaces)
}

/// The address that the kernel uses towards `remote`. Sends nothing.
pub(super) fn towards(remote: IpAddr) -> io::Result<IpAddr> {
    let any: IpAddr = match remote {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let probe = UdpSocket::bind((any, 0))?;
    probe.connect((remote, PORT))?;
    Ok(probe.local_addr()?.ip())
}

fn choose(routed: &[IpAddr], interfaces: &[Interface]) -> Vec<IpAddr> {
    let name = |ip: IpAddr| {
        let interface = interfaces.iter().find(|interface| interface.ip() == ip);
        interface.map(|interface| interface.name.as_str())
    };
    let mut chosen: Vec<(IpAddr, Option<&str>)> = Vec::new();
    let others = interfaces
        .iter()
        // "Unknown" is what tunnels say.
        .filter(|interface| {
            matches!(
                interface.oper_status,
                IfOperStatus::Up | IfOperStatus::Unknown
            )
        })
        .map(Interface::ip);
    for ip in routed.iter().copied().chain(others) {
        let interface = name(ip);
        // An interface has several addresses of IPv6; the kernel's choice, or any, is enough.
        let known = chosen.iter().any(|(other, name)| {
            *other == ip
                || (interface.is_some() && *name == interface && other.is_ipv4() == ip.is_ipv4())
        });
        if usable(ip) && !known && chosen.len() < MAX_ADDRESSES {
            chosen.push((ip, interface));
        }
    }
    if chosen.is_empty() {
        return vec![Ipv4Addr::LOCALHOST.into()];
    }
    chosen.into_iter().map(|(ip, _)| ip).collect()
}

/// Not for loopback, and not for link-local addresses: peers elsewhere can't use them, and those
/// of IPv6 mean nothing without their interface.
fn usable(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => !(ip.is_loopback() || ip.is_link_local() || ip.is_unspecified()),
        IpAddr::V6(ip) => !(ip.is_loopback() || ip.is_unicast_link_local() || ip.is_unspecified()),
    }
}

#[cfg(test)]
mod tests {
    use if_addrs::{IfAddr, Ifv4Addr, Ifv6Addr};

    use super::*;

    fn interface(name: &str, ip: &str, oper_status: IfOperStatus) -> Interface {
        let addr = match ip.parse().unwrap() {
            IpAddr::V4(ip) => IfAddr::V4(Ifv4Addr {
                ip,
                netmask: Ipv4Addr::BROADCAST,
                prefixlen: 32,
                broadcast: None,
            }),
            IpAddr::V6(ip) => IfAddr::V6(Ifv6Addr {
                ip,
                netmask: Ipv6Addr::UNSPECIFIED,
                prefixlen: 128,
                broadcast: None,
            }),
        };
        Interface {
            name: name.to_owned(),
            addr,
            index: None,
            oper_status,
            is_p2p: false,
        }
    }

    #[test]
    fn choices() {
        use IfOperStatus::{Down, Unknown, Up};
        let list = [
            interface("lo", "127.0.0.1", Unknown),
            interface("lo", "::1", Unknown),
            interface("docker0", "172.17.0.1", Down),
            interface("eth0", "192.168.1.2", Up),
            interface("eth0", "fe80::1", Up),
            interface("eth0", "2001:db8:1::1", Up),
            interface("eth0", "2001:db8:1::2", Up),
            interface("tun0", "10.8.0.2", Unknown),
            interface("br1", "172.18.0.1", Up),
            interface("br2", "172.19.0.1", Up),
            interface("usb0", "169.254.3.4", Up),
        ];
        let choose = |routed: &[&str], list: &[Interface]| -> Vec<String> {
            let routed: Vec<IpAddr> = routed.iter().map(|ip| ip.parse().unwrap()).collect();
            let chosen = super::choose(&routed, list);
            chosen.iter().map(IpAddr::to_string).collect()
        };
        assert_eq!(
            choose(&["10.8.0.2", "2001:db8:1::2"], &list),
            ["10.8.0.2", "2001:db8:1::2", "192.168.1.2", "172.18.0.1"]
        );
        assert_eq!(choose(&["10.0.0.1"], &[]), ["10.0.0.1"]);
        assert_eq!(choose(&[], &list[..3]), ["127.0.0.1"]);
        assert_eq!(choose(&[], &[]), ["127.0.0.1"]);
    }

    #[test]
    fn loopback_is_reached_from_loopback() {
        for loopback in [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()] {
            let loopback: IpAddr = loopback;
            assert_eq!(towards(loopback).unwrap(), loopback);
        }
    }

    #[test]
    fn this_machine_has_addresses_within_bounds() {
        let addresses = local_addresses();
        assert!(
            (1..=MAX_ADDRESSES).contains(&addresses.len()),
            "{addresses:?}"
        );
    }
}
