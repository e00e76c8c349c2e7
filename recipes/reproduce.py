"""Published numbers beside what this toolkit computes: ZeRO's tables, largest models, speed-ups, pipeline bubbles.

python recipes/reproduce.py                              # the targets, and how they come out
python recipes/reproduce.py target=zero_superlinear      # one of them
python recipes/reproduce.py target=all

The run directory gets reproduce.csv, reproduce.md, and plots of the targets that have one.
"""

from toolkit.config.schema import RunConfig
from toolkit.run.recipe import recipe


class Config(RunConfig):
    """The configuration of this recipe."""

    target: str | None = None  # a file of conf/reproduce, or all; None: list them


@recipe(engine=False)
def main(config: Config) -> None:
    from studies import reproduce

    from toolkit.errors import ConfigError
    from toolkit.job import ranks
    from toolkit.run.directory import Run
    from toolkit.run.terminal import Terminal

    if ranks.world() > 1:
        raise ConfigError(f"{ranks.world()} ranks: reproduce only computes. Launch it with python.")
    found = {target: reproduce.records(target) for target in reproduce.chosen(config.target or "all")}
    if config.target is None:
        (Terminal.current or Terminal(quiet=False)).console.print(reproduce.listing(found))
        return
    run = Run.open(config)
    run.write_csv("reproduce.csv", [record for mine in found.values() for record in mine])
    run.write_text("reproduce.md", reproduce.markdown(found))
    for target, mine in found.items():
        reproduce.plot(target, mine, run.dir)
    run.console.print(reproduce.listing(found) if len(found) > 1 else reproduce.of_target(found[config.target]))
    run.console.print(f"Run directory: {run.dir}")


if __name__ == "__main__":
    main()
