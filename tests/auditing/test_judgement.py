import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibau_jax.auditing import Audit, audit
from ibau_jax.auditing.auditor import SpaceFindings
from ibau_jax.auditing.auditor import _verdict as judged
from ibau_jax.auditing.judgement import (
    BACKDOORED,
    SUSPICIOUS,
    UNDECIDED,
    anomaly_index,
    confidence,
    find_suspects,
    judge,
    lingering,
)
from ibau_jax.auditing.search import SmallestTriggers
from ibau_jax.cli.audit import audit_record, audit_tables, verdict_lines
from ibau_jax.config import AuditConfig
from ibau_jax.data import Dataset
from ibau_jax.errors import DataError
from ibau_jax.perturbations import Patch
from tests.nets import Brightness

EVEN = np.full(11, 8.0)  # of ten classes, and of what leads to any other


def with_ratio(ratio, label=3):
    sizes = EVEN.copy()
    sizes[label] /= ratio
    return sizes


def test_anomaly_index_of_a_normal_distribution_counts_standard_deviations():
    logarithms = np.random.default_rng(0).normal(1.0, 0.2, 20001)
    logarithms[[0, -1]] = 1.0 - 5 * 0.2
    assert anomaly_index(np.exp(logarithms))[0] == pytest.approx(5, rel=0.05)


def test_anomaly_index_by_hand():
    sizes = np.exp(np.asarray([0.0, 2.0, 3.0, 4.0, 4.0, 1.0]))  # median 3, deviations 3 1 0 1 1, their median 1
    np.testing.assert_allclose(anomaly_index(sizes), np.asarray([3, 1, 0, -1, -1, 2]) / 1.4826)


@pytest.mark.parametrize(
    ("below", "verdict"),
    [
        (SUSPICIOUS - 0.01, "no backdoor found"),
        (SUSPICIOUS + 0.01, "suspicious"),
        (BACKDOORED - 0.01, "suspicious"),
        (BACKDOORED + 0.01, "backdoored"),
    ],
)
def test_verdict_at_the_thresholds(below, verdict):
    assert judge(find_suspects({"patch": with_ratio(np.exp(below)), "perturbation": EVEN})) == verdict
    assert judge(find_suspects({"patch": EVEN, "perturbation": with_ratio(np.exp(below))})) == verdict


def test_suspects_come_in_order_and_name_the_space_they_stand_out_in():
    suspects = find_suspects({"patch": with_ratio(4, label=7), "perturbation": with_ratio(5, label=1)})
    assert [(suspect.label, suspect.space) for suspect in suspects] == [(1, "perturbation"), (7, "patch")]
    assert suspects[0].ratio == pytest.approx(5)
    assert suspects[0].confidence > suspects[1].confidence > 0.9


def test_away_from_the_own_class_counts_where_less_is_needed_than_to_any_class():
    alone = find_suspects({"patch": with_ratio(5, label=10), "perturbation": EVEN})
    assert [(suspect.label, suspect.space, round(suspect.ratio, 3)) for suspect in alone] == [(None, "patch", 5)]
    assert judge(alone) == "backdoored"
    beside = find_suspects({"patch": with_ratio(5, label=10), "perturbation": with_ratio(3)})
    assert [suspect.label for suspect in beside] == [3, None]
    assert judge(beside) == "backdoored"
    for ratio in (4.9, 5.4):  # what leads to class 3 leads away too; between seeds sizes differ by a tenth
        to_one = with_ratio(5) / np.where(np.arange(11) == 10, ratio, 1)
        assert [suspect.label for suspect in find_suspects({"patch": to_one})] == [3]
    assert find_suspects({"patch": np.asarray([8.0, 8.0, 1.0])}) == ()  # of two classes it is the other one


@given(factor=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_units_do_not_matter(factor, seed):
    sizes = np.exp(np.random.default_rng(seed).normal(0, 0.5, 10))
    np.testing.assert_allclose(anomaly_index(sizes * factor), anomaly_index(sizes), atol=1e-6)
    ratios = [suspect.ratio for suspect in find_suspects({"patch": sizes})]
    np.testing.assert_allclose([suspect.ratio for suspect in find_suspects({"patch": sizes * factor})], ratios)


def test_confidence_is_even_between_the_thresholds():
    assert confidence((SUSPICIOUS + BACKDOORED) / 2) == pytest.approx(0.5)


def test_a_class_lingers_where_a_smallest_trigger_still_leads_to_it():
    sizes = {"patch": with_ratio(1.3), "perturbation": with_ratio(1.6)}
    found = lingering(3, sizes)
    assert (found.label, found.space, round(found.ratio, 3)) == (3, "perturbation", 1.6)
    assert lingering(3, sizes | {"perturbation": with_ratio(1.6, label=5)}).space == "patch"
    assert lingering(3, {"patch": with_ratio(1.3, label=5)}) is None


def found(success):
    everything = SmallestTriggers({}, with_ratio(5), np.ones(11, bool))
    return {"patch": SpaceFindings(Patch(), everything, np.full(11, success))}


@pytest.mark.parametrize(
    ("images", "success", "stands_out", "verdict"),
    [
        (99, 0.9, False, UNDECIDED),
        (100, 0.9, False, "no backdoor found"),
        (99, 0.9, True, "backdoored"),  # 89 of other classes: at least 82 % follow
        (20, 0.6, True, UNDECIDED),  # 18 of other classes: at least 36 % follow
        (200, 0.6, True, "backdoored"),
        (99, np.nan, True, UNDECIDED),  # not measured
    ],
)
def test_few_images_say_only_what_others_confirm(images, success, stands_out, verdict):
    labels = np.arange(images) % 10
    data, spaces = Dataset(np.zeros((images, 2, 2, 3), np.uint8), labels), found(success)
    suspects = find_suspects({"patch": with_ratio(5)}) if stands_out else ()
    assert judged(suspects, spaces, data, data) == verdict


def test_what_any_other_class_is_called():
    suspect = find_suspects({"patch": with_ratio(5, label=10)})[0]
    findings = SpaceFindings(Patch(), SmallestTriggers({}, with_ratio(5, label=10), EVEN > 0), np.full(11, 0.45))
    audited = Audit("backdoored", (suspect,), {"patch": findings}, (4, 4, 3), 1.0, 500, 200, AuditConfig())
    assert (
        "any other class (confidence 100 %): a patch of 1.60 pixels leads there, 5.0 times smaller than the median "
        "class's; 45.00 % of held-out images follow it" in list(verdict_lines(audited))
    )
    assert next(audit_tables(audited)).columns[0]._cells[0] == "any other class"
    assert audit_record(audited)["suspects"][0]["label"] is None


def test_images_of_one_class_are_not_audited():
    images = Dataset(np.zeros((30, 4, 4, 1), np.uint8), np.zeros(30, np.int64))
    with pytest.raises(DataError, match="15 of 15 are of class 0"):
        audit(Brightness(), images)
