"""ViT and DeiT: encoders over image patches.

A layer is LayerNorm, three projections q, k and v, attention over all patches, O, residual, and a
two-projection MLP with its own LayerNorm and residual; a LayerNorm follows the last one.
"""

from __future__ import annotations

import sys
from typing import Any

from hf_fusion.registry import (
    EncoderCalls,
    Family,
    ModelParts,
    activation_of,
    class_name,
    expect_children,
    expect_parameters,
    expect_type,
    layer_norm_of,
    register_family,
    spec_of,
    unseen,
)
from hf_fusion.spec import (
    AttentionSpec,
    BlockSpec,
    BlockTensors,
    MlpSpec,
    QkvLayout,
    Residual,
)

_LINEAR = "torch.nn.modules.linear:Linear"
_LAYER_NORM = "torch.nn.modules.normalization:LayerNorm"
_DROPOUT = "torch.nn.modules.dropout:Dropout"
_PATCHES = (
    "transformers.models.vit.modeling_vit:ViTPatchEmbeddings",
    "transformers.models.deit.modeling_deit:DeiTPatchEmbeddings",
)
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_ARGUMENTS = ("pixel_values", "bool_masked_pos", "interpolate_pos_encoding")


def tensors(layer: Any) -> BlockTensors:
    """The parameters of a ViTLayer."""
    attention, mlp = layer.attention, layer.mlp
    return BlockTensors(
        attention_norm_weight=layer.layernorm_before.weight,
        attention_norm_bias=layer.layernorm_before.bias,
        mlp_norm_weight=layer.layernorm_after.weight,
        mlp_norm_bias=layer.layernorm_after.bias,
        qkv_weight=attention.q_proj.weight,
        qkv_bias=attention.q_proj.bias,
        o_weight=attention.o_proj.weight,
        o_bias=attention.o_proj.bias,
        up_weight=mlp.fc1.weight,
        up_bias=mlp.fc1.bias,
        down_weight=mlp.fc2.weight,
        down_bias=mlp.fc2.bias,
        k_weight=attention.k_proj.weight,
        k_bias=attention.k_proj.bias,
        v_weight=attention.v_proj.weight,
        v_bias=attention.v_proj.bias,
    )


def embed(base: Any, call: dict) -> Any:
    """Patch embeddings, in the dtype of their weights."""
    pixels, embeddings = call["pixel_values"], base.embeddings
    pixels = pixels.to(embeddings.patch_embeddings.projection.weight.dtype)
    masked, interpolated = call.get("bool_masked_pos"), call.get("interpolate_pos_encoding")
    if masked is None and not interpolated and owned(base) and _is_linear(embeddings, pixels):
        return _embed_patches(embeddings, pixels)
    return embeddings(pixels, bool_masked_pos=masked, interpolate_pos_encoding=interpolated)


def owned(base: Any) -> bool:
    """Whether nothing else holds the embeddings once they are made."""
    return unseen(base.embeddings)


def _is_linear(embeddings: Any, pixels: Any) -> bool:
    """Whether the projection of pixels (B, C, H, W) is one linear map of patches side by side.

    Anything else, wrong sizes among it, is for the module.
    """
    patches, dropout = embeddings.patch_embeddings, embeddings.dropout
    conv = patches.projection
    if (
        class_name(patches) not in _PATCHES
        or class_name(conv) != "torch.nn.modules.conv:Conv2d"
        or class_name(dropout) != _DROPOUT
        or dropout.training
    ):
        return False
    size, step = tuple(patches.image_size), tuple(conv.kernel_size)
    return (
        tuple(pixels.shape[1:]) == (conv.in_channels, *size)
        and patches.num_channels == conv.in_channels
        and len(step) == 2 == len(size)
        and size[0] % step[0] == 0 == size[1] % step[1]
        and tuple(conv.stride) == step
        and tuple(conv.padding) == (0, 0)
        and tuple(conv.dilation) == (1, 1)
        and conv.groups == 1
        and conv.bias is not None
        and embeddings.position_embeddings.shape[0] == 1
        and all(token.shape[1] == 1 for token in _tokens(embeddings))
        and all(p.dtype == pixels.dtype for p in embeddings.parameters())
    )


def _tokens(embeddings: Any) -> list:
    """What stands before the patches, (1, 1, hidden) each in the models that transformers makes."""
    tokens = embeddings.cls_token, getattr(embeddings, "distillation_token", None)
    return [token for token in tokens if token is not None]


