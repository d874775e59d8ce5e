"""The rows of `cases/wanted_checkpoints.md`, read from its tables: checkpoints of public code that people have."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.oracles import hugging_face, wanted

TENSOR = re.compile(r"`([^`]+)` \(([\d, ]*)\)")


@dataclass(frozen=True)
class Row:
    """One checkpoint, and what was seen in its file.

    Attributes:
        source: whose code wrote it.
        architecture: what that code calls the network.
        tensors: how many the state dict holds.
        key: under which the state dict lies; None where the file is the state dict.
        shapes: of some of its tensors, by name.
    """

    source: str
    architecture: str
    tensors: int
    key: str | None
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def classes(self) -> int:
        """The outputs of the last matrix, or of the last tensor where there is no matrix."""
        matrices = [shape for shape in self.shapes.values() if len(shape) == 2]
        return (matrices or list(self.shapes.values()))[-1][0]

    def module(self) -> torch.nn.Module | None:
        """The network in PyTorch, by a library or by public code's definition; None where there is none here."""
        module = wanted.oracle(self.source, self.architecture, self.classes)
        is_parallel = all(name.startswith("module.") for name in self.shapes)
        return torch.nn.DataParallel(module) if module is not None and is_parallel else module

    def spelled(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A module's state dict with the names of the release that the row is of."""
        return hugging_face.newer(state) if self.source == "HF transformers" else state

    def content(self, state: dict[str, torch.Tensor]) -> Mapping[str, object]:
        """What the file holds."""
        return {self.key: state, "epoch": 1} if self.key else state

    def differences(self, state: dict[str, torch.Tensor]) -> list[str]:
        """What the row says otherwise than a state dict."""
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        found = [
            f"{name} is {shapes.get(name, 'missing')} here, {shape} there"
            for name, shape in self.shapes.items()
            if shapes.get(name) != shape
        ]
        return found + [f"{len(state)} tensors here, {self.tensors} there"] * (len(state) != self.tensors)


def tables(shared: Path) -> Path:
    """The file, in the folder of data that is not in the repository."""
    return shared / "cases" / "wanted_checkpoints.md"


def wanted_rows(path: Path) -> list[Row]:
    """All of them, in the file's order."""
    cells = [line.strip().strip("|").split(" | ") for line in path.read_text().splitlines()]
    return [as_row(*map(str.strip, row)) for row in cells if len(row) == 5 and row[2].strip().isdigit()]


def as_row(source: str, architecture: str, tensors: str, key: str, shapes: str) -> Row:
    """A row of its cells' texts."""
    seen = {name: tuple(map(int, re.findall(r"\d+", sizes))) for name, sizes in TENSOR.findall(shapes)}
    return Row(source, architecture, int(tensors), None if key == "-" else key.strip("`"), seen)
