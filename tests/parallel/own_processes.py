"""The environment of the processes that tests start: without this one's eight devices."""

import os
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "PYTHONUNBUFFERED": "1",
    "XLA_FLAGS": re.sub(
        r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", "")
    ),
}
