"""Peak memory and step time of a model under every ZeRO layout, offload and way to keep activations, side by side.

deepspeed --num_gpus 2 recipes/memory.py model=bert_mini                # all of them
deepspeed --num_gpus 2 recipes/memory.py model=bert_mini zero=stage3    # one layout, every activation=…

The run directory gets memory.csv, memory.png and memory.svg.
"""

from collections.abc import Mapping
from typing import Any, Literal

from toolkit.config.schema import RunConfig, Strict
from toolkit.run.recipe import recipe


class Memory(Strict):
    """What is compared: all of them, or the given one; which is what choosing an option of theirs says."""

    layouts: Literal["all", "given"] = "all"
    activations: Literal["all", "given"] = "all"


class Config(RunConfig):
    memory: Memory = Memory()


def given(typed: Mapping[str, Any]) -> list[str]:
    """A layout or a way to keep activations that is typed is the only one."""
    groups = {"layouts": ("zero", "offload"), "activations": ("activation",)}
    return [f"memory.{key}=given" for key, own in groups.items() if any(typed.get(group) for group in own)]


@recipe(more=given)
def main(config: Config) -> None:
    from rich.console import Console
    from rich.progress import Progress
    from studies import step_memory

    from toolkit.config.compose import compose, rebased
    from toolkit.deepspeed.ds_config import required_ops
    from toolkit.engine.start import start_engine
    from toolkit.errors import ConfigError, ToolkitError
    from toolkit.job import ops, ranks
    from toolkit.models.build import build_model
    from toolkit.run.directory import Run
    from toolkit.tasks import build_task
    from toolkit.train.own_plan import begin

    run = Run.open(config.model_copy(update={"data": config.data.model_copy(update={"workers": 0})}))
    task = build_task(run)
    rows = []
    with Progress(console=run.console, disable=not run.console.is_terminal, transient=True) as bar:
        own = compose(step_memory.overrides(step_memory.chosen(config)), Config)
        for options in bar.track(step_memory.combinations(config)):
            name = step_memory.label(options)
            try:
                settings = rebased(config, own, compose(step_memory.overrides(options), Config))
                one = Run(run.dir, settings, Console(quiet=True))
                ds = begin(one, task).ds
                ops.ensure(required_ops(ds, device=ranks.device(), world=ranks.world()), run.console)
                engine = start_engine(build_model(one, task, ds), task, one, ds)
            except ToolkitError as error:
                run.console.print(f"left out: {' '.join(name.values())}: {error}")
                continue
            found = step_memory.measure(engine, task.train_batches(start_sample=0))
            rows.append(name | max(ranks.gathered(found), key=lambda rank: rank["peak_mib"]))
            run.console.print(f"{name['layout']:22} {name['activation']:18} {rows[-1]['peak_mib']:10,.1f} MiB  "
                              f"{rows[-1]['step_seconds']:.3f} s", highlight=False)  # fmt: skip
            engine.close()
    if not rows:
        raise ConfigError("no combination of zero, offload and activation is left to measure, see above.")
    run.write_csv("memory.csv", rows)
    run.console.print(step_memory.listing(rows))
    if ranks.rank() == 0:
        (run.dir / "plan.json").unlink(missing_ok=True)  # of the last layout
        title = f"{config.model.num_hidden_layers} layers of {config.model.hidden_size}, {ranks.world()} ranks"
        step_memory.plot(rows, run.dir / "memory", title)
    run.console.print(f"Run directory: {run.dir}")


if __name__ == "__main__":
    main()
