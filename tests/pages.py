"""The pages that people read, and the commands in them; one that stands in several places counts once.

PAGES                                  # README.md and all others
COMMANDS                               # the lines of their ```bash blocks, without comments
"""

import re

from launching import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "docker/README.md", "recipes/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES}
BLOCKS = [block for text in TEXTS.values() for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)]
LINES = [line for block in BLOCKS for line in block.replace("\\\n", "").splitlines()]
COMMANDS = list(dict.fromkeys(" ".join(line.split("  #")[0].split()) for line in LINES))
