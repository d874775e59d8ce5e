"""The bounds of what a pickle describes: how deep it nests, and how long its tensors' names are."""

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from ibau_jax.checkpoints.budget import Budget
from ibau_jax.checkpoints.values import Record, TorchTensor, TorchValue
from ibau_jax.errors import CheckpointError, quoted

MAX_NESTING = 100
MAX_NAME, MAX_PARTS = 400, 40  # of a tensor: characters, and parts between dots
CONTAINER_BYTES, NAMED_TENSOR = 128, 1536  # bytes that one takes beside its own in the tables of what walks the tree


def _children(value: Any) -> Iterator[Any]:
    """What a container holds that may be a container too."""
    if isinstance(value, dict):
        yield from value.values()
        yield getattr(value, "_metadata", None)
    elif isinstance(value, Namespace):
        yield from vars(value).values()
    elif isinstance(value, (list, tuple)):
        yield from value
    elif isinstance(value, TorchValue):
        yield from value.args
    elif isinstance(value, Record):
        yield from (value.args, value.items, value.entries, value.state)
    elif isinstance(value, TorchTensor):
        yield value.attributes


CONTAINERS = (dict, list, tuple, Namespace, TorchValue, Record)


def _may_nest(value: Any) -> bool:
    return isinstance(value, CONTAINERS) or (isinstance(value, TorchTensor) and value.attributes is not None)


def checked_tree(tree: Any, budget: Budget) -> Any:
    """`tree` if what walks it later may recurse and may take the names of its tensors apart, else CheckpointError.

    Its containers are nested at most MAX_NESTING deep and none contains itself; names have at most MAX_NAME characters
    and MAX_PARTS parts. Every item of every container is looked at once. Charged is what walking the tree takes later.
    """
    heights: dict[int, int] = {}
    path = [_Entered((tree,), budget)]
    while path:
        for child in path[-1].children:
            if id(child) not in heights:
                heights[id(child)] = MAX_NESTING  # too high for a container that it holds: a cycle
                path.append(_Entered(child, budget))
                break
            path[-1].height = max(path[-1].height, heights[id(child)] + 1)
        else:
            done = path.pop()
            heights[id(done.container)] = done.height
            if path:
                path[-1].height = max(path[-1].height, done.height + 1)
        if path and max(len(path), path[-1].height) > MAX_NESTING + 1:
            raise CheckpointError("the pickle nests its containers too deeply, or in themselves: refused")
    return tree


class _Entered:
    """A container some of whose children have been looked at."""

    def __init__(self, container: Any, budget: Budget) -> None:
        budget.take(CONTAINER_BYTES)
        if isinstance(container, dict):
            _check_names(container, budget)
        self.container = container
        self.children = filter(_may_nest, _children(container))
        self.height = 0


def _check_names(container: dict[Any, Any], budget: Budget) -> None:
    for name, value in container.items():
        if isinstance(value, TorchTensor):
            budget.take(NAMED_TENSOR + value.nbytes)
            if isinstance(name, str) and (len(name) > MAX_NAME or name.count(".") >= MAX_PARTS):
                raise CheckpointError(f"a tensor's name has too many characters or parts: {quoted(name)}: refused")
