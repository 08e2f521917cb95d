"""Work that is one call of a model: images, sequences, or a prompt; its inputs and its operations.

An encoder returns hidden states; a prompt is a decoder's first call, which fills a cache and
returns the logits of the last token, as the first call of generate() does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from hf_fusion.cache import CACHE

from .encoders import DECODER, IMAGE, TEXT
from .inputs import InputError, at_least
from .models import LoadedModel, prompts

Inputs = dict[str, torch.Tensor]
UNITS = {IMAGE: "images/s", TEXT: "sequences/s", DECODER: "tokens/s"}


@dataclass(frozen=True)
class Work:
    """One point of a bench: `batch` images, sequences of at most `length` tokens, or prompts of
    `length`.

    `lengths`: tokens of each sequence, image patches included; shorter ones are padded at the
    right.
    """

    kind: str
    batch: int
    length: int
    lengths: tuple[int, ...]

    @property
    def ragged(self) -> bool:
        """Whether some sequence is padded."""
        return min(self.lengths) < self.length

    @property
    def items(self) -> int:
        """What `unit` counts, per call: images, sequences or prompt tokens."""
        return sum(self.lengths) if self.kind == DECODER else self.batch

    @property
    def unit(self) -> str:
        """The unit of throughput."""
        return UNITS[self.kind]

    @property
    def label(self) -> str:
        """The work as tables print it."""
        if self.kind == IMAGE:
            return f"{self.batch} image" + ("s" if self.batch > 1 else "")
        return f"{self.batch}x{self.length}" + (" ragged" if self.ragged else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "kind": self.kind,
            "batch": self.batch,
            "length": self.length,
            "lengths": list(self.lengths),
            "ragged": self.ragged,
            "label": self.label,
        }


def make_work(
    loaded: LoadedModel, kind: str, batch: int, length: int, ragged: bool, seed: int
) -> Work:
    """The work of one point; InputError for a length that the model does not have."""
    at_least("batch", batch, 1)
    config = loaded.model.config
    if kind == IMAGE:
        tokens = _patches(config) + loaded.model.embeddings.position_embeddings.shape[1]
        tokens -= (config.image_size // config.patch_size) ** 2
        return Work(kind, batch, tokens, (tokens,) * batch)
    at_least("length", length, 1)
    limit = getattr(config, "max_position_embeddings", None)
    if limit and "roberta" in config.model_type:
        limit -= config.pad_token_id + 1  # its positions start behind the padding id
    if limit and length > limit:
        raise InputError(
            f"length is {length}: expected at most {limit}, the positions of {loaded.name}"
        )
    lengths = [length] * batch
    if ragged:
        generator = torch.Generator().manual_seed(seed)
        lowest = max(1, length // 8)
        lengths = torch.randint(lowest, length + 1, (batch,), generator=generator).tolist()
        lengths[0] = length
    return Work(kind, batch, length, tuple(lengths))


def make_inputs(loaded: LoadedModel, work: Work, count: int, seed: int) -> list[Inputs]:
    """`count` inputs of the model: pixels from N(0, 1), or slices of the held-out text where there
    is a tokenizer, else random ids.
    """
    config = loaded.model.config
    if work.kind == IMAGE:
        generator = torch.Generator().manual_seed(seed)
        shape = (work.batch, config.num_channels, config.image_size, config.image_size)
        dtype = next(loaded.model.parameters()).dtype
        drawn = (torch.randn(shape, generator=generator) for _ in range(count))
        return [{"pixel_values": pixels.to(dtype)} for pixels in drawn]
    drawn = prompts(loaded, count, work.batch, work.length, seed)
    if work.kind == DECODER:
        return [{"input_ids": ids} for ids in drawn]
    valid = torch.arange(work.length) < torch.tensor(work.lengths)[:, None]
    padding = getattr(config, "pad_token_id", None) or 0
    other = (padding + 7) % loaded.vocabulary
    return [
        {
            "input_ids": ids.masked_fill(ids == padding, other).masked_fill(~valid, padding),
            "attention_mask": valid.to(torch.int64),
        }
        for ids in drawn
    ]


@torch.no_grad()
def run_model(model: nn.Module, kind: str, inputs: Inputs) -> torch.Tensor:
    """The output a user's call gives: hidden states (B, S, hidden), or logits (B, 1, vocabulary)
    with a cache filled on the side.
    """
    if kind == DECODER:
        return model(**inputs, use_cache=True, logits_to_keep=1).logits
    return model(**inputs).last_hidden_state


def judged(work: Work, output: torch.Tensor) -> torch.Tensor:
    """The values of an output that mean something: those at padding do not."""
    if not work.ragged or work.kind == DECODER:
        return output
    valid = torch.arange(work.length) < torch.tensor(work.lengths)[:, None]
    return output[valid]


class _FirstCache(DynamicCache):
    """A cache for one call, without the empty tensor that tracers trip over."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[torch.Tensor] = []

    def update(self, keys: torch.Tensor, values: torch.Tensor, *arguments: Any, **options: Any):
        """Keeps both and returns them."""
        self.kept += [keys, values]
        return keys, values


class Entry(nn.Module):
    """A model as a function of positional tensors that returns the output, for a decoder with its
    keys and values after it: what compilers and converters take.
    """

    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, *tensors: torch.Tensor) -> Any:
        """Tensors in the order of `make_inputs`."""
        if self.kind == IMAGE:
            return self.model(pixel_values=tensors[0]).last_hidden_state
        if self.kind == TEXT:
            ids, mask = tensors
            return self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        cache = _FirstCache()
        output = self.model(
            input_ids=tensors[0], use_cache=True, logits_to_keep=1, **{CACHE: cache}
        )
        return (output.logits, *cache.kept)


def work_flops(model: nn.Module, work: Work) -> int:
    """Floating-point operations of one call, two per multiply-add, padding not counted: every
    matrix by the rows it meets, and the products of attention (a decoder's: the causal half).
    """
    tokens, macs = sum(work.lengths), 0
    patches = _patches(model.config) * work.batch if work.kind == IMAGE else 0
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Conv2d):
            macs += weight.numel() * patches
        elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            once = module is model.get_output_embeddings() or "pooler" in name
            macs += weight.numel() * (work.batch if once else tokens)
    config = model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    wide = config.num_attention_heads * size * config.num_hidden_layers
    causal = work.kind == DECODER
    pairs = sum(n * (n + 1) // 2 if causal else n * n for n in work.lengths)
    return 2 * (macs + 2 * wide * pairs)


def _patches(config: Any) -> int:
    return (config.image_size // config.patch_size) ** 2
