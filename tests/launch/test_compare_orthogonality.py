"""The comparison of orthogonal optimization, on tiny matrices and without PyTorch."""

import json

import pytest


def test_methods_are_timed_and_descend(tmp_path, program):
    small = ("--shapes", "2x6x4", "--cores", "1", "--rounds=2", "--budget=0.3", "--descents=1")
    done = program("compare_orthogonality", *small, f"--output={tmp_path}")
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "comparison.json").read_text())
    assert record["versions"]["jax"] and record["processor"] is not None
    rows = {row["method"]: row for row in record["rows"]}
    assert set(rows) == {"polar", "qr", "pogo", "landing"}
    for row in rows.values():
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
        assert row["errors"][-1] < 1e-4 and abs(row["gaps"][0]) < 1e-3
    assert "| `stiefel`, polar |" in done.out
    assert "2 of 6 × 4, 1 core:" in (tmp_path / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "6x4"], "'6x4' is not COUNTxROWSxCOLUMNS"),
        (["--shapes", "2x4x6"], "'2x4x6' has more columns than rows"),
        (["--rounds=1"], "2 or more show a spread"),
        (["--cores", "100000"], "--cores=100000: this process may use"),
        (["--torch_python=/nowhere/python", "--cores", "1"], "--torch_python=/nowhere/python"),
    ],
)
def test_impossible_arguments_are_refused_at_once(arguments, message, program):
    done = program("compare_orthogonality", *arguments)
    assert done.code == 2 and message in done.err
