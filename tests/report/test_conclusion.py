"""What a run amounts to: never more than its figures say."""

import pytest

from ibau_jax.auditing import Suspect
from ibau_jax.auditing.judgement import UNDECIDED
from ibau_jax.metrics import Metrics
from ibau_jax.report import conclude


def figures(acc, asr=None, images=2000, classes=10, ra=None):
    if asr is None:
        return Metrics(acc, n_images=images, n_classes=classes)
    return Metrics(acc, asr, asr, 1 - asr if ra is None else ra, images, images, images, classes)


FOUND = {"before": "backdoored", "after": "no backdoor found"}


@pytest.mark.parametrize(
    ("before", "after", "audits", "level", "text"),
    [
        (figures(0.9, 0.99), figures(0.9, 0.02), {}, "good", "no longer works"),
        (figures(0.9, 0.99), figures(0.9, 0.4), FOUND, "bad", "still works on 40.0 %"),
        (figures(0.9, 0.99), figures(0.8, 0.02), {}, "doubtful", "cost of 10.0 points"),
        (figures(0.9, 0.45), figures(0.9, 0.0), FOUND, "doubtful", "did not work before either (45.0 %)"),
        (figures(0.9), figures(0.9), {}, "doubtful", "Nothing is known"),
        (figures(0.9), figures(0.9), FOUND, "good", "no longer finds"),
        (figures(0.9), figures(0.9), {**FOUND, "before": "no backdoor found"}, "doubtful", "found no backdoor before"),
        (
            figures(0.9),
            figures(0.8),
            {**FOUND, "before": "no backdoor found"},
            "doubtful",
            "either, at the cost of 10.0 points",
        ),
        (figures(0.9), figures(0.9), {**FOUND, "after": "suspicious"}, "bad", "suspicious"),
    ],
)
def test_headline(before, after, audits, level, text):
    found = conclude(before, after, audits, targeted=False)
    assert (found.level, text in found.headline) == (level, True), found


@pytest.mark.parametrize(
    ("cleaned", "clean", "level"),
    [(0.8, 0.1, "doubtful"), (0.8, 0.9, "good"), (0.2, 0.1, "good"), (0.8, None, "doubtful")],
)
def test_what_is_relearned_at_once_was_only_hidden(cleaned, clean, level):
    relearned = {"cleaned": [0.0, cleaned], "as it came": [1.0, 1.0]}
    relearned |= {} if clean is None else {"never backdoored": [0.0, clean]}
    relearned = {name: [figures(0.9, asr) for asr in shares] for name, shares in relearned.items()}
    found = conclude(figures(0.9, 0.99), figures(0.9, 0.0), {}, relearned, targeted=False)
    assert found.level == level
    assert any(f"cleaned {100 * cleaned:.1f} %" in reason for reason in found.reasons)


@pytest.mark.parametrize(
    ("asr", "still", "level"),
    [(None, True, "doubtful"), (None, False, "good"), (0.02, True, "good")],
)
def test_a_class_that_still_stands_out_is_said_and_counts_where_the_attack_is_unknown(asr, still, level):
    before, after = figures(0.9, None if asr is None else 0.99), figures(0.9, asr)
    found = conclude(before, after, FOUND, targeted=True, still=Suspect(4, "patch", 2.6, 0.5) if still else None)
    assert found.level == level
    assert any("class 4 still stands out after the last round: a patch 2.6" in one for one in found.reasons) == still


def test_a_suspect_that_lingers_is_said_and_decides_nothing():
    suspect = Suspect(9, "perturbation", 1.66, 0.01)
    given, none = (conclude(figures(0.9), figures(0.9), FOUND, targeted=True, suspect=one) for one in (suspect, None))
    assert (given.level, given.headline) == (none.level, none.headline)
    (said,) = set(given.reasons) - set(none.reasons)
    assert said.startswith(
        "class 9, suspected before, is still the one that the smallest perturbation leads to (1.7 times"
    )


def test_a_targeted_unlearnings_audit_is_no_proof():
    reasons = [conclude(figures(0.9), figures(0.9), FOUND, targeted=targeted).reasons for targeted in (True, False)]
    assert ["no proof" in " ".join(each) for each in reasons] == [True, False]


