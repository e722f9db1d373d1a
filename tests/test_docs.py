"""The Python blocks of the documentation run, in order, each page in a namespace of its own."""

import importlib.util
import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
OPTIONAL = ("equinox", "haiku")  # of the frameworks on the pages, those that are not required

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    if not page.exists():
        pytest.skip(f"there is no {page.name}")
    monkeypatch.chdir(tmp_path)  # what a block writes goes there
    text, namespace, left_out = page.read_text(encoding="utf-8"), {"__name__": page.stem}, []
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
    notebook = json.loads((ROOT / "docs" / "first_steps.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    namespace = {"__name__": "notebook"}
    for cell in cells:
        assert all(output["output_type"] != "error" for output in cell["outputs"])
        exec(compile("".join(cell["source"]), "first_steps.ipynb", "exec"), namespace)
    assert sum(bool(cell["outputs"]) for cell in cells) == len(cells)


def found(name):
    return importlib.util.find_spec(name) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_local_links_lead_somewhere(page):
    if not page.exists():
        pytest.skip(f"there is no {page.name}")
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing
