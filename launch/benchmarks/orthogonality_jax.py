"""Worker: this project's `stiefel`. `python orthogonality_jax.py CORE...`"""

import sys

from orthojax.benchmarks.orthogonality import restrict, serve

if __name__ == "__main__":
    restrict(sys.argv[1:])  # before JAX makes its threads
    import functools
    import importlib.metadata

    import jax
    import optax

    from orthojax import stiefel
    from orthojax.ortho import KernelAxes

    @functools.cache
    def compiled(method, rate):
        # `optax.sgd` is linear and without memory: what it is given need not be tangent already.
        tx = stiefel(
            optax.sgd(rate),
            method,
            view={"kernel": KernelAxes(inputs=1, outputs=2)},
            project_gradient=False,
        )

        def step(params, state, target):
            def objective(params):
                return 0.5 * ((params["kernel"] - target) ** 2).sum()

            updates, state = tx.update(jax.grad(objective)(params), state, params)
            return optax.apply_updates(params, updates), state

        return tx, jax.jit(step, donate_argnums=(0, 1))

    def make(method, start, target, rate):
        tx, step = compiled(method, rate)
        params = {"kernel": jax.numpy.array(start)}
        carry, target = [params, tx.init(params)], jax.numpy.asarray(target)
        # Compiled before the clock runs.
        jax.block_until_ready(step(*jax.tree.map(jax.numpy.copy, carry), target))

        def advance():
            carry[:] = step(*carry, target)

        return advance, lambda: jax.block_until_ready(carry[0]["kernel"])

    versions = {name: importlib.metadata.version(name) for name in ("jax", "optax")}
    serve(make, versions)
