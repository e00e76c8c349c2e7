"""The checks of this host, for toolkit doctor, which starts it on every host: a request on the input, then an answer.

python -m toolkit.cluster.doctor < request.json
"""

import json
import os
import sys


def main() -> None:
    request = json.load(sys.stdin)
    os.environ |= request.pop("environment")  # before anything is imported that reads it
    from toolkit.cluster.doctor.host import here
    from toolkit.cluster.doctor.ssh import answer
    from toolkit.run.terminal import Terminal

    with Terminal() as terminal:  # what libraries print is no part of the answer
        result = here(request, terminal.console)
        print(answer(result), file=terminal.console.file, flush=True)


main()
