"""The comparison's arithmetic, against figures worked out by hand, and its tables."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.methods import of_unlearning
from ibau_jax.comparison import (
    Outcome,
    Trial,
    as_csv,
    as_markdown,
    check_methods,
    effectiveness,
    key_of,
    method_names,
    outcome_of,
    rows,
)
from ibau_jax.errors import ConfigError
from ibau_jax.metrics import Metrics


def outcome(method, after, seed=0, before=(0.9, 1.0, 0.0), n_clean=100, seconds=10.0):
    def metrics(acc, asr, ra):
        return Metrics(acc, asr, asr, ra)

    return Outcome("model", method, n_clean, seed, metrics(*before), metrics(*after), seconds)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((0.9, 1.0), (0.9, 0.0), 1.0),  # the attack is gone, and nothing lost
        ((0.9, 1.0), (0.9, 1.0), 0.5),  # nothing happened
        ((0.9, 1.0), (0.8, 0.2), 0.85),
        ((0.9, 0.5), (0.95, 0.7), 0.5),  # more accuracy and more attack are not counted
        ((0.9, 1.0), (0.1, 1.0), 0.1),
    ],
)
def test_der(before, after, expected):
    assert effectiveness(Metrics(*before), Metrics(*after)) == pytest.approx(expected)


shares = st.floats(0, 1)


@given(shares, shares, shares, shares)
def test_der_is_a_share(acc, asr, acc_after, asr_after):
    assert 0 <= effectiveness(Metrics(acc, asr), Metrics(acc_after, asr_after)) <= 1


OUTCOMES = [
    outcome("ft", (0.88, 0.6, 0.3), 0),
    outcome("ft", (0.90, 0.4, 0.5), 1, seconds=20.0),
    outcome("robust", (0.89, 0.0, 0.8), 0),
    outcome("ft", (0.91, 0.9, 0.1), 0, n_clean=5000),
]


def test_rows_are_means_with_the_best_first():
    found = rows(OUTCOMES)
    assert [(row["n_clean"], row["method"], row["runs"]) for row in found] == [
        (5000, "ft", 1), (100, "robust", 1), (100, "ft", 2)
    ]  # fmt: skip
    few = found[2]
    assert few["acc"] == pytest.approx(0.89)
    assert few["acc_sd"] == pytest.approx(0.0141421, rel=1e-4)  # of a sample of two: 0.02 / sqrt 2
    assert few["asr"] == pytest.approx(0.5)
    assert few["der"] == pytest.approx(((0.4 - 0.02 + 1) / 2 + (0.6 + 1) / 2) / 2)
    assert few["seconds"] == 15
    assert few["paired"] == pytest.approx(((0.4 - 0.02 + 1) / 2, (1 - 0.01 + 1) / 2))  # seed 0 alone is in both
    assert found[0]["paired"] is None


def test_the_table_has_every_run():
    text = as_markdown(OUTCOMES)
    assert "| 100 | ft | 2 | 89.0 ± 1.4 | 50.0 ± 14.1 | 40.0 ± 14.1 | 74.5 ± 7.8 | 69.0 / 99.5 | 15 ± 7 |" in text
    assert text.count("| `model` |") == len(OUTCOMES)
    read = list(csv.DictReader(io.StringIO(as_csv(OUTCOMES))))
    assert [float(row["after_asr"]) for row in read] == [0.6, 0.4, 0.0, 0.9]
    assert [float(row["der"]) for row in read] == pytest.approx([one.der for one in OUTCOMES])


def test_methods_are_known():
    assert {"robust", "cifar10", "backdoorbench", "ft", "ft-sam", "fp", "nc", "nad", "anp", "sau"} <= set(
        method_names()
    )
    check_methods(method_names())
    with pytest.raises(ConfigError, match="there is no method 'magic'; choose of robust"):
        check_methods(["ft", "magic"])


def test_of_what_was_found_of_robust_the_table_takes_the_runs_that_others_had_and_that_are_not_there():
    def found(acc):
        shares = {"asr": 0.1, "asr_all": 0.1, "ra": 0.5}
        return {"before": {"acc": 0.9, **shares}, "after": {"acc": acc, **shares}, "seconds": 3.0}

    results = {
        "model": {"robust,100": {"0": found(0.1), "1": found(0.2), "2": found(0.3)}, "cifar10,100": {"1": found(0.4)}}
    }
    taken = of_unlearning(results, OUTCOMES)
    assert [(one.key, one.after.acc) for one in taken] == [(("model", "robust", 100, 1, None), 0.2)]


def test_methods_on_one_model_measure_it_as_it_came_once(monkeypatch):
    monkeypatch.setattr("ibau_jax.comparison.defend", lambda method, *arguments, **options: (method, 1.0))
    measured = []

    def measure(model):
        measured.append(model)
        return Metrics(0.5)

    trial = Trial("as it came", None, measure)
    for method in ("ft", "fp"):
        assert outcome_of(key_of("x", method, 10, 0, None), trial).before == Metrics(0.5)
    assert measured == ["as it came", "ft", "fp"]
