"""Several small runs in one launch, as joining takes longer than they do; fit() and all below it is the real one.

    launch_many(output_dir, {"name": ["override", …], …})      # of launching.py: ranks of the server run this file

With ``memory``, one more step of each is counted: <output_dir>/<name>/peak.json, bytes of the rank with most, and
memory.json, those of every rank by category: at the peak, the largest of each, and between steps. With DeepSpeed's
comms_logger and its ``debug`` on, also the messages of the step after that.
What a run was refused with is written to <output_dir>/<name>.error.json, one message per rank.
"""

import faulthandler
import json
import sys
from pathlib import Path
from typing import Any


def train(arguments: list[str]) -> None:
    from deepspeed import comm
    from rich.console import Console
    from studies.step_memory import Tracker, sizes

    from toolkit.config.compose import compose
    from toolkit.deepspeed.ds_config import complete, required_ops
    from toolkit.engine.start import start_engine
    from toolkit.errors import ToolkitError
    from toolkit.job import ops, ranks
    from toolkit.models.build import build_model
    from toolkit.run.directory import Run
    from toolkit.run.terminal import Terminal
    from toolkit.tasks import build_task
    from toolkit.train.loop import fit
    from toolkit.train.own_plan import begin

    output_dir, file, *extra = (Path(a) for a in arguments)
    runs = json.loads(file.read_text())
    configs = {n: compose([*overrides, f"name={n}", f"output_dir={output_dir}"]) for n, overrides in runs.items()}
    ranks.complete_environment()
    for config in configs.values():
        ds = complete(config, world=ranks.world(), device=ranks.device())
        ops.ensure(required_ops(ds, device=ranks.device(), world=ranks.world()), Console())
    with ranks.joined():
        for name, config in configs.items():
            faulthandler.dump_traceback_later(180, exit=True)  # until fit() does it
            with Terminal():
                engine, error = None, None
                try:
                    run = Run.open(config)
                    task = build_task(run)
                    plan = begin(run, task)
                    engine = start_engine(build_model(run, task, plan.ds), task, run, plan.ds)
                    fit(engine, task, run, plan)
                    if extra:
                        with Tracker(engine.ds) as tracker:
                            engine.train_batch(task.train_batches(start_sample=0))
                        run.write_json("peak.json", ranks.largest([sum(tracker.at_peak.values())])[0])
                        found = {"at_peak": tracker.at_peak, "peak": tracker.peak, "state": sizes(engine.ds)}
                        comm.reset_log()  # after a step: weights gathered to evaluate need no gathering in the first
                        engine.train_batch(task.train_batches(start_sample=0))
                        found["logged"] = logged(comm.comm.comms_logger)
                        run.write_json("memory.json", ranks.gathered(found))
                except ToolkitError as refused:
                    error = f"{type(refused).__name__}: {refused}"
                errors = ranks.gathered(error)
                if any(errors) and ranks.rank() == 0:
                    (output_dir / f"{name}.error.json").write_text(json.dumps(errors))
                if engine is not None:
                    engine.close()


def logged(logger: Any) -> list[Any]:
    """[operation, caller, bytes of a message, count] of each entry of DeepSpeed's comms logger, if it is on."""
    entries = [(name, size, count) for name, of in logger.get_raw_data().items() for size, (count, *_) in of.items()]
    return [[*name.rstrip("]").split(" | [Caller Func: "), size, count] for name, size, count in entries]


if __name__ == "__main__":
    train([a for a in sys.argv[1:] if not a.startswith("--local_rank=")])
