"""Branches that are folded into one convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthojax.models import PlainNet
from orthojax.models.repvgg import centers, folded


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [5, 6, 7, 8])
def test_centers_are_what_the_center_tap_reads(size, stride):
    x = jax.random.normal(jax.random.key(0), (2, size, size + 1, 3))
    center = jnp.zeros((3, 3, 3, 3)).at[1, 1].set(jnp.eye(3))
    convolved = jax.lax.conv_general_dilated(
        x, center, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_array_equal(centers(x, stride, 3), convolved)


def test_the_folded_kernel_is_the_sum_of_all_branches():
    rng = np.random.default_rng(0)
    kernel, point = rng.normal(size=(3, 3, 2, 2)), rng.normal(size=(1, 1, 2, 2))
    factors = {"point_bn": rng.normal(size=2), "identity_bn": rng.normal(size=2)}
    found = folded(kernel, factors, {"point": {"kernel": point}})
    x = rng.normal(size=(3, 3, 2))  # one window
    by_branch = (
        np.einsum("hwc,hwcm->m", x, kernel)
        + factors["point_bn"] * np.einsum("c,cm->m", x[1, 1], point[0, 0])
        + factors["identity_bn"] * x[1, 1]
    )
    np.testing.assert_allclose(np.einsum("hwc,hwcm->m", x, found), by_branch, rtol=1e-12)


@pytest.mark.parametrize(
    "options", [{"norm": "none"}, {"modulated": True}, {"activation": "crelu"}]
)
def test_it_needs_batch_normalization_and_no_site(options):
    with pytest.raises(ValueError, match="repvgg.*norm=.*modulated="):
        PlainNet(depth=8, parametrization="repvgg", **options)
