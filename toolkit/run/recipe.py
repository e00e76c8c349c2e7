"""Turns a function of a RunConfig into a command for `deepspeed`, `torchrun`, `srun`, `mpirun` and plain `python`.

    @recipe("pretrain")                          # the kinds of task that it is for; none: all
    def main(config: RunConfig) -> None: ...

The annotation of ``config`` is the class of the configuration: RunConfig, or one of the recipe's own that adds a node.
A recipe for one kind of task starts from that kind's preset, so that its bare command works.

The decorated function reads Hydra overrides from the command line, refuses a wrong configuration
before any process group exists, builds DeepSpeed's ops, joins the ranks, and turns errors into one
line and an exit code, which toolkit.errors lists.

SIGTERM or SIGINT to any rank lets all of them finish the step, save and exit with 75; docs/errors.md says what the
launchers make of it.
"""

import functools
import os
import platform
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from toolkit.config import overrides
from toolkit.config.compose import register_schema
from toolkit.config.kinds import KINDS
from toolkit.config.schema import RunConfig, conf_dir, load
from toolkit.errors import ConfigError, Stopped, ToolkitError, leave, memory_told
from toolkit.errors import typed as remember
from toolkit.job import ranks

# The run directory is the toolkit's own, made once on rank 0: Hydra writes no files and no log.
HYDRA = "hydra.run.dir=. hydra.sweep.subdir=. hydra.output_subdir=null hydra/job_logging=none hydra/hydra_logging=none"
# In the batch script, before srun: where the ranks of a job of its own find each other.
SLURM_SWEEP = "hydra.launcher.setup=['export MASTER_ADDR=$(hostname) MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))']"
SWEEP = [
    "hydra.sweep.dir=${output_dir}/sweep",
    "+hydra.callbacks.sweep._target_=toolkit.run.sweep.Begin",
    f"+hydra.callbacks.sweep.started={time.time_ns()}",
]
LESS_MEMORY = (
    "Lower batch.micro_size (more accumulation makes up for it), or take activation=recompute, a higher ZeRO stage, "
    "offload=cpu."
)

Main = Any  # a function of a RunConfig
More = Callable[[Mapping[str, Any]], list[str]]  # overrides that follow from what was typed, as overrides.values()


@dataclass(frozen=True)
class Recipe:
    """A recipe's function, its kinds of task, whether it trains with a DeepSpeed engine, what it adds; its file."""

    main: Main
    kinds: tuple[str, ...]
    engine: bool
    more: More | None
    script: str

    def __call__(self) -> None:
        """Run what this process's command line says."""
        import hydra

        ranks.adopt_scheduler()
        register_schema(self.config)
        if "--debug" in sys.argv:
            os.environ["HYDRA_FULL_ERROR"] = "1"  # for the jobs of a sweep, too
        # The deepspeed launcher appends --local_rank=N, which Hydra would reject; LOCAL_RANK says it too.
        words = [a for a in sys.argv[1:] if not re.match(r"--local[_-]rank=|--debug$", a)]
        remember([sys.argv[0], *words], alone="RANK" not in os.environ)
        typed = overrides.split(words)
        if typed.said.help:
            print(self.help() * (ranks.rank() == 0))
            return
        debug = os.environ.get("HYDRA_FULL_ERROR") == "1"
        try:
            # Hydra takes overrides before flags, or after them; for its own help and completion as they are typed
            asks = typed.said.hydra_help or typed.said.shell_completion
            sys.argv[1:] = words if asks else [*_given(self, typed), *_flags(typed)]
        except ConfigError as error:
            refuse(error)
        decorate = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
        start = decorate(functools.partial(_job, self, debug))
        with nullcontext() if debug else _refusing(shows=typed.said.cfg or typed.said.info):
            _sweep(start) if typed.multirun else start()

    def help(self) -> str:
        """What the recipe is, with examples, and what is typed after it."""
        folders = sorted(p for p in conf_dir().iterdir() if p.is_dir() and p.name != "reproduce")
        options = {p.name: [f"{o.name}/…" if o.is_dir() else o.stem for o in sorted(p.iterdir())] for p in folders}
        listed = (f"{name}={', '.join(found)}" for name, found in options.items())
        wrapped = (textwrap.fill(line, 118, initial_indent="  ", subsequent_indent="      ") for line in listed)
        return "\n".join([
            str(self.main.__globals__["__doc__"]).strip(), "", "Options of groups, of which each sets several keys:",
            *wrapped, "", "Single keys are set as train.steps=1000; --cfg job prints all of them as composed, "
            "--hydra-help Hydra's own flags.",
        ])  # fmt: skip

    @property
    def config(self) -> type[RunConfig]:
        """The class that the function asks for."""
        found: type[RunConfig] = get_type_hints(self.main).get("config", RunConfig)
        return found

    def completed(self, typed: list[str]) -> list[str]:
        """The overrides, with the preset of the kind of task where there is but one and none was chosen."""
        found = overrides.values(typed)
        preset = len(self.kinds) == 1 and not (found.get("task") or found.get("experiment"))
        return [*typed, *([f"task={self.kinds[0]}"] if preset else []), *(self.more(found) if self.more else [])]

    def refuse(self, config: RunConfig, name: str) -> None:
        """Raise ConfigError for a task that the recipe ``name`` is not for, or would begin from nothing unasked."""
        if not self.kinds:
            return
        if config.task.kind not in self.kinds:
            texts = {f.stem: f.read_text() for f in sorted((conf_dir() / "task").glob("*.yaml"))}
            known = [task for task, text in texts.items() if any(re.search(rf"kind: {k}\b", text) for k in self.kinds)]
            raise ConfigError(f"task={config.task.name}: {name} is not for it. It takes task={', '.join(known)}.")
        begun = config.model.weights or config.model.from_scratch
        if not begun and "weights" in KINDS[config.task.kind].needs:
            raise ConfigError(
                f"model.weights is not set: task={config.task.name} would train a model of random weights. Set it to a "
                "hub name (model.weights=google-bert/bert-base-uncased), a Hugging Face folder or a run, or say that "
                "it is to be from scratch: model.weights=none."
            )
        if not self.engine:
            from toolkit.deepspeed import ds_config

            ds_config.refuse_unread(config)


