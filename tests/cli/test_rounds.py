"""What rounds are evaluated on, and which one counts where logits are no longer finite."""

import json
from pathlib import Path

import numpy as np
import pytest

from ibau_jax.checkpoints import load
from ibau_jax.cli import run as cli_run
from ibau_jax.cli.options import parse
from ibau_jax.cli.unlearn_options import UnlearnOptions
from ibau_jax.data import load_dataset, split_dataset
from ibau_jax.errors import NotFiniteError
from ibau_jax.metrics import evaluate
from ibau_jax.triggers import load_attack
from tests.cli.commands import EXAMPLE, FAST


@pytest.fixture
def many_digits(tmp_path, monkeypatch):
    """More images than a round before the last is evaluated on; of 1300, 40 unlearn."""
    parts = [load_dataset(f"digits:{part}", (32, 32, 3)) for part in ("test", "train")]
    images, labels = (np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "labels"))
    np.savez(tmp_path / "digits.npz", x=images[:1300], y=labels[:1300])
    monkeypatch.chdir(tmp_path)
    return ["--ckpt", EXAMPLE, "--dataset", "digits.npz", *FAST, "--n-rounds", 2, "--no-audit", "--out", "out"]


@pytest.fixture
def not_finite(monkeypatch):
    """Logits are not finite in an evaluation where the numbers of images so far are some that `break_after` got."""
    calls = []

    def break_after(*counts):
        def evaluated(model, images, attack):
            calls.append(len(images))
            if tuple(calls) in counts:
                raise NotFiniteError("the logits are not finite")
            return evaluate(model, images, attack)

        monkeypatch.setattr("ibau_jax.cli.task.evaluate", evaluated)

    return break_after


def unlearned(arguments):
    return cli_run.run(parse(UnlearnOptions, [*map(str, arguments)]))


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_the_last_good_round_is_evaluated_on_all_images_and_others_on_some(many_digits, not_finite, broken):
    """Where the second round's logits are not finite, the first one counts."""
    not_finite(*([(1260, 1000, 1260)] if broken else []))
    code, result = unlearned(many_digits), json.loads(Path("out/result.json").read_text())
    assert (code, result["status"]) == ((1, "diverged") if broken else (0, "completed"))
    assert [record["n_images"] for record in result["rounds"]] == ([1260] if broken else [1000, 1260])
    split = split_dataset(load_dataset("digits.npz", (32, 32, 3)), 40, result["config"]["seed"])
    attack, names = load_attack("badnets", (32, 32, 3)).aimed_at(3), ("acc", "asr", "ra")
    metrics = evaluate(load(Path("out/model.pth")).model(), split.evaluation, attack)
    assert [result["after"][name] for name in names] == [getattr(metrics, name) for name in names]


@pytest.mark.slow
def test_of_several_runs_one_that_is_no_longer_finite_ends_with_its_last_good_round(many_digits, not_finite):
    not_finite((1260, 1000, 1260, 1260, 1000, 1260))  # the second run's last
    assert unlearned([*many_digits, "--seed", 0, 1]) == 1
    of_runs = json.loads(Path("out/summary.json").read_text())
    assert [run["status"] for run in of_runs] == ["completed", "diverged"]
    assert [run["after"]["n_images"] for run in of_runs] == [1260, 1260]


@pytest.mark.slow
def test_a_last_good_round_that_is_not_finite_for_other_images_is_one_line_and_no_result(many_digits, not_finite):
    not_finite((1260, 1000, 1260), (1260, 1000, 1260, 1260))
    with pytest.raises(NotFiniteError, match=r"after round 1 the logits are not finite. Try a smaller --lr"):
        unlearned(many_digits)
    assert not Path("out/result.json").exists()
