"""What is checked before the service starts, so that a mistake ends in one error at once."""

import ipaddress
import socket
from collections.abc import Callable

from serve.contract.errors import FocalPathError
from serve.contract.manifest import Manifest, read_bundle
from serve.inference.probe import check_provider
from serve.inference.providers import candidates_for
from serve.service.access import ApiKeys
from serve.service.telemetry import check_tracing
from serve.settings import ServeSettings

Check = Callable[[ServeSettings, Manifest], object]


def check_start(settings: ServeSettings) -> Manifest:
    """Run all checks, and return the bundle's manifest.

    Raises:
        FocalPathError: the service would not start, or never be ready.
    """
    manifest = read_bundle(settings.bundle)
    for check in START_CHECKS.values():
        check(settings, manifest)
    return manifest


def _check_precision(settings: ServeSettings, manifest: Manifest) -> None:
    """Refuse a file or a provider that the bundle does not have or did not pass with."""
    if settings.backend == "onnxruntime":
        candidates_for(settings, manifest)


def _check_address(settings: ServeSettings, _: Manifest) -> None:
    """Refuse an address that cannot be listened at."""
    host, port = settings.host, settings.port
    try:
        version = ipaddress.ip_address(host).version
    except ValueError as error:
        raise FocalPathError(
            f"--host is {host!r}, expected an IP address such as 127.0.0.1."
        ) from error
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise FocalPathError(
                f"cannot listen at {host} port {port}: {error.strerror or error}. Stop what uses "
                "the port, or choose another with --port."
            ) from error


def _check_access(settings: ServeSettings, _: Manifest) -> None:
    """Refuse to serve everybody who can reach this machine, unless the settings say so."""
    if settings.api_keys_file is not None:
        ApiKeys(settings.api_keys_file)
    elif not ipaddress.ip_address(settings.host).is_loopback and not settings.insecure_no_key:
        raise FocalPathError(
            f"--host is {settings.host}, where others can reach the service, and no API key is "
            "asked for. Set --api-keys-file, or --insecure-no-key if something before the service "
            "checks who calls."
        )


START_CHECKS: dict[str, Check] = {
    "precision": _check_precision,
    "provider": lambda settings, _: check_provider(settings),
    "address": _check_address,
    "access": _check_access,
    "tracing": lambda settings, _: check_tracing(settings),
}
"""By what each is about, in the order in which they run."""
