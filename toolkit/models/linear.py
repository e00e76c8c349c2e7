"""A linear regression as a Hugging Face model, and the best that any can do: its optimum by other means.

model = LinearRegression(LinearConfig(features=10))
best = optimum("mae", x, y)         # scikit-learn's, in float64: weights [features], intercept, loss
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch import distributed as dist
from transformers import PretrainedConfig, PreTrainedModel

Floats = NDArray[np.float64]


class LinearConfig(PretrainedConfig):  # type: ignore[misc]
    """``features`` standardised columns; ``table`` holds what turns them and the output into its units."""

    model_type = "linear_regression"

    def __init__(self, features: int = 1, table: dict[str, Any] | None = None, **rest: Any) -> None:
        self.features = features
        self.table = table or {}
        super().__init__(**rest)


class LinearRegression(PreTrainedModel):  # type: ignore[misc]
    """ŷ = x·w + b."""

    config_class = LinearConfig
    base_model_prefix = "linear_regression"

    def __init__(self, config: LinearConfig) -> None:
        super().__init__(config)
        self.linear = nn.Linear(config.features, 1)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # The loss is convex, so any start will do but 0 for the intercept: there its gradient over standardised data is
        # nothing but rounding, which differs between layouts, and Adam would make whole steps of it.
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
            nn.init.ones_(module.bias)

    def get_input_embeddings(self) -> None:
        """None: AutoTP asks."""

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Predictions [rows] of standardised features [rows, features], in standard deviations of the target."""
        group = getattr(self.linear, "mp_group", None)  # AutoTP's: each of its ranks has the weights of some columns
        if group is not None:  # its engine insists that all are given the same rows
            features = features.chunk(dist.get_world_size(group), 1)[dist.get_rank(group)]
        return {"predicted": self.linear(features)[:, 0]}


@dataclass(frozen=True)
class Optimum:
    """The best weights [features] and intercept, and their mean loss."""

    weights: Floats
    intercept: float
    loss: float


def mean_loss(kind: str, residuals: Floats, delta: float) -> float:
    """The mean of |r|, of r² or of Huber's: r²/2 up to ``delta``, then delta·(|r| - delta/2)."""
    size = np.abs(residuals)
    if kind == "mae":
        return float(size.mean())
    if kind == "mse":
        return float((residuals**2).mean())
    return float(np.where(size <= delta, size**2 / 2, delta * (size - delta / 2)).mean())


def optimum(kind: str, x: Floats, y: Floats, delta: float) -> Optimum:
    """The linear model of least loss on x [rows, features], y [rows].

    mse: least squares in closed form; mae: the median's quantile regression, a linear programme (Koenker and Bassett
    1978); huber: L-BFGS on the convex loss (Huber 1964).
    """
    from sklearn import linear_model

    # The interior point method takes a tenth of the simplex's time
    median = linear_model.QuantileRegressor(quantile=0.5, alpha=0, solver="highs-ipm")
    found = (median if kind == "mae" else linear_model.LinearRegression()).fit(x, y)
    weights, intercept = found.coef_, float(found.intercept_)
    if kind == "huber":
        best = _huber(x, y, delta, np.append(weights, intercept))
        weights, intercept = best[:-1], float(best[-1])
    return Optimum(weights, intercept, mean_loss(kind, y - x @ weights - intercept, delta))


def _huber(x: Floats, y: Floats, delta: float, start: Floats) -> Floats:
    """The weights and, at the end, the intercept."""
    from scipy.optimize import minimize

    def loss(w: Floats) -> tuple[float, Floats]:
        residuals = y - x @ w[:-1] - w[-1]
        slope = -np.clip(residuals, -delta, delta) / len(y)
        return mean_loss("huber", residuals, delta), np.append(slope @ x, slope.sum())

    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-10})
    return found.x  # type: ignore[no-any-return]
