"""The audit as a user runs it, on the embedded example.

What an audit of enough steps finds there is checked with the README's first command: tests/check_example.py.
"""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from ibau_jax.auditing.auditor import Audit, ViewFindings
from ibau_jax.auditing.judgement import anomaly_index, find_suspects, judge
from ibau_jax.cli.audit import audit_tables, verdict_lines
from ibau_jax.data import load_dataset
from tests.cli.commands import AUDIT, AUDITED_UNLEARN, EXAMPLE, FAST, run

EXIT_CODES = {"no backdoor found": 0, "suspicious": 1, "backdoored": 1}


def test_what_a_script_reads(tmp_path):
    quick = ["--audit-steps", 3, "--audit-images", 20]
    done = run(*AUDIT, "--ckpt", EXAMPLE, *quick, "--json", cwd=tmp_path, fresh=True)
    found = json.loads(done.stdout)
    assert done.returncode == EXIT_CODES[found["verdict"]]
    assert set(found["views"]) == {"perturbation", "patch"}
    for view in found["views"].values():
        numbers = {name: view[name] for name in view if name != "unit"}
        assert numbers.pop("earlier") is None  # there was no audit before
        assert {len(of_classes) for of_classes in numbers.values()} == {10}
    assert "3 steps are too few for a small trigger to show" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_a_person_sees():
    """On a screen of 80 columns: the classes with the smallest triggers, how they compare, and why the verdict is so."""
    shares, sizes = np.linspace(0, 1, 10), np.asarray([21.0, 20, 19, 2, 22, 23, 24, 25, 26, 27])
    patch = ViewFindings("pixels", sizes, shares, shares / 2, anomaly_index(sizes), triggers=())
    suspects = find_suspects({"patch": sizes})
    screen = Console(width=80, file=io.StringIO())
    for table in audit_tables(Audit(judge(suspects), suspects, {"patch": patch})):
        screen.print(table)
    rows = [line.split("│")[1:-1] for line in screen.file.getvalue().splitlines() if "│" in line]
    found = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    assert list(found) == ["3", "2", "1", "0", "4", "median"]
    assert found["3"][:2] == ["2.00", "11.25"]
    assert found["3"][3:] == ["33.33 %", "16.67 %"]
    assert found["median"] == ["22.50", "", "", "50.00 %", "25.00 %"]
    verdict, evidence = verdict_lines(Audit(judge(suspects), suspects, {"patch": patch}))
    assert verdict == "backdoored"
    assert evidence.startswith("class 3 (confidence 100 %): a patch of 2.00 pixels suffices, 11.2 times less than")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--audit-steps", 0], "steps is 0"),
        (["--audit-success", 1.5], "success is 1.5"),
        (["--dataset", "few.npz"], "not 4 and 3"),
        (["--dataset", "nosuch.npz"], "there is no file nosuch.npz"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, arguments, message):
    digits = load_dataset("digits", (32, 32, 3))
    np.savez(tmp_path / "few.npz", x=digits.images[:7], y=digits.labels[:7])
    done = run(*AUDIT, "--ckpt", EXAMPLE, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_too_few_clean_images_are_not_audited_but_unlearn(tmp_path, small_digits):
    few = ["--dataset", small_digits, *FAST, "--n-clean", 8, "--out", "out"]
    done = run(*AUDITED_UNLEARN, "--ckpt", EXAMPLE, *few, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "out is not audited: an audit takes 10 clean images" in done.stderr
    assert json.loads((tmp_path / "out" / "result.json").read_text())["audit"] is None
