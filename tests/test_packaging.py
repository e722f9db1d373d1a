"""What an installed package has: every room, the configs, a program to start."""

import ast
import configparser
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import orthojax
from orthojax import __main__

ROOT = pathlib.Path(__file__).parents[1]


def test_every_room_is_installed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = setup["options"]["packages"].split()
    rooms = [file.parent.relative_to(ROOT) for file in (ROOT / "orthojax").rglob("__init__.py")]
    found = {room.as_posix().replace("/", ".") for room in rooms}
    elsewhere = {f"orthojax.{name}" for name in ("benchmarks", "configs", "experiments")}
    assert set(listed) == found | elsewhere and len(listed) == len(set(listed))


LIBRARY = (
    *("sites", "ortho", "tree_paths", "initializers", "isometry", "matrices", "describe"),
    *("checks", "errors", "extras"),
)


def test_the_library_imports_nothing_of_the_trainer():
    """Of this project its own rooms; of others what JAX and optax bring, and no more."""
    for room in LIBRARY:
        place = ROOT / "orthojax" / room
        for file in place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")]:
            for node in ast.walk(ast.parse(file.read_bytes())):
                modules = [node.module] if isinstance(node, ast.ImportFrom) else []
                modules += [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if modules == ["orthojax"]:
                    modules = [f"orthojax.{alias.name}" for alias in node.names]
                for first, *rest in (module.split(".") for module in modules):
                    if first == "orthojax":
                        assert rest[0] in LIBRARY, f"{file}: {modules}"
                    else:
                        assert first in {"jax", "optax", "numpy", *sys.stdlib_module_names}, file


@pytest.mark.parametrize(("old", "new"), [("load", "load_classifier"), ("read", "read_moments")])
def test_an_old_name_says_the_new(old, new):
    with pytest.raises(AttributeError, match=f"orthojax.{old} is called orthojax.{new}"):
        getattr(orthojax, old)
    assert new in dir(orthojax) and old not in dir(orthojax)


def test_the_command_has_a_word_for_each_program(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["orthojax"])
    assert __main__.main() == 0
    assert "train|predict|evaluate|export|prepare|reproduce" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["orthojax", "trian"])
    assert __main__.main() == 2 and "no command 'trian'" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["orthojax", "train"])
    assert __main__.main() == 2
    assert "orthojax train needs flax, " in (told := capsys.readouterr().err)
    assert told.endswith(": pip install 'orthojax-nets[train]'\n")


USE = """
import pathlib, jax, jax.numpy as jnp, optax, orthojax
from flax import nnx

assert "site-packages" in orthojax.__file__
from orthojax.configs import digits_plain110

net = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
chain = optax.chain(orthojax.optax_ortho(0.1), optax.sgd(0.1))
optimizer = nnx.Optimizer(net, chain, wrt=nnx.Param)
optimizer.update(net, nnx.grad(lambda net: net(jnp.ones((2, 4))).sum())(net))
config = digits_plain110.get_config("depth=8,steps=4")
config.model.width, config.batch_size, config.mesh.data = 4, 8, 1
config.dataset.data_dir = str(pathlib.Path("data").absolute())
assert orthojax.train_and_evaluate(config, "run")["steps"] == 4
orthojax.load_classifier("run")
"""


@pytest.mark.slow
def test_the_oldest_packages_that_are_declared_can_be_installed_and_train(tmp_path):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    required = "\n".join((setup["options"]["install_requires"], extras["flax"], extras["train"]))
    pins = [line.replace(" >= ", "==") for line in required.split("\n") if " >= " in line]
    assert len(pins) == len(required.split()) // 3
    run = installed(tmp_path, "--prefer-binary", *pins, f"{ROOT}[train]")
    run("-c", USE)


LIBRARY_TESTS = (
    "ortho",
    "sites",
    *(f"test_{m}.py" for m in ("initializers", "isometry", "matrices")),
)
COMPLAIN = """
import orthojax
for name in ("linen", "nnx", "describe_net", "load_classifier", "train_and_evaluate"):
    try:
        getattr(orthojax, name)
    except orthojax.errors.MissingExtraError as error:
        assert "pip install 'orthojax-nets[" in str(error) and str(error).count("\\n") == 0
    else:
        raise AssertionError(name)
"""


@pytest.mark.slow
def test_the_library_needs_jax_and_optax_alone(tmp_path):
    """Nine packages with this one: also what these two bring, and no more; its tests pass there."""
    run = installed(tmp_path, ROOT)
    listed = {package["name"] for package in json.loads(run("-m", "pip", "list", "--format=json"))}
    own = {"orthojax-nets", "jax", "jaxlib", "optax", "numpy"}
    assert listed - {"pip", "setuptools"} == own | {"scipy", "ml_dtypes", "opt_einsum", "absl-py"}
    run("-c", COMPLAIN)
    command = tmp_path / "venv" / "bin" / "orthojax"
    ended = subprocess.run([command, "train"], capture_output=True, text=True)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "pip install 'orthojax-nets[train]'" in ended.stderr
    run("-m", "pip", "install", "-q", "pytest", "hypothesis", "chex")
    shutil.copytree(ROOT / "tests", tmp_path / "elsewhere" / "tests")
    found = run(
        "-m", "pytest", "-q", "--import-mode=importlib", *(f"tests/{t}" for t in LIBRARY_TESTS)
    )
    assert " passed" in found and " failed" not in found
    print(found.splitlines()[-1])


def installed(directory, *packages):
    """Runs Python in a new environment with these packages, elsewhere; its output."""
    python = directory / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", directory / "venv"], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    (directory / "elsewhere").mkdir()

    def run(*arguments):
        ended = subprocess.run(
            [python, *arguments],
            cwd=directory / "elsewhere",
            env=kept,
            text=True,
            stdout=subprocess.PIPE,
        )
        assert ended.returncode == 0, ended.stdout
        return ended.stdout

    return run


@pytest.mark.slow
def test_the_wheel_trains_from_another_directory(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", tmp_path, ROOT]
    subprocess.run(build, check=True)
    [wheel] = tmp_path.glob("*.whl")
    place = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", place, wheel]
    subprocess.run(install, check=True)
    command = [sys.executable, "-m", "orthojax", "train", "--workdir=run"]
    command += ["--config=digits_plain110:depth=8,steps=4", "--config.model.width=4"]
    subprocess.run(
        [*command, "--config.mesh.data=1", "--config.batch_size=8"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(place)},
        check=True,
    )
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 4
