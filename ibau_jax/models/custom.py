"""A user's own Flax NNX module: `--model path/to/file.py:Class`. See docs/custom_model.md."""

import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from ibau_jax.errors import CheckpointError, shortened
from ibau_jax.image_size import ImageSize
from ibau_jax.models.layers import ABSTRACT
from ibau_jax.models.registry import Architecture, get_architecture


@functools.cache  # asked for several times while one checkpoint is read; the file runs once
def find_architecture(spec: str) -> Architecture:
    """The registered architecture called `spec`, or the module class that `FILE.py:CLASS` names.

    The file is run, as `python FILE.py` would run it: name only your own code.

    Raises:
        CheckpointError: there is no such architecture, file or class, or the file fails.
    """
    if not is_own(spec):
        return get_architecture(spec)
    found = load_object(spec, "--model")
    if not isinstance(found, type) or not issubclass(found, nnx.Module):
        raise CheckpointError(f"--model: {spec} is no Flax NNX module class")
    return _from_class(spec, found)


def is_own(name: str) -> bool:
    """Whether an architecture's name says that it is the user's own, FILE.py:CLASS."""
    return ":" in name


def load_object(spec: str, option: str) -> Any:
    """What `FILE.py:NAME` names; the file is run. `option` is what messages say named it.

    Raises:
        CheckpointError: there is no such file or name, or the file fails.
    """
    path, _, name = spec.rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"{option}: there is no file {file}; it takes FILE.py:NAME")
    found = importlib.util.spec_from_file_location(f"ibau_jax_custom_{file.stem}", file)
    if found is None or found.loader is None:
        raise CheckpointError(f"{option}: {file} is no Python file; its name must end with .py")
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses and typing look their module up
    try:
        found.loader.exec_module(module)
    except Exception as error:  # whatever the user's code raises
        raise CheckpointError(f"{option}: {file} fails: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        raise CheckpointError(f"{option}: {file} has no {name!r}")
    return getattr(module, name)


@functools.cache
def _check_logits(spec: str, module_class: Any, num_classes: int, size: ImageSize, channels: int) -> None:
    """Raises CheckpointError unless the model gives a logit for each class, without computing anything."""

    shape = (1, *size, channels)

    def run() -> Any:
        return module_class(num_classes, size.plain(), nnx.Rngs(0))(jnp.zeros(shape))

    try:
        logits = nnx.eval_shape(run)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise CheckpointError(
            f"--model: {spec} fails on images of the shape {shape} under jax.jit: {type(error).__name__}: "
            f"{shortened(error)}. If it takes others, set image_size and channels on the class, or name --image-size"
        ) from error
    if getattr(logits, "shape", None) != (1, num_classes):
        raise CheckpointError(
            f"--model: {spec} gives {getattr(logits, 'shape', type(logits).__name__)} for images of the shape "
            f"{shape}, not logits of the shape (1, {num_classes})"
        )


def _from_class(spec: str, module_class: Any) -> Architecture:
    channels = int(getattr(module_class, "channels", 3))
    try:
        usual = ImageSize.of(getattr(module_class, "image_size", 32))
    except ValueError as error:
        raise CheckpointError(f"--model: {spec}: {error}") from error

    def build(num_classes: int, image_size: ImageSize, rngs: nnx.Rngs) -> nnx.Module:
        try:
            model = (
                nnx.eval_shape(lambda: module_class(num_classes, image_size.plain(), nnx.Rngs(0)))
                if rngs is ABSTRACT
                else module_class(num_classes, image_size.plain(), rngs)
            )
        except (Exception, SystemExit) as error:  # whatever the user's code raises
            raise CheckpointError(
                f"--model: {spec} can't be built as {module_class.__name__}(num_classes={num_classes}, "
                f"image_size={image_size.plain()}, rngs): {type(error).__name__}: {error}"
            ) from error
        if nnx.to_flat_state(nnx.state(model, nnx.RngState)):
            raise CheckpointError(
                f"--model: {spec} holds random state; models here only infer: put ibau_jax.models.layers.Identity in "
                "place of dropout"
            )
        _check_logits(spec, module_class, num_classes, image_size, channels)
        return model

    return Architecture(
        name=spec,
        build=build,
        classifier=getattr(module_class, "classifier_name", None),
        image_sizes=(usual,),
        channels=channels,
    )
