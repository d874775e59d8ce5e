"""The search against models whose smallest triggers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from ibau_jax import AuditConfig, Dataset, audit
from ibau_jax.auditing.judgement import median_size
from ibau_jax.auditing.search import aim_parts, compile_search, in_the_race, measure, run_search
from ibau_jax.errors import DataError
from ibau_jax.execution import DEFAULT_EXECUTION
from ibau_jax.perturbations import Patch, Pixel

SHAPE, CLASSES = (6, 6, 3), 4


class Linear(nnx.Module):
    """Logits W x + b."""

    def __init__(self, weights, bias):
        self.weights, self.bias = nnx.Param(jnp.asarray(weights, jnp.float32)), jnp.asarray(bias, jnp.float32)

    def __call__(self, x):
        return x.reshape(len(x), -1) @ self.weights[...] + self.bias[None]


def grey_images(count, seed=0):
    """Near grey, so that small perturbations stay in [0, 1]."""
    rng = np.random.default_rng(seed)
    images = rng.uniform(0.4, 0.6, (count, *SHAPE)).astype(np.float32)
    return Dataset(images, rng.integers(0, CLASSES, count), "grey")


def random_linear(seed=1):
    weights = np.random.default_rng(seed).normal(0, 1, (np.prod(SHAPE), CLASSES))
    return Linear(weights, -0.5 * weights.sum(0))


def needed_norm(model, images, label, share):
    """The norm along the best direction of two classes, a closed form: the quantile of margin / ‖w_t − w_o‖."""
    weights = np.asarray(model.weights[...], np.float64)
    flat = images.images.reshape(len(images), -1).astype(np.float64)
    logits = flat @ weights + np.asarray(model.bias, np.float64)
    other = 1 - label
    difference = weights[:, label] - weights[:, other]
    margins = (logits[:, other] - logits[:, label])[images.labels != label]
    return np.quantile(margins, share) / np.linalg.norm(difference)


def test_perturbation_has_the_norm_of_the_closed_form():
    """Between two classes the smallest universal perturbation of a linear model lies along w_t − w_o."""
    weights = np.random.default_rng(3).normal(0, 1, (np.prod(SHAPE), 2))
    model = Linear(weights, [6.0, -6.0] - 0.5 * weights.sum(0))  # class 1 is far away
    images = grey_images(400)
    images = Dataset(images.images, np.zeros(400, np.int64), "zeros")
    config = AuditConfig(steps=300, batch_size=100)
    search = compile_search(model, 2, images, Pixel(), config, DEFAULT_EXECUTION)
    found = run_search(search, model, images)
    assert found.sizes[1] == pytest.approx(needed_norm(model, images, 1, config.success), rel=0.1)
    held_out = measure(search, model, found.triggers, images, found.finished)
    assert held_out[1] == pytest.approx(config.success, abs=0.1)
    assert held_out[0] == 0  # there is no image of another class


class Brightness(nnx.Module):
    """Tells classes by their brightness; with a backdoor, a red pixel in the corner leads to class 2."""

    def __init__(self, backdoor):
        self.backdoor, self.scale = backdoor, nnx.Param(jnp.asarray(400.0))

    def __call__(self, x):
        levels = jnp.linspace(0.2, 0.8, CLASSES)[None]
        logits = -self.scale[...] * (jnp.mean(x, axis=(1, 2, 3))[:, None] - levels) ** 2
        red = x[:, -1, -1, 0] - x[:, -1, -1, 2]  # of a grey image 0
        return logits + self.backdoor * red[:, None] * jnp.asarray([[0.0, 0, 1, 0]])


def bright_images(count, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    images = np.ones(SHAPE) * np.linspace(0.2, 0.8, CLASSES)[labels][:, None, None, None] + rng.uniform(
        -0.1, 0.1, (count, *SHAPE[:2], 1)
    )
    return Dataset(images.astype(np.float32), labels, "grey")


def test_a_backdoor_of_one_pixel_is_found_with_its_place_and_target():
    found = audit(Brightness(150.0), bright_images(200), AuditConfig(steps=150))
    assert found.verdict == "backdoored"
    assert found.suspects[0].label == 2
    findings = found.spaces["patch"]
    mask = np.asarray(findings.triggers["mask"])[2, :, :, 0]
    assert np.unravel_index(mask.argmax(), mask.shape) == (5, 5)
    assert mask[5, 5] > 0.5 * mask.sum()
    assert findings.sizes[2] == findings.sizes.min()
    others = [label for label in range(CLASSES) if label != 2]
    assert max(following_at(findings, label, findings.sizes[2]) for label in others) < 0.5 < findings.success[2]
    np.testing.assert_allclose(following_at(findings, 2, findings.sizes[2]), findings.success[2], atol=0.1)


class AllToAll(Brightness):
    """A red pixel in the corner makes every class the next one."""

    def __call__(self, x):
        logits, red = super().__call__(x), x[:, -1, -1, 0] - x[:, -1, -1, 2]
        stamped = jax.nn.sigmoid(40 * (red - 0.3))[:, None]
        return (1 - stamped) * logits + stamped * jnp.roll(logits, 1, axis=1)


def test_an_all_to_all_backdoor_of_one_pixel_is_found_with_its_place():
    """Without it a little more or less light is enough too, since classes lie side by side; but not as little."""
    found, without = (
        audit(model, bright_images(200), AuditConfig(steps=150)) for model in (AllToAll(0), Brightness(0))
    )
    suspect = found.suspects[-1]
    assert (found.verdict, suspect.label, suspect.space) == ("backdoored", None, "perturbation")
    findings = found.spaces["perturbation"]
    assert findings.sizes[-1] < without.spaces["perturbation"].sizes[-1] / 5
    assert np.unravel_index(np.argmax(findings.triggers[-1]), SHAPE) == (5, 5, 0)
    assert 0.95 < findings.sizes[-1] / (0.3 / np.sqrt(2)) < 1.3  # half of the way by red, half by blue


def following_at(findings, label, size):
    """The share of other images of other classes that follow a patch which is cut down to a size."""
    images = bright_images(200, seed=1)
    patch = jax.tree.map(lambda leaf: jnp.asarray(leaf[label]), findings.triggers)
    logits = Brightness(150.0)(Patch().apply(Patch().project(patch, size), jnp.asarray(images.images)))
    return np.mean(np.argmax(logits, axis=1)[images.labels != label] == label)


def test_a_model_without_a_backdoor_has_no_suspect():
    model, grey = random_linear(), grey_images(200)
    labels = np.asarray(jnp.argmax(model(jnp.asarray(grey.images)), axis=1))
    found = audit(model, Dataset(grey.images, labels, "grey"), AuditConfig(steps=150))
    assert found.verdict == "no backdoor found"
    assert found.suspects == ()


def test_classes_in_parts_are_found_as_together(monkeypatch):
    model, images, config = random_linear(), grey_images(60), AuditConfig(steps=20)
    together = compile_search(model, CLASSES, images, Patch(), config, DEFAULT_EXECUTION)
    monkeypatch.setattr("ibau_jax.auditing.search.PIXELS_AT_ONCE", 2 * config.batch_size * SHAPE[0] * SHAPE[1])
    parted = compile_search(model, CLASSES, images, Patch(), config, DEFAULT_EXECUTION)
    assert [len(part) for part in aim_parts(parted, np.arange(CLASSES + 1))] == [2, 2, 2]
    one, other = run_search(together, model, images), run_search(parted, model, images)
    np.testing.assert_allclose(one.sizes, other.sizes, rtol=1e-5)
    np.testing.assert_allclose(
        measure(together, model, one.triggers, images, one.finished),
        measure(parted, model, other.triggers, images, other.finished),
        atol=1e-6,
    )


MANY = 13


class Steps(nnx.Module):
    """Tells classes by their brightness, each class's band as wide as the next; red in the corner leads to class 4."""

    def __init__(self, backdoor):
        self.backdoor, self.scale = backdoor, nnx.Param(jnp.asarray(3000.0))

    def __call__(self, x):
        levels = jnp.linspace(0.2, 0.8, MANY)[None]
        logits = -self.scale[...] * (jnp.mean(x, axis=(1, 2, 3))[:, None] - levels) ** 2
        red = x[:, -1, -1, 0] - x[:, -1, -1, 2]
        return logits + self.backdoor * red[:, None] * jax.nn.one_hot(4, MANY)[None]


