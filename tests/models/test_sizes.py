"""Sizes that names spell and state dicts tell."""

import pytest

from ibau_jax.checkpoints.conversion import torch_shapes
from ibau_jax.checkpoints.recognition import abstract_shapes
from ibau_jax.errors import CheckpointError
from ibau_jax.models import architectures, convnext, get_architecture, proposed, regnet, repvgg, shufflenet

NAMES = [
    *(f"mobilenet_v2_x{width}" for width in ("0_25", "0_35", "0_5", "0_75", "1_4", "2_0")),
    *(f"mnasnet{width}" for width in ("0_35", "0_5", "0_75", "1_0", "1_3")),
    *(f"shufflenet_v2_{size}" for size in shufflenet.NAMED),
    *(f"regnet_{kind}_{size}" for kind, sizes in regnet.NAMED.items() for size in sizes),
    *(f"convnext_{size}" for size in convnext.NAMED),
    *(f"repvgg_{size}{form}" for size in repvgg.NAMED for form in repvgg.FORMS),
    "repvgg_a0_stride8",
    "repvgg_w16_d1",
    "repvgg_w16_24_d1_2_g4",
    "shufflenet_v2_w16_32_d2_1_l8",
    "regnet_x_w16_32_d1_2_g8",
    "regnet_y_w24_d3_g12",
    "convnext_w40_80_160_320_d2_2_6_3",
    "convnext_w8_d1",
]


def shapes(architecture):
    return torch_shapes(abstract_shapes(architecture, 7, architecture.image_sizes[0]))


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_tells_the_size(name):
    architecture = get_architecture(name)
    assert architecture.landmarks.items() <= shapes(architecture).items()
    assert [one.name for one in proposed(shapes(architecture)) if not one.is_guessed] == [name]


@pytest.mark.slow
def test_no_other_network_is_taken_for_one_of_these():
    for architecture in (one for one in architectures() if one.variant_of is None):
        its = shapes(architecture)
        others = {one.name for one in proposed(its) if not one.is_guessed and shapes(one) == its}
        assert others <= {architecture.name}


@pytest.mark.parametrize(
    "name",
    [
        "mobilenet_v2_x1_0",  # mobilenet_v2
        "mobilenet_v2_x0_50",
        "mobilenet_v2_x0_05",
        "mnasnet4_0",
        "regnet_x_128gf",
        "regnet_x_w16_32_d1_g8",
        "regnet_x_w20_d1_g8",
        "regnet_x_w16_d0_g8",
        "regnet_x_w16_d1_g0",
        "shufflenet_v2_w15_d1_l8",
        "shufflenet_v2_w16_d1",
        "repvgg_w16_18_d1_1_g4",
        "repvgg_w16_d0",
        "convnext_w0_d1",
        "convnext_w10000_d1",
    ],
)
def test_there_is_no_network_of_these_sizes(name):
    with pytest.raises(CheckpointError, match="there is no model"):
        get_architecture(name)


@pytest.mark.parametrize("shape", [(), (8,), (0, 0, 3, 3), (10**6, 8, 3, 3)])
def test_shapes_that_no_network_has_propose_none(shape):
    names = (
        "trunk_output.block1.block1-0.f.b.0.weight",
        "stage2.0.branch2.5.weight",
        "conv5.0.weight",
        "features.1.0.block.0.weight",
        "layers.14.weight",
        "stage1.0.rbr_dense.conv.weight",
        "stage1.0.rbr_reparam.weight",
        "features.18.0.weight",
    )
    assert proposed(dict.fromkeys(names, shape)) == []
