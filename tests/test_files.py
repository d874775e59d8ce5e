"""Files that appear complete or not at all; tests/cli has those of whole commands, and full disks."""

from ibau_jax.files import put_all_in_place, staging_folder


def test_nothing_of_an_earlier_run_is_left(tmp_path):
    folder = tmp_path / "run"
    for trigger in ("old", None):
        with staging_folder(folder) as staging:
            (staging / "result").write_text(f"with {trigger}")
            if trigger:
                (staging / "trigger").write_text(trigger)
            put_all_in_place(staging, folder, ("trigger", "result"))
        (folder / "mine").touch()  # what no run has written stays
    assert sorted(path.name for path in folder.iterdir()) == ["mine", "result"]
    assert (folder / "result").read_text() == "with None"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
