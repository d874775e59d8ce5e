"""Whether the README's first command cleaned the embedded example, as CI runs it.

python -m tests.check_example runs/badnets_digits/result.json
"""

import json
import sys
from pathlib import Path


def main() -> None:
    """Checks what the command found out for itself (data, attack, target), what it did, and what it says of that."""
    result = json.loads(Path(sys.argv[1]).read_text())
    before, after, audit = result["before"], result["after"], result["audit"]
    assert (result["config"]["attacks"], result["config"]["target_labels"]) == (["badnets"], [3]), result["config"]
    assert min(before["acc"], before["asr"]) >= 0.95, before
    assert after["asr"] <= 0.05, after
    assert after["acc"] >= before["acc"] - 0.02, (before, after)
    assert audit["before"]["verdict"] == "backdoored", audit["before"]["suspects"]
    assert audit["before"]["suspects"][0]["label"] == 3, audit["before"]["suspects"]
    for space in ("perturbation", "patch"):
        view = audit["before"]["views"][space]
        assert min(range(10), key=view["sizes"].__getitem__) == 3, view
        assert view["success"][3] > 0.7, view
    assert audit["after"]["verdict"] == "no backdoor found", audit["after"]["suspects"]


if __name__ == "__main__":
    main()
