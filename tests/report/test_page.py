"""The page: well-formed, complete without network or JavaScript, and what it shows is what was found."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from ibau_jax.auditing.auditor import Audit, SpaceFindings
from ibau_jax.auditing.search import SmallestTriggers
from ibau_jax.config import AuditConfig, UnlearnConfig
from ibau_jax.perturbations import Patch, Pixel
from ibau_jax.report import Conclusion, gather, render
from ibau_jax.triggers import Attack
from ibau_jax.triggers import Patch as WhitePatch
from ibau_jax.unlearning import Round
from tests.nets import Brightness, brightness_data

VOID = {"meta", "img", "br", "source", "link", "input"}
HOSTILE = '"><script>alert(1)</script>'


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects what a test asks for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.text = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset")]
        assert not [name for name, _ in attributes if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


class Dark(nnx.Module):
    """Class 0 for all images."""

    def __call__(self, x):
        return jnp.stack([jnp.ones(len(x)), jnp.zeros(len(x)), jnp.zeros(len(x))], axis=1)


def rounds():
    delta = np.zeros((1, 4, 4, 1), np.float32)
    delta[0, -1, -1] = 0.8
    return (Round(1, delta, 0.8, 0.0, 0.0, 1.0),)


def evidence(rng, attack=None):
    return gather(Brightness(), Dark(), brightness_data(rng, wrong=10), 3, rounds(), UnlearnConfig(), attack)


CORNER = Attack("corner", WhitePatch(slice(3, 4), slice(3, 4)), target_label=2)


def test_evidence_is_what_the_models_say(rng):
    found = evidence(rng, CORNER)
    assert found.counts.tolist() == [20, 20, 0]
    assert found.unlearned[0].share.before.tolist() == [0, 0, 1]  # 0.2 + 0.8 is above 0.9 in the last pixel
    assert found.unlearned[0].share.after.tolist() == [1, 0, 0]
    assert {example.triggered_classes for example in found.examples} == {(2, 0)}
    assert all(example.triggered[-1, -1, 0] == 1 for example in found.examples)
    assert evidence(rng).examples == []


def test_perturbations_that_stay_are_shown_once(rng):
    first = rounds()[0]
    others = [replace(first, number=2), replace(first, number=3, perturbation=first.perturbation / 2)]
    found = gather(Brightness(), Dark(), brightness_data(rng), 3, (first, *others), UnlearnConfig(), None)
    assert [(entry.round, entry.perturbation.max()) for entry in found.unlearned] == [
        (1, first.perturbation.max()),
        (3, first.perturbation.max() / 2),
    ]


FINISHED = 5


def audits(classes=14):
    def findings(space, triggers):
        sizes = np.linspace(1, 3, classes)
        finished = np.arange(classes) < FINISHED
        return SpaceFindings(
            space, SmallestTriggers(triggers, sizes, finished), np.where(finished, sizes / 3, np.nan), sizes / 5
        )

    spaces = {
        "perturbation": findings(Pixel(), np.random.default_rng(0).normal(size=(classes, 4, 4, 3))),
        "patch": findings(Patch(), {"mask": np.ones((classes, 4, 4, 1)), "pattern": np.zeros((classes, 4, 4, 3))}),
    }
    return {
        when: Audit("backdoored", (), spaces, (4, 4, 3), 1.0, 500, 200, AuditConfig()) for when in ("before", "after")
    }


def result():
    figures = {"acc": 0.9, "asr": 0.99, "asr_all": 0.99, "ra": 0.01}
    record = {**figures, "asr": 0.031, "round": 1, "suspects": [], "n_images": 5}
    return {
        "checkpoint": HOSTILE,
        "model": "small_vgg",
        "num_classes": 3,
        "status": "completed",
        "config": {"n_clean": 5, "clean_set": HOSTILE, "n_evaluation": 5, "dataset": "d", "attacks": [HOSTILE], "target_labels": [2],
                   "checkpoint_sha256": "abc123", "lr": 0.001, "mean": None},
        "execution": {"devices": 1},
        "device": "cpu",
        "versions": {"jax": "0.0"},
        "before": {**figures, "class_acc": (0.75, 0.875, None)},
        "after": {name: record[name] for name in figures} | {"n_images": 5, "n_triggered": 4, "class_acc": (1.0, 0.0, None)},
        "intervals": {"before": {}, "after": {"asr": (0.0123, 0.456)}},
        "suspects": [{"label": 2, "space": "patch", "ratio": 3.14, "confidence": 0.9},
                     {"label": None, "space": "warp", "ratio": 2.5, "confidence": 0.4}],
        "kept_round": 1,
        "rounds": [record],
        "relearning": {"cleaned": [record, record], "as it came": [record, record]},
        "seconds": {"total": 1.5},
        "cleaned": {"file": "model.pth", "sha256": "def456"},
    }  # fmt: skip


@pytest.fixture
def page(rng):
    conclusion = Conclusion("good", "The headline", ("a reason",))
    return render(result(), conclusion, evidence(rng, CORNER), audits())


def test_it_needs_nothing_else(page):
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert all(link.startswith("data:image/") for link in parsed.links)
    assert not re.findall(r"url\(|@import|https?://", re.sub(r"data:[^\"]*", "", page))
    assert "prefers-color-scheme: dark" in page


def test_the_verdict_comes_first_and_all_is_there(page):
    text = " ".join(Page(page).text)
    order = ["The headline", "a reason", "Before and after", "Round by round", "What was unlearned", "Audit without",
             "Examples", "Does it come back?", "Accuracy of each class", "How it was done"]  # fmt: skip
    places = [text.rindex(part) for part in order]
    assert places == sorted(places)
    for part in (
        "3.1\N{NO-BREAK SPACE}%",
        "1.2 to 45.6\N{NO-BREAK SPACE}%",
        "classified rightly, of 5.",
        "\N{MINUS SIGN}95.9",
        "abc123",
        "def456",
        "After: round 1.",
        "Stood out before: class 2 (by\npatch, 3.1 times)",
        "any other class (by\nwarp, 2.5 times).",
    ):
        assert part in text, part


def test_only_classes_whose_search_was_finished_are_shown(page):
    for space in ("perturbation", "patch"):
        shown = re.findall(rf'alt="{space} to class (\d+) before"', page)
        assert shown == [str(label) for label in range(FINISHED)]


def test_the_accuracy_of_each_class_is_that_of_the_result(page):
    rows = re.findall(r"<tr><td>(\d+)</td><td>(\d+)</td><td>([^<]*)</td>\s*<td>([^<]*)</td>", page)
    expected = [("0", "20", "75.0 %", "100.0 %"), ("1", "20", "87.5 %", "0.0 %"), ("2", "0", "–", "–")]
    assert [tuple(cell.replace("\N{NO-BREAK SPACE}", " ") for cell in row) for row in rows] == expected


def test_classes_have_their_names(rng):
    named = {**result(), "class_names": ["cat", HOSTILE, ""]}
    shown = render(named, Conclusion("good", "The headline", ()), evidence(rng, CORNER), audits())
    text = " ".join(Page(shown).text)
    assert re.findall(r"<tr><td>(0 \(cat\)|2)</td><td>", shown) == ["0 (cat)", "2"]
    assert 'alt="patch to class 0 (cat) before"' in shown
    assert "Stood out before: class 2 (by" in text
    assert HOSTILE not in shown


def test_names_from_files_are_text(page):
    assert HOSTILE not in page
    assert HOSTILE in "".join(Page(page).text)


def test_pictures_are_the_images(rng, page):
    shown = re.findall(r'src="data:image/png;base64,([^"]*)" alt="the same with the trigger"', page)
    example = evidence(rng, CORNER).examples[0]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown[0]))))
    np.testing.assert_array_equal(pixels, np.round(example.triggered[:, :, 0] * 255))


def test_rounds_that_were_evaluated_on_fewer_images_are_marked(rng, page):
    fewer = result()
    fewer["rounds"].insert(0, {**fewer["rounds"][0], "n_images": 3})
    marked = render(fewer, Conclusion("good", "The headline", ()), evidence(rng, CORNER), audits())
    assert "Rounds before the last were evaluated on 3 of the images." in " ".join(Page(marked).text)
    assert "Rounds before the last" not in " ".join(Page(page).text)


def test_a_run_without_attack_or_audit_or_images_of_a_class(rng):
    bare = result()
    for metrics in (bare["before"], bare["after"], bare["rounds"][0]):
        metrics |= {"asr": None, "asr_all": None, "ra": None}
    bare["config"]["attacks"] = []
    bare |= {"relearning": None, "suspects": []}
    text = " ".join(Page(render(bare, Conclusion("doubtful", "x", ()), evidence(rng), {})).text)
    assert "No attack was named" in text
    assert "Examples" not in text
    assert "Stood out" not in text
    assert "Does it come back" not in text
    assert "–" in text
