"""How far long work is, where there is no terminal."""

from ibau_jax.cli import progress
from ibau_jax.metrics import Metrics


def test_a_log_has_a_line_from_time_to_time(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.Bar() as bar:
        job = bar.add_task("compiling", total=None)
        for done in range(150):
            now += 1.0
            bar.update(job, description="audit [before]", completed=done, total=150)
    printed = capsys.readouterr()
    assert printed.err.splitlines() == ["audit [before] 59/150", "audit [before] 119/150"]
    assert printed.out == ""


def test_it_says_nothing_of_short_work(capsys):
    bar = progress.RoundProgress(1, ["x"])
    with bar.running(0):
        bar.on_batch("inner", 1, 1, 2)
        bar.on_before("x", Metrics(acc=0.5, asr=None, asr_all=None, ra=None), ())
    printed = capsys.readouterr()
    assert (printed.err, printed.out) == ("", "before     ACC 50.00 %\n")
