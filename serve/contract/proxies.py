"""Proxies that the environment names, and that none stands between this machine and itself."""

import os
from collections.abc import MutableMapping
from urllib.parse import urlsplit

_PROXIES = {"http_proxy", "https_proxy", "all_proxy"}
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def spare_loopback(environment: MutableMapping[str, str] = os.environ) -> None:
    """Add the loopback addresses to NO_PROXY where a proxy is set.

    A proxy would look for the service, the collector of traces or the tracker on its own machine.
    httpx, requests, urllib and gRPC obey the variable, as do the processes that this one starts.
    """
    if not any(environment[name] for name in environment if name.lower() in _PROXIES):
        return
    given = environment.get("no_proxy") or environment.get("NO_PROXY", "")
    hosts = [host for host in map(str.strip, given.split(",")) if host]
    if "*" not in hosts:
        hosts += [host for host in _LOOPBACK if host not in hosts]
        environment["no_proxy"] = environment["NO_PROXY"] = ",".join(hosts)


def is_proxied(url: str) -> bool:
    """Whether the environment names a proxy on the way to an address."""
    from urllib.request import getproxies, proxy_bypass  # seldom needed, and slow to import

    try:
        parts, proxies = urlsplit(url), getproxies()
    except ValueError:  # it is no address
        return False
    is_named = bool(proxies.get(parts.scheme) or proxies.get("all"))
    return is_named and not proxy_bypass(parts.hostname or "")
