"""The notebooks run to the end, on small data."""

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import QUICKLY_COMPILED, ROOT

pytestmark = pytest.mark.slow
PUBLISHED = {
    "IBAU_CHECKPOINT": str(ROOT / "examples" / "badnets_digits.pth"),
    "IBAU_DATASET": "digits",
    "IBAU_ATTACK": "badnets",
    "IBAU_TARGET": "3",
    "IBAU_N_CLEAN": "60",
    "IBAU_ROUNDS": "1",
}
SMALL = {
    "unlearn_cifar10": PUBLISHED,
    "unlearn_gtsrb": PUBLISHED,
    "your_own_model": {"IBAU_EPOCHS": "2", "IBAU_N_CLEAN": "60", "IBAU_AUDIT_STEPS": "3"},
}


@pytest.mark.parametrize("name", SMALL)
def test_it_runs(tmp_path, monkeypatch, name):
    (tmp_path / "lenet.py").write_text((ROOT / "examples" / "lenet.py").read_text())
    for variable, value in {**SMALL[name], **QUICKLY_COMPILED}.items():  # it compiles more than it computes
        monkeypatch.setenv(variable, value)
    notebook = nbformat.read(ROOT / "examples" / f"{name}.ipynb", 4)
    committed = [cell.get("outputs") for cell in notebook.cells if cell.cell_type == "code"]
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("ASR" in output.get("text", "") for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any(committed), "it is committed without the outputs of a real run"
