"""toolkit prepare data=text data.path='docs/*.txt'    # corpus -> token ids, with an audit"""

from toolkit.cli.command import OVERRIDES, Commands, add, console
from toolkit.errors import ConfigError


def add_to(commands: Commands) -> None:
    command = add(
        commands, prepare, "prepare a task's data and print what is in it",
        "toolkit prepare data=text data.path='docs/*.txt'", "toolkit prepare task=multi30k",
    )  # fmt: skip
    command.add_argument("overrides", nargs="*", help=OVERRIDES.format("data.max_length=512"))


def prepare(overrides: list[str]) -> None:
    from toolkit import data
    from toolkit.config.compose import compose

    told, config = console(), compose(overrides)
    if config.task.kind == "translate":
        from toolkit.data import parallel

        pairs = parallel.prepare(config)
        told.print("\n".join(parallel.told(pairs.audit)), f"Prepared pairs: {pairs.path}", sep="\n", highlight=False)
        return
    if config.task.kind != "pretrain":
        from toolkit.tasks import kind

        if not hasattr(kind(config), "prepare"):
            raise ConfigError(f"task.kind={config.task.kind}: it has nothing to prepare. Start its recipe.")
        labelled = kind(config).prepare(config)
        told.print(*labelled.notes, f"Prepared rows: {labelled.path}", sep="\n", highlight=False)
        return
    prepared = data.prepare(config, console=told, progress=True)
    told.print(data.format_audit(prepared.audit))
    told.print(f"Prepared corpus: {prepared.path}")
