"""Appendix: eigenvalues of the Jacobian of batch normalization, by autodiff and by Eq. 12 to 17.

Eigenvalues relative to ρ, in float32; the largest deviation over the seeds. The paper argues that
the two small ones vanish for large batches (Eq. 18); they do for any: `1` is an eigenvector of Eq.
12 with the eigenvalue 0, because normalized activations add up to 0, and `x̂` one with
`ε / (σ² + ε)`, because their squares add up to `m σ² / (σ² + ε)`. What grows with the batch is the
share of the directions that keep their length, `1 - 2/m`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from orthojax.experiments.report import POINTS, Line, draw, table, write_report
from orthojax.models import BatchNorm

BATCHES = (4, 8, 16, 32, 64, 128, 256, 512)
EPSILON = 1e-5
GAMMA = 1.5
NORM = "‖JJᵀ/ρ² − I‖ / m^½"


@jax.jit
def jacobian(x):
    """dy/dx of one channel over a batch, (m, m), from the layer that the nets use."""
    norm = BatchNorm(use_running_average=False, epsilon=EPSILON)
    scale, bias = jnp.full((1,), GAMMA), jnp.zeros((1,))
    statistics = {"mean": jnp.zeros(1), "var": jnp.ones(1)}
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": statistics}

    def forward(x):
        y, _ = norm.apply(variables, x[:, None], mutable=["batch_stats"])
        return y[:, 0]

    return jax.jacrev(forward)(x)


def equation_12(x):
    """The same in float64, from the formula: `ρ (I - (1 + x̂x̂ᵀ) / m)` and `ρ`."""
    x, m = np.asarray(x, np.float64), len(x)
    rho = GAMMA / np.sqrt(x.var() + EPSILON)
    normalized = (x - x.mean()) / np.sqrt(x.var() + EPSILON)
    return rho * (np.eye(m) - (1 + np.outer(normalized, normalized)) / m), rho


def jobs(options):
    """Nothing is trained."""
    del options
    return {}


def measure(m, seed):
    """How far autodiff is from Eq. 12, the eigenvalues over ρ, and the quasi-isometry error."""
    x = 2 * jax.random.normal(jax.random.key(seed), (m,)) + 1
    found = np.asarray(jacobian(x), np.float64)
    expected, rho = equation_12(x)
    eigenvalues = np.sort(np.linalg.eigvalsh((found + found.T) / 2)) / rho
    isometry = np.linalg.norm(found @ found.T / rho**2 - np.eye(m)) / np.sqrt(m)
    return {
        "batch": m,
        "seed": seed,
        "autodiff_error": float(np.abs(found - expected).max() / rho),
        "smallest": eigenvalues[:2].tolist(),
        "others_from_1": float(np.abs(eigenvalues[2:] - 1).max()),
        "second_smallest_predicted": EPSILON / (float(np.var(np.asarray(x))) + EPSILON),
        "quasi_isometry_error": float(isometry),
    }


def report(options, results):
    """Eigenvalues and the error that the two lost directions make."""
    del results
    found = {m: [measure(m, seed) for seed in options.seeds] for m in BATCHES}
    rows = [
        [
            m,
            f"{max(r['autodiff_error'] for r in records):.1e}",
            f"{max(abs(e) for r in records for e in r['smallest']):.1e}",
            f"{max(r['others_from_1'] for r in records):.1e}",
            f"{sum(r['quasi_isometry_error'] for r in records) / len(records):.4f}",
            f"{np.sqrt(2 / m):.4f}",
        ]
        for m, records in found.items()
    ]
    x = jax.random.normal(jax.random.key(options.seeds[0]), (32,))
    (expected, rho), ranks = equation_12(x), range(1, 33)
    values = np.linalg.eigvalsh(np.asarray(jacobian(x), np.float64)) / rho
    spectrum = [
        Line("autodiff", ranks, values, POINTS),
        Line("Eq. 12", ranks, np.linalg.eigvalsh(expected) / rho),
    ]
    means = [np.mean([r["quasi_isometry_error"] for r in found[m]]) for m in BATCHES]
    error = [
        Line("measured", BATCHES, means, POINTS),
        Line("(2 / m)^½", BATCHES, np.sqrt(2 / np.array(BATCHES))),
    ]
    ranked = {"title": "batch of 32", "xlabel": "index", "ylabel": "eigenvalue / ρ"}
    logarithmic = {"title": "quasi-isometry", "xlabel": "batch size m", "ylabel": NORM}
    logarithmic |= {"xscale": "log", "yscale": "log"}
    headings = ["m", "autodiff - Eq. 12", "two smallest", "others - 1", NORM]
    write_report(
        options,
        __doc__,
        table([*headings, "(2 / m)^½"], rows),
        pictures={"appendix": draw((spectrum, ranked), (error, logarithmic))},
        records=[record for records in found.values() for record in records],
    )
