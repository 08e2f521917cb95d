"""Encoders by name, and the kind a name stands for: image encoder, text encoder or decoder.

As for decoders, a shape has seeded random weights: latency does not depend on their values.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from torch import nn

from hf_fusion.registry import families

from . import models
from .inputs import InputError, dtype_name, unaccepted

IMAGE, TEXT, DECODER = "image", "text", "decoder"

# name: configuration class, hidden, layers, heads, other fields (published configurations); the MLP
# is four times as wide as hidden
ENCODER_SHAPES: dict[str, tuple[str, int, int, int, dict[str, Any]]] = {
    "vit-s16": ("ViTConfig", 384, 12, 6, {}),
    "vit-b16": ("ViTConfig", 768, 12, 12, {}),
    "vit-l16": ("ViTConfig", 1024, 24, 16, {}),
    "deit-ti16": ("DeiTConfig", 192, 12, 3, {}),
    "deit-s16": ("DeiTConfig", 384, 12, 6, {}),
    "deit-b16": ("DeiTConfig", 768, 12, 12, {}),
    "bert-base": ("BertConfig", 768, 12, 12, {"vocab_size": 30522}),
    "bert-large": ("BertConfig", 1024, 24, 16, {"vocab_size": 30522}),
    "distilbert-base": ("DistilBertConfig", 768, 6, 12, {"vocab_size": 30522}),
    "roberta-base": (
        "RobertaConfig", 768, 12, 12,
        {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1},
    ),
    "xlm-roberta-base": (
        "XLMRobertaConfig", 768, 12, 12,
        {"vocab_size": 250002, "max_position_embeddings": 514, "type_vocab_size": 1},
    ),
}  # fmt: skip
ACCEPTED = (*ENCODER_SHAPES, *models.ACCEPTED)


def encoder_config(name: str) -> Any:
    """The configuration of a shape in ENCODER_SHAPES."""
    import transformers

    kind, hidden, layers, heads, fields = ENCODER_SHAPES[name]
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes["intermediate_size"] = 4 * hidden
    if kind == "DistilBertConfig":
        sizes = {"dim": hidden, "n_layers": layers, "n_heads": heads, "hidden_dim": 4 * hidden}
    return getattr(transformers, kind)(**sizes, **fields)


def kind_of(name: str) -> str:
    """IMAGE, TEXT or DECODER for a model name; InputError where nothing is called so."""
    if name == models.TINY or name in models.PYTHIA_SHAPES:
        return DECODER
    if name in ENCODER_SHAPES:
        return kind_of_config(encoder_config(name))
    shapes = [*ENCODER_SHAPES, *models.PYTHIA_SHAPES]
    local = models.looks_local(name)
    mistyped = "/" not in name and difflib.get_close_matches(name, shapes, 1, 0.85)
    if not name or not local and (mistyped or name.startswith("pythia-")):
        raise unaccepted("model", name, ACCEPTED)
    if local and not (Path(name).expanduser() / "config.json").is_file():
        raise InputError(
            f"model folder {name!r} has no config.json: accepted are {', '.join(ACCEPTED)}"
        )
    return kind_of_config(_config(name))


def kind_of_config(config: Any) -> str:
    """IMAGE, TEXT or DECODER by the family of the configuration, else by its auto classes."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    family = config.model_type.replace("-", "_")
    encoders = {known.name for known in families() if known.encoder is not None}
    if hasattr(config, "image_size") and not hasattr(config, "vocab_size"):
        return IMAGE
    if family in encoders and not getattr(config, "is_decoder", False):
        return TEXT
    return DECODER if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else TEXT


def load_any(name: str, dtype: str, seed: int) -> tuple[models.LoadedModel, str]:
    """The model called `name` with its kind: an encoder without a head, a decoder with one."""
    from transformers import AutoModel

    dtype, kind = dtype_name(dtype), kind_of(name)
    if kind == DECODER:
        return models.load_model(name, dtype, seed), kind
    tokenizer: Any = None
    if name in ENCODER_SHAPES:
        model: nn.Module = models.random_model(encoder_config(name), dtype, seed, AutoModel)
        source = f"random weights, seed {seed}"
    else:
        local = models.looks_local(name)
        path = str(Path(name).expanduser()) if local else name
        model, tokenizer = models.checkpoint(path, name, dtype, AutoModel)
        source = "local checkpoint" if local else "hub checkpoint"
        tokenizer = tokenizer if kind == TEXT else None
    return models.LoadedModel(name, dtype, source, model.eval(), tokenizer), kind


def _config(name: str) -> Any:
    path = str(Path(name).expanduser()) if models.looks_local(name) else name
    return models.configuration(path, name)
