"""Runs the blocks of slides on many machines, with Ray.

Ray reads its environment when it is imported, so this package sets it first.
"""

import os

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray reports what it is used for unless told not to
    "RAY_AUTH_MODE": "token",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a worker without a GPU sees what the machine has
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # what died is told by `Tell`, not among the results
}
"""Of every Ray process that is started from here, unless the user has set it otherwise."""

for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
