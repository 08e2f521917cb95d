"""Models by name: the shipped tiny Pythia, a Pythia shape with random weights, a folder, a hub id.

Latency does not depend on the values of weights, so a shape needs no download; what a model says
does, so perplexity and equal tokens mean most on a trained checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hf_fusion

from .inputs import DTYPES, InputError, at_least, dtype_name, read_text, unaccepted

TINY = "tiny"
TINY_FOLDER = "tiny_pythia"

# name: hidden, layers, heads, vocabulary; the MLP is four times as wide as hidden (published Pythia
# configurations)
PYTHIA_SHAPES = {
    "pythia-14m": (128, 6, 4, 50304),
    "pythia-31m": (256, 6, 8, 50304),
    "pythia-70m": (512, 6, 8, 50304),
    "pythia-160m": (768, 12, 12, 50304),
    "pythia-410m": (1024, 24, 16, 50304),
    "pythia-1b": (2048, 16, 8, 50304),
    "pythia-1.4b": (2048, 24, 16, 50304),
    "pythia-2.8b": (2560, 32, 32, 50304),
    "pythia-6.9b": (4096, 32, 32, 50432),
    "pythia-12b": (5120, 36, 40, 50688),
}
ACCEPTED = (TINY, *PYTHIA_SHAPES, "a local folder", "a hub id such as EleutherAI/pythia-160m")


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with what it was asked as, where it came from and its tokenizer if
    it has one.
    """

    name: str
    dtype: str
    source: str
    model: nn.Module
    tokenizer: Any | None

    @property
    def layers(self) -> int:
        """Number of transformer layers by the configuration."""
        return self.model.config.num_hidden_layers

    @property
    def positions(self) -> int | None:
        """Number of positions by the configuration, None where it has no such number."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def vocabulary(self) -> int:
        """Number of token ids the model accepts."""
        return self.model.config.vocab_size


def tiny_folder() -> Path:
    """The folder of the shipped checkpoint; InputError when this installation has none."""
    for root in hf_fusion.__path__:
        folder = Path(root) / TINY_FOLDER
        if (folder / "config.json").is_file():
            return folder
    raise InputError(
        f"the shipped checkpoint {TINY_FOLDER} is missing from this installation of hf_fusion"
    )


def heldout_text() -> str:
    """The text the shipped checkpoint was not trained on."""
    return read_text(tiny_folder() / "heldout.txt")


def load_model(name: str, dtype: str = "bf16", seed: int = 0) -> LoadedModel:
    """The model called `name` in `dtype`, on the CPU, in evaluation mode, without an
    end-of-sequence token.

    `seed` fixes the weights of a Pythia shape. Code from a hub is never run. InputError names what
    is not accepted.
    """
    dtype = dtype_name(dtype)
    if name == TINY:
        model, tokenizer = checkpoint(str(tiny_folder()), name, dtype)
        source = "shipped checkpoint"
    elif name in PYTHIA_SHAPES:
        model, tokenizer = random_pythia(name, dtype, seed), None
        source = f"random weights, seed {seed}"
    elif looks_local(name):
        if not (Path(name).expanduser() / "config.json").is_file():
            raise InputError(
                f"model folder {name!r} has no config.json: accepted are {', '.join(ACCEPTED)}"
            )
        model, tokenizer = _decoder(str(Path(name).expanduser()), name, dtype)
        source = "local checkpoint"
    elif name.startswith("pythia-") or not name:
        raise unaccepted("model", name, ACCEPTED)
    else:
        model, tokenizer = _decoder(name, name, dtype)
        source = "hub checkpoint"
    _decode_freely(model)
    return LoadedModel(name, dtype, source, model.eval(), tokenizer)


def random_pythia(name: str, dtype: str, seed: int, device: str = "cpu") -> nn.Module:
    """A GPT-NeoX of a published Pythia shape: weights and biases from N(0, 0.02), norms at 1 and
    0.
    """
    from transformers import GPTNeoXConfig

    hidden, layers, heads, vocabulary = PYTHIA_SHAPES[name]
    config = GPTNeoXConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        rotary_pct=0.25,
        use_parallel_residual=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return random_model(config, dtype, seed, device=device)


def random_model(
    config: Any, dtype: str, seed: int, auto: Any = None, device: str = "cpu"
) -> nn.Module:
    """The model of `config` by the auto class `auto` (default causal LM) on `device`, filled
    there once, with the same values (rounded) in every dtype.

    Parameters are made on the meta device first: the library's own initialisation takes minutes at
    a billion weights.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = (auto or AutoModelForCausalLM).from_config(config, dtype=DTYPES[dtype])
    generator = torch.Generator(device).manual_seed(seed)
    filled: dict[int, nn.Parameter] = {}
    for module in model.modules():
        norm = "norm" in type(module).__name__.lower()
        for key, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in filled:
                value = torch.empty(parameter.shape, device=device)
                if norm:
                    value.fill_(1.0 if key == "weight" else 0.0)
                else:
                    value.normal_(0.0, 0.02, generator=generator)
                filled[id(parameter)] = nn.Parameter(
                    value.to(DTYPES[dtype]), parameter.requires_grad
                )
            setattr(module, key, filled[id(parameter)])
    model.tie_weights()
    return model.to(device)


