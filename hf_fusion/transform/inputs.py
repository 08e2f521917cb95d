"""Example inputs from a configuration, and inputs of other shapes drawn after given ones."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..report import FusionError, Reason

BATCH, LENGTH, TARGET = 2, 13, 9  # all different, so that no two dimensions are taken for one
_FIRST_ID = 5  # ids below are padding and other marks in most vocabularies
_IMAGE, _SAMPLES = 224, 4000
_HIDDEN = -3e4  # from here on a number stands for minus infinity; fp16 ends at -65504


def example_inputs(model: nn.Module, seed: int = 0, mask: bool = False) -> dict[str, Tensor]:
    """Keyword arguments for a transformers model, two rows of each, from its configuration.

    mask: adds an attention mask, or a mask of pixels, with padding at the right of the first row.
    Raises FusionError where the configuration does not say what the model reads, or where `mask`
    asks for one that the model does not take.
    """
    config, name = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or name is None:
        raise FusionError(
            Reason.INPUT, f"{type(model).__name__} has no configuration: give example_inputs"
        )
    config = getattr(config, "text_config", config) if name == "input_ids" else config
    parameters = inspect.signature(model.forward).parameters
    masks = {"input_ids": "attention_mask", "pixel_values": "pixel_mask"}
    if mask and masks.get(name) not in parameters:
        raise FusionError(
            Reason.INPUT, f"{type(model).__name__} takes no mask of its {name}: leave `mask` out"
        )
    generator = torch.Generator().manual_seed(seed)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def ids(length: int) -> Tensor:
        low = min(_FIRST_ID, config.vocab_size - 1)
        return torch.randint(low, config.vocab_size, (BATCH, length), generator=generator)

    if name == "pixel_values":
        size = getattr(config, "image_size", None) or _IMAGE
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        made = {name: noise(BATCH, getattr(config, "num_channels", 3), height, width)}
        if mask:
            made["pixel_mask"] = torch.ones(BATCH, height, width, dtype=torch.int64)
            made["pixel_mask"][0, :, -(width // 3) :] = 0
        return made
    if name == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 1500)
        return {name: noise(BATCH, config.num_mel_bins, frames)}
    if name == "input_values":
        return {name: noise(BATCH, _SAMPLES)}
    if name != "input_ids" or not hasattr(config, "vocab_size"):
        raise FusionError(Reason.INPUT, f"the model reads {name}: give example_inputs")
    length = min(LENGTH, longest_sequence(config))
    made = {"input_ids": ids(length)}
    if mask:
        made["attention_mask"] = torch.ones(BATCH, length, dtype=torch.int64)
        made["attention_mask"][0, -2:] = 0
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        made["decoder_input_ids"] = ids(min(TARGET, longest_sequence(config)))
    return made


def longest_sequence(config: Any) -> int:
    """The longest sequence that the configuration names, without bound where it names none."""
    names = ("max_position_embeddings", "n_positions")
    sizes = (getattr(config, name, None) or 0 for name in names)
    return min((n for n in sizes if n > 0), default=1 << 30)


def like(name: str, example: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A tensor of `shape` with the values' range of `example`; masks are padded at the right.

    A mask is two-dimensional, with "mask" in its name, of zeros and ones; one without a zero is
    padded too. What holds infinities or what stands for them, as an additive mask does, is
    repeated; a triangle of hidden keys, as causality is, is made anew.
    """
    if "mask" in name and example.dim() == 2 and _marks(example):
        drawn = torch.ones(shape, dtype=example.dtype)
        for row in range(shape[0]):
            # at most two, so that a narrow window leaves no query without a key
            drawn[row, max(1, shape[1] - (2, 0, 1)[row % 3]) :] = 0
        return drawn
    if example.is_floating_point() and bool((example.isfinite() & (example > _HIDDEN)).all()):
        low = float(example.float().std()) if example.numel() > 1 else 1.0
        drawn = torch.randn(shape, generator=generator) * (low or 1.0) + example.float().mean()
        return drawn.to(example.dtype)
    if example.is_floating_point() or example.dtype == torch.bool or not example.numel():
        return _tiled(example, shape)
    least, most = int(example.min()), int(example.max())
    if "mask" in name and most <= 1:
        return _tiled(example, shape)
    return torch.randint(least, most + 1, shape, generator=generator, dtype=example.dtype)


def _marks(example: Tensor) -> bool:
    """Whether the values are 1 for what is seen and 0 for what is not, with something seen."""
    if example.dtype == torch.bool:
        return bool(example.all())  # with both values, either may be what is seen
    return bool(((example == 0) | (example == 1)).all()) and bool(example.any())


def _tiled(example: Tensor, shape: tuple[int, ...]) -> Tensor:
    if _triangular(example) and shape[-1] == shape[-2]:
        above = torch.ones(shape[-2:], dtype=torch.bool).triu(1)
        corner = example.flatten(0, -3)[0] if example.dim() > 2 else example
        return torch.where(above, corner[0, -1], corner[-1, 0]).expand(shape).contiguous()
    times = [-(-new // max(old, 1)) for new, old in zip(shape, example.shape, strict=True)]
    return example.repeat(times)[tuple(slice(n) for n in shape)].contiguous()


def _triangular(example: Tensor) -> bool:
    """Whether its matrices are square, of one value up to the diagonal and another above it."""
    if example.dim() < 2 or example.shape[-1] != example.shape[-2] or example.shape[-1] < 2:
        return False
    above = torch.ones(example.shape[-2:], dtype=torch.bool).triu(1)
    low, high = example[..., ~above], example[..., above]
    alike = bool((low == low.flatten()[0]).all()) and bool((high == high.flatten()[0]).all())
    return alike and bool(low.flatten()[0] != high.flatten()[0])
