"""Strict numerics, the shared real data, and small things that many tests need."""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from ibau_jax.cli.device import use_compile_cache
from ibau_jax.cli.process import LARGE_PAGES, TUNABLES

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("IBAU_SHARED", ROOT.parent / "shared"))

# All processes of a test run, and the commands that tests run, keep compiled programs for one another, not in the home
# of whoever runs the tests. Processes begun by this one inherit the folder; .ci/run has one for all its steps.
if "IBAU_TEST_CACHE" not in os.environ:
    _cache = tempfile.TemporaryDirectory()
    os.environ["IBAU_TEST_CACHE"] = _cache.name
os.environ["XDG_CACHE_HOME"] = os.environ["IBAU_TEST_CACHE"]
use_compile_cache()

# Two workers share the cores with XLA's threads: several of OpenMP's, which wait for one another, make PyTorch's oracles
# take three times as long there. Read when torch is first imported, here and in the commands that tests run.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# As commands do for themselves (ibau_jax.cli.process); the workers, which start after this, and all commands have it.
os.environ.setdefault(TUNABLES, f"{LARGE_PAGES}=1")

QUICKLY_COMPILED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "True"}  # a process's environment

# Strict dtype promotion is not possible: optax's own Adam raises a float to an integer array.
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
    """The short tests compile much and compute little: without LLVM's costly passes they need a sixth less time.

    Without XLA's fusion emitters, which compile longer to compute faster, another sixth. The commands that they run
    inherit both; the slow tests compile as for a user: large images and matrices would take many times as long.
    """
    short = config.getoption("markexpr") == "not slow"
    jax.config.update("jax_disable_most_optimizations", short)
    if short:
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")  # read when a backend is first used
        os.environ.update(QUICKLY_COMPILED)


@pytest.fixture
def compiled_quickly(pytestconfig) -> Iterator[None]:
    """For a slow test that compiles much and computes little all the same."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    pytest_configure(pytestconfig)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and real poisoned checkpoints."""
    if not (SHARED / "checkpoints").is_dir():
        pytest.skip(f"no real data: {SHARED} is not there (set IBAU_SHARED)")
    return SHARED


@pytest.fixture(scope="session")
def shared_checkpoints(shared) -> list[Path]:
    return sorted((shared / "checkpoints").glob("*.pth"))


ROW = "row of the architectures' table"


@pytest.fixture
def conversion_table(record_property) -> Callable[..., None]:
    """Takes a row for the table of architectures printed at the end: see tests/models/test_architectures.py.

    A property of the test's report, since the test may run in another process than the one that prints.
    """
    return lambda *row: record_property(ROW, row)


def pytest_terminal_summary(terminalreporter):
    reports = [*terminalreporter.stats.get("passed", []), *terminalreporter.stats.get("failed", [])]
    rows = [row for report in reports if report.when == "call" for name, row in report.user_properties if name == ROW]
    if rows:
        terminalreporter.section("architectures: relative difference to PyTorch")
        columns = ("image", "parameters", "logits", "gradient", "worst", "load")
        widths = (6, 14, 10, 10, 10, 8)
        heads = "".join(f"{column:>{width}}" for column, width in zip(columns, widths, strict=True))
        terminalreporter.line(f"{'':28}{heads}")
    for name, size, parameters, logits, gradient, worst, seconds in sorted(rows):
        numbers = f"{size:>6}{parameters:>14,}{logits:>10.1e}{gradient:>10.1e}{worst:>10.1e}{seconds:>6.1f} s"
        terminalreporter.line(f"{name:28}{numbers}")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