def steps_images(count):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, MANY, count)
    images = np.ones(SHAPE) * np.linspace(0.2, 0.8, MANY)[labels][:, None, None, None]
    return Dataset((images + rng.uniform(-0.1, 0.1, (count, *SHAPE[:2], 1))).astype(np.float32), labels, "grey")


def test_the_race_ends_as_it_does_where_every_class_goes_on(monkeypatch):
    """With 13 classes 8 leave the race; sizes, median and target are those of the search that nobody leaves."""
    model, images, config = Steps(2000.0), steps_images(200), AuditConfig(steps=120)
    raced = run_search(compile_search(model, MANY, images, Pixel(), config, DEFAULT_EXECUTION), model, images)
    monkeypatch.setattr("ibau_jax.auditing.search.FRONT", MANY)
    whole = run_search(compile_search(model, MANY, images, Pixel(), config, DEFAULT_EXECUTION), model, images)
    assert raced.finished.sum() == 6
    assert whole.finished.all()
    assert np.argmin(raced.sizes[:-1]) == np.argmin(whole.sizes[:-1]) == 4
    np.testing.assert_allclose(median_size(raced.sizes), median_size(whole.sizes), rtol=0.15)
    np.testing.assert_allclose(raced.sizes[raced.finished], whole.sizes[raced.finished], rtol=0.15)
    np.testing.assert_allclose(raced.sizes, whole.sizes, rtol=0.5)
    held = np.asarray(jax.vmap(Pixel().size)(jnp.asarray(raced.triggers)))
    assert (held <= raced.sizes * (1 + 1e-5)).all()  # also those that left the race at a larger size