def recipe(*kinds: str, engine: bool = True, more: More | None = None) -> Callable[[Main], Recipe]:
    """Make a function a command; see the module's docstring.

    Without ``engine`` the node deepspeed is not looked at. ``more`` makes overrides of what was typed.
    """
    return lambda main: Recipe(main, kinds, engine, more, str(Path(main.__code__.co_filename).resolve()))


def _given(recipe: Recipe, typed: overrides.Typed) -> Iterable[str]:
    """The overrides that Hydra gets."""
    if typed.config and typed.multirun:
        raise ConfigError(f"{typed.config} with --multirun: a sweep's jobs start from overrides. Drop one of the two.")
    primary = typed.config in (None, "--config-dir")
    given = overrides.permissive(
        recipe.completed(typed.overrides) if primary else typed.overrides, sweep=typed.multirun
    )
    slurm = overrides.values(typed.overrides).get("hydra/launcher") == "submitit_slurm"
    return *(SWEEP if typed.multirun else ()), *([SLURM_SWEEP] if slurm else ()), *given, *HYDRA.split()


def _flags(typed: overrides.Typed) -> list[str]:
    """Hydra's flags, the folder of --config-path from where the command was typed, as other paths are."""
    path = typed.said.config_path
    if path is None or path.startswith("pkg://"):
        return typed.flags
    whole = str(Path(path).absolute())
    return [f"{w.removesuffix(path)}{whole}" if w == path or w.endswith(f"={path}") else w for w in typed.flags]


@contextmanager
def _refusing(shows: Any) -> Iterator[None]:
    """What Hydra refuses is one line and a refusal's code, where it would print a paragraph and leave with a bug's."""
    from hydra._internal import utils
    from hydra.errors import CompactHydraException
    from omegaconf.errors import OmegaConfBaseException

    def refused(function: Callable[[], Any]) -> Any:
        try:
            return function()
        except (CompactHydraException, OmegaConfBaseException) as error:
            refuse(ConfigError(overrides.told(error)))

    report = utils.run_and_report
    utils.run_and_report = lambda function: report(lambda: refused(function))
    try:
        yield
    except (CompactHydraException, ValueError) as error:  # of flags that do not go together
        refuse(ConfigError(overrides.told(error)))
    except SystemExit as end:
        sys.exit(ConfigError.code if shows and end.code == 1 else end.code)
    finally:
        utils.run_and_report = report


def _sweep(start: Callable[[], None]) -> None:
    from toolkit.run import sweep

    try:
        start()
    except BaseException as error:
        sweep.finish(wait=isinstance(error, SystemExit) and error.code != Stopped.code)
        raise
    if sweep.finish():
        sys.exit(1)


def refuse(error: ToolkitError) -> NoReturn:
    """Print the error's lines and leave with its code; on rank 0 alone, where that refuses it, too."""
    rank, whose = os.environ.get("RANK", "0"), ""
    if rank != "0":
        time.sleep(3)  # the launcher ends all ranks of a host once one has left; what ends later has more to say
        whose = f"rank {rank} on {platform.node()}: "
    leave(error, whose)


def _job(recipe: Recipe, debug: bool, cfg: Any) -> None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    if HydraConfig.get().mode == RunMode.MULTIRUN:
        from toolkit.run import sweep

        sweep.job(recipe.script)
        return
    try:
        given: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
        config = load(cfg, recipe.config, overrides.keys(given))
        recipe.refuse(config, sys.argv[0])
        _run(recipe, config, debug)
    except ToolkitError as error:
        if debug:
            raise
        refuse(error)


def _run(recipe: Recipe, config: RunConfig, debug: bool) -> None:
    # Here: each worker that draws data imports the recipe's file, and needs none of these.
    from toolkit.deepspeed import ds_config
    from toolkit.job import fingerprint, ops, watchdog, workers
    from toolkit.run.terminal import Terminal

    ranks.complete_environment()
    device = ranks.device()
    ds = ds_config.complete(config, world=ranks.world(), device=device) if recipe.engine else {}
    if recipe.engine and config.data.workers and not KINDS[config.task.kind].ignores("data.workers"):
        workers.begin()
    with Terminal(quiet=not debug) as terminal:
        ops.ensure(ds_config.required_ops(ds, device=device, world=ranks.world()), terminal.console)
        try:
            with ranks.joined(), watchdog.watching(terminal.say, config.train.lost_seconds):
                fingerprint.check(config)
                with memory_told(LESS_MEMORY):
                    recipe.main(config)
        except Stopped as stop:
            terminal.console.print(str(stop), markup=False, highlight=False)
            sys.exit(stop.code)
