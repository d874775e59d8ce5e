"""Several checkpoints, seeds and learning rates from one command line."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from ibau_jax.checkpoints import load
from ibau_jax.cli.options import ModelOptions
from ibau_jax.cli.plan import plan_runs
from ibau_jax.config import UnlearnConfig
from ibau_jax.data import load_dataset
from ibau_jax.errors import ConfigError
from tests.cli import commands
from tests.cli.commands import EVALUATE, EXAMPLE, UNLEARN, run
from tests.cli.test_scripts import KILLED

FAST = [*commands.FAST, "--dataset", "small.npz"]


@pytest.fixture
def folder(tmp_path):
    """Two checkpoints and one that is none, and few images."""
    digits = load_dataset("digits", (32, 32, 3))
    np.savez(tmp_path / "small.npz", x=digits.images[:80], y=digits.labels[:80])
    for name in ("a", "b"):
        shutil.copy(EXAMPLE, tmp_path / f"{name}.pth")
    (tmp_path / "broken.pth").write_bytes(EXAMPLE.read_bytes()[:5000])
    return tmp_path


@pytest.mark.slow
def test_a_broken_checkpoint_is_reported_and_the_others_finish(folder):
    done = run(*UNLEARN, "--ckpt", "*.pth", *FAST, "--out", "out", cwd=folder)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("broken: ")
    assert done.stderr.count("\n") == 1
    records = {record["run"]: record for record in json.loads((folder / "out" / "summary.json").read_text())}
    assert set(records) == {"a", "b", "broken"}
    assert "error" in records["broken"]
    for name in ("a", "b"):
        assert records[name]["status"] == "completed"
        assert json.loads((folder / "out" / name / "result.json").read_text())["after"] == records[name]["after"]
        assert name in done.stdout
    # The same content and the same options give the same result.
    assert len({(folder / "out" / name / "model.pth").read_bytes() for name in ("a", "b")}) == 1


@pytest.mark.slow
def test_seeds_and_learning_rates_are_swept(folder):
    done = run(*UNLEARN, "--ckpt", "a.pth", *FAST, "--seed", 0, 1, "--lr", 1e-3, 1e-4, cwd=folder)
    assert done.returncode == 0, done.stderr
    names = {f"a-seed{seed}-lr{lr}" for seed in (0, 1) for lr in ("0.001", "0.0001")}
    assert {path.name for path in (folder / "runs").iterdir()} == names | {"summary.json"}
    for name in names:
        config = json.loads((folder / "runs" / name / "result.json").read_text())["config"]
        assert name == f"a-seed{config['seed']}-lr{config['lr']:g}"
    leaves = [load(folder / "runs" / name / "model.pth").leaves for name in sorted(names)]
    key = next(iter(leaves[0]))
    assert len({leaf[key].tobytes() for leaf in leaves}) == 4


@pytest.mark.slow
def test_compiled_programs_are_kept_unless_told_not_to(folder):
    def cached(name, *arguments):
        environment = {**os.environ, "XDG_CACHE_HOME": str(folder / name)}
        done = run(*EVALUATE, "--ckpt", "a.pth", "--dataset", "small.npz", *arguments, cwd=folder, env=environment)
        assert done.returncode == 0, done.stderr
        return [path for path in (folder / name).glob("ibau_jax/*/*") if path.is_file()]

    assert cached("kept")
    assert not cached("not", "--no-compile-cache")


def test_nothing_but_broken_checkpoints(folder):
    done = run(*UNLEARN, "--ckpt", "broken.pth", "nosuch.pth", *FAST, cwd=folder)
    assert (done.returncode, done.stderr.count("\n")) == (2, 2)
    assert not (folder / "runs").exists()


def test_a_pattern_that_fits_nothing(folder):
    done = run(*UNLEARN, "--ckpt", "nosuch*.pth", *FAST, cwd=folder)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "nosuch*.pth" in done.stderr


def planned(*paths, out=None):
    subjects = [ModelOptions(ckpt=path) for path in paths]
    return [run.folder.as_posix() for run in plan_runs(subjects, [UnlearnConfig()], out)]


def test_folders_of_runs(tmp_path):
    one, other = Path("record/x/attack_result.pt"), Path("record/y/attack_result.pt")
    assert planned(one) == ["runs/attack_result"]
    assert planned(one, out=Path("here")) == ["here"]
    assert planned(one, other) == ["runs/x-attack_result", "runs/y-attack_result"]
    assert planned(Path("m/a.pth"), Path("m/a.pt"), out=tmp_path) == [f"{tmp_path}/a-pth", f"{tmp_path}/a-pt"]
    with pytest.raises(ConfigError, match="twice"):
        planned(one, one)


@pytest.mark.slow
def test_several_runs_that_are_killed_while_results_are_put_in_place_go_on(folder):
    """After the first run's results and a part of the second one's: with --resume both are there, and nothing else."""
    (folder / "killed.py").write_text(KILLED)
    arguments = ["--ckpt", "a.pth", "b.pth", *FAST]
    where = folder / "out" / "b"
    killed = run(
        sys.executable, folder / "killed.py", 2, where, UNLEARN[1], "--no-audit", *arguments, "--out", "out", cwd=folder
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (folder / "out" / "a" / "result.json").exists()
    assert not (where / "result.json").exists()
    for _ in range(2):  # the second time all is there
        resumed = run(*UNLEARN, *arguments, "--out", "out", "--resume", cwd=folder)
        assert resumed.returncode == 0, resumed.stderr
        records = json.loads((folder / "out" / "summary.json").read_text())
        assert [(record["run"], record["status"]) for record in records] == [("a", "completed"), ("b", "completed")]
        assert records[0]["after"] == records[1]["after"]
        assert sorted(entry.name for entry in (folder / "out").iterdir()) == ["a", "b", "summary.json"]
        assert not list(where.glob(".*"))
