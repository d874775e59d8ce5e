"""The command line as a user runs it: a subprocess, its exit code, its one line, its files."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
import torch
from PIL import Image

from ibau_jax.checkpoints import load
from ibau_jax.data import load_dataset, split_dataset
from ibau_jax.models.small_vgg import torch_module
from tests.cli.commands import AUDIT, CONVERT, EVALUATE, EXAMPLE, FAST, UNLEARN, run, unlearn
from tests.conftest import ROOT

ROUNDS = 4  # of a run that is interrupted


def options(small_digits):
    """One run's, with the published spellings."""
    return ["--poi_path", EXAMPLE, "--dataset", small_digits, "--n_rounds", 2, "--batch_size", 20, "--K", 2, "--optim",
            "Adam", "--lr", 0.001, "--device", "cpu", "--n-clean", 60, "--preset", "cifar10"]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_digits):
    """That run, and what it left."""
    folder = tmp_path_factory.mktemp("run")
    done = unlearn(*options(small_digits), "--log_path", "logs", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "logs", done


def test_result_json(finished):
    folder, _ = finished
    result = json.loads((folder / "result.json").read_text())
    assert {
        "checkpoint",
        "model",
        "num_classes",
        "config",
        "device",
        "versions",
        "before",
        "after",
        "rounds",
        "seconds",
    } <= set(result)
    assert (result["model"], result["num_classes"], result["status"]) == ("small_vgg", 10, "completed")
    for metrics in (result["before"], result["after"], *result["rounds"]):
        assert all(0 <= metrics[name] <= 1 for name in ("acc", "asr", "asr_all", "ra"))
    assert [record["round"] for record in result["rounds"]] == [1, 2]
    assert all(record["perturbation_norm"] > 0 and record["seconds"] > 0 for record in result["rounds"])
    assert result["after"] == {name: result["rounds"][-1][name] for name in result["after"]}
    assert (result["after"]["n_images"], result["after"]["n_classes"]) == (60, 10)
    for name, (low, high) in result["intervals"]["after"].items():
        assert 0 <= low <= result["after"][name] <= high <= 1
    assert result["config"]["n_clean"] == 60
    assert result["config"]["n_evaluation"] == 60
    assert (result["config"]["K"], result["config"]["optim"]) == (2, "Adam")
    assert result["before"]["asr"] > 0.9
    assert {"compile", "unlearn", "total"} <= set(result["seconds"])


def test_model_files(finished):
    folder, _ = finished
    original = torch.load(EXAMPLE, weights_only=True)
    cleaned = torch.load(folder / "model.pth", weights_only=True)
    assert list(cleaned) == list(original)
    assert list(cleaned["net"]) == list(original["net"])
    changed = [name for name in cleaned["net"] if not torch.equal(cleaned["net"][name], original["net"][name])]
    assert changed
    assert not [name for name in changed if "running" in name or "tracked" in name]
    for name, leaf in load(folder / "flax").leaves.items():
        np.testing.assert_array_equal(leaf, load(folder / "model.pth").leaves[name])


def test_perturbation_picture(finished):
    folder, _ = finished
    pixels = np.asarray(Image.open(folder / "perturbation.png").convert("RGB"))
    assert min(pixels.shape[:2]) > 200
    assert pixels.std() > 10


def test_what_is_printed(finished):
    _, done = finished
    for text in (
        "60 images of",
        "60 other images of",
        "badnets (to class 3)",
        "round 2/2",
        "ASR",
        "before",
        "after",
    ):
        assert text in done.stdout
    assert done.stderr == ""
    assert "Traceback" not in done.stdout


def test_nothing_but_results_is_left(finished):
    folder, _ = finished
    names = ["flax", "model.pth", "perturbation.png", "report.html", "result.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert [path.name for path in folder.parent.iterdir()] == ["logs"]


def test_the_report_has_the_files_digests(finished):
    folder, done = finished
    result, page = json.loads((folder / "result.json").read_text()), (folder / "report.html").read_text()
    for file, digest in (
        (EXAMPLE, result["config"]["checkpoint_sha256"]),
        (folder / "model.pth", result["cleaned"]["sha256"]),
    ):
        assert hashlib.sha256(file.read_bytes()).hexdigest() == digest
        assert digest in page
    assert result["conclusion"]["headline"] in page
    assert result["conclusion"]["headline"] in done.stdout


@pytest.mark.slow
def test_results_are_not_overwritten_unless_asked(tmp_path, finished, small_digits):
    folder = shutil.copytree(finished[0], tmp_path / "logs")
    before = (folder / "result.json").read_text()
    arguments = ["--ckpt", EXAMPLE, "--dataset", small_digits, "--out", folder, *FAST]
    refused = unlearn(*arguments, cwd=folder)
    assert refused.returncode == 2
    assert "already holds" in refused.stderr
    assert (folder / "result.json").read_text() == before
    (folder / "mine.txt").write_text("kept")
    assert unlearn(*arguments, "--overwrite", cwd=folder).returncode == 0
    assert json.loads((folder / "result.json").read_text())["config"]["n_clean"] == 40
    assert (folder / "mine.txt").read_text() == "kept"


@pytest.mark.slow
def test_without_an_attack_its_figures_are_null(tmp_path, small_digits):
    plain = tmp_path / "plain.pth"
    torch.save(torch.load(EXAMPLE, weights_only=True)["net"], plain)
    done = unlearn("--ckpt", plain, "--dataset", small_digits, "--clean-set", small_digits, *FAST[2:], "--preset", "gtsrb",
                   "--mean", 0.5, 0.5, 0.5, "--std", 0.5, 0.5, 0.5, "--clip", "False", "--force", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "runs" / "plain" / "result.json").read_text())
    assert result["after"]["acc"] is not None
    assert result["after"]["asr"] is result["after"]["ra"] is result["after"]["asr_all"] is None
    assert result["config"]["attacks"] == []
    assert result["config"]["clip"] is False
    assert result["config"]["n_evaluation"] == 80  # the clean set is in the data: its 40 images do not evaluate
    assert isinstance(torch.load(tmp_path / "runs" / "plain" / "model.pth", weights_only=True), dict)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "number"),
    [
        (["--preset", "cifar10"], signal.SIGTERM),
        (["--spaces", "perturbation", "patch", "--min-batches", 3], signal.SIGKILL),
    ],
)
def test_an_interrupted_run_goes_on_and_ends_like_an_uninterrupted_one(tmp_path, small_digits, preset, number):
    arguments = ["--ckpt", EXAMPLE, "--dataset", small_digits, *FAST[4:], "--n-rounds", ROUNDS, *preset, "--no-audit"]
    process = subprocess.Popen(
        [*UNLEARN, *map(str, arguments)], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    partial = tmp_path / "runs" / ".badnets_digits.partial"
    deadline = time.monotonic() + 120
    while not (partial / "round-00001").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}[number], errors
    assert ("--resume" in errors) == (number == signal.SIGTERM)
    assert not (tmp_path / "runs" / "badnets_digits").exists()
    last = max(folder for folder in partial.iterdir() if folder.name.startswith("round-"))
    assert 1 <= len(json.loads((last / "state.json").read_text())["rounds"]) < ROUNDS

    other = unlearn(*arguments, "--lr", 0.5, "--resume", cwd=tmp_path)
    assert (other.returncode, "other options: lr" in other.stderr) == (2, True)
    resumed = unlearn(*arguments, "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert not partial.exists()
    whole = unlearn(*arguments, "--out", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    one, two = (tmp_path / "runs" / "badnets_digits", tmp_path / "whole")
    assert (one / "model.pth").read_bytes() == (two / "model.pth").read_bytes()
    records = [json.loads((folder / "result.json").read_text())["rounds"] for folder in (one, two)]
    assert [[r["acc"], r["perturbation_norm"], r["suspects"]] for r in records[0]] == [
        [r["acc"], r["perturbation_norm"], r["suspects"]] for r in records[1]
    ]


KILLED = """
import os, runpy, signal, sys
at, out, script = int(sys.argv[1]), os.path.abspath(sys.argv[2]), sys.argv[3]
count, real = 0, os.replace
def replace(source, target):
    global count
    real(source, target)
    count += os.path.dirname(os.path.abspath(target)) == out
    if count == at:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
sys.argv = [script, *sys.argv[4:]]
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("at", range(1, 6))
def test_a_run_that_is_killed_while_its_results_are_put_in_place_goes_on(tmp_path, finished, small_digits, at):
    """After each of five renamings; what --resume ends with is what a run ends with that nothing happened to."""
    (tmp_path / "killed.py").write_text(KILLED)
    arguments = [*options(small_digits), "--no-audit"]
    killed = run(
        sys.executable, tmp_path / "killed.py", at, "out", UNLEARN[1], *arguments, "--out", "out", cwd=tmp_path
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "out" / "result.json").exists() == (at == 5)
    resumed = unlearn(*options(small_digits), "--out", "out", "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    again = unlearn(*options(small_digits), "--out", "out", "--resume", "--overwrite", cwd=tmp_path)
    assert (again.returncode, "holds this run's results already" in again.stdout) == (0, True), again.stderr
    assert not [entry for entry in (*tmp_path.iterdir(), *(tmp_path / "out").iterdir()) if entry.name[0] == "."]
    one, other = tmp_path / "out", finished[0]
    assert sorted(entry.name for entry in one.iterdir()) == sorted(entry.name for entry in other.iterdir())
    assert (one / "model.pth").read_bytes() == (other / "model.pth").read_bytes()
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    for name in ("before", "after", "intervals", "conclusion", "cleaned", "config"):
        assert results[0][name] == results[1][name], name


def test_figures_are_those_of_the_file(tmp_path, small_digits):
    """Of bfloat16 weights, by PyTorch: rounded, they classify differently than those that unlearned."""
    content = torch.load(EXAMPLE, weights_only=True)
    content["net"] = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in content["net"].items()
    }
    torch.save(content, tmp_path / "x.pth")
    arguments = ["--ckpt", "x.pth", "--dataset", small_digits, *FAST, "--lr", 0.005, "--no-audit", "--out", "out"]
    done = unlearn(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    module = torch_module(10)
    module.load_state_dict(torch.load(tmp_path / "out" / "model.pth", weights_only=True)["net"])  # as float32
    assert next(iter(load(tmp_path / "out" / "model.pth").leaves.values())).dtype == ml_dtypes.bfloat16
    images = split_dataset(load_dataset(str(small_digits), (32, 32, 3)), 40, result["config"]["seed"]).evaluation
    pixels = torch.tensor(images.images.transpose(0, 3, 1, 2)).float() / 255
    with torch.no_grad():
        said = module.eval()(pixels).argmax(1).numpy()
    assert result["after"]["n_images"] == len(images) == 80
    assert result["after"]["acc"] == pytest.approx(np.mean(said == images.labels), abs=1e-9)
    assert result["rounds"][-1]["acc"] == result["after"]["acc"]


@pytest.mark.slow
def test_relearning(tmp_path, small_digits):
    arguments = ["--ckpt", EXAMPLE, "--dataset", small_digits, *FAST, "--relearn", 3, "--relearn-epochs", 2]
    done = unlearn(*arguments, "--clean-ckpt", EXAMPLE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "runs" / "badnets_digits" / "result.json").read_text())["relearning"]
    assert {name: len(figures) for name, figures in found.items()} == {
        "cleaned": 3,
        "as it came": 3,
        "never backdoored": 3,
    }
    assert found["as it came"] == found["never backdoored"]  # the same file
    assert found["as it came"][0]["asr"] > 0.9
    assert "as it came" in done.stdout


@pytest.mark.slow
def test_a_safetensors_checkpoint_comes_back_as_one(tmp_path, small_digits):
    from safetensors.torch import load_file, save_file

    save_file(torch.load(EXAMPLE, weights_only=True)["net"], tmp_path / "x.safetensors", {"format": "pt"})
    done = unlearn("--ckpt", tmp_path / "x.safetensors", "--dataset", small_digits, *FAST, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cleaned = load_file(tmp_path / "runs" / "x" / "model.safetensors")
    assert set(cleaned) == set(torch.load(EXAMPLE, weights_only=True)["net"])


def test_help_names_every_option_in_groups():
    text = run(*UNLEARN, "--help", cwd=ROOT, fresh=True).stdout
    for option in ("--ckpt", "--poi-path", "--unl-set", "--n-rounds", "--batch-size", "--log-path", "--device", "--K",
                   "--optim", "--lr", "--solver", "--mean", "--attack", "--resume", "--overwrite"):  # fmt: skip
        assert option in text, option
    for group in ("subject", "data", "attack", "method", "output", "device"):
        assert f"{group} options" in text


def test_help_texts_are_wrapped_where_the_screen_ends():
    wide = {**os.environ, "COLUMNS": "1000"}
    for command, break_in_the_source in (
        (UNLEARN, "'runs/*/model.pth'; read without torch, nothing in them is executed"),
        (CONVERT, "in the original's wrapper and key order"),
        (AUDIT, "half of them to search on, half to measure on, in the forms that --dataset of scripts/unlearn.py has"),
    ):
        assert break_in_the_source in run(*command, "--help", cwd=ROOT, env=wide).stdout


def test_evaluate(tmp_path, small_digits):
    done = run(*EVALUATE, "--ckpt", EXAMPLE, "--dataset", small_digits, "--json", cwd=tmp_path, fresh=True)
    metrics = json.loads(done.stdout)
    assert metrics["acc"] > 0.95
    assert metrics["asr"] > 0.95
    table = run(*EVALUATE, "--ckpt", EXAMPLE, "--dataset", small_digits, cwd=tmp_path)
    assert "ACC" in table.stdout
    missing = run(*EVALUATE, "--ckpt", "nosuch.pth", cwd=tmp_path)
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)


@pytest.mark.slow
def test_a_whole_run_audits_twice_and_imports_neither_torch_nor_tensorflow(tmp_path, small_digits):
    program = f"""
import runpy, sys
sys.argv = ["unlearn.py", "--ckpt", {str(EXAMPLE)!r}, "--dataset", {str(small_digits)!r}, "--out", "out", *{[*FAST, "--audit-steps", "5", "--audit-images", "10"]!r}]
try:
    runpy.run_path({str(ROOT / "scripts" / "unlearn.py")!r}, run_name="__main__")
except SystemExit as end:
    assert end.code == 0
found = {{"torch", "tensorflow", "tensorflow_datasets", "h5py"}} & set(sys.modules)
assert not found, found
"""
    done = run(sys.executable, "-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    audits = json.loads((tmp_path / "out" / "result.json").read_text())["audit"]
    assert audits["after"]["views"]["patch"]["sizes"] != audits["before"]["views"]["patch"]["sizes"]
    for when in ("before", "after"):
        assert f"audit {when:<6}  {audits[when]['verdict']}: " in done.stdout
