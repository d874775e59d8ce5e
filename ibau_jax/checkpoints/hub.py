"""Models of the Hugging Face hub, downloaded below the folder where its client keeps others. Needs huggingface_hub."""

import re
from pathlib import Path

from ibau_jax.checkpoints.hints import CONFIG, PREPROCESSOR
from ibau_jax.checkpoints.hugging_face import WEIGHTS
from ibau_jax.errors import CheckpointError, quoted, shortened

NAME = re.compile(r"hf:(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
SHARDS = {".safetensors": "model-*.safetensors", ".bin": "pytorch_model-*.bin"}


def downloaded(name: str) -> Path:
    """The folder to which `hf:ORG/NAME[@REVISION]` was downloaded.

    Only weights and their descriptions are downloaded, nothing that could be executed.

    Raises:
        CheckpointError: the name is none, huggingface_hub is not installed, or the model can't be downloaded.
    """
    match = NAME.fullmatch(name)
    if match is None:
        raise CheckpointError(f"{quoted(name)} names no model of the hub; write hf:ORG/NAME or hf:ORG/NAME@REVISION")
    try:
        from huggingface_hub import HfApi, constants, snapshot_download
    except ImportError as error:
        raise CheckpointError(f"{name} needs huggingface_hub: pip install 'ibau-jax[hub]'") from error
    repository, revision = match["repository"], match["revision"]
    try:
        files = HfApi().list_repo_files(repository, revision=revision)
        weights = next((one for one in WEIGHTS if one in files), None)
        if weights is None:
            raise CheckpointError(f"it has none of {', '.join(WEIGHTS)}")
        shards = [SHARDS[Path(weights.removesuffix(".index.json")).suffix]] if weights.endswith(".json") else []
        wanted = [CONFIG, PREPROCESSOR, weights, *shards]
        # A folder of its own: in the hub's cache are links that lead out of a folder, which an index may not.
        folder = Path(constants.HF_HOME, "ibau_jax", repository, revision or "main")
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted, local_dir=folder))
    except Exception as error:  # whatever the hub's client raises for names, networks and disks
        raise CheckpointError(f"can't download {name}: {shortened(error)}") from error
