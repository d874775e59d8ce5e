"""What importing the package costs and gives."""

import sys
from pathlib import Path

import pytest

from tests.cli.commands import run
from tests.conftest import ROOT


def test_import_is_light():
    program = "import sys, ibau_jax; print(sorted({'jax', 'flax', 'sklearn', 'matplotlib', 'h5py', 'tensorflow_datasets'} & set(sys.modules)))"
    assert run(sys.executable, "-c", program, cwd=ROOT).stdout.strip() == "[]"
    loaded = "import sys, ibau_jax; ibau_jax.load, ibau_jax.unlearn, ibau_jax.evaluate, ibau_jax.load_dataset; print(sorted({'sklearn', 'matplotlib', 'h5py', 'tensorflow_datasets'} & set(sys.modules)))"
    assert run(sys.executable, "-c", loaded, cwd=ROOT).stdout.strip() == "[]"


def test_public_names_exist():
    import ibau_jax

    assert all(getattr(ibau_jax, name) is not None for name in ibau_jax.__all__)
    # A function of the package must not be hidden by a module of its name, in whatever order they are used.
    program = "import ibau_jax; ibau_jax.State; assert callable(ibau_jax.unlearn); assert callable(ibau_jax.evaluate)"
    assert run(sys.executable, "-c", program, cwd=ROOT).returncode == 0
    assert Path(ibau_jax.__file__).parent.name == "ibau_jax"
    with pytest.raises(AttributeError):
        ibau_jax.nosuch  # noqa: B018
