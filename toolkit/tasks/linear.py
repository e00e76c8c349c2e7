"""A linear regression by mean absolute, squared or Huber's error, whose optimum is known: what training must reach."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch

from toolkit.data import regression
from toolkit.data.batch import Batch
from toolkit.data.order import Rounds, filled, keyed
from toolkit.errors import ConfigError
from toolkit.job import ranks
from toolkit.models.linear import LinearConfig, LinearRegression, Optimum, optimum
from toolkit.run.directory import Run
from toolkit.tasks.task import Evaluates, Task, Watch

# Numbers that the optimum is computed from, at most: 1 GiB of least squares, half a minute of linear programme.
MOST = {"mse": 2**27, "huber": 2**25, "mae": 2**22}
SOME = 2**20  # training rows that means and deviations are of, and train_loss where the optimum is unknown


class Linear(Task):
    """Features and target are standardised, so that one learning rate suits every table; records have its units."""

    inputs, labels, outputs = ("features",), ("target", "real"), ("predicted",)
    model_class = LinearRegression

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        config = self.config
        self.kind = config.task.loss
        self.table = ranks.agreed(lambda: regression.read(config.data, config.seed))
        self.parts = regression.Parts(self.table.size, config.data.holdout)
        some = self.parts.rows("train", np.arange(min(self.parts.train, SOME)))
        self.moments = _moments(self.table, *self.table.take(some))
        self.width = len(self.table.names)
        self.padded = -(-self.width // config.tensor_size) * config.tensor_size  # columns of zeros learn nothing
        mean, std, target_mean, target_std = self.moments
        self.unit = target_std if self.kind == "mae" else target_std**2  # records are in the target's
        units = {"mean": mean.tolist(), "std": std.tolist(), "target_mean": target_mean, "target_std": target_std}
        # Kept with the checkpoints, so that none is gone on with by another loss
        loss = {"loss": self.kind, "huber_delta": config.task.huber_delta if self.kind == "huber" else None}
        table = {"names": list(self.table.names), "target": self.table.target, **units, **loss}
        self.hf_config = LinearConfig(self.padded, table)
        run.write_model(self.hf_config, LinearRegression.__name__)
        self.learns(self._rows("train"), Rounds(self.parts.train, config.seed, config.batch.global_size))
        skipped = getattr(self.table, "skipped", 0)
        run.console.print(
            f"{self.parts.train:,} rows of {self.width} features to train on, {self.parts.held_out:,} held out"
            + f", {skipped:,} skipped" * bool(skipped),
            highlight=False,
        )

    @cached_property
    def optimum(self) -> Optimum | None:
        """The best on the training rows, standardised; rank 0 finds it. None where the rows are too many."""
        if self.parts.train * self.width > MOST[self.kind]:
            self.run.console.print(
                f"The optimum is not computed: {self.parts.train:,} rows of {self.width} are many for loss={self.kind}."
            )
            return None
        found: Optimum | None = None
        if ranks.rank() == 0:
            x, y = self._rows("train").take(np.arange(self.parts.train))
            found = optimum(self.kind, x, y, self.config.task.huber_delta)
        return ranks.from_rank0(found)  # type: ignore[no-any-return]

    # Rows to batches -------------------------------------------------------------------------------------------------

    def _rows(self, part: str) -> regression.Standardised:
        return regression.Standardised(self.table, self.parts, part, *self.moments, self.padded)

    def _eval_batches(self, part: str) -> Iterator[Batch]:
        rows, size, limit = self._rows(part), self.parts.held_out, self.config.train.eval_samples
        if part == "train":
            size, limit = self.parts.train, None if self.optimum else SOME
        for positions in regression.chunks(min(size, limit or size), of=1024 * self.split.world):
            mine = np.array_split(positions, self.split.world)[self.split.rank]
            yield rows[filled(keyed(0, mine), 1)]

    # What the engine asks --------------------------------------------------------------------------------------------

    def losses(self, outputs: Batch, batch: Batch) -> Batch:
        """``loss``, summed over the rows, of the standardised target."""
        error = (outputs["predicted"].float() - batch["target"]) * batch["real"]
        if self.kind == "mse":
            return {"loss": error.square().sum()}
        if self.kind == "mae":
            return {"loss": error.abs().sum()}
        delta = self.config.task.huber_delta
        return {"loss": torch.nn.functional.huber_loss(error, torch.zeros_like(error), reduction="sum", delta=delta)}

    def counts(self, batch: Batch) -> dict[str, float]:
        """Rows and their bytes in fp32 with the target, of all ranks that share the columns."""
        rows = int(batch["real"].sum())
        return {"loss": rows, "sequences": rows, "bytes": 4 * rows * (self.width + 1)}

    def useful_flops(self, counts: dict[str, float]) -> float:
        """Multiply and add once for the prediction, once for the weights' gradient."""
        return 4 * counts["sequences"] * self.width

    def evaluate(self, engine: Evaluates, watch: Watch) -> dict[str, float]:
        """``loss`` on what is held out, ``train_loss`` on the training rows, and ``optimum_loss``, the least there."""
        parts = ({"loss": "eval"} if self.parts.held_out else {}) | {"train_loss": "train"}
        result = {name: engine.evaluate(watch(self._eval_batches(part)))["loss"] for name, part in parts.items()}
        return result | ({"optimum_loss": self.unit * self.optimum.loss} if self.optimum else {})

    def coefficients(self, weights: Any, intercept: float) -> dict[str, float]:
        """Weights [features] and intercept of the standardised model in the table's units, by name."""
        mean, std, target_mean, target_std = self.moments
        raw = np.asarray(weights)[: self.width] * target_std / std
        return {"(intercept)": float(target_mean + target_std * intercept - raw @ mean)} | dict(
            zip(self.table.names, raw.tolist(), strict=True)
        )


def _moments(table: Any, x: Any, y: Any) -> tuple[Any, Any, float, float]:
    """Means and standard deviations [features] of the features, those of the target."""
    for name, column in zip((*table.names, table.target), (*x.T, y), strict=True):
        if np.ptp(column) == 0:
            raise ConfigError(
                f"column '{name}' is {column[0]:g} in every training row, so nothing can be learned of it. Use more "
                f"rows, another data.holdout, or data.drop=[{name}]."
            )
    return x.mean(0), x.std(0), float(y.mean()), float(y.std())
