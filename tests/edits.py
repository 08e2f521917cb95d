"""Ways in which programs change a model under a running patch. Each edit does the same to two
models with one seed.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from pairs import tokens
from torch import nn
from torch.nn.utils import parametrize, prune

from hf_fusion.report import Reason

EDITS: dict[str, Edit] = {}


class Edit(NamedTuple):
    """`apply(model, seed)` edits in place and may return another module to call from then on.

    `reasons`: what refusals it may lead to; empty where the model must stay fused.
    """

    apply: Callable
    reasons: tuple[Reason, ...]


def edit(*reasons: Reason):
    """Registers an edit under its function's name."""

    def register(function: Callable) -> Callable:
        def apply(model: nn.Module, seed: int):
            torch.manual_seed(seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return function(model) or model

        EDITS[function.__name__] = Edit(apply, reasons)
        return function

    return register


def _causal(model: nn.Module) -> nn.Module:
    """The GPTNeoXForCausalLM inside an adapter's wrapper, or the model itself."""
    return next(m for m in model.modules() if type(m).__name__ == "GPTNeoXForCausalLM")


def _layer(model: nn.Module) -> nn.Module:
    return _causal(model).gpt_neox.layers[0]


def _other(tensor: torch.Tensor) -> torch.Tensor:
    """Values of the same kind as those of a parameter, and others."""
    return tensor.detach().flip(0) * 1.25 + 0.1 * torch.randn_like(tensor)


def _loss(model: nn.Module) -> None:
    with torch.enable_grad():
        ids = tokens(7, 2, 6)
        model(ids, labels=ids).loss.backward()


def _train(model: nn.Module, optimizer) -> None:
    _loss(model)
    optimizer.step()
    model.zero_grad(set_to_none=True)


@edit()
def copy_(model):
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(_other(p))


@edit()
def add_(model):
    with torch.no_grad():
        model.gpt_neox.layers[1].attention.query_key_value.weight.add_(0.2)
        model.gpt_neox.layers[0].mlp.dense_4h_to_h.bias.add_(torch.randn(32))


@edit()
def data_write(model):
    for p in model.parameters():
        p.data.mul_(0.8)  # bumps no version
        p.data.add_(0.05)


@edit()
def data_assign(model):
    for p in model.parameters():
        p.data = _other(p)


@edit()
def data_assign_bias(model):
    _layer(model).attention.dense.bias.data = torch.randn(32)


@edit()
def vector(model):
    nn.utils.vector_to_parameters(
        _other(nn.utils.parameters_to_vector(model.parameters())), model.parameters()
    )


@edit()
def swap_tensors(model):
    weight = _layer(model).mlp.dense_h_to_4h.weight
    torch.utils.swap_tensors(weight, nn.Parameter(_other(weight)))


@edit(Reason.LABELS, Reason.GRADIENTS)
def optimizer_foreach(model):
    _train(model, torch.optim.SGD(model.parameters(), lr=0.05, foreach=True))


@edit(Reason.LABELS, Reason.GRADIENTS)
def optimizer_fused(model):
    _train(model, torch.optim.AdamW(model.parameters(), lr=0.05, fused=True))


@edit()
def load(model):
    model.load_state_dict({k: _other(v) for k, v in model.state_dict().items()})


@edit()
def load_assign(model):
    model.load_state_dict({k: _other(v) for k, v in model.state_dict().items()}, assign=True)


@edit()
def parameter_assign(model):
    layer = _layer(model)
    layer.attention.dense.weight = nn.Parameter(_other(layer.attention.dense.weight))
    model.lm_head.weight = nn.Parameter(_other(model.lm_head.weight))


@edit()
def tie(model):
    model.lm_head.weight = model.gpt_neox.embed_in.weight


@edit()
def resize(model):
    model.resize_token_embeddings(model.config.vocab_size + 9, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(_other(model.lm_head.weight))


@edit()
def swap_module(model):
    layer = _layer(model)
    layer.mlp.dense_h_to_4h = nn.Linear(32, 37)
    model.gpt_neox.final_layer_norm = nn.LayerNorm(32, eps=0.5).eval()


@edit()
def swap_layers(model):
    """Two layers change places; their caches follow them."""
    layers = model.gpt_neox.layers
    layers[0], layers[1] = layers[1], layers[0]
    for index in (0, 1):
        layers[index].attention.layer_idx = index


@edit(Reason.STRUCTURE)
def swap_layers_only(model):
    layers = model.gpt_neox.layers
    layers[0], layers[1] = layers[1], layers[0]


@edit()
def drop_layer(model):
    del model.gpt_neox.layers[-1]
    model.config.num_hidden_layers -= 1


@edit()
def norm_eps(model):
    _layer(model).input_layernorm.eps = 3.0
    _layer(model).post_attention_layernorm.eps = 3.0


@edit()
def attention_scale(model):
    for layer in model.gpt_neox.layers:
        layer.attention.scaling *= 3.0


@edit(Reason.SHAPE)
def attention_scale_of_one(model):
    """Layers with unlike attention no longer make one model; they run one by one."""
    _layer(model).attention.scaling *= 3.0


@edit()
def residual(model):
    for layer in model.gpt_neox.layers:
        layer.use_parallel_residual = not layer.use_parallel_residual


@edit()
def activation(model):
    from transformers.activations import ACT2FN

    _layer(model).mlp.act = ACT2FN[
        "relu" if type(_layer(model).mlp.act).__name__ != "ReLU" else "silu"
    ].eval()


@edit()
def no_bias(model):
    _layer(model).attention.query_key_value.bias = None


@edit()
def frequencies(model):
    model.gpt_neox.rotary_emb.inv_freq.mul_(0.3)


@edit(Reason.MODULE_TYPE)
def subclass(model):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    _layer(model).attention.dense.__class__ = Doubled


@edit(Reason.FORWARD_REPLACED)
def own_forward(model):
    mlp = _layer(model).mlp
    mlp.forward = lambda x: 0.5 * type(mlp).forward(mlp, x)


@edit(Reason.STRUCTURE, Reason.MODULE_TYPE, Reason.TENSOR_TYPE)
def parametrized(model):
    class Halved(nn.Module):
        def forward(self, weight):
            return 0.5 * weight

    parametrize.register_parametrization(_layer(model).mlp.dense_4h_to_h, "weight", Halved())


@edit(Reason.STRUCTURE, Reason.MODULE_TYPE, Reason.TENSOR_TYPE, Reason.HOOKS)
def pruned(model):
    prune.l1_unstructured(_layer(model).mlp.dense_4h_to_h, "weight", 0.6)


@edit()
def pruned_for_good(model):
    pruned(model)
    prune.remove(_layer(model).mlp.dense_4h_to_h, "weight")


@edit(Reason.MODULE_TYPE, Reason.STRUCTURE, Reason.TENSOR_TYPE)
def quantised(model):
    """int8 linear layers inside layer 0, by torch's own dynamic quantisation."""
    from torch.ao.quantization import quantize_dynamic

    layer = _layer(model)
    layer.mlp = quantize_dynamic(copy.deepcopy(layer.mlp), {nn.Linear}, dtype=torch.qint8)


def _adapter(model):
    import peft

    config = peft.LoraConfig(
        r=4, lora_alpha=64, target_modules=["query_key_value", "dense_4h_to_h"],
        init_lora_weights=False, layers_to_transform=[0], task_type="CAUSAL_LM",
    )  # fmt: skip
    return peft.get_peft_model(model, config)


@edit(Reason.MODULE_TYPE, Reason.STRUCTURE)
def lora_add(model):
    return _adapter(model).eval()


@edit(Reason.MODULE_TYPE, Reason.STRUCTURE)
def lora_merge(model):
    """The adapter's product is in the weights, its wrappers are still there."""
    wrapped = _adapter(model).eval()
    wrapped.merge_adapter()
    return wrapped


@edit()
def lora_merge_and_unload(model):
    return _adapter(model).merge_and_unload().eval()


@edit(Reason.MODULE_TYPE)
def lora_unload(model):
    """Adds, calls and takes off an adapter; the weights are then changed by hand, or nothing would
    show.
    """
    wrapped = _adapter(model).eval()
    with torch.no_grad():
        wrapped(tokens(1))
    add_(wrapped.unload().eval())
