"""Proxies of the environment: none on the way to this machine itself."""

import pytest

from serve.contract.proxies import is_proxied, spare_loopback

PROXY = "http://proxy.example:8080"
LOOPBACK = "localhost,127.0.0.1,::1"
NAMES = [name + "_proxy" for name in ("http", "https", "all", "no")]


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, LOOPBACK),
        ({"NO_PROXY": ".inside.example, ::1"}, ".inside.example,::1,localhost,127.0.0.1"),
        ({"no_proxy": "a.example", "NO_PROXY": "b.example"}, f"a.example,{LOOPBACK}"),
    ],
)
def test_loopback_is_left_out_of_proxies(name: str, given: dict[str, str], expected: str) -> None:
    environment = given | {name: PROXY}
    for _ in range(2):  # as in a process and in one that it starts
        spare_loopback(environment)
        assert (environment["no_proxy"], environment["NO_PROXY"]) == (expected, expected)


@pytest.mark.parametrize(
    "environment", [{}, {"HTTP_PROXY": ""}, {"HTTP_PROXY": PROXY, "NO_PROXY": "*"}]
)
def test_an_environment_that_needs_nothing_stays_as_it_is(environment: dict[str, str]) -> None:
    before = dict(environment)
    spare_loopback(environment)
    assert environment == before


@pytest.mark.parametrize(
    ("variables", "url", "expected"),
    [
        ({}, "http://inside.example:3000", False),
        ({"HTTP_PROXY": PROXY}, "http://inside.example:3000", True),
        ({"HTTP_PROXY": PROXY}, "https://inside.example", False),
        ({"ALL_PROXY": PROXY}, "https://inside.example", True),
        ({"HTTP_PROXY": PROXY, "NO_PROXY": ".example"}, "http://inside.example:3000", False),
        ({"HTTP_PROXY": PROXY}, "http://[", False),
    ],
)
def test_a_proxy_is_known_by_the_environment(
    variables: dict[str, str], url: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_proxied(url) is expected
