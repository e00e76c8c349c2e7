"""A small convolutional network that takes the noise out of an image, whole or in tiles on several ranks.

model = build_model(run, task).over(Grid(rows=1, columns=2, rank=ranks.rank()))
"""

from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from studies.spatial import Grid, SpatialConv2d


class DenoiserConfig(PretrainedConfig):  # type: ignore[misc]
    """``layers`` convolutions of ``kernel`` x ``kernel`` pixels, with ``channels`` features between them."""

    model_type = "denoiser"

    def __init__(self, layers: int = 5, channels: int = 24, kernel: int = 3, colours: int = 3, **options: Any) -> None:
        self.layers, self.channels, self.kernel, self.colours = layers, channels, kernel, colours
        super().__init__(**options)


class Denoiser(PreTrainedModel):  # type: ignore[misc]
    """Predicts the noise and takes it off: DnCNN (Zhang et al. 2017) without batch normalisation."""

    config_class = DenoiserConfig
    main_input_name = "noisy"

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__(config)
        sizes = [config.colours, *[config.channels] * (config.layers - 1), config.colours]
        self.convolutions = nn.ModuleList(SpatialConv2d(a, b, config.kernel) for a, b in pairwise(sizes))
        self.post_init()

    def over(self, grid: Grid) -> "Denoiser":
        """From now on each rank of ``grid`` sees its tile only."""
        for conv in self.convolutions:
            conv.grid = grid  # type: ignore[assignment]
        return self

    def _init_weights(self, module: nn.Module) -> None:
        """He et al. 2015; the last layer begins at zero, and so the network by leaving images as they are."""
        if isinstance(module, SpatialConv2d):
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            if module is self.convolutions[-1]:
                nn.init.zeros_(module.weight)
            else:
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, noisy: Tensor) -> dict[str, Tensor]:
        """``clean`` [images, colours, h, w] of ``noisy``, which is of the same shape; brightness from 0 to 1."""
        features = noisy.to(self.dtype)
        for conv in self.convolutions[:-1]:
            features = conv(features).relu()
        return {"clean": noisy - self.convolutions[-1](features)}
