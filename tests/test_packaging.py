"""What an installed package has: every room, the configs, a program to start."""

import configparser
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def test_every_room_is_installed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = setup["options"]["packages"].split()
    rooms = [file.parent.relative_to(ROOT) for file in (ROOT / "orthojax").rglob("__init__.py")]
    found = {room.as_posix().replace("/", ".") for room in rooms}
    elsewhere = {f"orthojax.{name}" for name in ("benchmarks", "configs", "experiments")}
    assert set(listed) == found | elsewhere and len(listed) == len(set(listed))


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
    required = setup["options"]["install_requires"].split("\n")
    pins = [line.replace(" >= ", "==") for line in required if line]
    assert all("==" in pin for pin in pins)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--prefer-binary", *pins, ROOT], check=True
    )
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    (tmp_path / "elsewhere").mkdir()
    subprocess.run([python, "-c", USE], cwd=tmp_path / "elsewhere", env=kept, check=True)


@pytest.mark.slow
def test_the_wheel_trains_from_another_directory(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", tmp_path, ROOT]
    subprocess.run(build, check=True)
    [wheel] = tmp_path.glob("*.whl")
    place = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", place, wheel]
    subprocess.run(install, check=True)
    command = [sys.executable, "-m", "orthojax.commands.train", "--workdir=run"]
    command += ["--config=digits_plain110:depth=8,steps=4", "--config.model.width=4"]
    subprocess.run(
        [*command, "--config.mesh.data=1", "--config.batch_size=8"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(place)},
        check=True,
    )
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 4
