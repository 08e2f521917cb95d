"""DistilBERT: a layer as BERT's (see bert.py) under other names, without pooler or token types."""

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

_MODELING = "transformers.models.distilbert.modeling_distilbert"
_LINEAR = "torch.nn.modules.linear:Linear"
_LAYER_NORM = "torch.nn.modules.normalization:LayerNorm"
_DROPOUT = "torch.nn.modules.dropout:Dropout"
_ARGUMENTS = ("input_ids", "inputs_embeds", "position_ids")
_CHILDREN = {
    "": {
        "attention": f"{_MODELING}:DistilBertSelfAttention",
        "sa_layer_norm": _LAYER_NORM,
        "ffn": f"{_MODELING}:FFN",
        "output_layer_norm": _LAYER_NORM,
    },
    "attention": dict.fromkeys(("q_lin", "k_lin", "v_lin", "out_lin"), _LINEAR)
    | {"dropout": _DROPOUT},
    "ffn": {"dropout": _DROPOUT, "lin1": _LINEAR, "lin2": _LINEAR, "activation": None},
}


def to_spec(layer: Any) -> BlockSpec:
    """The BlockSpec of a TransformerBlock; FusionError names what is not as expected."""
    for owner, children in _CHILDREN.items():
        module, shown = layer.get_submodule(owner), f"layer.{owner}".rstrip(".")
        expect_children(shown, module, tuple(children))
        for child, expected in children.items():
            if expected is not None:
                expect_type(f"{shown}.{child}", module._modules[child], expected)
    expect_parameters("the layer", layer, ("hidden_states", "attention_mask"))
    attention, ffn = layer.attention, layer.ffn
    hidden, head_dim = layer.sa_layer_norm.normalized_shape[-1], attention.attention_head_size
    return spec_of(
        lambda: BlockSpec(
            hidden=hidden,
            attention=AttentionSpec(
                heads=attention.q_lin.weight.shape[0] // head_dim,
                kv_heads=attention.k_lin.weight.shape[0] // head_dim,
                head_dim=head_dim,
                rotary_dim=0,
                scale=float(attention.scaling),
                qkv_layout=QkvLayout.SEPARATE,
                causal=False,
            ),
            mlp=MlpSpec(ffn.lin1.weight.shape[0], activation_of(ffn.activation)),
            attention_norm=layer_norm_of("layer.sa_layer_norm", layer.sa_layer_norm, hidden),
            mlp_norm=layer_norm_of("layer.output_layer_norm", layer.output_layer_norm, hidden),
            residual=Residual.POST_NORM,
        )
    )


def tensors(layer: Any) -> BlockTensors:
    """The parameters of a TransformerBlock."""
    attention, ffn = layer.attention, layer.ffn
    return BlockTensors(
        attention_norm_weight=layer.sa_layer_norm.weight,
        attention_norm_bias=layer.sa_layer_norm.bias,
        mlp_norm_weight=layer.output_layer_norm.weight,
        mlp_norm_bias=layer.output_layer_norm.bias,
        qkv_weight=attention.q_lin.weight,
        qkv_bias=attention.q_lin.bias,
        o_weight=attention.out_lin.weight,
        o_bias=attention.out_lin.bias,
        up_weight=ffn.lin1.weight,
        up_bias=ffn.lin1.bias,
        down_weight=ffn.lin2.weight,
        down_bias=ffn.lin2.bias,
        k_weight=attention.k_lin.weight,
        k_bias=attention.k_lin.bias,
        v_weight=attention.v_lin.weight,
        v_bias=attention.v_lin.bias,
    )


def parts(base: Any) -> ModelParts:
    """Layers of a DistilBertModel."""
    expect_children("the model", base, ("embeddings", "transformer"))
    expect_parameters("the model", base, (*_ARGUMENTS, "attention_mask"))
    expect_type("model.embeddings", base.embeddings, f"{_MODELING}:Embeddings")
    expect_type("model.transformer", base.transformer, f"{_MODELING}:Transformer")
    expect_children("model.transformer", base.transformer, ("layer",))
    return ModelParts(None, base.transformer.layer, None, None, None, called=("embeddings",))


def embed(base: Any, call: dict) -> Any:
    """Word and position embeddings, normed."""
    if (call.get("input_ids") is None) == (call.get("inputs_embeds") is None):
        raise FusionError(Reason.INPUT, "expected exactly one of input_ids and inputs_embeds")
    return base.embeddings(*(call.get(name) for name in _ARGUMENTS))


def finish(base: Any, hidden: Any) -> Any:
    """The model output."""
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=hidden)


def watched(layer: Any) -> list[tuple[dict, str]]:
    """The plain attributes and module functions that a TransformerBlock's result depends on."""
    attention, act = vars(layer.attention), vars(layer.ffn.activation)
    entries = [(vars(norm), "eps") for norm in (layer.sa_layer_norm, layer.output_layer_norm)]
    entries += [(attention, key) for key in ("scaling", "attention_head_size", "is_causal")]
    entries += [(act, "act")] if "act" in act else []
    namespace = vars(sys.modules[_MODELING])
    return entries + [
        (namespace, key) for key in ("eager_attention_forward", "apply_chunking_to_forward")
    ]


def tiny_config(**changes: Any) -> Any:
    """A DistilBertConfig with odd sizes: 2 layers, hidden 32, 4 heads, MLP 37, vocabulary 99."""
    from transformers import DistilBertConfig

    sizes = {
        "vocab_size": 99,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 37,
        "max_position_embeddings": 512,
    }
    names = {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
    }
    return DistilBertConfig(**sizes | {names.get(key, key): v for key, v in changes.items()})


register_family(
    Family(
        name="distilbert",
        layer_class=f"{_MODELING}:TransformerBlock",
        base_class=f"{_MODELING}:DistilBertModel",
        to_spec=to_spec,
        tensors=tensors,
        parts=parts,
        watched=watched,
        tiny_config=tiny_config,
        encoder=EncoderCalls(_ARGUMENTS, embed, finish, lambda base: unseen(base.embeddings)),
    )
)
