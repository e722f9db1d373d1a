"""The commands of the pages on what comes before and after training."""

import json
import pathlib
import re
import shlex
from unittest import mock

import jax
import numpy as np
import PIL.Image
import pytest

from orthojax.commands.config_flag import run_name
from orthojax.errors import DivergenceError
from orthojax.training.compiled import abstract_state
from orthojax.training.experiment import build

ROOT = pathlib.Path(__file__).parent.parent.parent
TINY = (
    *("--config.steps=6", "--config.mesh.data=1", "--config.batch_size=8"),
    *("--config.model.width=2", "--config.model.depth=8"),
)


def page(name):
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def blocks(name, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page(name), re.MULTILINE | re.DOTALL)


def commands(block):
    """Program and words of every command of a block that starts one of ours."""
    for command in block.replace("\\\n", " ").splitlines():
        python, *words = shlex.split(command, comments=True)
        if python == "python":
            yield pathlib.Path(words[0]).stem, words[1:]


def run(program, block, place, *tiny):
    """Runs the commands of a block; those that train are made small. By program, what each said."""
    found = {}
    for name, words in commands(block):
        done = program(name, *words, *(tiny if name == "train" else ()), cwd=place)
        assert done.code == 0, done.err
        found[name] = done.out + done.err
    return found


@pytest.fixture(scope="module")
def told(tmp_path_factory, program):
    """Trained nets: what each command said, and where."""
    place = tmp_path_factory.mktemp("user")
    rng = np.random.default_rng(0)
    for name in ("one", "two", "three"):
        pixels = rng.integers(0, 256, (20, 30), np.uint8)
        PIL.Image.fromarray(pixels).save(place / f"{name}.png")
    return place, run(program, blocks("inference.md", "bash")[0], place, *TINY)


def test_predict_names_a_class_for_every_picture(told):
    lines = [line for line in told[1]["predict"].splitlines() if ".png" in line]
    assert [line.split()[0] for line in lines] == ["one.png", "two.png", "three.png"]
    for line in lines:
        shares = [float(share) for share in re.findall(r"([\d.]+)%", line)]
        assert len(shares) == 3 and shares == sorted(shares, reverse=True)


def test_evaluate_agrees_with_training(told):
    place, said = told
    found = json.loads((place / "runs/digits/evaluation.json").read_text())
    summary = json.loads((place / "runs/digits/summary.json").read_text())
    assert found["accuracy"] == summary["test_accuracy"]
    assert found["images"] == 360 == sum(map(sum, found["confusion"]))
    assert f"top-1 {found['accuracy']:.2%}" in said["evaluate"]
    assert (place / "runs/digits/confusion.png").stat().st_size > 10_000


def test_export_leaves_a_program(told):
    place, said = told
    assert "uint8 (N, 8, 8, 1) to float32 (N, 10)" in said["export"]
    assert (place / "digits.stablehlo").stat().st_size > 1000


def test_pictures_in_folders_and_fine_tuning(tmp_path, program):
    for package in ("grain", "simplejpeg", "cv2"):
        pytest.importorskip(package)
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            place = tmp_path / "pets" / split / name
            place.mkdir(parents=True)
            for index in range(5):
                pixels = rng.integers(0, 256, (40, 50, 3), np.uint8)
                PIL.Image.fromarray(pixels).save(place / f"{index}.jpg")
    first, second = blocks("own_data.md", "bash")
    small = (*TINY, "--config.batch_size=4", "--config.dataset.workers=0")
    run(program, first, tmp_path, *small)
    # What the second begins with; on the page it is a net of CIFAR-10, which has as many channels.
    (tmp_path / "runs" / "pets").rename(tmp_path / "runs" / "cifar")
    said = run(program, second, tmp_path, *small)["train"]
    assert "begins as step 6 of runs/cifar: the head is kept" in said


def test_the_sweep_of_the_coefficient_trains_what_has_no_record(tmp_path, program):
    command = re.search(r"python launch/(sweep_coefficient).py *#", page("coefficient.md"))
    diverged = DivergenceError("at step 3")
    for left in (30, 0):
        with mock.patch(
            "orthojax.training.train.train_and_evaluate", side_effect=diverged
        ) as train:
            done = program(command[1], f"--workdir={tmp_path / 'runs'}")
        assert done.code == 0 and train.call_count == left and f"{left} are left" in done.err
    lines = (tmp_path / "runs" / "coefficient.jsonl").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 30 and (tmp_path / "runs" / "coefficient.png").exists()


def test_a_net_of_ones_own(flags, tmp_path, monkeypatch):
    (tmp_path / "my_nets.py").write_text(blocks("own_net.md", "python")[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    [(_, words)] = commands(blocks("own_net.md", "bash")[0])
    state = abstract_state(build(flags(*words), records=False))
    shapes = [leaf.shape for leaf in jax.tree.leaves(state.params)]
    assert shapes.count((3, 3, 16, 16)) == 5 and (3,) in shapes  # modulation sites


def test_a_config_of_ones_own(flags, tmp_path):
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "my_config.py").write_text(blocks("configs.md", "python")[0])
    [(_, words)] = commands(blocks("configs.md", "bash")[0])
    config = flags(*words)
    assert (config.seed, config.steps, config.schedule.name) == (1, 40, "linear")
    assert run_name() == "my_config-seed=1"
    build(config, records=False)