@pytest.mark.parametrize(
    ("before", "after", "level", "text"),
    [
        (figures(0.9, 0.0), figures(0.9, 1.0), "bad", "works better than before (0.0 % → 100.0 %)"),
        (figures(0.9, 0.0, 27), figures(0.9, 1.0, 27), "bad", "works better than before"),
        (figures(0.9, 0.7), figures(0.9, 0.9), "bad", "works better than before"),
        (figures(0.9, 0.0), figures(0.9, 0.05), "doubtful", "did not work before either"),
        (figures(0.9, 0.0, 2), figures(0.9, 1.0, 2), "bad", "attack works on 100.0 %"),
        (figures(0.9, 0.0, 2), figures(0.9, 0.0, 2), "doubtful", "Not enough images to say whether the attack worked"),
        (figures(0.9, 1.0, 1, 1), figures(0.9, 0.0, 1, 1), "doubtful", "a single image evaluates"),
        (figures(0.9, 0.4, 30), figures(0.9, 0.5, 30), "bad", "attack works on 50.0 %"),
        (figures(1.0, 1.0, 1), figures(1.0, 0.0, 1), "doubtful", "Not enough images to say"),
        (figures(0.9, 1.0, 30), figures(0.9, 0.0, 30), "doubtful", "Not enough images to say whether the attack still"),
        (figures(0.9, 1.0, 40), figures(0.9, 0.0, 40), "good", "no longer works"),
        (figures(0.9, 1.0, 400, 1), figures(0.9, 0.0, 400, 1), "doubtful", "all images that evaluate are of one class"),
        (figures(0.9, 1.0, 400, 2), figures(0.9, 0.0, 400, 2), "doubtful", "on images of only 2 of the 10 classes"),
        (figures(0.9, 1.0, None), figures(0.9, 0.0, None), "doubtful", "Not enough images to say"),
        (figures(0.9, 1.0), figures(0.9, float("nan")), "bad", "no number"),
        (figures(0.9, 1.0), figures(0.9), "bad", "no number"),
        (figures(0.9, 1.0), figures(float("nan"), 0.0), "doubtful", "accuracy is no number"),
        (figures(0.9, 1.0), figures(0.9, 0.0, ra=0.2), "doubtful", "only 20.0 % are classified rightly"),
        (figures(0.9, 1.0), figures(0.9, 0.0, ra=0.6), "good", "no longer works"),
        (
            figures(0.9, 1.0, 60),
            figures(0.86, 0.0, 60),
            "doubtful",
            "4.0 points of accuracy, which may be chance on 60",
        ),
        (figures(0.9), figures(0.86), "doubtful", "4.0 points of accuracy"),
    ],
)
def test_the_headline_says_no_more_than_the_images_carry(before, after, level, text):
    found = conclude(before, after, FOUND if before.asr is None else {}, targeted=False, num_classes=10)
    assert (found.level, text in found.headline) == (level, True), found


def test_few_images_are_warned_of():
    few, enough = (
        conclude(figures(0.9, 1.0, count), figures(0.9, 0.0, count), {}, targeted=False).reasons for count in (99, 100)
    )
    assert any("only 99 images evaluated" in reason for reason in few)
    assert not any("evaluated" in reason for reason in enough)
    assert any("(95 % interval 0.0 to 3.6) on 100 images" in reason for reason in enough)


@pytest.mark.parametrize(
    ("audits", "level", "text"),
    [
        ({"before": "backdoored", "after": UNDECIDED}, "doubtful", "whether a backdoor is left"),
        ({"before": UNDECIDED, "after": "no backdoor found"}, "doubtful", "whether there was a backdoor"),
        ({"before": UNDECIDED, "after": "backdoored"}, "bad", "backdoored"),
    ],
)
def test_an_audit_of_few_images_decides_nothing(audits, level, text):
    found = conclude(figures(0.9), figures(0.9), audits, targeted=False)
    assert (found.level, text in found.headline) == (level, True), found


def test_relearning_on_few_images_decides_nothing():
    relearned = {"cleaned": [figures(0.9, 0.0, 10), figures(0.9, 0.5, 10)]}
    found = conclude(figures(0.9, 1.0), figures(0.9, 0.0), {}, relearned, targeted=False)
    assert (found.level, "not enough images to say whether it is relearned" in found.headline) == ("doubtful", True)
