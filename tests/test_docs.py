"""The Python blocks of the documentation run, in order, each page in a namespace of its own."""

import importlib.util
import json
import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
OPTIONAL = ("equinox", "haiku")  # of the frameworks on the pages, those that are not required

# What the pages compute, and how much less of it is run here.
SMALLER = {
    "README.md": {"range(20)": "range(4)"},
    "constraint.md": {"depth: int = 20": "depth: int = 4", "range(60)": "range(45)"},
    "own_net.md": {"range(12)": "range(4)"},
    "modulation.md": {"range(20)": "range(6)"},
    "first_steps.ipynb": {"depth=44,steps=100": "depth=8,steps=4", "range(20)": "range(5)"},
}

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what a block writes goes there
    devices = jax.devices()[:1]  # as many as readers have
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    text, namespace, left_out = smaller(page), {"__name__": page.stem}, []
    assert text.count("```python") == len(BLOCK.findall(text))
    for block in BLOCK.finditer(text):
        missing = [name for name in OPTIONAL if f"import {name}" in block[1] and not found(name)]
        left_out += missing
        if not missing:
            # Line numbers of a traceback are those of the page.
            lines = text[: block.start(1)].count("\n")
            exec(compile("\n" * lines + block[1], str(page), "exec"), namespace)
    if left_out:
        pytest.skip(f"{page.name}: blocks left out for want of {', '.join(left_out)}")


def test_the_notebook_runs_and_is_stored_with_its_output(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    notebook = json.loads(smaller(ROOT / "docs" / "first_steps.ipynb"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    namespace = {"__name__": "notebook"}
    for cell in cells:
        assert all(output["output_type"] != "error" for output in cell["outputs"])
        exec(compile("".join(cell["source"]), "first_steps.ipynb", "exec"), namespace)
    assert sum(bool(cell["outputs"]) for cell in cells) == len(cells)


def smaller(page):
    text = page.read_text(encoding="utf-8")
    for computed, less in SMALLER.get(page.name, {}).items():
        assert text.count(computed) == 1
        text = text.replace(computed, less)
    return text


def found(name):
    return importlib.util.find_spec(name) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_local_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing
