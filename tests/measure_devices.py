"""Run by tests/test_devices.py in a process with 8 virtual CPU devices: prints what it finds as JSON."""

import json
from dataclasses import replace

import jax
import numpy as np

from ibau_jax.data import make_dataset
from ibau_jax.execution import Execution
from ibau_jax.presets import PRESETS
from ibau_jax.unlearning import initial_state, unlearn_many
from ibau_jax.unlearning.loop import compile_round
from ibau_jax.unlearning.stack import Stack
from tests.unlearning.test_stack import CONFIG, small_net, tiny_members, weights

BATCH = 16


def distance(results, others):
    """The largest relative difference of members' weights."""
    pairs = zip(results, others, strict=True)
    return max(float(np.linalg.norm(weights(a) - weights(b)) / np.linalg.norm(weights(b))) for a, b in pairs)


def costs(members, execution):
    """Operations of a device, and bytes of its arguments, in the compiled steps of a stack of convolutional nets."""
    rng, config = np.random.default_rng(0), replace(CONFIG, batch_size=BATCH, K=1)
    images, labels = rng.integers(0, 256, (BATCH, 32, 32, 3), np.uint8), rng.integers(0, 10, BATCH)
    data = make_dataset(images, labels, "random")
    states = [initial_state(small_net(seed), config) for seed in range(members)]
    steps = compile_round(Stack(states, [data] * members, [config] * members, execution))
    loops = (steps.inner, steps.outer)
    return {
        "flops": [loop.call.cost_analysis()["flops"] for loop in loops],
        "argument_bytes": steps.outer.call.memory_analysis().argument_size_in_bytes,
    }


def main():
    members = tiny_members(np.random.default_rng(0), 4)
    alone = unlearn_many(members)
    spreads = {
        "data": (members[:1], Execution(devices=8)),
        "data and parts": (members[:1], Execution(devices=2, microbatch=3)),
        "data, scan": (members[:1], Execution(devices=8, loop="scan")),
        "sharded parameters": (members[:1], Execution(devices=8, shard_params=True)),
        "members": (members, Execution(devices=4)),
        "members and data": (members, Execution(devices=8)),
        "members and data, scan": (members, Execution(devices=8, loop="scan")),
    }
    found = {name: distance(unlearn_many(some, execution=e), alone[: len(some)]) for name, (some, e) in spreads.items()}
    players = replace(PRESETS["robust"], n_rounds=1, min_batches=2, batch_size=20, optim="sgd", lr=1e-3)
    playing = [replace(member, config=replace(players, seed=number)) for number, member in enumerate(members[:2])]
    found["members with players"] = distance(
        unlearn_many(playing, execution=Execution(devices=2)), unlearn_many(playing)
    )
    work = {
        "1 of 1": costs(1, Execution()),
        "1 on 4": costs(1, Execution(devices=4)),
        "1 on 8": costs(1, Execution(devices=8)),
        "1 on 8, sharded": costs(1, Execution(devices=8, shard_params=True)),
        "2 of 1": costs(2, Execution()),
        "2 on 2": costs(2, Execution(devices=2)),
    }
    print(json.dumps({"devices": len(jax.devices()), "distances": found, "work": work}))


if __name__ == "__main__":
    main()
