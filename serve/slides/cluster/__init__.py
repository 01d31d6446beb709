"""Runs the blocks of slides on many machines, with Ray.

Ray reads its environment when it is imported, so this package sets it first.
"""

import os

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # turns off Ray's usage reports
    "RAY_AUTH_MODE": "token",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # workers without a GPU also see the machine's GPUs
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # `Tell` reports deaths; keep them out of the results
}
"""Environment of every Ray process that is started from here; the user's own values win."""

for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
