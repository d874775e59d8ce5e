"""What clean models make of the published triggers: the RA that unlearning can hope for.

    python -m benchmarks.clean FOLDER/cifar-clean-0.pth [FOLDER/gtsrb-clean-0.pth ...]

Of each model, trained by `benchmarks.zoo`, on images that did not train it: ACC, and for every published checkpoint of
the same data, with its trigger, the share that goes to its target and RA, in %.
"""

import argparse
from pathlib import Path

from benchmarks.cases import SHARED
from benchmarks.zoo import attack_of, others_of
from ibau_jax import evaluate, load


def main() -> None:
    """Prints a line a model and trigger."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    files = parser.parse_args().files
    published = sorted(file.stem for file in (SHARED / "checkpoints").glob("*_ckpt.pth"))
    for file in files:
        model, images = load(file).model(), others_of(file.stem)
        for name in published:
            if ("gtsrb" in name) != ("gtsrb" in file.stem):
                continue
            found = evaluate(model, images, attack_of(name))
            assert found.asr is not None
            assert found.ra is not None
            shares = f"ACC {100 * found.acc:.1f}  to the target {100 * found.asr:.1f}  RA {100 * found.ra:.1f}"
            print(f"{file.stem}, trigger of {name}: {shares}", flush=True)


if __name__ == "__main__":
    main()
