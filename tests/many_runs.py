"""Several small runs in one launch, as importing takes longer than they do; fit() and all below it is the real one.

deepspeed --num_gpus 2 tests/many_runs.py <output_dir> '{"name": ["override", …], …}'
"""

import json
import sys


def main() -> None:
    from toolkit import ops, ranks
    from toolkit.compose import compose
    from toolkit.ds_config import complete, required_ops
    from toolkit.engine import Engine
    from toolkit.models.build import build_model
    from toolkit.run import Run, Terminal
    from toolkit.tasks import build_task
    from toolkit.train import fit

    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    output_dir, runs = arguments[0], json.loads(arguments[1])
    configs = [compose([*overrides, f"name={name}", f"output_dir={output_dir}"]) for name, overrides in runs.items()]
    ranks.complete_environment()
    for config in configs:
        ds = complete(config, world=ranks.world(), device=ranks.device())
        ops.ensure(required_ops(ds, device=ranks.device(), world=ranks.world()), None)
    with ranks.joined():
        for config in configs:
            with Terminal():
                run = Run.open(config)
                task = build_task(run)
                engine = Engine.start(build_model(run, task), task, run)
                fit(engine, task, run)
                engine.ds.destroy()


main()
