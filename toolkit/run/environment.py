"""What a run ran on: env.json of its directory.

environment()["versions"]["torch"]
"""

import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

from toolkit.job import fingerprint, ranks


def environment() -> dict[str, Any]:
    """Versions, code and devices of this run; no environment variables, for they hold secrets."""
    import torch

    return {
        "command": sys.argv,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or _cpu(),
        "git": _git(),
        "host": platform.node(),
        "python": platform.python_version(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": fingerprint.versions(),
        "world_size": ranks.world(),
    }


def _cpu() -> list[str]:
    info = Path("/proc/cpuinfo")
    models = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return [f"{len(models) or os.cpu_count()} x {models[0] if models else 'CPU'}"]


def _git() -> dict[str, Any] | None:
    commit, status = fingerprint.git("rev-parse", "HEAD"), fingerprint.git("status", "--porcelain")
    return None if commit is None or status is None else {"commit": commit, "modified": bool(status)}
