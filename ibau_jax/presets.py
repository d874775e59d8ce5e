"""Named sets of constants: this project's, the published ones, and those of other implementations."""

from ibau_jax.config import UnlearnConfig

PRESETS: dict[str, UnlearnConfig] = {
    "robust": UnlearnConfig(
        n_rounds=3,
        min_batches=20,
        perturbations=4,
        renew=False,
        spaces=("perturbation", "patch", "warp", "wave"),
        enlarge=3.0,
        lr=8e-4,
        b2=0.95,
        schedule="cosine",
        portion=0.4,
        K=1,
        fixed_point_step=0.001,
        distillation=10.0,
        consistency=1.0,
        crop=2,
        mix=0.5,
        mirror="tolerated",
    ),
    # The published command line.
    "cifar10": UnlearnConfig(),
    # The published GTSRB notebook.
    "gtsrb": UnlearnConfig(clip=True, inner_optim="adam", inner_lr=1.0, norm_bound=10.0, n_rounds=1),
    # As BackdoorBench runs I-BAU (defense/i-bau.py, config/defense/i-bau), but for what docs/presets.md says.
    "backdoorbench": UnlearnConfig(
        batch_size=256,
        optim="amsgrad",
        lr=1e-4,
        space="normalized",
        shuffle=True,
        crop=4,
        mirror="tolerated",
    ),
    # As backdoor-toolbox does (other_defenses_tool_box/IBAU.py).
    "backdoor-toolbox": UnlearnConfig(n_rounds=3, lr=5e-4, space="normalized", shuffle=True),
}
