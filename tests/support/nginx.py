"""nginx in a process of its own, with the example from deploy/."""

import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support import ROOT
from tests.support.ports import free_port

EXAMPLE = ROOT / "deploy/nginx/focalpath.conf"
_MAIN = """
user root;
worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/focalpath.conf;
}}
"""
_START_TIMEOUT_S = 120.0


@contextmanager
def running_nginx(
    folder: Path, service_port: int, changes: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Serve the example before a service, and yield the address of the page.

    Args:
        folder: for its files.
        service_port: where the service listens on 127.0.0.1.
        changes: texts of the example and what stands for them, besides the ports.
    """
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/local/bin:/usr/bin")
    if nginx is None:
        pytest.skip("no nginx: `apt-get install -y nginx-light` brings it")
    port = free_port()
    text = EXAMPLE.read_text(encoding="utf-8")
    ports = {
        "listen 8080;": f"listen 127.0.0.1:{port};",
        "127.0.0.1:3000;": f"127.0.0.1:{service_port};",
    }
    for old, new in {**ports, **(changes or {})}.items():
        assert old in text, f"{EXAMPLE} has no {old!r}"
        text = text.replace(old, new)
    (folder / "focalpath.conf").write_text(text, encoding="utf-8")
    (folder / "nginx.conf").write_text(_MAIN.format(folder=folder), encoding="utf-8")
    command = [nginx, "-p", str(folder), "-e", str(folder / "error.log")]
    process = subprocess.Popen([*command, "-c", str(folder / "nginx.conf")])
    try:
        url = f"http://127.0.0.1:{port}/focalpath/"
        _wait_until_up(url, process, folder / "error.log")
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


def _wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        assert process.poll() is None, log.read_text(encoding="utf-8")
        assert time.monotonic() < deadline, log.read_text(encoding="utf-8")
        try:
            httpx.get(url)
            return
        except httpx.TransportError:
            time.sleep(0.02)
