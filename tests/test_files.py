"""Files that appear complete or not at all; tests/cli has those of whole commands, and full disks."""

import os
import subprocess
import sys

import pytest

from ibau_jax.errors import ConfigError
from ibau_jax.files import (
    check_free,
    check_writable,
    exclusive,
    put_all_in_place,
    put_in_place,
    regular_files,
    staging_folder,
)

NAMES = ("trigger", "result")


def write(folder, trigger):
    with staging_folder(folder / "result") as staging:
        (staging / "result").write_text(f"with {trigger}")
        if trigger:
            (staging / "trigger").write_text(trigger)
        put_all_in_place(staging, folder, NAMES)


def test_nothing_of_an_earlier_run_is_left(tmp_path):
    folder = tmp_path / "run"
    for trigger in ("old", None):
        write(folder, trigger)
        (folder / "mine").touch()  # what no run has written stays
    assert sorted(path.name for path in folder.iterdir()) == ["mine", "result"]
    assert (folder / "result").read_text() == "with None"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("calls", range(3))
def test_a_folder_that_has_the_last_name_is_of_one_run(tmp_path, monkeypatch, calls):
    """Fault injection: the process stops at each renaming while results are replaced."""
    write(tmp_path, "old")
    real, left = os.replace, [calls]

    def replace(*arguments):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        real(*arguments)

    monkeypatch.setattr(os, "replace", replace)
    try:
        write(tmp_path, "new")
    except KeyboardInterrupt:
        assert not (tmp_path / "result").exists()
    else:
        assert [(tmp_path / name).read_text() for name in NAMES] == ["new", "with new"]


HOLD = """
import sys, time
from pathlib import Path
from ibau_jax.files import staging_folder
with staging_folder(Path(sys.argv[1])) as staging:
    if staging: (staging / "half").touch()
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_at_a_time_makes_results_for_a_place(tmp_path):
    """Fault injection: one that is killed holds nothing any more."""
    (tmp_path / "link").symlink_to(tmp_path)
    hold = HOLD.replace("staging_folder", "exclusive")
    other = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        for target in (tmp_path / "out", tmp_path / "link" / "out"):
            with pytest.raises(ConfigError, match="another run is making results for"), exclusive(target):
                pass
        with exclusive(tmp_path / "other"):
            pass
    finally:
        other.kill()
        other.communicate()
    with exclusive(tmp_path / "out"):
        assert [entry.name for entry in tmp_path.iterdir()] == ["link"]


def test_staging_folders_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path):
    """Fault injection: one process is killed, another works."""
    target = tmp_path / "model.pth"
    (tmp_path / ".model.pth.mine").mkdir()  # not of this program
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(target)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with staging_folder(target):
            assert len(list(tmp_path.glob(".model.pth.*.staging"))) == 2
    finally:
        other.kill()
        other.communicate()
    assert len(list(tmp_path.glob(".model.pth.*.staging"))) == 1
    with staging_folder(target):
        assert len(list(tmp_path.glob(".model.pth.*.staging"))) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == [".model.pth.mine"]


def test_a_folder_made_for_what_failed_goes_again(tmp_path):
    with pytest.raises(ZeroDivisionError), staging_folder(tmp_path / "new" / "result"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def linked(tmp_path, place):
    (tmp_path / "link").symlink_to(place)
    return tmp_path / "link"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lambda folder: linked(folder, folder / "nowhere"), "is a link to"),
        (lambda folder: linked(folder, folder / "nowhere") / "below", "is not a folder"),
        (lambda folder: linked(folder, folder / "link"), "is a link to"),
        (lambda folder: folder / os.fsdecode(b"\xff"), "not UTF-8"),
        (lambda folder: folder / ("x" * 240), "longer than 220 bytes"),
        (lambda folder: folder / ("x" * 300) / "y", "File name too long"),
    ],
)
def test_what_can_not_be_written_is_known_before(tmp_path, target, message):
    with pytest.raises(ConfigError, match=message):
        check_writable(target(tmp_path))


def test_a_disk_without_room_is_known_before(tmp_path):
    check_free(tmp_path / "not" / "there", 1)
    with pytest.raises(ConfigError, match="MiB left"):
        check_free(tmp_path / "not" / "there", 2**60)


@pytest.mark.parametrize(("new", "old"), [("file", "folder"), ("folder", "file"), ("folder", "link")])
def test_a_folder_replaces_a_file_and_a_file_a_folder(tmp_path, new, old):
    target = tmp_path / "target"
    make = {"file": lambda path: path.write_text("x"), "folder": lambda path: path.mkdir()}
    (linked(tmp_path, tmp_path).rename(target) if old == "link" else make[old](target))
    with staging_folder(target) as staging:
        make[new](staging / "new")
        put_in_place(staging / "new", target)
    assert (target.is_dir(), target.is_symlink()) == (new == "folder", False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["target"]


def test_only_regular_files_are_read(tmp_path):
    (tmp_path / "a").touch()
    assert regular_files(tmp_path) == [tmp_path / "a"]
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        regular_files(tmp_path)
