"""The hosts of a job, in the format of DeepSpeed's launcher: lines of `host slots=8`.

slots("--hostfile", Path("hosts"))     # {"node-1": 8, "node-2": 8}
"""

import re
from pathlib import Path

from toolkit.errors import ConfigError


def slots(option: str, path: Path) -> dict[str, int]:
    """Ranks by host. ``option`` is where ``path`` was named. Raises ConfigError with file and line.

    A name is neither an option of ssh nor anything for a shell; users and ports belong into ~/.ssh/config.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} {path}: {error}. Give a file with lines of `host slots=8`.") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"([A-Za-z0-9][\w.-]*)\s+slots=([1-9]\d*)", text, re.ASCII)
        if not match or match[1] in hosts:
            rule = "a second line for this host" if match else "must be `host slots=8`"
            raise ConfigError(f"{path}, line {number}: {text!r}: {rule}. Correct it.")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise ConfigError(f"{option} {path}: no host in it. Give lines of `host slots=8`.")
    return hosts
