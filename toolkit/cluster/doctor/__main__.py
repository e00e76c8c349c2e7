"""What a host answers to toolkit doctor, which starts this on every host: a request on the input, then an answer.

python -m toolkit.cluster.doctor < request.json
"""

import json
import os
import sys


def main() -> None:
    request = json.load(sys.stdin)
    os.environ |= request.pop("environment")  # before anything is imported that reads it
    from toolkit.cluster.doctor import allreduce, examine, host
    from toolkit.run.terminal import Terminal

    asked = {"host": host.here, "all-reduce": allreduce.here}[request.pop("asked")]
    with Terminal() as terminal:  # what libraries print is no part of the answer
        result = asked(request, terminal.console)
        print(examine.MARK + json.dumps(result), file=terminal.console.file, flush=True)


main()
