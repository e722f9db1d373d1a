"""First-layer filters as images: Figure 6 of Xie et al. (2017)."""

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from orthojax.errors import UserError
from orthojax.inference import load_classifier
from orthojax.pictures.picture import label, new_picture


def tile_filters(kernel: np.ndarray, columns: int | None = None) -> np.ndarray:
    """Lays the filters of a first layer out in a grid, one pixel apart, each scaled on its own.

    Args:
      kernel: float (H, W, C, M), C being 1 or 3.
      columns: filters in a row; None makes the grid as square as can be.

    Returns:
      float (rows, columns, C): every filter scaled linearly to the range 0 to 1, a constant one to
      0.5; 1 (white) between them and where the last row is not full.

    Raises:
      ValueError: C is neither 1 nor 3.

    Example:
      >>> tile_filters(np.random.default_rng(0).normal(size=(7, 7, 3, 64))).shape
      (63, 63, 3)
    """
    height, width, channels, count = kernel.shape
    if channels not in (1, 3):
        raise ValueError(f"a kernel of shape {kernel.shape} has no colors; it needs 1 or 3 inputs")
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = np.ones((rows * (height + 1) - 1, columns * (width + 1) - 1, channels))
    for index in range(count):
        row, column = divmod(index, columns)
        part = np.asarray(kernel[..., index], np.float64)
        spread = part.max() - part.min()
        scaled = (part - part.min()) / spread if spread else np.full(part.shape, 0.5)
        top, left = row * (height + 1), column * (width + 1)
        grid[top : top + height, left : left + width] = scaled
    return grid


def picture_of_filters(kernels: Mapping[str, np.ndarray]) -> Any:
    """The first-layer filters of several nets beside each other, a matplotlib figure.

    Args:
      kernels: from a title to a kernel (H, W, C, M), C being 1 or 3.

    Example:
      >>> kernel = np.random.default_rng(0).normal(size=(7, 7, 3, 64))
      >>> len(picture_of_filters({"L2": kernel, "orthonormal": kernel}).axes)
      2
    """
    picture = new_picture(4 * len(kernels), 4.3)
    picture.get_layout_engine().set(wspace=0.1)
    panels = picture.subplots(1, len(kernels), squeeze=False)[0]
    for axes, (title, kernel) in zip(panels, kernels.items(), strict=True):
        grid = tile_filters(np.asarray(kernel))
        axes.imshow(grid if grid.shape[-1] == 3 else grid[..., 0], cmap="gray", vmin=0, vmax=1)
        axes.set_title(label(title))
        axes.set_axis_off()
    return picture


def first_kernel(workdir: str | os.PathLike, own_net: str | None = None) -> np.ndarray:
    """The stem's kernel, (H, W, C, M), of the newest checkpoint."""
    variables = load_classifier(workdir, "latest", own_net).variables
    try:
        return np.asarray(variables["params"]["stem"]["conv"]["kernel"])
    except KeyError:
        raise UserError(f"the net of {workdir} has no params/stem/conv/kernel to draw") from None
