"""Which addresses of the network are public, whatever form they are written in.

The ranges stand here and not only in Python's `ipaddress`, whose lists differ between its releases.
"""

from __future__ import annotations

import ipaddress
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

_OWN4 = [IPv4Network(n) for n in ("10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")]
_OWN6 = [IPv6Network(n) for n in ("::1/128", "fc00::/7")]
"""Networks of one's own: private, shared behind one address, loopback."""

_SPECIAL4 = [
    IPv4Network(n)
    for n in (
        "0.0.0.0/8",
        "169.254.0.0/16",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
        "100.100.100.200/32",  # metadata of Alibaba Cloud
        "168.63.129.16/32",  # the host of a machine of Azure
    )
]
"""Addresses that never hold a picture, those of clouds' metadata among them. Source: IANA's registry, RFC 6890."""

_UNICAST6 = IPv6Network("2000::/3")
_SPECIAL6 = [IPv6Network(n) for n in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20", "fd00:ec2::/32")]
_NAT64 = IPv6Network("64:ff9b::/96")


def is_allowed(address: str, *, private: bool) -> bool:
    """Say whether an address may be connected to.

    Args:
        address: An IPv4 or IPv6 address, as the system writes it; with a zone perhaps.
        private: Allow networks of one's own too. Addresses of metadata, multicast and the like are never allowed.
    """
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, IPv6Address):
        inner = found.ipv4_mapped or (IPv4Address(int(found) & 0xFFFFFFFF) if found in _NAT64 else None)
        if inner is None:
            return _is_allowed6(found, private)
        found = inner
    if any(found in network for network in _SPECIAL4):
        return False
    is_own = any(found in network for network in _OWN4)
    return private if is_own else found.is_global and not found.is_multicast


def _is_allowed6(address: IPv6Address, private: bool) -> bool:
    if any(address in network for network in _SPECIAL6):
        return False
    is_own = any(address in network for network in _OWN6)
    return private if is_own else address in _UNICAST6 and address.is_global
