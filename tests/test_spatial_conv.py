"""Convolutions of tiles against those of whole images in plain PyTorch, on real ranks; the network that trains."""

import os
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from launching import launch, python, read
from studies.denoiser import Denoiser
from studies.images import Images
from studies.spatial import Grid, SpatialConv2d, halo_bytes
from torch import Tensor, nn

from toolkit.checkpoint.export import export
from toolkit.errors import ConfigError, DataError


@dataclass(frozen=True)
class Case:
    """A grid, a stack of convolutions and the size of the image."""

    rows: int
    columns: int
    kernel: Any = 3
    layers: int = 1
    dilation: int = 1
    height: int = 12
    width: int = 12


CASES = [
    *(Case(*grid, kernel) for grid in ((1, 2), (2, 1)) for kernel in (1, 3, 5)),
    *(Case(*grid, 3, layers=2) for grid in ((1, 2), (2, 2), (4, 1))),
    Case(2, 2),
    Case(2, 2, 5, layers=2, height=13, width=15),
    Case(1, 4, (3, 5), width=18),
    Case(2, 1, 3, layers=2, dilation=2, height=11),
    Case(4, 1, 7, height=12),  # the halo is the neighbour's whole tile
]
SMALL = (
    "spatial_conv.size=16", "spatial_conv.sizes=[16,24]", "spatial_conv.channels=8", "spatial_conv.layers=3",
    "batch.micro_size=2", "train.steps=4", "train.log_every=1", "train.save_every=2", "train.eval_samples=7",
    "train.hang_minutes=3", "schedule=constant", "schedule.warmup=0",
)  # fmt: skip


def stack(case: Case, kind: Any, **options: Any) -> Any:
    """Convolutions, 3 -> 4 -> 4 … channels, the same whatever their class."""
    torch.manual_seed(1)
    sizes = [3, *[4] * case.layers]
    layers = [kind(a, b, case.kernel, dilation=case.dilation, **options) for a, b in pairwise(sizes)]
    return nn.Sequential(*layers).double()


def passes(model: Any, image: Tensor, upstream: Tensor) -> list[Tensor]:
    """Output, gradient of the image, gradients of weights and biases."""
    image = image.clone().requires_grad_()
    output = image
    for layer in model:
        output = layer(output).tanh()
    return [output.detach(), *torch.autograd.grad(output, [image, *model.parameters()], upstream)]


def inputs(case: Case) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, c, case.height, case.width, generator=random, dtype=torch.float64) for c in (3, 4))  # type: ignore[return-value]


