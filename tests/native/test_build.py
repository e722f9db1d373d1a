"""Building the native part: once among processes, and not at all without a compiler."""

import os
import subprocess
import sys

import pytest

from orthojax.native import build

pytestmark = pytest.mark.skipif(build.targets() is None, reason="nothing native here")

PROGRAM = """
import jax, jax.numpy as jnp
from orthojax.models.convolution import conv_general_dilated
x, kernel = jnp.ones((1, 4, 4, 8)), jnp.ones((3, 3, 8, 8))
numbers = ("NHWC", "HWIO", "NHWC")
f = jax.jit(lambda x: conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers))
print(float(f(x).sum()), "orthojax_" in f.lower(x).as_text())
"""
ANSWER = 8 * 8 * (4 * 9 + 8 * 6 + 4 * 4) * 1.0


def start(cache, **environment):
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), **environment}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_without_a_compiler_one_line_says_so(tmp_path):
    process = start(tmp_path, PATH=str(tmp_path), CXX="")
    out, log = process.communicate()
    assert out.split() == [str(ANSWER), "False"], log
    assert [line for line in log.splitlines() if "there is no C++ compiler" in line] == [
        log.strip().splitlines()[-1]
    ]


def test_a_failing_compiler_is_told_of(tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\n[ $1 = --version ] || { echo 'error: broken' >&2; exit 1; }\n")
    compiler.chmod(0o755)
    out, log = start(tmp_path, CXX=str(compiler)).communicate()
    assert out.split() == [str(ANSWER), "False"] and log.count("error: broken") == 1


def test_it_can_be_switched_off(tmp_path):
    out, log = start(tmp_path, ORTHOJAX_NATIVE="0").communicate()
    assert out.split() == [str(ANSWER), "False"] and not (tmp_path / "orthojax").exists()
    assert "native" not in log


@pytest.mark.slow
def test_two_processes_build_once(tmp_path):
    processes = [start(tmp_path) for _ in range(2)]
    for process in processes:
        out, log = process.communicate()
        assert out.split() == [str(ANSWER), "True"], log
    places = sorted(path.suffix for path in (tmp_path / "orthojax" / "native").iterdir())
    assert places == [".lock", ".so"]


@pytest.mark.slow
def test_sixteen_lanes_compute_the_same(tmp_path, monkeypatch):
    """The kernels for AVX-512 with their loops as they are, in AVX2's instructions."""
    from tests.native import test_convolution as reference

    names = build.load(build.build(tmp_path, "-DORTHOJAX_ALWAYS_WIDE", "-mno-avx512f"))
    monkeypatch.setattr(build, "targets", lambda: names)
    for case in reference.CASES:
        reference.test_it_computes_direct_sums(case)