def prompts(
    loaded: LoadedModel, count: int, batch: int, length: int, seed: int
) -> list[torch.Tensor]:
    """`count` prompts (batch, length) int64: slices of the held-out text where the model has a
    tokenizer, else random ids.
    """
    at_least("prompt length", length, 1)
    at_least("batch", batch, 1)
    generator = torch.Generator().manual_seed(seed)
    stream = token_stream(loaded) if loaded.tokenizer is not None else None
    result = []
    for _ in range(count):
        if stream is not None and stream.numel() > length:
            starts = torch.randint(0, stream.numel() - length, (batch,), generator=generator)
            result.append(
                torch.stack([stream[start : start + length] for start in starts.tolist()])
            )
        else:
            result.append(torch.randint(0, loaded.vocabulary, (batch, length), generator=generator))
    return result


def token_stream(loaded: LoadedModel, text: str | None = None) -> torch.Tensor | None:
    """`text`, or the held-out text, as int64 ids by the model's tokenizer; None when that has ids
    the model has not.
    """
    try:
        text = heldout_text() if text is None else text
    except InputError:
        return None
    ids = loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor(ids, dtype=torch.int64)
    return ids if ids.numel() and int(ids.max()) < loaded.vocabulary else None


def bytes_per_step(model: nn.Module, batch: int, context: int) -> int:
    """Bytes one decode step must read: every weight but the embedding table, `batch` rows of that,
    and the cache.

    context: tokens in the cache. A tied embedding is read whole, as the head.
    """
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is table
    weights = sum(
        p.numel() * p.element_size() for p in model.parameters() if p is not table or tied
    )
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * size * context * batch * table.element_size()
    return weights + batch * table.shape[1] * table.element_size() + cache


def checkpoint(
    path: str, name: str, dtype: str, auto: Any = None
) -> tuple[nn.Module, Any | None]:
    """Model and tokenizer (None without a usable one) at `path`, called `name` in errors; `auto` is
    the auto class, by default that of causal language models. A weight that the checkpoint lacks is
    an InputError: it would be a random one.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model, loading = (auto or AutoModelForCausalLM).from_pretrained(
            path, dtype=DTYPES[dtype], trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # a damaged file raises whatever its reader does
        raise unloadable(name, error) from None
    # a checkpoint with another head has no pooler, which nothing here asks for an answer
    lost = sorted(k for k in loading["missing_keys"] if not (auto and k.startswith("pooler.")))
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise unloadable(name, ValueError(f"its weights lack {', '.join(lost[:3])}{more}"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception:  # whatever it is: prompts are random ids then, and perplexity says so
        tokenizer = None
    return model, tokenizer


def configuration(path: str, name: str) -> Any:
    """The configuration at `path` of the model called `name`."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise unloadable(name, error) from None


def unloadable(name: str, error: Exception) -> InputError:
    """The error for a model that `error` keeps from being loaded."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    if "ignore_mismatched_sizes" in reason:
        reason = "its weights do not have the sizes of its configuration"
    elif not isinstance(error, (OSError, ValueError)):
        reason = f"{type(error).__name__}: {reason}"
    return InputError(
        f"model {name!r} cannot be loaded ({reason}): accepted are {', '.join(ACCEPTED)}"
    )


def _decoder(path: str, name: str, dtype: str) -> tuple[nn.Module, Any | None]:
    """`checkpoint` of a decoder; an encoder is an InputError that names its command."""
    from .encoders import DECODER, ENCODER_SHAPES, encoder_config, kind_of_config

    shape = name in ENCODER_SHAPES and not Path(path).is_dir()
    kind = kind_of_config(encoder_config(name) if shape else configuration(path, name))
    if kind != DECODER:
        raise InputError(
            f"model {name!r} is an encoder of {kind}s: expected a decoder; encoders are timed by "
            f"hf-fusion bench {name}:{dtype}"
        )
    return checkpoint(path, name, dtype)


def _decode_freely(model: nn.Module) -> None:
    """Lets generate() run to the asked length: a random model may emit its end token anywhere."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(pad_token_id=0, use_cache=True)


def looks_local(name: str) -> bool:
    """Whether `name` is a path and no hub id."""
    return name.startswith(("/", "./", "../", "~")) or name in (".", "..") or Path(name).is_dir()
