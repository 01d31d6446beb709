"""Checks before the service starts, so that a mistake ends in one error at once."""

import ipaddress
import socket
from collections.abc import Callable

from serve.contract.errors import SettingsError
from serve.contract.extras import how_to_install
from serve.contract.manifest import Manifest, read_bundle
from serve.inference.probe import check_provider
from serve.inference.providers import candidates_for
from serve.service.access import ApiKeys
from serve.service.tracing import check_tracing
from serve.settings import ServeSettings

Check = Callable[[ServeSettings, Manifest | None], object]


def check_start(settings: ServeSettings) -> Manifest:
    """Run all checks, and return the bundle's manifest.

    Raises:
        FocalPathError: the service would not start, or would never be ready.
    """
    manifest = read_bundle(settings.bundle)
    for check in START_CHECKS.values():
        check(settings, manifest)
    return manifest


def _check_precision(settings: ServeSettings, manifest: Manifest | None) -> None:
    """Refuse a file that the bundle lacks, or a provider that did not pass with it."""
    if manifest is not None and settings.backend == "onnxruntime":
        candidates_for(settings, manifest)


def _check_address(settings: ServeSettings, _: Manifest | None) -> None:
    """Refuse an address that the service cannot listen at."""
    host, port = settings.host, settings.port
    try:
        version = ipaddress.ip_address(host).version
    except ValueError as error:
        raise SettingsError(
            f"--host is {host!r}, expected an IP address such as 127.0.0.1."
        ) from error
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise SettingsError(
                f"cannot listen at {host} port {port}: {error.strerror or error}. Stop what uses "
                "the port, or choose another with --port.",
                code="address_unusable",
            ) from error


def _check_access(settings: ServeSettings, _: Manifest | None) -> None:
    """Refuse to listen beyond this machine without API keys, unless the settings allow it."""
    if settings.api_keys_file is not None:
        ApiKeys(settings.api_keys_file)
    elif not ipaddress.ip_address(settings.host).is_loopback and not settings.insecure_no_key:
        raise SettingsError(
            f"--host is {settings.host}, where others can reach the service, and there are no API "
            "keys. Set --api-keys-file, or --insecure-no-key if a proxy before the service checks "
            "who calls.",
            code="keys_missing",
        )


def _check_slides(settings: ServeSettings, _: Manifest | None) -> None:
    """Refuse folders of slides that cannot be used."""
    if settings.slides is None:
        return
    try:
        from serve.service.slides.state import check_slides
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("serve"):
            raise
        raise SettingsError(
            f"--slides needs {error.name}, which is not installed: {how_to_install('slides')}."
        ) from error
    check_slides(settings)


START_CHECKS: dict[str, Check] = {
    "precision": _check_precision,
    "provider": lambda settings, _: check_provider(settings),
    "address": _check_address,
    "access": _check_access,
    "slides": _check_slides,
    "tracing": lambda settings, _: check_tracing(settings),
}
"""Checks by their subject, in the order in which they run."""
