"""Other people's names for the networks here, one for one: timm's, transformers', torchvision's of earlier versions."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ibau_jax.checkpoints import timm_names

MOST_MARKS = 4  # networks in a file whose names are translated


@dataclass(frozen=True)
class Spelling:
    """Names that other code has for a network's tensors, one for one.

    Attributes:
        mark: what the name of one tensor ends with by which the spelling is known.
        names: patterns of names behind the network's prefix, and what the network here calls them: a template, or what
            makes it of the match.
        alteration: how what that code computes differs from the network here, unless it is told otherwise; "" if it
            does not (`ibau_jax.models.alterations`).
    """

    mark: str
    names: Mapping[str, str | Callable[[re.Match[str]], str]]
    alteration: str = ""

    def marks(self, name: str) -> bool:
        """Whether the spelling is known by a tensor of this name."""
        return name.endswith(self.mark) and name[: -len(self.mark)][-1:] in ("", ".")

    def translated(self, plain: Mapping[str, str]) -> dict[str, str] | None:
        """The file's names by the network's, where this is their spelling."""
        prefixes = [name.removesuffix(self.mark) for name in plain if self.marks(name)]
        if not 0 < len(prefixes) <= MOST_MARKS:
            return None
        found = {self._own(name, prefixes): full for name, full in plain.items()}
        return found if len(found) == len(plain) else None

    def _own(self, name: str, prefixes: list[str]) -> str:
        for prefix in filter(name.startswith, prefixes):
            for pattern, own in self.names.items():
                if match := re.fullmatch(pattern, name.removeprefix(prefix)):
                    return prefix + (match.expand(own) if isinstance(own, str) else own(match))
        return name


# Blocks of a vision transformer, as transformers' releases number them and as torchvision does.
BLOCK, OWN_BLOCK = r"(?:encoder\.layer|layers)\.(\d+)", r"encoder.layers.encoder_layer_\1"

# Layers of a Swin transformer's block, as transformers calls them and as torchvision does.
SWIN_BLOCK = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    r"attention\.self\.qkv": "attn.qkv",
    r"attention\.self": "attn",  # the table of positions and its index
    r"attention\.output\.dense": "attn.proj",
    r"intermediate\.dense": "mlp.0",
    r"output\.dense": "mlp.3",
}

# The first one whose mark is there holds: what other marks end with comes before them.
SPELLINGS = (
    # transformers' Swin transformers.
    Spelling(
        "swin.embeddings.patch_embeddings.projection.weight",
        {
            r"swin\.embeddings\.patch_embeddings\.projection\.(weight|bias)": r"features.0.0.\1",
            r"swin\.embeddings\.norm\.(weight|bias)": r"features.0.2.\1",
            **{
                rf"swin\.encoder\.layers\.{stage}\.{theirs}": ours
                for stage in range(timm_names.MOST_STAGES)
                for theirs, ours in (
                    *(
                        (rf"blocks\.(\d+)\.{part}\.(\w+)", rf"features.{2 * stage + 1}.\1.{own}.\2")
                        for part, own in SWIN_BLOCK.items()
                    ),
                    (r"downsample\.(norm|reduction)\.(weight|bias)", rf"features.{2 * stage + 2}.\1.\2"),
                )
            },
            r"swin\.layernorm\.(weight|bias)": r"norm.\1",
            r"classifier\.(weight|bias)": r"head.\1",
        },
    ),
    # Swin transformers of Microsoft and of timm before 0.9, whose stages end with what merges patches; then of timm,
    # whose stages begin with it.
    Spelling("layers.0.downsample.reduction.weight", timm_names.swin(merges_after=0)),
    Spelling("layers.0.blocks.0.attn.relative_position_bias_table", timm_names.swin(merges_after=-1)),
    # Other networks of timm's. EfficientNet's last stage has all of MobileNetV2's layers and more, three blocks from B5
    # on; that of V2's larger sizes, too. MNASNet has a block more than MobileNetV2 in its sixth stage.
    Spelling("s1.b1.conv1.conv.weight", timm_names.regnet()),
    Spelling("blocks.0.0.conv.weight", timm_names.efficientnet_v2_blocks()),
    Spelling("blocks.6.2.se.conv_reduce.weight", timm_names.efficientnet_blocks()),
    Spelling("blocks.6.0.se.conv_reduce.weight", timm_names.efficientnet()),
    Spelling("blocks.5.3.conv_pwl.weight", timm_names.mnasnet()),
    Spelling("blocks.6.0.conv_pwl.weight", timm_names.mobilenet_v2()),
    Spelling("blocks.6.0.conv.weight", timm_names.mobilenet_v3(*timm_names.V3_LARGE)),
    Spelling("blocks.5.0.conv.weight", timm_names.mobilenet_v3(*timm_names.V3_SMALL)),
    Spelling("stages.0.blocks.0.mlp.grn.weight", timm_names.convnext(timm_names.CONVNEXT_V2_BLOCK)),
    Spelling("stages.0.blocks.0.conv_dw.weight", timm_names.convnext(timm_names.CONVNEXT_BLOCK)),
    # CaiT's names are the network's own here, though some are of a vision transformer.
    Spelling("blocks.0.attn.proj_l.weight", {}),
    Spelling("stem.conv_kxk.conv.weight", timm_names.repvgg()),
    Spelling("stem.reparam_conv.weight", timm_names.repvgg()),
    # timm's and DeiT's vision transformers, in torchvision's words.
    Spelling(
        "blocks.0.attn.qkv.weight",
        {
            r"cls_token": "class_token",
            r"pos_embed": "encoder.pos_embedding",
            r"patch_embed\.proj\.(weight|bias)": r"conv_proj.\1",
            r"blocks\.(\d+)\.norm([12])\.(weight|bias)": r"encoder.layers.encoder_layer_\1.ln_\2.\3",
            r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)": r"encoder.layers.encoder_layer_\1.self_attention.in_proj_\2",
            r"blocks\.(\d+)\.attn\.proj\.(weight|bias)": r"encoder.layers.encoder_layer_\1.self_attention.out_proj.\2",
            r"blocks\.(\d+)\.mlp\.fc1\.(weight|bias)": r"encoder.layers.encoder_layer_\1.mlp.0.\2",
            r"blocks\.(\d+)\.mlp\.fc2\.(weight|bias)": r"encoder.layers.encoder_layer_\1.mlp.3.\2",
            r"blocks\.(\d+)\.ls([12])\.gamma": r"encoder.layers.encoder_layer_\1.ls\2.gamma",
            r"norm\.(weight|bias)": r"encoder.ln.\1",
            r"head\.(weight|bias)": r"heads.head.\1",
        },
    ),
    # torchvision's of before 0.13.
    Spelling(
        "encoder.layers.encoder_layer_0.mlp.linear_1.weight",
        {
            r"(encoder\.layers\.encoder_layer_\d+\.mlp)\.linear_1\.(weight|bias)": r"\1.0.\2",
            r"(encoder\.layers\.encoder_layer_\d+\.mlp)\.linear_2\.(weight|bias)": r"\1.3.\2",
        },
    ),
    # transformers' vision transformers, ViT and DeiT, of releases before and after 5; the folds join their queries.
    # Their ε, and that of ConvNeXt's last normalisation, is 1e-12 unless the configuration says another.
    *(
        Spelling(
            f"{name}.embeddings.patch_embeddings.projection.weight",
            {
                rf"{name}\.embeddings\.cls_token": "class_token",
                rf"{name}\.embeddings\.distillation_token": "dist_token",
                rf"{name}\.embeddings\.position_embeddings": "encoder.pos_embedding",
                rf"{name}\.embeddings\.patch_embeddings\.projection\.(weight|bias)": r"conv_proj.\1",
                rf"{name}\.{BLOCK}\.layernorm_before\.(weight|bias)": rf"{OWN_BLOCK}.ln_1.\2",
                rf"{name}\.{BLOCK}\.layernorm_after\.(weight|bias)": rf"{OWN_BLOCK}.ln_2.\2",
                rf"{name}\.{BLOCK}\.attention\.(?:attention\.)?qkv\.(weight|bias)": (
                    rf"{OWN_BLOCK}.self_attention.in_proj_\2"
                ),
                rf"{name}\.{BLOCK}\.attention\.(?:output\.dense|o_proj)\.(weight|bias)": (
                    rf"{OWN_BLOCK}.self_attention.out_proj.\2"
                ),
                rf"{name}\.{BLOCK}\.(?:intermediate\.dense|mlp\.fc1)\.(weight|bias)": rf"{OWN_BLOCK}.mlp.0.\2",
                rf"{name}\.{BLOCK}\.(?:output\.dense|mlp\.fc2)\.(weight|bias)": rf"{OWN_BLOCK}.mlp.3.\2",
                rf"{name}\.layernorm\.(weight|bias)": r"encoder.ln.\1",
                r"(?:cls_)?classifier\.(weight|bias)": r"heads.head.\1",
                r"distillation_classifier\.(weight|bias)": r"head_dist.\1",
            },
            alteration="ln_eps1e-12",
        )
        for name in ("vit", "deit")
    ),
    # The first vision transformer in PyTorch, which chenyaofo/pytorch-cifar-models has too.
    Spelling(
        "transformer.embeddings.patch_embeddings.weight",
        {
            r"transformer\.embeddings\.cls_token": "class_token",
            r"transformer\.embeddings\.position_embeddings": "encoder.pos_embedding",
            r"transformer\.embeddings\.patch_embeddings\.(weight|bias)": r"conv_proj.\1",
            rf"transformer\.{BLOCK}\.attention_norm\.(weight|bias)": rf"{OWN_BLOCK}.ln_1.\2",
            rf"transformer\.{BLOCK}\.ffn_norm\.(weight|bias)": rf"{OWN_BLOCK}.ln_2.\2",
            rf"transformer\.{BLOCK}\.attn\.qkv\.(weight|bias)": rf"{OWN_BLOCK}.self_attention.in_proj_\2",
            rf"transformer\.{BLOCK}\.attn\.out\.(weight|bias)": rf"{OWN_BLOCK}.self_attention.out_proj.\2",
            rf"transformer\.{BLOCK}\.ffn\.fc1\.(weight|bias)": rf"{OWN_BLOCK}.mlp.0.\2",
            rf"transformer\.{BLOCK}\.ffn\.fc2\.(weight|bias)": rf"{OWN_BLOCK}.mlp.3.\2",
            r"transformer\.encoder\.encoder_norm\.(weight|bias)": r"encoder.ln.\1",
            r"head\.(weight|bias)": r"heads.head.\1",
        },
    ),
    # transformers' ResNets.
    Spelling(
        "resnet.embedder.embedder.convolution.weight",
        {
            r"resnet\.embedder\.embedder\.convolution\.weight": "conv1.weight",
            r"resnet\.embedder\.embedder\.normalization\.(\w+)": r"bn1.\1",
            **{
                rf"resnet\.encoder\.stages\.{stage}\.layers\.(\d+)\.{theirs}": rf"layer{stage + 1}.\1.{ours}"
                for stage in range(4)
                for theirs, ours in (
                    *((rf"layer\.{place}\.convolution\.weight", f"conv{place + 1}.weight") for place in range(3)),
                    *((rf"layer\.{place}\.normalization\.(\w+)", rf"bn{place + 1}.\2") for place in range(3)),
                    (r"shortcut\.convolution\.weight", "downsample.0.weight"),
                    (r"shortcut\.normalization\.(\w+)", r"downsample.1.\2"),
                )
            },
            r"classifier\.1\.(weight|bias)": r"fc.\1",
        },
    ),
    # transformers' ConvNeXts.
    *(
        Spelling(
            f"{name}.embeddings.patch_embeddings.weight",
            {
                rf"{name}\.embeddings\.patch_embeddings\.(weight|bias)": r"features.0.0.\1",
                rf"{name}\.embeddings\.layernorm\.(weight|bias)": r"features.0.1.\1",
                **{
                    rf"{name}\.encoder\.stages\.{stage}\.{theirs}": ours
                    for stage in range(4)
                    for theirs, ours in (
                        (r"layers\.(\d+)\.layer_scale", rf"features.{2 * stage + 1}.\1.layer_scale"),
                        *(
                            (rf"layers\.(\d+)\.{part}\.(weight|bias)", rf"features.{2 * stage + 1}.\1.block.{place}.\2")
                            for part, place in layers.items()
                        ),
                        (r"downsampling_layer\.([01])\.(weight|bias)", rf"features.{2 * stage}.\1.\2"),
                    )
                },
                rf"{name}\.layernorm\.(weight|bias)": r"classifier.0.\1",
                r"classifier\.(weight|bias)": r"classifier.2.\1",
            },
            alteration="head_ln_eps1e-12",
        )
        for name, layers in (
            ("convnext", {"dwconv": 0, "layernorm": 2, "pwconv1": 3, "pwconv2": 5}),
            ("convnextv2", {"dwconv": 0, "layernorm": 2, "pwconv1": 3, "grn": 5, "pwconv2": 6}),
        )
    ),
)
