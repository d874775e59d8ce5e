"""Hugging Face transformers' own models, in either spelling of their names."""

import re

from tests.oracles import torchvision_models  # noqa: F401 - before transformers imports torchvision

# Of transformers 5, by those of transformers 4; the files on the hub have either.
NEWER = {
    r"\.encoder\.layer\.": ".layers.",
    r"attention\.attention\.(query|key|value)": lambda match: f"attention.{match[1][0]}_proj",
    r"attention\.output\.dense": "attention.o_proj",
    r"intermediate\.dense": "mlp.fc1",
    r"output\.dense": "mlp.fc2",
}


def newer(state):
    """A state dict with the names of transformers 5, which renamed the layers of ViT and DeiT."""
    for old, new in NEWER.items():
        state = {
            re.sub(old, new, name) if name.startswith(("vit", "deit")) else name: value for name, value in state.items()
        }
    return state


def made(kind, classes, **settings):
    """A model without weights: `kind` is what stands before and behind `ForImageClassification`, with - between."""
    import transformers

    before, _, behind = kind.partition("-")
    config = getattr(transformers, f"{before}Config")(num_labels=classes, **settings)
    return getattr(transformers, f"{before}ForImageClassification{behind}")(config)