def _embed_patches(embeddings: Any, pixels: Any) -> Any:
    """What the module computes, (B, tokens + patches, hidden), its convolution as a linear map.

    The convolution reorders its weights at every call, into memory that a ViT-B/16 layer in bf16
    could run in.
    """
    conv = embeddings.patch_embeddings.projection
    weight = conv.weight.flatten(1)
    (batch, channels, *size), step = pixels.shape, conv.kernel_size
    grid = size[0] // step[0], size[1] // step[1]
    patches = pixels.reshape(batch, channels, grid[0], step[0], grid[1], step[1])
    rows, count = patches.permute(0, 2, 4, 1, 3, 5), grid[0] * grid[1]
    rows = conv.bias.addmm(rows.reshape(batch * count, weight.shape[1]), weight.T)
    tokens = _tokens(embeddings)
    hidden = rows.new_empty((batch, len(tokens) + count, weight.shape[0]))
    for at, token in enumerate(tokens):
        hidden[:, at] = token[:, 0]
    hidden[:, len(tokens) :] = rows.view(batch, count, weight.shape[0])
    return hidden.add_(embeddings.position_embeddings)


def finish(base: Any, hidden: Any) -> Any:
    """The model output, pooled where the model pools."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    pooled = base.pooler(hidden) if base.pooler is not None else None
    return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)


def register(name: str, prefix: str) -> Family:
    """Registers the family of the classes `prefix`Model, `prefix`Layer, ..."""
    modeling = f"transformers.models.{name}.modeling_{name}"

    def to_spec(layer: Any) -> BlockSpec:
        children = {
            "attention": f"{modeling}:{prefix}Attention",
            "layernorm_before": _LAYER_NORM,
            "layernorm_after": _LAYER_NORM,
            "mlp": f"{modeling}:{prefix}MLP",
            "dropout": _DROPOUT,
        }
        expect_children("the layer", layer, tuple(children))
        expect_parameters("the layer", layer, ("hidden_states", "attention_mask"))
        for child, expected in children.items():
            expect_type(f"layer.{child}", layer._modules[child], expected)
        attention, mlp = layer.attention, layer.mlp
        expect_children("layer.attention", attention, _PROJECTIONS)
        expect_children("layer.mlp", mlp, ("activation_fn", "fc1", "fc2"))
        for child in _PROJECTIONS:
            expect_type(f"layer.attention.{child}", attention._modules[child], _LINEAR)
        for child in ("fc1", "fc2"):
            expect_type(f"layer.mlp.{child}", mlp._modules[child], _LINEAR)
        hidden = layer.layernorm_before.normalized_shape[-1]
        return spec_of(
            lambda: BlockSpec(
                hidden=hidden,
                attention=AttentionSpec(
                    heads=attention.q_proj.weight.shape[0] // attention.head_dim,
                    kv_heads=attention.k_proj.weight.shape[0] // attention.head_dim,
                    head_dim=attention.head_dim,
                    rotary_dim=0,
                    scale=float(attention.scaling),
                    qkv_layout=QkvLayout.SEPARATE,
                    causal=False,
                ),
                mlp=MlpSpec(mlp.fc1.weight.shape[0], activation_of(mlp.activation_fn)),
                attention_norm=layer_norm_of(
                    "layer.layernorm_before", layer.layernorm_before, hidden
                ),
                mlp_norm=layer_norm_of("layer.layernorm_after", layer.layernorm_after, hidden),
                residual=Residual.SEQUENTIAL,
            )
        )

    def parts(base: Any) -> ModelParts:
        pooler = ("pooler",) if "pooler" in base._modules else ()  # absent under most heads
        expect_children("the model", base, ("embeddings", "layers", "layernorm", *pooler))
        expect_parameters("the model", base, (*_ARGUMENTS, "attention_mask"))
        expect_type("model.embeddings", base.embeddings, f"{modeling}:{prefix}Embeddings")
        expect_type("model.layers", base.layers, "torch.nn.modules.container:ModuleList")
        expect_type("model.layernorm", base.layernorm, _LAYER_NORM)
        hidden = base.layernorm.normalized_shape[-1]
        return ModelParts(
            embedding=None,
            layers=base.layers,
            final_norm=base.layernorm,
            final_norm_spec=layer_norm_of("model.layernorm", base.layernorm, hidden),
            rotary=None,
            called=("embeddings", "pooler"),
        )

    def watched(layer: Any) -> list[tuple[dict, str]]:
        act, attention = vars(layer.mlp.activation_fn), vars(layer.attention)
        entries = [(vars(n), "eps") for n in (layer.layernorm_before, layer.layernorm_after)]
        entries += [(attention, key) for key in ("scaling", "head_dim", "is_causal")]
        entries += [(act, "act")] if "act" in act else []
        return [*entries, (vars(sys.modules[modeling]), "eager_attention_forward")]

    def tiny_config(**changes: Any) -> Any:
        import transformers

        sizes = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 37,
            "image_size": 30,
            "patch_size": 6,
            "encoder_stride": 6,
        }
        return getattr(transformers, f"{prefix}Config")(**{**sizes, **changes})

    return register_family(
        Family(
            name=name,
            layer_class=f"{modeling}:{prefix}Layer",
            base_class=f"{modeling}:{prefix}Model",
            to_spec=to_spec,
            tensors=tensors,
            parts=parts,
            watched=watched,
            tiny_config=tiny_config,
            encoder=EncoderCalls(_ARGUMENTS, embed, finish, owned),
        )
    )


register("vit", "ViT")
register("deit", "DeiT")
