"""PyTorch's side of a comparison."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import torch_baseline
from benchmarks.cases import BATCH_SIZE, LR, Case
from benchmarks.torch_models import in_torch, loaded


class TorchSide:
    """Rounds of the baseline; PyTorch's own defaults throughout."""

    def __init__(self, case: Case, folder: Path, device: str) -> None:
        self.device = torch.device("cpu" if device == "cpu" or not torch.cuda.is_available() else "cuda")
        self.work = dict(np.load(folder / "work.npz"))
        file = case.checkpoint or folder / "checkpoint.pth"
        self.model = loaded(file, case.model, case.image_size).to(self.device)
        images, labels = self.images("images"), torch.as_tensor(self.work["labels"]).to(self.device)
        batches = list(zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True))
        patched = [
            [torch.as_tensor(np.flatnonzero(mask)).to(self.device) for mask in masks] for masks in self.work["patched"]
        ]
        settings = torch_baseline.Settings(K=case.K, lr=LR)
        self.rounds = torch_baseline.rounds(self.model, batches, patched, settings)

    def images(self, name: str) -> torch.Tensor:
        """An array of the work, NCHW in [0, 1] on the device."""
        return in_torch(self.work[name]).to(self.device)

    def facts(self) -> dict[str, Any]:
        """What does not change."""
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        return {"device": name, "versions": {"torch": torch.__version__}}

    def round(self) -> None:
        """The next round."""
        next(self.rounds)
        self.wait()

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def evaluate(self) -> dict[str, float | None]:
        """ACC and ASR of the model as it is."""
        if not len(self.work["true"]):
            return {"acc": None, "asr": None}
        clean, triggered = (torch_baseline.predict(self.model, self.images(name)) for name in ("clean", "triggered"))
        return {
            "acc": float(np.mean(clean.cpu().numpy() == self.work["true"])),
            "asr": float(np.mean(triggered.cpu().numpy() == self.work["targets"])),
        }

    def ceiling(self) -> float:
        """Operations a second of a large float32 matrix product, the best of several."""
        size = 4096 if self.device.type == "cpu" else 8192
        matrix, seconds = torch.randn(size, size, device=self.device), []
        for _ in range(6):
            self.wait()
            start = time.perf_counter()
            matrix @ matrix
            self.wait()
            seconds.append(time.perf_counter() - start)
        return float(2 * size**3 / min(seconds))

    def device_peak(self) -> int | None:
        """Bytes of device memory at the most."""
        return int(torch.cuda.max_memory_allocated()) if self.device.type == "cuda" else None
