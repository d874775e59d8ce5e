"""Folders as Hugging Face's transformers writes and reads them: weights, `config.json`, `preprocessor_config.json`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from ibau_jax.checkpoints.hints import CONFIG, PREPROCESSOR
from ibau_jax.checkpoints.module_evidence import activations_of
from ibau_jax.checkpoints.recognition import abstract_model
from ibau_jax.errors import CheckpointError, shortened
from ibau_jax.image_size import ImageSize
from ibau_jax.json_files import read_json
from ibau_jax.models import Architecture
from ibau_jax.models.alterations import ALTERATIONS, HEAD_EPSILONS, LAYER_EPSILONS, replacing
from ibau_jax.models.registry import altered, unaltered

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What is kept of the two files: what is looked at here or in `hints`.
CONFIG_KEYS = (
    *("num_attention_heads", "hidden_act", "layer_norm_eps", "downsample_in_bottleneck", "downsample_in_first_stage"),
    *("image_size", "model_type", "id2label"),
)
PREPROCESSOR_KEYS = ("image_mean", "image_std", "do_normalize", "do_rescale", "size", "crop_size")
# Of which LayerNorms `layer_norm_eps` is the ε, by the alterations that give it, for each `model_type`.
EPSILONS = {"vit": LAYER_EPSILONS, "deit": LAYER_EPSILONS, "convnext": HEAD_EPSILONS, "convnextv2": HEAD_EPSILONS}
DEFAULTS = {"num_attention_heads": 12}  # what transformers takes where the key is left out
ALIASES = {"swish": "silu"}  # of activations
MOST_LABELS = 1000  # whose names are kept


def is_model_folder(path: Path) -> bool:
    """Says whether a folder is one of transformers'."""
    return (path / CONFIG).is_file()


def weights_file(path: Path) -> Path:
    """The file with the weights: the path itself, or the one in a folder of transformers'.

    Raises:
        CheckpointError: the folder holds none.
    """
    if not path.is_dir():
        return path
    found = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{path} has a {CONFIG} but none of {', '.join(WEIGHTS)}")
    return found


def read_description(path: Path) -> dict[str, Any]:
    """What the files beside the weights say, by file: what `hints` and `told_by_description` look at.

    A file has none beside it.

    Raises:
        CheckpointError: one of them is damaged.
    """
    if not path.is_dir():
        return {}
    kept = {CONFIG: _read(path / CONFIG, CONFIG_KEYS)}
    labels = kept[CONFIG].get("id2label")
    if not isinstance(labels, dict) or len(labels) > MOST_LABELS:
        kept[CONFIG].pop("id2label", None)
    if (path / PREPROCESSOR).exists():
        kept[PREPROCESSOR] = _read(path / PREPROCESSOR, PREPROCESSOR_KEYS)
    return kept


def _read(file: Path, keys: Sequence[str]) -> dict[str, Any]:
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"can't read {file}: {shortened(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is damaged: it holds no settings by name")
    return {key: content[key] for key in keys if key in content}


def told_by_description(
    possible: list[Architecture], description: Mapping[str, Any], num_classes: int, image_size: ImageSize
) -> list[Architecture]:
    """Those of several architectures with the same names and shapes that `config.json` does not contradict.

    They have the ε of LayerNorm that it says.

    Raises:
        CheckpointError: it contradicts all of them; the message says in what.
    """
    config = description.get(CONFIG) or {}
    possible = [_with_epsilon(one, config, num_classes, image_size) for one in possible]
    found = {one: _contradiction(one, abstract_model(one, num_classes, image_size), config) for one in possible}
    right = [one for one, contradiction in found.items() if contradiction is None]
    if not right:
        raise CheckpointError(
            f"{CONFIG} says {found[possible[0]]}, unlike {possible[0].name}, which has the same names and shapes. "
            "Write the network as a Flax module and name it by --model FILE.py:CLASS (see docs/custom_model.md)"
        )
    return right


def _with_epsilon(
    architecture: Architecture, config: Mapping[str, Any], num_classes: int, image_size: ImageSize
) -> Architecture:
    """The architecture with the ε of LayerNorm that `config.json` says, where an alteration gives it."""
    said, kind = config.get("layer_norm_eps"), EPSILONS.get(str(config.get("model_type")), {})
    name = next((name for name, epsilon in kind.items() if epsilon == said), None)
    if name is None:
        return architecture
    base, alterations = unaltered(architecture)
    changes = ALTERATIONS[name](nnx.clone(abstract_model(base, num_classes, image_size)))
    return altered(base, *replacing(alterations, kind, name if changes else None))


def _contradiction(architecture: Architecture, model: nnx.Module, config: Mapping[str, Any]) -> str | None:
    heads = {module.heads for _, module in nnx.iter_graph(model) if isinstance(getattr(module, "heads", None), int)}
    caffe = "_v1" in architecture.name
    facts = {
        "num_attention_heads": next(iter(heads)) if len(heads) == 1 else None,
        "hidden_act": activations_of(model) or None,
        "downsample_in_bottleneck": caffe if architecture.name.startswith("resnet") else None,
        "downsample_in_first_stage": False,
    }
    epsilons = {layer.epsilon for _, layer in nnx.iter_graph(model) if isinstance(layer, nnx.LayerNorm)}
    epsilon = config.get("layer_norm_eps")
    if epsilons and isinstance(epsilon, (int, float)) and epsilon not in epsilons:
        return f"layer_norm_eps = {epsilon}"
    for key, own in facts.items():
        said = config.get(key, DEFAULTS.get(key) if "model_type" in config else None)
        named = ALIASES.get(said, said) if isinstance(said, str) else None
        if said is None or own is None or said == own or (isinstance(own, set) and named in own):
            continue
        return f"{key} = {shortened(said, 40)}"
    return None
