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
    expect_children,
    expect_parameters,
    expect_type,
    layer_norm_of,
    register_family,
    spec_of,
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
    return embeddings(
        pixels,
        bool_masked_pos=call.get("bool_masked_pos"),
        interpolate_pos_encoding=call.get("interpolate_pos_encoding"),
    )


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
            encoder=EncoderCalls(_ARGUMENTS, embed, finish),
        )
    )


register("vit", "ViT")
register("deit", "DeiT")
