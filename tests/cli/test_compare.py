"""Other methods and their comparison as a user runs them."""

import json
import shutil

import pytest
from PIL import Image

from tests.cli.commands import COMPARE, EXAMPLE, UNLEARN, run

TWO = ["--methods", "ft", "sau", "--n-clean", 30, "--epochs", 1, "--device", "cpu"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory, small_digits):
    folder = tmp_path_factory.mktemp("compared")
    arguments = ["--ckpt", EXAMPLE, "--dataset", small_digits, *TWO, "--seed", 0, "--out", "t"]
    done = run(*COMPARE, *arguments, cwd=folder, fresh=True)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.mark.slow
def test_tables(compared):
    folder, done = compared
    assert sorted(file.name for file in (folder / "t").iterdir()) == [
        "outcomes.json", "table.csv", "table.md", "table.png"
    ]  # fmt: skip
    outcomes = json.loads((folder / "t" / "outcomes.json").read_text())["outcomes"]
    assert [one["method"] for one in outcomes] == ["ft", "sau"]
    assert all(one["before"]["asr"] > 0.9 and one["seconds"] > 0 for one in outcomes)
    with Image.open(folder / "t" / "table.png") as picture:
        assert min(picture.size) > 150
    assert "Means over all runs" in done.stdout
    assert max(map(len, done.stdout.split("Means over")[1].splitlines())) <= 80


@pytest.mark.slow
def test_what_is_there_is_not_run_again(compared, small_digits):
    """The first seed's outcomes stay as they are; the second seed's one method is added."""
    folder, _ = compared
    before = json.loads((folder / "t" / "outcomes.json").read_text())["outcomes"]
    more = ["--methods", "ft", "--n-clean", 30, "--epochs", 1, "--device", "cpu", "--seed", 0, 1]
    done = run(*COMPARE, "--ckpt", EXAMPLE, "--dataset", small_digits, *more, "--out", "t", cwd=folder)
    assert done.returncode == 0, done.stderr
    after = json.loads((folder / "t" / "outcomes.json").read_text())["outcomes"]
    assert after[:2] == before
    assert [(one["method"], one["seed"]) for one in after[2:]] == [("ft", 1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "magic"], "there is no method 'magic'"),
        (["--n-clean", 120], "--n-clean 120 of 120 images leaves none to evaluate on"),
    ],
)
def test_wrong_input(tmp_path, small_digits, arguments, message):
    done = run(*COMPARE, "--ckpt", EXAMPLE, "--dataset", small_digits, "--out", "t", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert not list(tmp_path.iterdir())


def test_two_checkpoints_with_one_name_are_refused(tmp_path, small_digits):
    """Else the second one's runs would be taken for the first one's, and left out."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        shutil.copy(EXAMPLE, tmp_path / folder / "x.pth")
    arguments = ["--ckpt", "one/x.pth", "two/x.pth", "--attack", "badnets", "--dataset", small_digits, "--n-clean", 30]
    done = run(*COMPARE, *arguments, "--out", "t", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "one/x.pth and two/x.pth are both x in the tables" in done.stderr
    assert not (tmp_path / "t").exists()


@pytest.mark.slow
def test_unlearn_by_another_method(tmp_path, small_digits):
    arguments = ["--ckpt", EXAMPLE, "--dataset", small_digits, "--n-clean", 40, "--out", "out", "--device", "cpu"]
    done = run(*UNLEARN, *arguments, "--method", "fp", "--epochs", 1, "--lr", 0.001, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["config"]["method"], result["config"]["epochs"], result["config"]["lr"]) == ("fp", 1, 0.001)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "flax", "model.pth", "report.html", "result.json"
    ]  # fmt: skip
    assert "What was unlearned" not in (tmp_path / "out" / "report.html").read_text()
    assert "Fine-Pruning, RAID 2018" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "ft", "--K", 5], "--K says nothing to --method ft"),
        (["--epochs", 3], "--epochs is of other methods"),
        (["--method", "ft", "--resume"], "keeps no state to --resume from"),
        (["--method", "sau", "--epochs", 0], "epochs is 0"),
    ],
)
def test_options_of_other_methods(tmp_path, small_digits, arguments, message):
    done = run(*UNLEARN, "--ckpt", EXAMPLE, "--dataset", small_digits, "--n-clean", 40, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert not list(tmp_path.iterdir())
