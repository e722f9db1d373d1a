"""First-layer filters as pictures."""

import numpy as np
import pytest

from orthojax.experiments.filters import tile_filters


@pytest.mark.parametrize(("count", "columns", "grid"), [(64, None, (8, 8)), (5, 2, (3, 2))])
def test_every_filter_stands_where_it_should_and_fills_its_range(count, columns, grid):
    kernel = np.random.default_rng(0).normal(size=(7, 5, 3, count)) * np.arange(1, count + 1)
    tiles = tile_filters(kernel, columns)
    assert tiles.shape == (8 * grid[0] - 1, 6 * grid[1] - 1, 3)
    assert (tiles[7::8] == 1).all() and (tiles[:, 5::6] == 1).all()  # the gaps
    for index in range(count):
        row, column = divmod(index, grid[1])
        tile = tiles[8 * row : 8 * row + 7, 6 * column : 6 * column + 5]
        assert tile.min() == 0 and tile.max() == 1
        # Scaled linearly: the correlation with the filter is perfect.
        assert np.corrcoef(tile.ravel(), kernel[..., index].ravel())[0, 1] > 1 - 1e-12


def test_constant_filters_are_grey():
    assert (tile_filters(np.full((3, 3, 1, 1), 7.0)) == 0.5).all()


def test_filters_without_colors_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 3, 16, 4\) has no colors"):
        tile_filters(np.ones((3, 3, 16, 4)))
