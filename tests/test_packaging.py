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
    assert set(listed) == found | {"orthojax.configs"} and len(listed) == len(set(listed))


@pytest.mark.slow
def test_the_wheel_trains_from_another_directory(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", tmp_path, ROOT]
    subprocess.run(build, check=True)
    [wheel] = tmp_path.glob("*.whl")
    place = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", place, wheel]
    subprocess.run(install, check=True)
    command = [sys.executable, "-m", "orthojax.launch.train", "--workdir=run"]
    command += ["--config=digits_plain110:depth=8,steps=4", "--config.model.width=4"]
    subprocess.run(
        [*command, "--config.mesh.data=1", "--config.batch_size=8"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(place)},
        check=True,
    )
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 4
