"""GPT-NeoX: Pythia, GPT-NeoX-20B and their classification heads.

A layer is LayerNorm, fused QKV with rows ordered per head as q|k|v, RoPE on the leading part of
each head, attention, O, and a two-projection MLP with its own LayerNorm; attention and MLP run
side by side or one after the other.
"""

from __future__ import annotations

import sys
from typing import Any

from hf_fusion.registry import (
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
)
from hf_fusion.spec import (
    AttentionSpec,
    BlockSpec,
    BlockTensors,
    MlpSpec,
    QkvLayout,
    Residual,
)

_MODELING = "transformers.models.gpt_neox.modeling_gpt_neox"
_LINEAR = "torch.nn.modules.linear:Linear"
_LAYER_NORM = "torch.nn.modules.normalization:LayerNorm"
_DROPOUT = "torch.nn.modules.dropout:Dropout"

_LAYER_CHILDREN = {
    "input_layernorm": _LAYER_NORM,
    "post_attention_layernorm": _LAYER_NORM,
    "post_attention_dropout": _DROPOUT,
    "post_mlp_dropout": _DROPOUT,
    "attention": f"{_MODELING}:GPTNeoXAttention",
    "mlp": f"{_MODELING}:GPTNeoXMLP",
}
# parameters of the forwards; cache_position is one of releases before 5.4, past_key_values before
# 5.24, cache from there on
_LAYER_PARAMETERS = (
    "hidden_states", "attention_mask", "position_ids", "use_cache", "layer_past",
    "position_embeddings", "cache_position",
)  # fmt: skip
_BASE_PARAMETERS = (
    "input_ids", "attention_mask", "position_ids", "inputs_embeds", "past_key_values", "cache",
    "use_cache", "cache_position",
)  # fmt: skip
_LM_PARAMETERS = (*_BASE_PARAMETERS, "labels", "logits_to_keep")
# functions that the classes above call and that others are known to replace
_MODULE_FUNCTIONS = ("apply_rotary_pos_emb", "rotate_half", "eager_attention_forward")


def to_spec(layer: Any) -> BlockSpec:
    """The BlockSpec of a GPTNeoXLayer; FusionError names what is not as expected."""
    expect_children("the layer", layer, tuple(_LAYER_CHILDREN))
    expect_parameters("the layer", layer, _LAYER_PARAMETERS)
    for name, expected in _LAYER_CHILDREN.items():
        expect_type(f"layer.{name}", layer._modules[name], expected)
    attention, mlp = layer.attention, layer.mlp
    expect_children("layer.attention", attention, ("query_key_value", "dense"))
    expect_children("layer.mlp", mlp, ("dense_h_to_4h", "dense_4h_to_h", "act"))
    for name in ("query_key_value", "dense"):
        expect_type(f"layer.attention.{name}", attention._modules[name], _LINEAR)
    for name in ("dense_h_to_4h", "dense_4h_to_h"):
        expect_type(f"layer.mlp.{name}", mlp._modules[name], _LINEAR)
    if attention.is_causal is not True:
        raise FusionError(
            Reason.NOT_CAUSAL,
            f"layer.attention.is_causal is {attention.is_causal!r}, expected True",
        )
    hidden, head_dim = layer.input_layernorm.normalized_shape[-1], attention.head_size
    return spec_of(
        lambda: BlockSpec(
            hidden=hidden,
            attention=AttentionSpec(
                heads=hidden // head_dim,
                kv_heads=hidden // head_dim,
                head_dim=head_dim,
                # the rotary module makes a frequency for every second dimension, rounded up
                rotary_dim=(attention.rotary_ndims + 1) // 2 * 2,
                scale=float(attention.scaling),
                qkv_layout=QkvLayout.PER_HEAD,
            ),
            mlp=MlpSpec(mlp.dense_h_to_4h.weight.shape[0], activation_of(mlp.act)),
            attention_norm=layer_norm_of("layer.input_layernorm", layer.input_layernorm, hidden),
            mlp_norm=layer_norm_of(
                "layer.post_attention_layernorm", layer.post_attention_layernorm, hidden
            ),
            residual=Residual.PARALLEL if layer.use_parallel_residual else Residual.SEQUENTIAL,
        )
    )


