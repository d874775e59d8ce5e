"""The benchmark's PyTorch side against the tests' own oracle, and the benchmark itself on the embedded example."""

import json
import runpy
import sys

import numpy as np
import pytest
import torch

from benchmarks import torch_baseline, unlearning
from benchmarks.compare import SIDES
from benchmarks.report import markdown
from benchmarks.torch_models import SmallVGG
from tests.cli.commands import run
from tests.conftest import ROOT
from tests.oracles import torch_ibau
from tests.oracles.cifar_models import randomise

COMMANDS = sorted(
    file.stem
    for file in (ROOT / "benchmarks").glob("*.py")
    if f"    python -m benchmarks.{file.stem}" in file.read_text().partition("import ")[0]
)
BENCHMARK = [sys.executable, ROOT / "scripts" / "benchmark.py"]


@pytest.mark.parametrize("clip", [False, True])
def test_the_baseline_computes_the_hypergradient(rng, clip):
    torch.manual_seed(0)
    model = randomise(SmallVGG(10), seed=1)
    images, first = torch.rand(2, 6, 3, 32, 32)
    labels, first_labels = torch.randint(0, 10, (2, 6))
    delta, indices = 0.1 * torch.randn(1, 3, 32, 32), torch.tensor([1, 4])
    mask = torch.zeros(6)
    mask[indices] = 1
    settings = torch_baseline.Settings(K=4, clip=clip)
    torch_baseline.set_hypergradient(model, delta, (images, labels), indices, (first, first_labels), settings)
    _, expected = torch_ibau.hypergradient(
        model, delta, (images, labels, mask), (first, first_labels), terms=4, clip=clip
    )
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        assert (parameter.grad - wanted).norm() <= 1e-4 * wanted.norm()


@pytest.mark.filterwarnings("ignore:grad and param do not obey:UserWarning")  # PyTorch's, about its own speed
@pytest.mark.parametrize(("optimizer", "bound"), [("sgd", None), ("adam", 0.5)])
def test_the_baseline_computes_the_perturbation(optimizer, bound):
    torch.manual_seed(0)
    model = randomise(SmallVGG(10), seed=1)
    images = torch.rand(3, 6, 3, 32, 32)
    batches = [(part, torch.zeros(6, dtype=torch.long)) for part in images]
    settings = torch_baseline.Settings(inner_optim=optimizer, inner_lr=0.1, norm_bound=bound)
    found = torch_baseline.perturbation(model, batches, settings)
    expected = torch_ibau.perturbation(model, batches, clip=False, optimizer=optimizer, learning_rate=0.1, bound=bound)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_an_unknown_case(tmp_path):
    done = run(*BENCHMARK, "--case", "nosuch", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "digits-400" in done.stderr


def test_results_that_are_there_make_tables():
    files = list((ROOT / "benchmarks" / "results").glob("*.json"))
    assert files
    document = (ROOT / "docs" / "performance.md").read_text()
    for file in files:
        assert markdown(json.loads(file.read_text())) in document  # the document is made of the files


@pytest.mark.slow
def test_both_sides_unlearn_the_embedded_example(tmp_path):
    done = run(*BENCHMARK, "--case", "digits-400", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("|")]
    figures = {row[2].strip(): row[-2].strip() for row in rows if row[2].strip() in SIDES}
    assert set(figures) == set(SIDES)
    for side, text in figures.items():
        acc, asr = map(float, text.split("/"))
        assert acc > 90, side
        assert asr < 20, side
    ratios = next(row for row in rows if "ratio" in row[2])
    assert float(ratios[4].strip(" *x")) > 0
    assert np.isfinite(float(ratios[5].strip(" *x")))


def test_the_table_of_unlearning_says_how_far_the_kept_round_is_behind_the_best():
    rounds = [
        {"acc": 0.70, "asr": 0.02, "ra": 0.6},
        {"acc": 0.75, "asr": 0.04, "ra": 0.7},
        {"acc": 0.75, "asr": 0.10, "ra": 0.6},
    ]
    run = {"before": {"acc": 0.8, "asr": 1.0, "ra": 0.0}, "after": rounds[2], "rounds": rounds, "seconds": 100.0}
    np.testing.assert_allclose(unlearning.shortfall(run), (0.0, 0.06))
    better = {**run, "after": rounds[1], "seconds": 200.0}
    lines = unlearning.table({"x": {"robust,100": {"0": run, "1": better}, "robust,5000": {"0": better}}}).splitlines()
    assert [line.split(" | ")[2] for line in lines[2:]] == ["5000", "100"]
    cells = lines[3].strip("| ").split(" | ")
    assert cells == [
        "`x`", "robust", "100", "80.0 / 100.0 / 0.0", "**75.0 / 7.0 / 65.0**",
        "0: 75.0 / 10.0 / 60.0; 1: 75.0 / 4.0 / 70.0", "0.0 / 6.0", "150",
    ]  # fmt: skip
    clean = {**run, "before": {"acc": 0.8, "asr": None, "ra": None}, "after": {"acc": 0.79, "asr": None, "ra": None}}
    assert "**79.0 / – / –**" in unlearning.row("y", "robust,100", {"0": clean})


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # another test imported it
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_takes_and_does_nothing(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    assert end.value.code == 0
    assert f"python -m benchmarks.{name}" in capsys.readouterr().out
