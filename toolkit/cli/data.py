"""toolkit prepare data=text data.path='texts/*.txt'    # corpus -> token ids, with an audit"""

from toolkit.cli.command import OVERRIDES, Commands, add, console


def add_to(commands: Commands) -> None:
    command = add(
        commands, prepare, "prepare a task's data and print what is in it",
        "toolkit prepare data=text data.path='texts/*.txt'", "toolkit prepare experiment=multi30k data.path=multi30k",
    )  # fmt: skip
    command.add_argument("overrides", nargs="*", help=OVERRIDES.format("data.max_length=512"))


def prepare(overrides: list[str]) -> None:
    from toolkit.config.compose import compose
    from toolkit.data.text import format_audit
    from toolkit.tasks import task_class

    told, config = console(), compose(overrides)
    kind = task_class(config.task.kind)
    prepared = kind.prepare(config, told)
    lines = [format_audit(prepared.audit)] if "entropy" in prepared.audit else prepared.notes
    told.print(*lines, f"Prepared {kind.prepares}: {prepared.path}", sep="\n", highlight=False)
