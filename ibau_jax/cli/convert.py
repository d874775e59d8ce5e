"""The conversion utility."""

from collections.abc import Iterator
from pathlib import Path

from ibau_jax.checkpoints import load, save
from ibau_jax.checkpoints.flax_store import is_flax_checkpoint
from ibau_jax.checkpoints.verify import verify
from ibau_jax.errors import ConfigError
from ibau_jax.files import check_writable, put_in_place, staging_folder


def convert(
    source: Path, target: Path, model: str | None, num_classes: int | None, compare: bool, overwrite: bool
) -> Iterator[str]:
    """Converts `source` to `target`, whose name says to what, and yields what to tell the user.

    Raises:
        CheckpointError: see `ibau_jax.load`; or the logits differ from PyTorch's. Nothing is written then.
        ConfigError: `target` is there already or can't be written.
    """
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} is there already; add --overwrite or choose another OUT")
    if target.is_dir() and not is_flax_checkpoint(target):
        raise ConfigError(f"{target} is a folder that holds something other than a Flax checkpoint; choose another OUT")
    check_writable(target)
    checkpoint = load(source, model=model, num_classes=num_classes)
    with staging_folder(target) as folder:
        prepared = folder / target.name
        save(checkpoint, prepared)
        if compare:
            difference = verify(checkpoint, prepared if source.is_dir() else source)
            yield f"logits differ from PyTorch's by {difference:.1e} (relative)"
        put_in_place(prepared, target)
    values = sum(leaf.size for leaf in checkpoint.leaves.values())
    architecture, classes = checkpoint.architecture.name, checkpoint.num_classes
    yield f"{source}: {architecture}, {classes} classes, {values:,} values in {len(checkpoint.leaves)} leaves"
    yield f"written: {target}"
