"""Serve an exported bundle: labels, pictures and numbers of tissue images. Never imports torch."""

import os

from serve.contract.cpu_quota import cpu_quota
from serve.contract.proxies import spare_loopback

# ONNX Runtime 1.29 and later otherwise sends usage data to its maker, and writes an id of this
# machine into the home folder. It reads this when it is loaded, so before any import of it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
spare_loopback()
# Of numpy and torch, which count CPUs and know no quota; they read it when they are loaded.
if _quota := cpu_quota():
    os.environ.setdefault("OMP_NUM_THREADS", str(_quota))
