"""The command line as a user runs it: a subprocess, its exit code, its one line, its files."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from ibau_jax.checkpoints import load
from ibau_jax.cli.options import parse
from ibau_jax.cli.run import run as run_unlearning
from ibau_jax.cli.unlearn_options import MethodOptions, UnlearnOptions
from ibau_jax.config import AuditConfig
from ibau_jax.errors import IbauError
from tests.cli.commands import EVALUATE, EXAMPLE, UNLEARN, run
from tests.conftest import ROOT

FAST = ["--preset", "cifar10", "--n-rounds", "1", "--K", "1", "--n-clean", "40", "--batch-size", "20"]


def unlearn(*arguments, cwd):
    return run(*UNLEARN, *arguments, cwd=cwd)


def unlearn_here(monkeypatch, out, *arguments):
    """In this process, which need not start anew, and where constants can be changed."""
    line = ["unlearn.py", "--ckpt", EXAMPLE, "--out", out, "--device", "cpu", "--no-audit", *arguments]
    monkeypatch.setattr("sys.argv", [str(word) for word in line])
    return run_unlearning(parse(UnlearnOptions))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_digits):
    """One run, with the published spellings, and what it left."""
    folder = tmp_path_factory.mktemp("run")
    done = unlearn(
        "--poi_path", EXAMPLE, "--dataset", small_digits, "--n_rounds", 2, "--batch_size", 20, "--K", 2, "--optim", "Adam",
        "--lr", 0.001, "--device", "cpu", "--log_path", "logs", "--n-clean", 60, "--preset", "cifar10", cwd=folder,
    )  # fmt: skip
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
    assert result["after"] == {name: result["rounds"][-1][name] for name in ("acc", "asr", "asr_all", "ra")}
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
        "badnets, target label 3",
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


def test_results_are_not_overwritten_unless_asked(finished, small_digits):
    folder, _ = finished
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
    (folder / "mine.txt").unlink()


def test_without_an_attack_its_figures_are_null(tmp_path, small_digits):
    plain = tmp_path / "plain.pth"
    torch.save(torch.load(EXAMPLE, weights_only=True)["net"], plain)
    done = unlearn("--ckpt", plain, "--dataset", small_digits, "--clean-set", small_digits, *FAST[2:], "--preset", "gtsrb",
                   "--mean", 0.5, 0.5, 0.5, "--std", 0.5, 0.5, 0.5, "--clip", "False", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "runs" / "plain" / "result.json").read_text())
    assert result["after"]["acc"] is not None
    assert result["after"]["asr"] is result["after"]["ra"] is result["after"]["asr_all"] is None
    assert result["config"]["attack"] is None
    assert result["config"]["clip"] is False
    assert result["config"]["n_evaluation"] == 80  # the clean set is in the data: its 40 images do not evaluate
    assert isinstance(torch.load(tmp_path / "runs" / "plain" / "model.pth", weights_only=True), dict)


def broken_file(tmp_path, content):
    (tmp_path / "broken.pth").write_bytes(content)
    return tmp_path / "broken.pth"


def saved(tmp_path, tree):
    torch.save(tree, tmp_path / "saved.pth")
    return tmp_path / "saved.pth"


def images(tmp_path, x, y):
    np.savez(tmp_path / "images.npz", x=x, y=y)
    return ["--ckpt", EXAMPLE, "--dataset", tmp_path / "images.npz"]


def zeros(*shape):
    return np.zeros(shape, np.uint8)


BAD = {
    "missing file": (lambda t: ["--ckpt", "nosuch.pth"], "can't read nosuch.pth"),
    "truncated file": (lambda t: ["--ckpt", broken_file(t, EXAMPLE.read_bytes()[:50_000])], "damaged or truncated"),
    "no checkpoint": (lambda t: ["--ckpt", broken_file(t, b"MZ\x90 something else")], "no PyTorch checkpoint"),
    "forbidden global": (
        lambda t: ["--ckpt", saved(t, {"net": torch.nn.Linear(2, 2)})],
        "torch.nn.modules.linear.Linear",
    ),
    "no state dict": (lambda t: ["--ckpt", saved(t, {"acc": 1})], "no state dict"),
    "unknown architecture": (lambda t: ["--ckpt", saved(t, {"fc.weight": torch.ones(2, 2)})], "fc.weight (2, 2)"),
    "unknown model": (lambda t: ["--ckpt", EXAMPLE, "--model", "resnet0"], "small_vgg"),
    "wrong classes": (lambda t: ["--ckpt", EXAMPLE, "--num-classes", 43], "misshapen"),
    "no data": (lambda t: ["--ckpt", saved(t, torch.load(EXAMPLE, weights_only=True)["net"])], "--dataset"),
    "unknown data": (lambda t: ["--ckpt", EXAMPLE, "--dataset", "nosuch.npz"], "no file nosuch.npz"),
    "wrong size": (lambda t: images(t, zeros(9, 28, 28, 3), np.zeros(9, int)), "28x28x3"),
    "wrong channels": (lambda t: images(t, zeros(9, 32, 32, 1), np.zeros(9, int)), "32x32x1"),
    "wrong labels": (lambda t: images(t, zeros(9, 32, 32, 3), np.full(9, 10)), "label 10"),
    "not a number": (lambda t: images(t, np.full((9, 32, 32, 3), np.nan), np.zeros(9, int)), "NaN"),
    "out of range": (lambda t: images(t, np.full((9, 32, 32, 3), 2.0), np.zeros(9, int)), "[0, 1]"),
    "no images": (lambda t: images(t, zeros(0, 32, 32, 3), np.zeros(0, int)), "empty"),
    "empty clean set": (lambda t: ["--ckpt", EXAMPLE, "--n-clean", 0], "--n-clean"),
    "batch size 0": (lambda t: ["--ckpt", EXAMPLE, "--batch-size", 0], "batch_size is 0"),
    "unknown optimiser": (lambda t: ["--ckpt", EXAMPLE, "--optim", "nosuch"], "nosuch"),
    "target out of range": (lambda t: ["--ckpt", EXAMPLE, "--target-label", 10], "target label 10"),
    "target without attack": (
        lambda t: [
            "--ckpt",
            saved(t, torch.load(EXAMPLE, weights_only=True)["net"]),
            "--dataset",
            "digits",
            "--target",
            1,
        ],
        "without --attack",
    ),
    "unknown attack": (lambda t: ["--ckpt", EXAMPLE, "--attack", "nosuch"], "badnets_all2all"),
    "no trigger file": (lambda t: ["--ckpt", EXAMPLE, "--attack", "trojan_wm"], "--trigger-dir"),
    "out is a file": (lambda t: ["--ckpt", EXAMPLE, "--out", broken_file(t, b"x")], "is a file"),
    "out below a file": (lambda t: ["--ckpt", EXAMPLE, "--out", broken_file(t, b"x") / "y"], "not a folder"),
    "nothing to resume": (lambda t: ["--ckpt", EXAMPLE, "--resume"], "no interrupted run"),
    "unknown device": (lambda t: ["--ckpt", EXAMPLE, "--device", "abacus"], "abacus"),
    "no such device": (lambda t: ["--ckpt", EXAMPLE, "--device", "tpu"], "no device"),
    "wrong deviation": (lambda t: ["--ckpt", EXAMPLE, "--std", 0, 1, 1], "deviations positive"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_line_and_exit_code_2(tmp_path, name):
    make, message = BAD[name]
    arguments = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    done = unlearn(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert sorted(tmp_path.rglob("*")) == before  # nothing was written


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    done = unlearn("--ckpt", EXAMPLE, "--out", tmp_path / "closed" / "run", cwd=tmp_path)
    assert (done.returncode, "permission" in done.stderr) == (2, True)


def test_a_full_disk_gives_one_line_and_leaves_nothing(tmp_path, small_digits):
    """Fault injection: no file may grow beyond 200 kB, so the first big one fails half-way."""
    limited = (
        "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    arguments = ["--ckpt", EXAMPLE, "--dataset", small_digits, *FAST]
    done = run(sys.executable, "-c", limited, *UNLEARN[1:], *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_divergence_in_the_first_round_writes_nothing(tmp_path, small_digits):
    done = unlearn(
        "--ckpt",
        EXAMPLE,
        "--dataset",
        small_digits,
        *FAST,
        "--inner-lr",
        "1e38",
        "--lr",
        "1e38",
        "--optim",
        "sgd",
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "NaN or infinite" in done.stderr
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "number"),
    [
        (["--preset", "cifar10"], signal.SIGTERM),
        (["--folds", 1, "--held-out", 0.1, "--min-batches", 3, "--max-acc-drop", 0.9], signal.SIGKILL),  # robust-few
    ],
)
def test_an_interrupted_run_goes_on_and_ends_like_an_uninterrupted_one(tmp_path, small_digits, preset, number):
    arguments = ["--ckpt", EXAMPLE, "--dataset", small_digits, *FAST[4:], "--n-rounds", 12, *preset, "--no-audit"]
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
    assert 1 <= len(json.loads((last / "state.json").read_text())["rounds"]) < 12

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
    assert [[r["acc"], r["perturbation_norm"], r["standing"]] for r in records[0]] == [
        [r["acc"], r["perturbation_norm"], r["standing"]] for r in records[1]
    ]


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


@pytest.mark.parametrize(
    ("wrong", "text"),
    [(["--relearn", 900], "choose 1 to"), (["--relearn", 3, "--clean-ckpt", "nosuch.pth"], "nosuch.pth")],
)
def test_relearning_that_can_not_be_tried(tmp_path, monkeypatch, small_digits, wrong, text):
    with pytest.raises(IbauError, match=text):
        unlearn_here(monkeypatch, tmp_path / "other", "--dataset", small_digits, *FAST, *wrong)
    assert not list(tmp_path.iterdir())


def test_rounds_that_cost_accuracy_leave_nothing(tmp_path, monkeypatch, small_digits):
    monkeypatch.setattr("ibau_jax.suspects.SCAN", AuditConfig(steps=3))
    with pytest.raises(IbauError, match="every round lost more than 5 points of held-out accuracy"):
        unlearn_here(monkeypatch, tmp_path / "out", "--dataset", small_digits, *FAST, "--lr", 0.5, "--held-out", 0.3)
    assert not list(tmp_path.rglob("*.pth"))


def test_a_safetensors_checkpoint_comes_back_as_one(tmp_path, small_digits):
    from safetensors.torch import load_file, save_file

    save_file(torch.load(EXAMPLE, weights_only=True)["net"], tmp_path / "x.safetensors", {"format": "pt"})
    done = unlearn("--ckpt", tmp_path / "x.safetensors", "--dataset", small_digits, *FAST, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cleaned = load_file(tmp_path / "runs" / "x" / "model.safetensors")
    assert set(cleaned) == set(torch.load(EXAMPLE, weights_only=True)["net"])


def test_help_names_every_option_in_groups():
    text = run(*UNLEARN, "--help", cwd=ROOT).stdout
    for option in ("--ckpt", "--poi-path", "--unl-set", "--n-rounds", "--batch-size", "--log-path", "--device", "--K",
                   "--optim", "--lr", "--solver", "--mean", "--attack", "--resume", "--overwrite"):  # fmt: skip
        assert option in text, option
    for group in ("subject", "data", "attack", "method", "output", "device"):
        assert f"{group} options" in text


def test_as_many_rounds_as_were_asked_for():
    planned, asked, both = (
        MethodOptions(preset="robust-few", **given).configs()[0]
        for given in ({}, {"n_rounds": 2}, {"n_rounds": 2, "more_rounds": 1})
    )
    assert (planned.n_rounds, planned.more_rounds) == (1, 2)
    assert (asked.n_rounds, asked.more_rounds) == (2, 0)
    assert (both.n_rounds, both.more_rounds) == (2, 1)


def test_evaluate(tmp_path, small_digits):
    done = run(*EVALUATE, "--ckpt", EXAMPLE, "--dataset", small_digits, "--json", cwd=tmp_path)
    metrics = json.loads(done.stdout)
    assert metrics["acc"] > 0.95
    assert metrics["asr"] > 0.95
    table = run(*EVALUATE, "--ckpt", EXAMPLE, "--dataset", small_digits, cwd=tmp_path)
    assert "ACC" in table.stdout
    missing = run(*EVALUATE, "--ckpt", "nosuch.pth", cwd=tmp_path)
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)


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
