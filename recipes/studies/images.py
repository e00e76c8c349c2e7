"""Photographs cut into square crops, with noise that depends on the seed and the crop's number only.

    images = Images(path=None, size=64, holdout=0.25, noise=0.1, seed=42)     # None: scikit-learn's two photographs
    images.train(7)                                                           # clean and noisy, each [3, 64, 64]

What is held out is the right part of each photograph; training never sees it.
"""

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import ConfigError, DataError

Image = NDArray[np.float32]  # [3, height, width], 0 to 1
TRAIN, HELD_OUT = 0, 1


@dataclass(frozen=True)
class Noisy:
    """An image and what noise has made of it, both [3, height, width]."""

    clean: Image
    noisy: Image


class Images:
    """Crops of ``size`` pixels; Gaussian noise of standard deviation ``noise`` on a brightness of 0 to 1."""

    def __init__(self, path: str | Sequence[str] | None, *, size: int, holdout: float, noise: float, seed: int) -> None:
        photographs = read(path)
        self.size, self.noise, self.seed = size, noise, seed
        cuts = [round(image.shape[2] * (1 - holdout)) for image in photographs]
        self.trained = [image[:, :, :cut] for image, cut in zip(photographs, cuts, strict=True)]
        self.held_out = [image[:, :, cut:] for image, cut in zip(photographs, cuts, strict=True)]
        smallest = min(min(image.shape[1:]) for image in [*self.trained, *(self.held_out if holdout else [])])
        if size > smallest:
            raise ConfigError(
                f"spatial_conv.size={size}: with data.holdout={holdout:g} the smallest part of an image is {smallest} "
                "pixels wide or high. Lower spatial_conv.size, or use larger images."
            )
        self.crops = sum(len(self._corners(image)) for image in self.trained)  # side by side: an epoch
        self.held_out_crops = [(i, *corner) for i, image in enumerate(self.held_out) for corner in self._corners(image)]

    def train(self, number: int) -> Noisy:
        """The ``number``-th of an endless stream of random crops."""
        random = np.random.default_rng([self.seed, TRAIN, number])
        image = self.trained[random.integers(len(self.trained))]
        y, x = (random.integers(length - self.size + 1) for length in image.shape[1:])
        return self._pair(self._crop(image, y, x), random)

    def evaluation(self, number: int) -> Noisy:
        """The ``number``-th of the crops that lie side by side in what is held out."""
        photograph, y, x = self.held_out_crops[number]
        return self._pair(self._crop(self.held_out[photograph], y, x), self._random(number))

    def picture(self) -> Noisy:
        """The middle square of what the first photograph has held out, or of all of it if that is nothing."""
        image = self.held_out[0] if self.held_out_crops else self.trained[0]
        side = min(image.shape[1:])
        y, x = ((length - side) // 2 for length in image.shape[1:])
        return self._pair(image[:, y : y + side, x : x + side], self._random(len(self.held_out_crops)))

    def _random(self, number: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, HELD_OUT, number])

    def _corners(self, image: Image) -> list[tuple[int, int]]:
        rows, columns = (range(0, length - self.size + 1, self.size) for length in image.shape[1:])
        return [(y, x) for y in rows for x in columns]

    def _crop(self, image: Image, y: int, x: int) -> Image:
        return image[:, y : y + self.size, x : x + self.size]

    def _pair(self, clean: Image, random: np.random.Generator) -> Noisy:
        noise = random.standard_normal(clean.shape, dtype=np.float32) * np.float32(self.noise)
        return Noisy(np.ascontiguousarray(clean), clean + noise)


def read(path: str | Sequence[str] | None) -> list[Image]:
    """The photographs of files and globs, by name; of scikit-learn for None. Raises DataError naming a bad file."""
    from PIL import Image as Pillow

    if path is None:
        from sklearn.datasets import load_sample_images

        pixels = list(load_sample_images().images)  # china.jpg and flower.jpg, 427 x 640
    else:
        pixels = []
        for pattern in [path] if isinstance(path, str) else path:
            # Path.glob takes no absolute pattern
            files = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
            if not files:
                raise DataError(f"data.path={pattern}: no such file. Name images, such as 'photos/*.jpg'.")
            for file in files:
                try:
                    pixels.append(np.asarray(Pillow.open(Path(file)).convert("RGB")))
                except OSError as error:
                    raise DataError(f"{file}: no image that Pillow can read: {error}.") from error
    return [image.transpose(2, 0, 1).astype(np.float32) / 255 for image in pixels]
