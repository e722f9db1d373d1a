"""CompiledSteps for TPUs, compiled where there is none.

The TPU compiler serves one process at a time: nothing in other files may use it, and the tests of
one file run one after the other.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from orthojax.models.convolution import conv_general_dilated

ROOT = pathlib.Path(__file__).parents[2]
INSTALLED = importlib.util.find_spec("libtpu") is not None


def compile_for_tpu(*flags):
    command = [sys.executable, str(ROOT / "launch" / "compile_for_tpu.py"), *flags]
    # Devices that the tests pretend to have are of no use to it.
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def convolution_gradient(platform, size=8):
    x, kernel = jnp.ones((2, size, size, 4)), jnp.ones((3, 3, 4, 4))
    numbers = ("NHWC", "HWIO", "NHWC")

    def loss(x, kernel):
        y = conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)
        return jnp.sum(jnp.sin(y))

    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(x, kernel)
    return traced.lower(lowering_platforms=(platform,))


def test_the_convolution_is_that_of_the_platform_it_is_compiled_for():
    """Not that of the machine's: this one is a CPU."""
    cpu, tpu = (convolution_gradient(platform).as_text() for platform in ("cpu", "tpu"))
    assert "optimization_barrier" in cpu and "optimization_barrier" not in tpu
    assert "concatenate" in convolution_gradient("cpu", size=4).as_text()
    assert "concatenate" not in convolution_gradient("tpu", size=4).as_text()


def test_nothing_of_the_choice_is_left_in_a_compiled_program():
    assert " conditional(" not in convolution_gradient("cpu").compile().as_text()


@pytest.mark.skipif(not INSTALLED, reason="needs the TPU compiler: pip install -e '.[train,tpu]'")
def test_an_unknown_topology_is_named():
    finished = compile_for_tpu("--topology=v5e-17")
    assert finished.returncode == 2
    assert finished.stderr.splitlines()[-1].startswith("error: unknown topology `v5e-17`")
    assert "such as v5e:4x4" in finished.stderr


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--config.model.dept=8", "--config.model.dept=8: unknown key"),
        ("--compare=configs/nowhere.py", "configs/nowhere.py"),
        ("--compare=configs/cifar10_plain.py:dept=8", "did you mean `depth`?"),
    ],
)
def test_a_bad_config_is_named(flag, named, program):
    finished = program("compile_for_tpu", flag)
    assert finished.code == 2 and named in finished.err


@pytest.mark.skipif(INSTALLED, reason="the TPU compiler is installed")
def test_without_the_compiler_the_extra_is_named(program):
    finished = program("compile_for_tpu")
    assert finished.code == 2 and "pip install 'orthojax-nets[tpu]'" in finished.err


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs the TPU compiler: pip install -e '.[train,tpu]'")
def test_the_8_layer_net_for_16_chips(tmp_path):
    """What the method adds is a few per cent of the flops, and no all-reduce."""
    records = tmp_path / "records.json"
    finished = compile_for_tpu(
        *("--config=configs/cifar10_plain.py:depth=8", "--config.model.scan=False"),
        *(
            "--compare=cifar10_plain:depth=8,method=baseline",
            "--compare.model.scan=False",
        ),
        f"--json={records}",
    )
    assert finished.returncode == 0, finished.stderr
    for part in ("| per device | cifar10_plain:depth=8,", "| flops |", "-> 'ortho'"):
        assert part in finished.stdout
    ours, theirs = json.loads(records.read_text())
    assert (ours["topology"], ours["config"]["batch_size"]) == ("v5e:4x4", 128)
    assert ours["versions"]["libtpu"]
    ours, theirs = ours["cost"], theirs["cost"]
    assert 1 < ours["flops"] / theirs["flops"] < 1.05
    assert ours["memory"] > theirs["memory"] > 0
    assert ours["all_reduces"] == theirs["all_reduces"] > 0
