"""Which published figures count as reproduced."""

import pytest

from benchmarks.reproduction import PUBLISHED, document, verdict


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((78.4, 97.9), (76.9, 10.9), "reproduced"),  # 1.5 points of accuracy lost where 1.86 were, 10.9 against 9.36 %
        ((78.4, 97.9), (77.4, 3.0), "better"),
        ((78.4, 97.9), (74.0, 3.0), "not reproduced"),  # too much accuracy lost
        ((78.4, 97.9), (77.4, 20.0), "not reproduced"),
    ],
)
def test_verdicts(before, after, expected):
    assert verdict(PUBLISHED[0], before, after) == expected


def test_the_page_says_what_was_not_run():
    run = {"before": {"acc": 0.784, "asr_all": 0.98}, "rounds": [{"acc": 0.769, "asr_all": 0.109}]}
    other = {"before": {"acc": 0.784, "asr_all": 0.98}, "rounds": [{"acc": 0.771, "asr_all": 0.128}]}
    ours = {"badnets_8_02_ckpt": {"cifar10,5000": {"0": run, "1": other}}}
    page = document(ours, {"badnets_8_02_ckpt": {"cifar10,5000": {"1": other}}})
    assert "84.94 / 97.64 → 83.08 / 9.36 | 78.40 / 98.00 → 77.00 / 11.85 (0: 76.9 / 10.9; 1: 77.1 / 12.8) | " in page
    assert "**not reproduced** | 78.40 / 98.00 → 77.10 / 12.80 (1: 77.1 / 12.8) | our copy" in page
    assert "97.80 / 100.00 → 98.60 / 9.80 | – | **not run** | – |" in page
