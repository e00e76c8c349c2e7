"""What must be the same on every rank of a job: configuration, packages, code.

    python -m toolkit.job.fingerprint          # this host's packages and code as one line of JSON
    fingerprint.check(config)                  # every rank, once joined; the one that differs is named

A cluster's nodes drift apart: an old checkout here, another torch there. Such a job trains, and wrongly.
"""

import hashlib
import json
import platform
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

from toolkit.config.schema import RunConfig, conf_dir
from toolkit.errors import ConfigError
from toolkit.job import ranks

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "tokenizers", "hydra-core", "pydantic", "numpy")
WAYS_OUT = {
    "configuration": "Give every node the same overrides, or one saved config: --config-path, --config-name.",
    **dict.fromkeys(("commit", "code"), "Put every node on the same checkout, or on one shared folder or image."),
}
INSTALL = "Install the same on every node: pip install -c constraints.txt -e ."  # for whatever else differs


def here() -> dict[str, str]:
    """Versions of Python and packages, the commit, and a hash of the sources as they are on this host's disk."""
    code = {"commit": git("rev-parse", "--short=12", "HEAD") or "none", "code": _code()}
    return {"python": platform.python_version(), **versions(), **code}


def versions() -> dict[str, str]:
    """Of the packages that decide what a run computes."""
    return {name: next((found.version for found in distributions(name=name)), "missing") for name in PACKAGES}


def of(config: RunConfig) -> str:
    """A configuration's hash: equal whatever the order of its keys."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def check(config: RunConfig) -> None:
    """Refuse a job whose ranks differ in what must be the same. Every rank calls it. Raises ConfigError on all."""
    mine = (platform.node(), {"configuration": of(config), **here()})
    if problems := differences(ranks.gathered(mine)):
        raise ConfigError("\n".join(problems))


def differences(found: Sequence[tuple[str, dict[str, str]]]) -> list[str]:
    """One line for every host and thing that differ from rank 0's; ``found``: host and fingerprint by rank."""
    (first, reference), *_ = found
    wrong: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for rank, (host, prints) in enumerate(found):
        for key in reference:
            if prints[key] != reference[key]:
                wrong[host, key, prints[key]].append(rank)
    return [
        f"host {host} (rank {', '.join(map(str, where))}): {key} {value}, but rank 0's host {first} has "
        f"{reference[key]}. {WAYS_OUT.get(key, INSTALL)}"
        for (host, key, value), where in wrong.items()
    ]


def _code() -> str:
    """Of the package, its presets and the recipe: what git may not know of, an image holds no commit."""
    package = Path(__file__).resolve().parents[1]
    files = {f: f.relative_to(package) for end in ("py", "json", "cpp") for f in package.rglob(f"*.{end}")}
    files |= {f: Path("conf") / f.relative_to(conf_dir()) for f in conf_dir().rglob("*.yaml")}
    main = Path(sys.argv[0])
    files |= {f: Path(f.name) for f in (main.parent / "studies").rglob("*.py")}
    if main.suffix == ".py" and main.is_file():
        files.setdefault(main.resolve(), Path(main.name))
    digest = hashlib.sha256()
    for path, name in sorted(files.items(), key=lambda item: item[1]):
        digest.update(f"{name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def git(*arguments: str) -> str | None:
    """What git says of this checkout; None where there is no git or no checkout."""
    code = Path(__file__).resolve().parent
    try:
        said = subprocess.check_output(["git", *arguments], cwd=code, stderr=subprocess.DEVNULL, text=True)
        return said.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    print(json.dumps(here()))