def work(rank: int, world: int, folder: str) -> None:
    """One rank: every case of so many ranks, and what DTensor makes of a convolution."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    found: dict[Any, Any] = {}
    for case in CASES:
        grid = Grid(case.rows, case.columns, rank)
        if grid.size == world:
            model = stack(case, SpatialConv2d)
            for layer in model:
                layer.grid = grid
            image, upstream = inputs(case)
            tile = grid.tile(case.height, case.width)
            found[case] = (passes(model, image[tile], upstream[tile]), grid.sent_bytes)
    if world == 2:
        found["dtensor"] = dtensor_difference(rank)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def dtensor_difference(rank: int) -> float:
    """Between this rank's half of a convolution and what DTensor's own gives it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.nn.functional import conv2d

    mesh = init_device_mesh("cpu", (2,))
    image, weight = torch.arange(192.0).view(1, 3, 8, 8), torch.ones(4, 3, 3, 3)
    whole = conv2d(image, weight, padding=1)
    split = conv2d(
        distribute_tensor(image, mesh, [Shard(2)]), distribute_tensor(weight, mesh, [Replicate()]), padding=1
    )
    return float((split.to_local() - whole[:, :, 4 * rank : 4 * rank + 4]).abs().max())  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[Any]]:
    """What each rank has found, by case."""
    results: dict[Any, list[Any]] = {}
    for world in (2, 4):
        folder = tmp_path_factory.mktemp(f"world{world}")
        done = python(__file__, str(folder), ranks=world)
        assert done.returncode == 0, done.stderr
        for rank in range(world):
            for case, result in torch.load(folder / f"{rank}.pt", weights_only=False).items():
                results.setdefault(case, []).append(result)
    return results


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_all_gradients_are_those_of_one_process(case: Case, found: dict[Any, list[Any]]) -> None:
    output, to_image, *to_weights = passes(stack(case, nn.Conv2d, padding="same"), *inputs(case))
    parts = [values for values, _ in found[case]]
    for place, whole in enumerate((output, to_image)):
        joined = torch.full_like(whole, torch.nan)
        for rank, values in enumerate(parts):
            joined[Grid(case.rows, case.columns, rank).tile(case.height, case.width)] = values[place]
        torch.testing.assert_close(joined, whole, atol=1e-12, rtol=0)
    for place, whole in enumerate(to_weights, start=2):
        torch.testing.assert_close(sum(values[place] for values in parts), whole, atol=1e-11, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_bytes_that_are_sent_are_those_of_the_formula(case: Case, found: dict[Any, list[Any]]) -> None:
    grid, shape = Grid(case.rows, case.columns), (2, case.height, case.width)
    formula = sum(2 * halo_bytes(grid, conv, shape, itemsize=8) for conv in stack(case, SpatialConv2d))
    assert sum(sent for _, sent in found[case]) == formula


def test_the_formula_counts_corners_twice_and_borders_once() -> None:
    # 2 x 2 tiles of 12 x 12 pixels, one wide: two rows of 12, then two columns of 12 + 4
    pixels = 2 * 12 + 2 * (12 + 4)
    assert halo_bytes(Grid(2, 2), SpatialConv2d(3, 8, 3), (5, 12, 12)) == 5 * 3 * 4 * pixels
    assert halo_bytes(Grid(1, 1), SpatialConv2d(3, 8, 3), (5, 12, 12)) == 0
    assert halo_bytes(Grid(4, 1), SpatialConv2d(3, 8, 1), (5, 12, 12)) == 0


def test_dtensor_still_gets_a_split_convolution_wrong(found: dict[Any, list[Any]]) -> None:
    assert min(found["dtensor"]) > 1, "DTensor can do it now: take the note out of recipes/studies/spatial.py"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same four images a step on one rank, on two with a stop after two steps, and on four."""
    folder = tmp_path_factory.mktemp("runs")
    for name, ranks, overrides in [
        ("one", 1, ["zero=stage0", "batch.global_size=4"]),
        ("two", 2, ["zero=stage2", "batch.global_size=8", "train.steps=2"]),
        ("two", 2, ["zero=stage2", "batch.global_size=8"]),
        ("four", 4, ["zero=stage0", "batch.global_size=16", "spatial_conv.rows=2"]),
    ]:
        arguments = [o for o in SMALL if o.split("=")[0] not in {x.split("=")[0] for x in overrides}]
        launch(folder, f"name={name}", *arguments, *overrides, ranks=ranks, recipe="spatial_conv", bare=True)
    return folder


def records(run: Path) -> list[dict[str, Any]]:
    return read(run / "metrics.jsonl")


@pytest.mark.parametrize("name", ["two", "four"])
def test_training_in_tiles_and_resuming_gives_the_losses_of_one_rank(name: str, runs: Path) -> None:
    one, split = ([r for r in records(runs / n) if "loss" in r] for n in ("one", name))
    assert [r["step"] for r in split] == [1, 2, 3, 4]
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in split] == pytest.approx([r[key] for r in one], rel=1e-5)
    held_out = [[r["eval_psnr"] for r in records(runs / n) if "eval_psnr" in r][-1] for n in ("one", name)]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-5)
    assert one[-1]["loss"] < 0.95 < one[0]["loss"], "1 is the noise itself"


@pytest.mark.parametrize("name", ["one", "two", "four"])
def test_the_recipe_compares_and_draws(name: str, runs: Path) -> None:
    compared = [r for r in records(runs / name) if "difference" in r]
    assert [r["size"] for r in compared] == [16, 24], "once, though the run was started twice"
    for row in compared:
        assert row["difference"] < 1e-12 and row["halo_bytes"] == row["halo_bytes_formula"]
        assert (row["halo_bytes"] == 0) == (name == "one")
        assert min(row[f"{n}_seconds"] for n in ("whole", "split", "tile")) > 0
    assert all((runs / name / file).stat().st_size > 5000 for file in ("denoised.png", "spatial_conv.svg"))


def test_images_and_pixels_are_counted_once_whatever_the_grid(runs: Path) -> None:
    for name in ("one", "four"):
        rated = next(r for r in records(runs / name) if "tokens_per_second" in r)
        assert rated["tokens_per_second"] == pytest.approx(16 * 16 * rated["samples_per_second"])
        assert rated["samples_per_second"] * rated["step_seconds"] == pytest.approx(4)


def test_the_export_cleans_a_whole_image_on_one_process(runs: Path) -> None:
    from omegaconf import OmegaConf

    run = runs / "four"
    model = Denoiser.from_pretrained(export(run))
    assert (model.config.channels, model.config.layers) == (8, 3)
    config = OmegaConf.load(run / "config.yaml")
    images = Images(None, size=16, holdout=config.data.holdout, noise=config.spatial_conv.noise, seed=config.seed)
    pairs = [images.evaluation(i) for i in range(7)]
    with torch.no_grad():
        cleaned = model(torch.from_numpy(np.stack([p.noisy for p in pairs])))["clean"].numpy()
    error = np.square(cleaned - np.stack([p.clean for p in pairs])).mean() / 0.1**2
    logged = [r["eval_loss"] for r in records(run) if "eval_loss" in r]
    assert error == pytest.approx(logged[-1], rel=1e-4)


def test_what_is_held_out_is_never_trained_on_and_noise_depends_on_the_number_only(tmp_path: Path) -> None:
    from PIL import Image

    ramp = np.broadcast_to(np.arange(40, dtype=np.uint8)[None, :, None], (20, 40, 3))
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "ramp.png")
    images, again = (Images(str(tmp_path / "*.png"), size=8, holdout=0.25, noise=0.5, seed=3) for _ in range(2))
    trained = [images.train(i) for i in range(200)]
    assert len({p.clean[0, 0, 0] for p in trained}) > 15 and max(p.clean.max() for p in trained) == np.float32(29 / 255)
    assert images.crops == 2 * 3 and len(images.held_out_crops) == 2
    assert min(images.evaluation(i).clean.min() for i in range(2)) == np.float32(30 / 255)
    assert (again.train(7).noisy == trained[7].noisy).all() and (again.train(8).noisy != trained[7].noisy).any()
    noise = np.stack([p.noisy - p.clean for p in trained])
    assert noise.std() == pytest.approx(0.5, rel=0.02) and abs(noise.mean()) < 0.01


def test_images_that_cannot_be_used_are_refused_by_name(tmp_path: Path) -> None:
    def load(pattern: str, size: int = 8) -> Images:
        return Images(str(tmp_path / pattern), size=size, holdout=0.25, noise=0.1, seed=0)

    from PIL import Image

    Image.new("RGB", (40, 20)).save(tmp_path / "small.png")
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(DataError, match=r"data.path=.*\*.gif: no such file"):
        load("*.gif")
    with pytest.raises(DataError, match=r"text.jpg: no image that Pillow can read"):
        load("*.jpg")
    with pytest.raises(ConfigError, match=r"spatial_conv.size=16: with data.holdout=0.25 .* is 10 pixels"):
        load("small.png", size=16)


@pytest.mark.parametrize("options", [{"kernel_size": 4}, {"kernel_size": (3, 2)}, {"stride": 2}, {"padding": 1}])
def test_other_convolutions_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="a convolution over tiles has an odd kernel, stride 1"):
        SpatialConv2d(3, 4, **{"kernel_size": 3, **options})


def test_a_halo_larger_than_a_tile_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    Grid(4, 1).refuse_small(12, 12, 3)
    with pytest.raises(ConfigError, match="a grid of 4 x 1 ranks has tiles of 2 x 12: the halo of 3 would"):
        Grid(4, 1).refuse_small(11, 12, 3)  # three tiles have 3 rows, one has 2
    conv = SpatialConv2d(3, 4, 7)
    conv.grid = Grid(1, 2)
    with pytest.raises(ConfigError, match="a halo of 3 pixels is larger than this rank's tile"):
        conv(torch.zeros(1, 3, 8, 2))  # without a process group


def test_ranks_that_make_no_grid_are_refused_in_one_line(tmp_path: Path) -> None:
    result = launch(tmp_path, *SMALL, "spatial_conv.rows=3", recipe="spatial_conv", bare=True, check=False)
    message = "spatial_conv.rows=3 x spatial_conv.columns=None: 2 ranks do not make this grid."
    assert result.code != 0 and message in result.error and result.error.count("\n") == 0


if __name__ == "__main__":
    import test_spatial_conv  # a Case of __main__ could not be read by the tests

    test_spatial_conv.work(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), sys.argv[-1])
