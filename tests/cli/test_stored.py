"""Where an interrupted run waits: the same state comes back, whatever happens to the files."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from ibau_jax.auditing import Suspect
from ibau_jax.cli.run_folder import suspects_record
from ibau_jax.cli.stored_run import StoredRun
from ibau_jax.errors import ConfigError
from ibau_jax.interruption import Terminated, deferred_signals, end_on_sigterm
from ibau_jax.presets import PRESETS
from ibau_jax.unlearning import initial_state, unlearn
from tests.conftest import ROOT
from tests.unlearning.test_loop import Tiny, tiny_data

CONFIG = replace(PRESETS["robust"], n_rounds=3, batch_size=10, min_batches=4, spaces=("perturbation", "patch"))
IDENTITY = {"seed": 2, "spaces": ("perturbation", "patch")}
FIGURES = {"acc": 0.5, "asr": None, "asr_all": None, "ra": None, "n_images": 40}
RECORD = ("perturbation_norm", "inner_loss", "outer_loss", "seconds")


@pytest.fixture(scope="module")
def states():
    """A model, and its state after each of three rounds of everything that a state can hold."""
    rng, found = np.random.default_rng(0), []
    model, data = Tiny(nnx.Rngs(0)), tiny_data(rng, 40)
    unlearn(model, data, CONFIG, on_round=found.append)
    return model, data, found


def record(done):
    return {
        "round": done.number,
        "suspects": suspects_record(done.outliers),
        **FIGURES,
        **{name: getattr(done, name) for name in RECORD},
    }


def stored_run(folder, states, identity=IDENTITY):
    run = StoredRun(folder / "run", identity)
    for state in states:
        run.store_state(state, {"before": FIGURES, "rounds": [record(done) for done in state.rounds]})
    return run


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(contents(one)), jax.tree.leaves(contents(other)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (one.outliers, one.mirrored) == (other.outliers, other.mirrored)
    assert [(d.number, d.outliers) for d in one.rounds] == [(d.number, d.outliers) for d in other.rounds]


def contents(state):
    perturbations = [done.perturbation for done in state.rounds]
    return nnx.state(state.model), state.optimizer_state, state.players, perturbations


def fresh(states):
    return initial_state(states[0], CONFIG)


def test_the_last_state_comes_back_and_goes_on_bit_by_bit(tmp_path, states):
    model, data, done = states
    suspects = (Suspect(1, "patch", 4.0, 0.9), Suspect(None, "wave", 3.0, 0.5))
    second = replace(done[1], outliers=suspects)
    run = stored_run(tmp_path, [done[0], second])
    state, before, records = run.restore_state(fresh(states), CONFIG)
    assert_same(state, second)
    assert (before.acc, before.n_images, before.asr) == (0.5, 40, None)
    assert [record["round"] for record in records] == [1, 2]
    went_on = []
    unlearn(model, data, CONFIG, state=state, on_round=went_on.append)
    assert_same(went_on[-1], replace(done[2], outliers=suspects))
    run.remove()
    assert not run.exists()


def test_only_the_last_two_rounds_stay_and_nothing_of_a_killed_process(tmp_path, states):
    run = stored_run(tmp_path, states[2][:2])
    (run.folder / ".round-00003.half.staging").mkdir()
    stored_run(tmp_path, states[2][2:])
    assert sorted(entry.name for entry in run.folder.iterdir()) == ["round-00002", "round-00003"]


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_damaged_state_is_noticed_and_the_round_before_is_taken(tmp_path_factory, states, data):
    run = stored_run(tmp_path_factory.mktemp("damaged"), states[2][:2])
    files = sorted(file for file in (run.folder / "round-00002").rglob("*") if file.is_file() and file.stat().st_size)
    victim = files[data.draw(st.integers(0, 999)) % len(files)]
    content = victim.read_bytes()
    if data.draw(st.booleans()):
        victim.write_bytes(content[: data.draw(st.integers(0, 10**6)) % len(content)])
    else:
        victim.unlink()
    state, _, records = run.restore_state(fresh(states), CONFIG)
    assert_same(state, states[2][0])
    assert len(records) == 1


def signed_again(folder, change):
    """Changes state.json as somebody would who knows how its checksum is made."""
    content = json.loads((folder / "state.json").read_text())
    content.pop("checksum")
    change(content)
    text = json.dumps(content, sort_keys=True)
    content["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "state.json").write_text(json.dumps(content))


def put(*keys, value):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


TAMPERED = {
    "identity list": put("identity", value=[1]),
    "identity null": put("identity", value=None),
    "digests list": put("digests", value=[]),
    "digests text": put("digests", value="x"),
    "leaves number": put("leaves", value=5),
    "leaves path a number": put("leaves", value=[[5, [3]]]),
    "leaves path elsewhere": put("leaves", value=[[["..", "..", "etc"], [3]]]),
    "leaves path of lists": put("leaves", value=[[[["x"]], [3]]]),
    "leaves none": put("leaves", value=[]),
    "leaves shape": put("leaves", 0, 1, value=[10**6]),
    "before list": put("before", value=[1]),
    "before text": put("before", "acc", value="x"),
    "before missing": lambda content: content.pop("before"),
    "rounds missing": lambda content: content.pop("rounds"),
    "rounds number": put("rounds", value=3),
    "rounds fewer": lambda content: content["rounds"].pop(0),
    "last round missing": lambda content: content["rounds"].pop(),
    "round number": put("rounds", 0, "round", value="1"),
    "round figure": put("rounds", 0, "inner_loss", value="x"),
    "round accuracy": put("rounds", 0, "acc", value=7),
    "round suspects": put("rounds", 0, "suspects", value=[{"label": "x"}]),
    "suspects": put("suspects", value=5),
    "suspects label": put("suspects", value=[{"label": "x", "space": "patch", "ratio": 3.0, "confidence": 1}]),
    "suspects figures": put("suspects", value=[{"label": 1, "space": "patch", "ratio": "x", "confidence": 1}]),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_state_falls_back_to_the_round_before(tmp_path, states, capsys, name):
    run = stored_run(tmp_path, states[2][:2])
    signed_again(run.folder / "round-00002", TAMPERED[name])
    state, _, records = run.restore_state(fresh(states), CONFIG)
    assert_same(state, states[2][0])
    assert len(records) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_change_without_its_checksum_is_noticed_and_strange_entries_are_no_steps(tmp_path, states):
    run = stored_run(tmp_path, states[2][:2])
    file = run.folder / "round-00002" / "state.json"
    file.write_text(file.read_text().replace('"mirrored": false', '"mirrored": true'))
    (run.folder / "round-99999").touch()
    (run.folder / "round-x").mkdir()
    assert_same(run.restore_state(fresh(states), CONFIG)[0], states[2][0])
    signed_again(run.folder / "round-00001", lambda content: None)
    os.mkfifo(run.folder / "round-00001" / "leaves" / "pipe")
    with pytest.raises(ConfigError, match="damaged"):
        run.restore_state(fresh(states), CONFIG)


@pytest.mark.parametrize("name", [".", ".."])
def test_a_folder_without_a_name_of_its_own(tmp_path, monkeypatch, name):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    expected = {".": tmp_path / "a" / ".b.partial", "..": tmp_path / ".a.partial"}[name]
    assert StoredRun(Path(name), {}).folder == expected


def test_when_all_are_damaged_it_says_so_and_deletes_nothing(tmp_path, states):
    run = stored_run(tmp_path, states[2][:2])
    for file in run.folder.rglob("state.json"):
        file.write_text("{}")
    with pytest.raises(ConfigError, match="damaged"):
        run.restore_state(fresh(states), CONFIG)
    assert len(list(run.folder.iterdir())) == 2


def test_another_runs_state_is_refused(tmp_path, states):
    stored_run(tmp_path, states[2][:1])
    with pytest.raises(ConfigError, match="other options: seed changed"):
        StoredRun(tmp_path / "run", {**IDENTITY, "seed": 3}).restore_state(fresh(states), CONFIG)
    with pytest.raises(ConfigError, match="no interrupted run"):
        StoredRun(tmp_path / "other", IDENTITY).restore_state(fresh(states), CONFIG)


FULL_DISK = """
import resource, sys
from pathlib import Path
import tests.cli.test_stored as t
states = t.states.__wrapped__()
run = t.stored_run(Path(sys.argv[1]), states[2][:1])
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
try:
    t.stored_run(Path(sys.argv[1]), states[2][1:2])
except t.ConfigError as error:
    print("error:", error)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
t.assert_same(run.restore_state(t.fresh(states), t.CONFIG)[0], states[2][0])
print("the last good state is there")
"""


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_good_state(tmp_path):
    """A limit on the size of files stands for the full disk: the third file's writing fails with an OSError."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert "error: can't store the state after round 2" in done.stdout, done.stderr
    assert "--resume" in done.stdout
    assert "the last good state is there" in done.stdout, done.stderr
    assert [entry.name for entry in (tmp_path / ".run.partial").iterdir()] == ["round-00001"]


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_signals_wait_for_the_end_of_a_write(number, kind):
    before, written = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)], []

    def write():
        with deferred_signals():
            os.kill(os.getpid(), number)
            written.extend(range(1000))

    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs begin without
    end_on_sigterm()
    try:
        with pytest.raises(kind):
            write()
    finally:
        for one, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(one, handler)
    assert len(written) == 1000
