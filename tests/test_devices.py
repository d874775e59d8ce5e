"""Many devices: 8 virtual ones in a process, and two processes that meet. The number is fixed when JAX starts."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from ibau_jax.checkpoints import load
from tests.cli.commands import AUDITED_UNLEARN, EXAMPLE, UNLEARN, run
from tests.conftest import QUICKLY_COMPILED, ROOT

pytestmark = pytest.mark.slow  # a minute for compiling the same steps for many layouts
VIRTUAL = "--xla_force_host_platform_device_count="


@pytest.fixture(scope="module")
def found():
    environment = {**os.environ, "XLA_FLAGS": VIRTUAL + "8", **QUICKLY_COMPILED}
    done = run(sys.executable, "-m", "tests.measure_devices", cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_many_devices_give_what_one_gives(found):
    assert found["devices"] == 8
    assert len(found["distances"]) == 8
    assert max(found["distances"].values()) <= 1e-5, found["distances"]


def test_the_work_is_shared(found):
    work = found["work"]
    whole = np.asarray(work["1 of 1"]["flops"])
    for name, share in {"1 on 4": 4, "1 on 8": 8, "1 on 8, sharded": 8}.items():
        # Not all of it can be: reductions and the optimiser are each device's own.
        assert (np.asarray(work[name]["flops"]) <= 1.25 * whole / share).all(), name
    both = np.asarray(work["2 of 1"]["flops"])
    assert (np.asarray(work["2 on 2"]["flops"]) <= 1.1 * both / 2).all()


def test_sharded_parameters_take_a_share_of_the_memory(found):
    work = found["work"]
    assert work["1 on 8, sharded"]["argument_bytes"] < 0.3 * work["1 on 8"]["argument_bytes"]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize(
    ("more", "tolerance"),
    [
        (["--no-audit"], 1e-5),
        # Players climb many steps, where rounding adds up. Adam would go as far where a gradient is rounding alone.
        (["--audit-steps", 3, "--spaces", "perturbation", "--min-batches", 3, "--optim", "sgd", "--lr", 0.01], 1e-3),
    ],
)
def test_two_processes_give_what_one_gives(tmp_path, more, tolerance):
    """Each has one CPU device; the first writes. With players both audit the original model."""
    from ibau_jax.data import load_dataset

    digits = load_dataset("digits", (32, 32, 3))
    np.savez(tmp_path / "small.npz", x=digits.images[:80], y=digits.labels[:80])
    fast = [
        "--preset", "cifar10", "--n-rounds", 1, "--K", 2, "--n-clean", 30, "--batch-size", 15, "--inner-lr", 0.1,
        "--device", "cpu", *more,
    ]  # fmt: skip
    arguments = ["--ckpt", EXAMPLE, "--dataset", "small.npz", *fast]
    one = run(*AUDITED_UNLEARN, *arguments, "--out", "one", cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    meeting = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2, "--devices", 2, "--out", "two"]
    processes = [
        subprocess.Popen(
            [*map(str, [*AUDITED_UNLEARN, *arguments, *meeting, "--process-id", number])],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "cleaned model" in outputs[0][0]
    assert "round 1/1" in outputs[0][0]
    assert "round" not in outputs[1][0]  # gloo has a line of its own there
    found, expected = (load(tmp_path / name / "model.pth").leaves for name in ("two", "one"))
    for name, leaf in expected.items():
        assert np.linalg.norm(found[name] - leaf) <= tolerance * np.linalg.norm(leaf), name


def test_a_coordinator_needs_to_know_who_is_who(tmp_path):
    done = run(*UNLEARN, "--ckpt", EXAMPLE, "--coordinator", "127.0.0.1:1", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--num-processes" in done.stderr
