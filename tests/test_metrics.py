"""ACC, ASR, RA and ASR_all against a count by hand, on models whose predictions are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from ibau_jax.checkpoints import load
from ibau_jax.data import Dataset, load_dataset
from ibau_jax.errors import ConfigError, DataError
from ibau_jax.metrics import Metrics, check_measurable, confidence_interval, evaluate, predict
from ibau_jax.report.conclusion import conclude
from ibau_jax.triggers import Additive, Attack, load_attack
from tests.oracles.twins import as_torch

CLASSES = 5


class ReadsPixels(nnx.Module):
    """Says the class that the first pixel names; the second, where it is not black, overrules it."""

    def __call__(self, x):
        first, second = jnp.round(x[:, 0, 0, 0] * 255), jnp.round(x[:, 0, 1, 0] * 255)
        return jax.nn.one_hot(jnp.where(second > 0, second - 1, first).astype(jnp.int32), CLASSES)


def stamped(classes):
    """An attack that writes a class for each image of the data set into the second pixel (0: leaves it)."""

    def stamp(images):
        return images.at[:, 0, 1, :].set(jnp.asarray(classes, jnp.float32)[: len(images), None] / 255)

    return stamp


def data(first, labels):
    images = np.zeros((len(labels), 2, 2, 3), np.uint8)
    images[:, 0, 0] = np.asarray(first)[:, None]
    return Dataset(images, np.asarray(labels))


def test_by_hand():
    labels = [0, 1, 2, 3, 4, 2]
    dataset = data([0, 1, 2, 3, 0, 2], labels)  # one of six is wrong
    said = [2, 2, 2, 3, 2, 0]  # what the triggered images are classified as; the target is 2
    attack = Attack("test", stamped(np.asarray(said) + 1))
    metrics = evaluate(ReadsPixels(), dataset, attack, 2, batch_size=6)
    assert metrics.acc == pytest.approx(5 / 6)
    assert metrics.asr == pytest.approx(3 / 4)  # labels 0, 1, 3, 4 became 2, 2, 3, 2
    assert metrics.ra == pytest.approx(1 / 4)
    assert metrics.asr_all == pytest.approx(4 / 6)
    assert (metrics.n_images, metrics.n_triggered, metrics.n_triggered_all, metrics.n_classes) == (6, 4, 6, 5)
    all_to_all = Attack("test", stamped(np.asarray([1, 2, 0, 4, 0, 3]) + 1), all_to_all=True)
    metrics = evaluate(ReadsPixels(), dataset, all_to_all, batch_size=6)
    assert metrics.asr == metrics.asr_all == pytest.approx(5 / 6)  # 2 became 0, not 3
    assert metrics.ra == 0


@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30),
    target=st.integers(0, 4),
)
@settings(max_examples=20, deadline=None)
def test_against_a_count_in_python(rows, target):
    clean, labels, said = (list(column) for column in zip(*rows, strict=True))
    attack = Attack("test", stamped(np.asarray(said + [0] * 30) + 1))
    metrics = evaluate(ReadsPixels(), data(clean, labels), attack, target, batch_size=30)
    counted = [(s, y) for s, y in zip(said, labels, strict=True) if y != target]
    assert metrics.acc == pytest.approx(sum(c == y for c, y in zip(clean, labels, strict=True)) / len(rows))
    assert metrics.asr_all == pytest.approx(sum(s == target for s in said) / len(rows))
    if counted:
        assert metrics.asr == pytest.approx(sum(s == target for s, _ in counted) / len(counted))
        assert metrics.ra == pytest.approx(sum(s == y for s, y in counted) / len(counted))
    else:
        assert metrics.asr is None
        assert metrics.ra is None


def test_without_an_attack_only_acc():
    shares = (1.0, 0.5, *(None,) * (CLASSES - 2))
    assert evaluate(ReadsPixels(), data([0, 1, 0], [0, 1, 1])) == Metrics(
        2 / 3, n_images=3, n_classes=2, class_acc=shares
    )


def test_wrong_targets_and_labels_are_refused():
    attack = load_attack("badnets", (6, 6, 3))
    images = Dataset(np.zeros((2, 6, 6, 3), np.uint8), np.asarray([0, 1]))
    for target in (None, -1, 5):
        with pytest.raises(ConfigError):
            evaluate(ReadsPixels(), images, attack, target)
    with pytest.raises(DataError, match="label 7"):
        evaluate(ReadsPixels(), data([0], [7]))


def test_real_checkpoints_against_torch(shared):
    """The same predictions as PyTorch on real images, clean and triggered, so the same ACC and ASR."""
    checkpoint = load(shared / "checkpoints" / "badnets_8_02_ckpt.pth")
    arrays = np.load(shared / "data" / "cifar10_test.npz")
    dataset = Dataset(arrays["x"][:530], arrays["y"][:530].astype(np.int64))
    model = checkpoint.architecture.torch_module(10)
    state = torch.load(shared / "checkpoints" / "badnets_8_02_ckpt.pth", map_location="cpu", weights_only=True)
    model.load_state_dict(state["net"])
    attack = load_attack("badnets", (32, 32, 3))
    unit = dataset.images.astype(np.float32) / 255
    with torch.no_grad():
        expected = [model.eval()(as_torch(x)).argmax(1).numpy() for x in (unit, attack.stamp(unit))]
    for stamp, classes in zip((None, attack.stamp), expected, strict=True):
        assert np.mean(predict(checkpoint.model(), dataset, stamp) == classes) >= 0.998  # ties in float32
    metrics = evaluate(checkpoint.model(), dataset, attack, 8)
    others = dataset.labels != 8
    assert metrics.acc == pytest.approx(np.mean(expected[0] == dataset.labels), abs=0.004)
    shares = [np.mean(expected[0][dataset.labels == label] == label) for label in range(10)]
    assert metrics.class_acc == pytest.approx(shares, abs=0.03)  # one of 40 images
    assert metrics.asr == pytest.approx(np.mean(expected[1][others] == 8), abs=0.004)


@pytest.mark.parametrize(("hits", "count"), [(0, 1), (1, 1), (0, 30), (30, 30), (45, 100), (1, 10_000)])
def test_intervals_are_exact(hits, count):
    expected = binomtest(hits, count).proportion_ci(0.95, method="exact")
    np.testing.assert_allclose(confidence_interval(hits / count, count), expected, atol=1e-9)
    metrics = Metrics(hits / count, ra=hits / count, n_images=count)
    assert metrics.intervals() == {"acc": confidence_interval(hits / count, count)}  # nobody counted triggered images


def test_figures_come_back_from_records_of_more_and_of_older_versions():
    old = {"acc": 0.5, "asr": None, "asr_all": None, "ra": None}
    assert Metrics.of({**old, "round": 3}) == Metrics(0.5)
    assert Metrics.of({**old, "n_images": 7}).n_images == 7
    assert Metrics.of({**old, "class_acc": [0.5, None]}).class_acc == (0.5, None)
    wrong = [{}, {**old, "acc": None}, {**old, "acc": 1.5}, {**old, "acc": "x"}, {**old, "asr": float("nan")}]
    for record in [
        *wrong,
        {**old, "n_images": -1},
        {**old, "n_images": "7"},
        {**old, "n_images": True},
        {**old, "class_acc": [2]},
    ]:
        with pytest.raises((KeyError, TypeError, ValueError)):
            Metrics.of(record)


def test_a_trigger_that_leads_elsewhere_than_was_named_is_told(shared):
    """A published model whose target is 8, by PyTorch's own classes; and the same with that target."""
    checkpoint = load(shared / "checkpoints" / "badnets_8_02_ckpt.pth")
    images = load_dataset(str(shared / "data" / "cifar10_test.npz"), checkpoint.input_shape).first(200)
    attack = load_attack("badnets", checkpoint.input_shape)
    wrong, right = (evaluate(checkpoint.model(), images, attack, target) for target in (3, 8))
    assert wrong.leads_to == 8
    assert "to class 8, not to its target" in wrong.doubt_of_target
    assert (right.leads_to, right.doubt_of_target) == (None, None)
    assert "class 8" in " ".join(conclude(wrong, wrong, {}, targeted=False).reasons)


def test_a_trigger_that_changes_nothing_measures_nothing():
    images = data([0, 0], [0, 1])
    for stamp in (
        Additive(np.zeros(images.images.shape[1:], np.float32)),
        Additive(np.full(images.images.shape[1:], 1e-3)),
    ):
        with pytest.raises(DataError, match=r"x \(to class 3\) changes no pixel of the first 2 images"):
            check_measurable(Attack("x", stamp, target_label=3), images, CLASSES)
    check_measurable(Attack("x", Additive(np.full(images.images.shape[1:], 0.01)), target_label=3), images, CLASSES)


def test_images_of_the_target_class_alone_measure_nothing():
    check_measurable(Attack("x", None, target_label=3), data([0, 0], [3, 2]), CLASSES)
    check_measurable(Attack("x", None, all_to_all=True), data([0], [3]), CLASSES)
    triggered = Attack("x", None, triggered=data([0], [3]), target_label=3)
    for attack, labels in ((Attack("x", None, target_label=3), [3, 3]), (triggered, [1, 2])):
        with pytest.raises(DataError, match="no image is left to measure x"):
            check_measurable(attack, data([0, 0], labels), CLASSES)
