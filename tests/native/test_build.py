"""Building the native part: once among processes, and not at all without a compiler."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from orthojax.models.convolution import conv_general_dilated
from orthojax.native import build

pytestmark = pytest.mark.skipif(build.targets() is None, reason="nothing native here")

ANSWER = 8 * 8 * (4 * 9 + 8 * 6 + 4 * 4) * 1.0


@pytest.fixture
def warnings(tmp_path, monkeypatch, caplog):
    """What is logged by the first use in a process, which `convolve` is made to be."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "targets", functools.cache(build.targets.__wrapped__))
    return lambda: [record.getMessage() for record in caplog.records if record.name == "absl"]


def convolve():
    """The sum of a convolution of ones, and whether the native one is in the program."""
    x, kernel = np.ones((1, 4, 4, 8), np.float32), np.ones((3, 3, 8, 8), np.float32)
    numbers = ("NHWC", "HWIO", "NHWC")
    convolution = jax.jit(
        lambda x: conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)
    )
    return float(convolution(x).sum()), "orthojax_" in convolution.lower(x).as_text()


@pytest.mark.parametrize(
    ("named", "told"),
    [("", "there is no C++ compiler"), ("g++-0 -O3", "there is no g++-0, which $CXX names")],
)
def test_without_a_compiler_one_line_says_so(named, told, tmp_path, monkeypatch, warnings):
    if not named:
        monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", named)
    assert convolve() == (ANSWER, False)
    assert len(warnings()) == 1 and told in warnings()[0]


def test_a_failing_compiler_is_told_of(tmp_path, monkeypatch, warnings):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\n[ $1 = --version ] || { echo 'error: broken' >&2; exit 1; }\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert convolve() == (ANSWER, False)
    assert len(warnings()) == 1 and "error: broken" in warnings()[0]


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Builds with a compiler of which every run writes another library; how it was called."""
    compiler, calls = tmp_path / "compiler", tmp_path / "calls"
    body = f'echo "$@" >> {calls}; while [ $1 != -o ]; do shift; done; wc {calls} > $2'
    compiler.write_text(f"#!/bin/sh\n{body}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    return lambda: len(calls.read_text().splitlines()) if calls.exists() else 0


def test_what_is_built_serves_when_the_compiler_is_gone(tmp_path, stand_in):
    built = build.build(tmp_path / "native")
    content, runs = built.read_bytes(), stand_in()
    (tmp_path / "compiler").unlink()
    assert build.build(tmp_path / "native") == built
    assert built.read_bytes() == content and stand_in() == runs > 0


def _cut(library):
    library.write_bytes(library.read_bytes()[:-1])


def _empty(library):
    library.write_bytes(b"")


def _flip(library):
    content = bytearray(library.read_bytes())
    content[0] ^= 1
    library.write_bytes(content)


def _open_to_others(library):
    library.chmod(0o775)


def _link(library):
    library.rename(library.with_suffix(".elsewhere"))
    library.symlink_to(library.with_suffix(".elsewhere"))


@pytest.mark.parametrize("spoil", [_cut, _empty, _flip, _open_to_others, _link])
def test_a_library_that_cannot_be_trusted_is_built_anew(spoil, tmp_path, stand_in):
    library, runs = build.build(tmp_path / "native"), stand_in()
    spoil(library)
    assert build.build(tmp_path / "native") == library
    assert stand_in() == 2 * runs and not library.is_symlink()
    assert build.build(tmp_path / "native") == library
    assert stand_in() == 2 * runs


def _give_away(path, monkeypatch):
    """Makes a path somebody else's."""
    if os.getuid() == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)


def test_nothing_is_loaded_from_a_directory_of_somebody_else(tmp_path, monkeypatch, warnings):
    place = tmp_path / "orthojax" / "native"
    place.mkdir(parents=True)
    _give_away(place, monkeypatch)
    assert convolve() == (ANSWER, False)
    assert len(warnings()) == 1 and f"{place} belongs to user" in warnings()[0]
    assert not list(place.iterdir())


def test_the_directory_is_kept_for_its_owner(tmp_path, stand_in):
    place = tmp_path / "native"
    place.mkdir(mode=0o775)
    place.chmod(0o777)
    build.build(place)
    assert place.stat().st_mode & 0o022 == 0


def test_without_a_home_one_line_says_so(monkeypatch, warnings):
    monkeypatch.setattr(build, "cache_directory", lambda name: None)
    assert convolve() == (ANSWER, False)
    assert len(warnings()) == 1 and "set XDG_CACHE_HOME" in warnings()[0]


def test_what_is_exported_is_for_any_machine():
    x, kernel = np.ones((1, 4, 4, 8), np.float32), np.ones((3, 3, 8, 8), np.float32)
    numbers = ("NHWC", "HWIO", "NHWC")

    def squares(kernel):
        y = conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)
        return (y**2).sum()

    step = jax.jit(jax.grad(squares))
    assert "orthojax_kernel_gradient" in step.lower(kernel).as_text()
    exported = jax.export.export(step, platforms=("cpu",))(kernel)
    assert "orthojax_" not in exported.mlir_module()
    np.testing.assert_allclose(exported.call(kernel), step(kernel), rtol=1e-5)


def test_it_can_be_switched_off(tmp_path, monkeypatch, warnings):
    monkeypatch.setenv("ORTHOJAX_NATIVE", "0")
    assert convolve() == (ANSWER, False)
    assert not (tmp_path / "orthojax").exists() and not warnings()


@pytest.mark.slow
def test_two_processes_build_once(tmp_path):
    root = pathlib.Path(__file__).parents[2]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(root)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    program = "from tests.native.test_build import convolve; print(*convolve())"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
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