def tensors(layer: Any) -> BlockTensors:
    """The parameters of a GPTNeoXLayer."""
    attention, mlp = layer.attention, layer.mlp
    return BlockTensors(
        attention_norm_weight=layer.input_layernorm.weight,
        attention_norm_bias=layer.input_layernorm.bias,
        mlp_norm_weight=layer.post_attention_layernorm.weight,
        mlp_norm_bias=layer.post_attention_layernorm.bias,
        qkv_weight=attention.query_key_value.weight,
        qkv_bias=attention.query_key_value.bias,
        o_weight=attention.dense.weight,
        o_bias=attention.dense.bias,
        up_weight=mlp.dense_h_to_4h.weight,
        up_bias=mlp.dense_h_to_4h.bias,
        down_weight=mlp.dense_4h_to_h.weight,
        down_bias=mlp.dense_4h_to_h.bias,
    )


def parts(base: Any) -> ModelParts:
    """Embedding, layers, final norm and rotary module of a GPTNeoXModel."""
    expect_children(
        "the model", base, ("embed_in", "emb_dropout", "layers", "final_layer_norm", "rotary_emb")
    )
    expect_parameters("the model", base, _BASE_PARAMETERS)
    expect_type("model.embed_in", base.embed_in, "torch.nn.modules.sparse:Embedding")
    expect_type("model.emb_dropout", base.emb_dropout, _DROPOUT)
    expect_type("model.layers", base.layers, "torch.nn.modules.container:ModuleList")
    expect_type("model.final_layer_norm", base.final_layer_norm, _LAYER_NORM)
    expect_type("model.rotary_emb", base.rotary_emb, f"{_MODELING}:GPTNeoXRotaryEmbedding")
    if base.embed_in.max_norm is not None:
        raise FusionError(
            Reason.STRUCTURE,
            f"model.embed_in.max_norm is {base.embed_in.max_norm!r}, expected None",
        )
    hidden = base.embed_in.weight.shape[-1]
    return ModelParts(
        embedding=base.embed_in,
        layers=base.layers,
        final_norm=base.final_layer_norm,
        final_norm_spec=layer_norm_of("model.final_layer_norm", base.final_layer_norm, hidden),
        rotary=base.rotary_emb,
    )


def head(causal_lm: Any) -> Any:
    """The output projection of a GPTNeoXForCausalLM; releases before 5.4 call it embed_out."""
    name = "embed_out" if "embed_out" in causal_lm._modules else "lm_head"
    expect_children("the model", causal_lm, ("gpt_neox", name))
    expect_parameters("the model", causal_lm, _LM_PARAMETERS)
    expect_type(f"model.{name}", causal_lm._modules[name], _LINEAR)
    return causal_lm._modules[name]


def cache_index(layer: Any) -> int:
    """The layer of the cache that a GPTNeoXLayer fills."""
    return layer.attention.layer_idx


def watched(layer: Any) -> list[tuple[dict, str]]:
    """The plain attributes and module functions that a GPTNeoXLayer's result depends on."""
    attention, act = vars(layer.attention), vars(layer.mlp.act)
    entries = [(vars(layer), "use_parallel_residual")]
    entries += [(vars(layer.input_layernorm), "eps"), (vars(layer.post_attention_layernorm), "eps")]
    entries += [
        (attention, key)
        for key in ("scaling", "head_size", "rotary_ndims", "is_causal", "layer_idx")
    ]
    entries += [(act, "act")] if "act" in act else []
    namespace = vars(sys.modules[_MODELING])
    return entries + [(namespace, key) for key in _MODULE_FUNCTIONS]


def tiny_config(**changes: Any) -> Any:
    """A GPTNeoXConfig with odd sizes: 2 layers, hidden 32, 4 heads, MLP 37, vocabulary 99."""
    from transformers import GPTNeoXConfig

    sizes = {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 37,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    return GPTNeoXConfig(**{**sizes, **changes})


register_family(
    Family(
        name="gpt_neox",
        layer_class=f"{_MODELING}:GPTNeoXLayer",
        base_class=f"{_MODELING}:GPTNeoXModel",
        causal_lm_class=f"{_MODELING}:GPTNeoXForCausalLM",
        to_spec=to_spec,
        tensors=tensors,
        parts=parts,
        head=head,
        cache_index=cache_index,
        watched=watched,
        tiny_config=tiny_config,
        cache_argument="layer_past",
    )
)
