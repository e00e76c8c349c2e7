"""The posterior of a linear regression by Metropolis chains on several ranks, the same chains on any number of them.

deepspeed --num_gpus 2 recipes/mcmc.py                                # scikit-learn's diabetes
deepspeed --num_gpus 2 recipes/mcmc.py data.path=table.csv mcmc.chains=64 mcmc.numbers=per_rank

Random numbers from a counter are timed beside one stream for all ranks and a seed for each rank, and all three are
repeated as other numbers of ranks would have them. The run directory gets mcmc.csv, mcmc_numbers.csv, mcmc.png, .svg.
"""

from pydantic import Field, model_validator
from studies.random_numbers import Generator

from toolkit.config.schema import Positive, RunConfig, Strict
from toolkit.run.recipe import recipe


class Mcmc(Strict):
    """The chains, and where their numbers come from."""

    # counter: functions of (seed, chain, step); shared: one stream, drawn whole by every rank; per_rank: a seed each
    numbers: Generator = "counter"
    chains: int = Field(8, ge=2)  # R-hat compares chains with one another
    steps: Positive = 10_000  # of each chain
    warmup: Positive = 1000  # first steps that are left out of the results
    prior: float = Field(1.0, gt=0)  # deviation of a coefficient, in those of the target for one of the feature
    worlds: tuple[Positive, ...] = Field((1, 2, 4), min_length=1)  # numbers of ranks to repeat the chains for
    rounds: Positive = 3  # the best of so many is reported

    @model_validator(mode="after")
    def _fits(self) -> "Mcmc":
        if self.steps < self.warmup + 100:
            raise ValueError(f"mcmc.steps={self.steps} leaves under 100 after mcmc.warmup={self.warmup}. Raise it")
        if max(self.worlds) > self.chains:
            raise ValueError(f"{max(self.worlds)} of mcmc.worlds is above mcmc.chains={self.chains}: ranks need chains")
        return self


class Config(RunConfig):
    mcmc: Mcmc = Mcmc()


@recipe("linear", engine=False)
def main(config: Config) -> None:
    import numpy as np
    from rich.progress import Progress
    from studies import mcmc, mcmc_report

    from toolkit.data import regression
    from toolkit.errors import ConfigError
    from toolkit.job import ranks
    from toolkit.run.directory import Run

    own = config.mcmc
    if own.chains < ranks.world():
        raise ConfigError(f"mcmc.chains={own.chains} on {ranks.world()} ranks: each needs one. Raise mcmc.chains.")
    table = ranks.agreed(lambda: regression.read(config.data, config.seed))
    target = ranks.from_rank0(ranks.agreed(lambda: mcmc.posterior(table, own.prior)))
    run = Run.open(config)
    with Progress(console=run.console, disable=not run.console.is_terminal, transient=True) as bar:
        job = bar.add_task("chains", total=3 * (own.rounds + sum(own.worlds) / ranks.world()))
        common = (target, own.chains, own.steps, config.seed)
        timed = mcmc.measure(*common, own.rounds, lambda: bar.advance(job))
        simulated = mcmc.simulate(*common, own.worlds, lambda: bar.advance(job))
    choices = mcmc.compared(timed, simulated)
    parts = ranks.gathered_on_rank0(timed[own.numbers].chains[own.warmup :])
    if ranks.rank() == 0:
        mcmc_report.write(run, target, np.concatenate(parts, axis=2), choices, simulated)
    run.console.print(f"Run directory: {run.dir}")


if __name__ == "__main__":
    main()
