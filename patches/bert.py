"""BERT, RoBERTa and XLM-RoBERTa as encoders.

A layer is three projections q, k and v, attention over all tokens, O, residual and LayerNorm, and a
two-projection MLP, residual and LayerNorm. As a decoder, or with cross-attention, the models run
stock.
"""

from __future__ import annotations

import sys
from typing import Any

from hf_fusion.registry import (
    EncoderCalls,
    Family,
    FusionError,
    ModelParts,
    Reason,
    activation_of,
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
_ARGUMENTS = ("input_ids", "token_type_ids", "position_ids", "inputs_embeds")
# past_key_values before transformers 5.24, cache from there on
_DECODING = (
    "encoder_hidden_states", "encoder_attention_mask", "past_key_values", "cache", "use_cache",
)  # fmt: skip
_MODULE_FUNCTIONS = ("eager_attention_forward", "apply_chunking_to_forward")


def tensors(layer: Any) -> BlockTensors:
    """The parameters of a BertLayer."""
    inner, o = layer.attention.self, layer.attention.output
    up, down = layer.intermediate.dense, layer.output
    return BlockTensors(
        attention_norm_weight=o.LayerNorm.weight,
        attention_norm_bias=o.LayerNorm.bias,
        mlp_norm_weight=down.LayerNorm.weight,
        mlp_norm_bias=down.LayerNorm.bias,
        qkv_weight=inner.query.weight,
        qkv_bias=inner.query.bias,
        o_weight=o.dense.weight,
        o_bias=o.dense.bias,
        up_weight=up.weight,
        up_bias=up.bias,
        down_weight=down.dense.weight,
        down_bias=down.dense.bias,
        k_weight=inner.key.weight,
        k_bias=inner.key.bias,
        v_weight=inner.value.weight,
        v_bias=inner.value.bias,
    )


def embed(base: Any, call: dict) -> Any:
    """Word, position and token type embeddings, normed."""
    if (call.get("input_ids") is None) == (call.get("inputs_embeds") is None):
        raise FusionError(Reason.INPUT, "expected exactly one of input_ids and inputs_embeds")
    return base.embeddings(**{name: call.get(name) for name in _ARGUMENTS})


def finish(base: Any, hidden: Any) -> Any:
    """The model output, pooled where the model pools."""
    from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

    pooled = base.pooler(hidden) if base.pooler is not None else None
    return BaseModelOutputWithPoolingAndCrossAttentions(
        last_hidden_state=hidden, pooler_output=pooled
    )


def register(name: str, prefix: str) -> Family:
    """Registers the family of the classes `prefix`Model, `prefix`Layer, ..."""
    modeling = f"transformers.models.{name}.modeling_{name}"

    def to_spec(layer: Any) -> BlockSpec:
        if layer.is_decoder or layer.add_cross_attention or layer.attention.self.is_causal:
            raise FusionError(Reason.NOT_ENCODER, "the layer is a decoder's, expected an encoder's")
        nested = {
            "": {"attention": "Attention", "intermediate": "Intermediate", "output": "Output"},
            "attention": {"self": "SelfAttention", "output": "SelfOutput"},
            "attention.self": dict.fromkeys(("query", "key", "value"), _LINEAR)
            | {"dropout": _DROPOUT},
            "attention.output": {"dense": _LINEAR, "LayerNorm": _LAYER_NORM, "dropout": _DROPOUT},
            "intermediate": {"dense": _LINEAR, "intermediate_act_fn": None},
            "output": {"dense": _LINEAR, "LayerNorm": _LAYER_NORM, "dropout": _DROPOUT},
        }
        for owner, children in nested.items():
            module, shown = layer.get_submodule(owner), f"layer.{owner}".rstrip(".")
            expect_children(shown, module, tuple(children))
            for child, kind in children.items():
                if kind is not None:
                    expected = kind if ":" in kind else f"{modeling}:{prefix}{kind}"
                    expect_type(f"{shown}.{child}", module._modules[child], expected)
        expect_parameters("the layer", layer, ("hidden_states", "attention_mask", *_DECODING[:4]))
        inner, first, second = layer.attention.self, layer.attention.output, layer.output
        hidden, head_dim = first.LayerNorm.normalized_shape[-1], inner.attention_head_size
        up = layer.intermediate
        return spec_of(
            lambda: BlockSpec(
                hidden=hidden,
                attention=AttentionSpec(
                    heads=inner.query.weight.shape[0] // head_dim,
                    kv_heads=inner.key.weight.shape[0] // head_dim,
                    head_dim=head_dim,
                    rotary_dim=0,
                    scale=float(inner.scaling),
                    qkv_layout=QkvLayout.SEPARATE,
                    causal=False,
                ),
                mlp=MlpSpec(up.dense.weight.shape[0], activation_of(up.intermediate_act_fn)),
                attention_norm=layer_norm_of(
                    "layer.attention.output.LayerNorm", first.LayerNorm, hidden
                ),
                mlp_norm=layer_norm_of("layer.output.LayerNorm", second.LayerNorm, hidden),
                residual=Residual.POST_NORM,
            )
        )

    def parts(base: Any) -> ModelParts:
        pooler = ("pooler",) if "pooler" in base._modules else ()  # absent under most heads
        expect_children("the model", base, ("embeddings", "encoder", *pooler))
        expect_parameters("the model", base, (*_ARGUMENTS, "attention_mask", *_DECODING))
        expect_type("model.embeddings", base.embeddings, f"{modeling}:{prefix}Embeddings")
        expect_type("model.encoder", base.encoder, f"{modeling}:{prefix}Encoder")
        expect_children("model.encoder", base.encoder, ("layer",))
        if base.config.is_decoder:
            raise FusionError(Reason.NOT_ENCODER, "config.is_decoder is True, expected False")
        return ModelParts(
            embedding=None,
            layers=base.encoder.layer,
            final_norm=None,
            final_norm_spec=None,
            rotary=None,
            called=("embeddings", "pooler"),
        )

    def watched(layer: Any) -> list[tuple[dict, str]]:
        inner, act = vars(layer.attention.self), vars(layer.intermediate.intermediate_act_fn)
        norms = (layer.attention.output.LayerNorm, layer.output.LayerNorm)
        entries = [(vars(layer), key) for key in ("is_decoder", "add_cross_attention")]
        entries.append((vars(layer.attention.self.config), "is_decoder"))
        entries += [(vars(norm), "eps") for norm in norms]
        entries += [(inner, key) for key in ("scaling", "attention_head_size", "is_causal")]
        entries += [(act, "act")] if "act" in act else []
        namespace = vars(sys.modules[modeling])
        return entries + [(namespace, key) for key in _MODULE_FUNCTIONS]

    def tiny_config(**changes: Any) -> Any:
        import transformers

        sizes = {
            "vocab_size": 99,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 37,
            "max_position_embeddings": 512,
            "pad_token_id": 1,
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
            encoder=EncoderCalls(_ARGUMENTS, embed, finish, lambda base: unseen(base.embeddings)),
        )
    )


register("bert", "Bert")
register("roberta", "Roberta")
register("xlm_roberta", "XLMRoberta")
