"""The audit as a user runs it, on the embedded example, whose target is class 3."""

import json

import numpy as np
import pytest

from ibau_jax.data import load_dataset
from tests.cli.commands import AUDIT, AUDITED_UNLEARN, EXAMPLE, FAST, run

TARGET = 3
QUICK = ["--audit-steps", "80", "--audit-images", "100"]


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    return run(*AUDIT, "--ckpt", EXAMPLE, *QUICK, "--json", cwd=tmp_path_factory.mktemp("audit"))


@pytest.mark.slow
def test_the_example_is_backdoored_and_its_target_named(audited):
    assert audited.returncode == 1, audited.stderr
    found = json.loads(audited.stdout)
    assert found["verdict"] == "backdoored"
    assert found["suspects"][0]["label"] == TARGET
    for view in ("perturbation", "patch"):
        assert np.argmin(found["views"][view]["sizes"]) == TARGET
        numbers = {name: found["views"][view][name] for name in found["views"][view] if name != "unit"}
        assert numbers.pop("earlier") is None  # there was no audit before
        assert {len(of_classes) for of_classes in numbers.values()} == {11}  # and any other
    assert found["views"]["patch"]["success"][TARGET] > 0.7


@pytest.mark.slow
def test_what_a_person_sees(tmp_path):
    done = run(*AUDIT, "--ckpt", EXAMPLE, "--audit-steps", 3, "--audit-images", 20, cwd=tmp_path, fresh=True)
    assert done.returncode in (0, 1), done.stderr
    assert "3 steps are too few for a small trigger to show" in done.stderr
    for text in ("Smallest perturbation", "Smallest patch", "any other class", "median", "verdict: "):
        assert text in done.stdout
    assert max(map(len, done.stdout.split("verdict")[0].splitlines())) <= 80
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.slow
def test_too_few_clean_images_are_not_audited_but_unlearn(tmp_path, small_digits):
    few = ["--dataset", small_digits, *FAST, "--n-clean", 8, "--out", "out"]
    done = run(*AUDITED_UNLEARN, "--ckpt", EXAMPLE, *few, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "out is not audited: an audit takes 10 clean images" in done.stderr
    assert json.loads((tmp_path / "out" / "result.json").read_text())["audit"] is None