@pytest.mark.parametrize("classes", [2, 3, 6, 13])
def test_a_class_that_left_the_race_never_has_the_smallest_trigger(classes):
    rng = np.random.default_rng(classes)
    weights = rng.normal(0, 1, (np.prod(SHAPE), classes))
    model, images = Linear(weights, rng.normal(0, 3, classes)), grey_images(40)
    images = Dataset(images.images, images.labels % classes, "grey")
    for seed in range(3):
        config = AuditConfig(steps=3, seed=seed)  # far too few, so that sizes are wild
        search = compile_search(model, classes, images, Pixel(), config, DEFAULT_EXECUTION)
        found = run_search(search, model, images)
        assert found.finished.sum() == min(5, classes) + 1
        assert found.sizes[:-1][found.finished[:-1]].min() == found.sizes[:-1].min()
        assert (found.sizes <= Pixel().max_size(SHAPE) * (1 + 1e-6)).all()


def test_what_left_the_race_is_not_measured():
    model, images, config = Steps(2000.0), steps_images(60), AuditConfig(steps=6)
    findings = audit(model, images, config).spaces["perturbation"]
    np.testing.assert_array_equal(np.isnan(findings.success), ~findings.smallest.finished)


@given(sizes=st.lists(st.floats(0.01, 100), min_size=2, max_size=60))
def test_the_smallest_and_the_median_stay_in_the_race(sizes):
    sizes = np.asarray(sizes)
    front, middle = in_the_race(sizes)
    both = np.concatenate([front, middle])
    assert len(set(both)) == len(both) == min(5, len(sizes))
    assert sizes.min() == sizes[both].min()
    assert (np.sort(sizes)[(len(sizes) - 1) // 2] in sizes[both]) or (np.sort(sizes)[len(sizes) // 2] in sizes[both])


def test_progress_counts_every_step_once():
    reports = []
    model, images, config = Steps(0.0), steps_images(60), AuditConfig(steps=6)
    search = compile_search(model, MANY, images, Pixel(), config, DEFAULT_EXECUTION)
    run_search(search, model, images, lambda done, count: reports.append((done, count)))
    assert reports == [(done, 2 * (3 + 1 + 1)) for done in range(1, 11)]  # parts of six, two steps a heat


def test_scanned_on_the_device_it_finds_the_same():
    from ibau_jax import Execution

    model, images, config = random_linear(), grey_images(60), AuditConfig(steps=20)
    sizes = [
        run_search(compile_search(model, CLASSES, images, Pixel(), config, Execution(loop=loop)), model, images)
        for loop in ("python", "scan")
    ]
    np.testing.assert_allclose(sizes[0].sizes, sizes[1].sizes, rtol=1e-5)


def test_searched_and_measured_images_are_different(monkeypatch):
    seen = []
    from ibau_jax.auditing import auditor as module

    original = module.Auditor._divided

    def spy(self, images, held_out):
        seen.append(original(self, images, held_out))
        return seen[-1]

    monkeypatch.setattr(module.Auditor, "_divided", spy)
    audit(random_linear(), grey_images(50), AuditConfig(steps=2))
    searched, measured = ({image.tobytes() for image in some.images} for some in seen[0])
    assert not searched & measured
    assert len(searched) + len(measured) == 50


@pytest.mark.parametrize(
    ("common", "others", "searched"),
    [(180, 20, (20, 20)), (93, 7, (9, 7)), (60, 140, (60, 140)), (700, 300, (250, 250))],
)
def test_a_search_has_no_class_in_the_majority_where_it_can(monkeypatch, common, others, searched):
    """A step takes 16 images, so that so many are searched on even where others are fewer than half of them."""
    seen, images, held_out = [], bright_images(3000, seed=2), bright_images(100, seed=3)
    of_class, rest = np.flatnonzero(images.labels == 1)[:common], np.flatnonzero(images.labels != 1)[:others]
    unequal = images.take(np.concatenate([of_class, rest])[np.random.default_rng(0).permutation(common + others)])
    monkeypatch.setattr(
        "ibau_jax.auditing.auditor.run_search",
        lambda search, model, images, *rest: (seen.append(images.labels), run_search(search, model, images, *rest))[1],
    )
    audit(Brightness(0.0), unequal, AuditConfig(steps=3), held_out=held_out)
    assert {(int(np.sum(labels == 1)), int(np.sum(labels != 1))) for labels in seen} == {searched}


def test_held_out_images_may_be_sorted_by_class():
    """As those of a folder are; the first 200 are of one class."""
    held_out = bright_images(3000, seed=3)
    held_out = held_out.take(np.argsort(held_out.labels, kind="stable"))
    assert audit(Brightness(0.0), bright_images(100, seed=2), AuditConfig(steps=3), held_out=held_out).n_measured == 200


def test_too_few_images_are_an_error():
    with pytest.raises(DataError, match="not 10 and 9"):
        audit(random_linear(), grey_images(19))


def test_images_of_another_size_and_unknown_labels_are_errors():
    with pytest.raises(DataError, match="grey"):
        audit(random_linear(), Dataset(np.zeros((30, 6, 6, 3), np.float32), np.full(30, 9), "grey"))
    with pytest.raises(DataError, match="does not take images of 5x6x3"):
        audit(random_linear(), Dataset(np.zeros((30, 5, 6, 3), np.float32), np.arange(30) % 4, "grey"))
