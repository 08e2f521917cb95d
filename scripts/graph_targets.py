#!/usr/bin/env python3
"""What the graph road reaches: an attention block, ViT whole, and every family at full size.

    python scripts/graph_targets.py block
    python scripts/graph_targets.py vit --dtype fp32 --rounds 7
    python scripts/graph_targets.py families

Prints Markdown tables; exit code 1 where a target or an equality is missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers as t
from torch import nn

from hf_fusion import cli
from hf_fusion.harness import encoders, inputs, options
from hf_fusion.harness.render import table
from hf_fusion.transform import FusedModel, fuse
from hf_fusion.transform.interface import configurations
from hf_fusion.transform.measure import compare, implementation
from hf_fusion.transform.verify import verify

LIBRARY, REGIONS, NATIVE = ("aten",), ("inductor", "aten"), None
_IDS = {"vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
          "num_key_value_heads": 4, "intermediate_size": 3072, **_IDS}  # fmt: skip


class EncoderBert(nn.Module):
    """BERT base of nn.TransformerEncoder, its positions from torch.arange."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(30522, 768), nn.Embedding(512, 768)
        layer = nn.TransformerEncoderLayer(768, 12, 3072, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 12)

    def forward(self, ids: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        """ids (B, S); padding (B, S), True where there is no token."""
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        return self.encoder(x, src_key_padding_mask=padding)

    @staticmethod
    def examples(mask: bool) -> dict[str, torch.Tensor]:
        """Two rows of 13 tokens, the first of 11 where `mask`."""
        made = {"ids": torch.randint(5, 30522, (2, 13))}
        return {**made, "padding": torch.arange(13) >= torch.tensor([[11], [13]])} if mask else made


# published sizes; Llama and Mistral have those of llama-160m, with grouped heads and a window
FAMILIES: dict[str, tuple[type, Any]] = {
    "ViT-B/16": (t.ViTModel, lambda: t.ViTConfig()),
    "ViT-L/16": (t.ViTModel, lambda: encoders.encoder_config("vit-l16")),
    "Swin-T": (t.SwinModel, lambda: t.SwinConfig()),
    "BERT base": (t.BertModel, lambda: t.BertConfig()),
    "Pythia 160M": (t.GPTNeoXModel, lambda: t.GPTNeoXConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
        vocab_size=50304)),
    "GPT-2": (t.GPT2Model, lambda: t.GPT2Config()),
    "Llama 160M": (t.LlamaModel, lambda: t.LlamaConfig(**_LLAMA)),
    "Mistral 160M, window 8": (t.MistralModel, lambda: t.MistralConfig(**_LLAMA, sliding_window=8)),
    "T5 small": (t.T5Model, lambda: t.T5Config()),
    "BART base": (t.BartModel, lambda: t.BartConfig(
        d_model=768, encoder_layers=6, decoder_layers=6, encoder_ffn_dim=3072,
        decoder_ffn_dim=3072, encoder_attention_heads=12, decoder_attention_heads=12)),
    "DETR ResNet-50": (t.DetrModel, lambda: t.DetrConfig(
        use_timm_backbone=False, backbone_config=t.ResNetConfig(out_features=["stage4"]))),
    "nn.TransformerEncoder, BERT base": (EncoderBert, lambda: None),
}  # fmt: skip
UNPADDED = ("ViT-B/16", "ViT-L/16", "Swin-T")  # take no mask


class Block(nn.Module):
    """Norm, attention, output projection and residual of a ViT-B/16 layer."""

    def __init__(self) -> None:
        super().__init__()
        self.config = t.ViTConfig()
        self.config._attn_implementation = "sdpa"
        self.norm = nn.LayerNorm(768)
        self.attention = t.models.vit.modeling_vit.ViTAttention(self.config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, S, 768)."""
        return x + self.attention(self.norm(x))[0]


def row(name: str, reading: dict[str, Any], eager: dict[str, Any]) -> tuple[str, ...]:
    """A table row: kernels, peak, both against eager, and time where there is one."""
    less = 100 * (1 - reading["peak_bytes"] / eager["peak_bytes"])
    cells = [name, str(reading["kernels"]), f"{eager['kernels'] / reading['kernels']:.2f}",
             f"{reading['peak_bytes'] / 1e6:.3f}", f"{less:.1f} %"]  # fmt: skip
    if reading["seconds"]:
        low, middle, high = (1e3 * s for s in reading["seconds"])
        cells.append(f"{middle:.1f} ({low:.1f}-{high:.1f})")
    return tuple(cells)


FORMS = ("model, eager", "model, sdpa")
HEADER = ("form", "kernels", "eager's / it", "peak MB", "less than eager")


def check(missed: list[str], what: str, holds: bool) -> None:
    """Prints a target with its verdict."""
    print(f"- {what}: {'reached' if holds else 'MISSED'}")
    if not holds:
        missed.append(what)


def block(arguments: argparse.Namespace, missed: list[str]) -> None:
    """The attention block at 1 and 8 images."""
    model = Block().eval()
    fused = fuse(model, torch.randn(2, 197, 768), backends=LIBRARY)
    for batch in (1, 8):
        found = compare(fused, {"x": torch.randn(batch, 197, 768)})
        ours, sdpa, eager = (found[k] for k in ("fused", "model, sdpa", "model, eager"))
        print(f"\nAttention block of ViT-B/16, batch {batch}, fp32\n")
        print(table(HEADER, [row(name, r, eager) for name, r in found.items()]))
        check(missed, "kernels half of eager's", ours["kernels"] <= 0.5 * eager["kernels"])
        check(missed, "peak 55 % below eager", ours["peak_bytes"] <= 0.45 * eager["peak_bytes"])
        check(missed, "peak 25 % below sdpa", ours["peak_bytes"] <= 0.75 * sdpa["peak_bytes"])


def vit(arguments: argparse.Namespace, missed: list[str]) -> None:
    """ViT-B/16 whole, by every back end, beside torch.compile in the same rounds."""
    dtype = arguments.dtype
    loaded, _ = encoders.load_any(arguments.model, dtype, 0)
    x = torch.randn(1, 3, 224, 224).to(next(loaded.model.parameters()).dtype)
    native = fuse(loaded.model, backends=NATIVE)
    others = {"fused, library": LIBRARY, "fused, compiled regions": REGIONS}
    made = {name: fuse(loaded.model, backends=names) for name, names in others.items()}
    with torch.no_grad():
        made["fused, compiled regions"](pixel_values=x)
    calls: dict[str, Callable[[], Any]] = {
        name: (lambda model=model: model(pixel_values=x)) for name, model in made.items()
    }
    found = compare(
        native, {"pixel_values": x}, compiled=True, rounds=arguments.rounds, beside=calls
    )
    found["fused, native"] = found.pop("fused")
    eager, threads = found["model, eager"], torch.get_num_threads()
    print(f"\n{arguments.model} {dtype}, 1 image, {threads} threads, {arguments.rounds} rounds\n")
    header = (*HEADER, "ms (quartiles)") if arguments.rounds else HEADER
    print(table(header, [row(name, r, eager) for name, r in found.items()]))
    library, regions = (found[name] for name in others)
    if arguments.model == "vit-b16":
        check(missed, "library: at most 126 kernels", library["kernels"] <= 126)
        check(missed, "compiled regions: at most 105", regions["kernels"] <= 105)
        if dtype == "fp32":
            check(missed, "library: peak at most 3.7 MB", library["peak_bytes"] <= 3.7e6)
    ratios = [eager["kernels"] / found[k]["kernels"] for k in (*others, "fused, native")]
    check(missed, f"operators per launch, library: {ratios[0]:.2f} of 1.6", ratios[0] >= 1.6)
    check(missed, "operators per launch: 2.0 with regions or native", max(ratios[1:]) >= 2.0)
    if arguments.rounds:
        ours, compiled = (found[k]["seconds"][1] for k in ("fused, native", "model, torch.compile"))
        check(
            missed,
            f"time: torch.compile's / ours {compiled / ours:.2f}, at least 1",
            compiled >= ours,
        )


def families(arguments: argparse.Namespace, missed: list[str]) -> None:
    """Every family at full size: equality with eager and sdpa, without and with padding."""
    rows = []
    for name, (kind, config) in FAMILIES.items():
        if arguments.family not in (None, name):
            continue
        torch.manual_seed(0)
        own = kind is EncoderBert
        model = (kind() if own else kind(config())).eval()
        for mask in (False,) if name in UNPADDED else (False, True):
            fused = fuse(model, kind.examples(mask) if own else None, mask=mask, shapes=1)
            errors = [_errors(model, fused, source) for source in ("eager", "sdpa")]
            found, report = compare(fused), fused.report
            eager, sdpa = (found.get(form, found.get("model")) for form in FORMS)
            layers = f"{len(report.detected)} of {len(report.expected)}"
            if report.detection_rate < 1 or any(isinstance(e, str) for e in errors):
                missed.append(name)
            rows.append((
                name, "padding" if mask else "no mask", layers,
                *(e if isinstance(e, str) else f"{e:.1e}" for e in errors),
                *(str(reading["kernels"]) for reading in (eager, sdpa, found["fused"])),
                f"{found['fused']['peak_bytes'] / sdpa['peak_bytes']:.2f}",
            ))  # fmt: skip
            print(" ".join(rows[-1]), file=sys.stderr)
        del model, fused
    print("\nFull size, fp32, three shapes each; largest difference from the model\n")
    header = ("model", "input", "attention layers", "to eager", "to sdpa", "kernels eager", "sdpa",
              "fused", "peak / sdpa's")  # fmt: skip
    print("\n".join(markdown(header, rows)))


def _errors(model: nn.Module, fused: FusedModel, source: str) -> float | str:
    try:
        with implementation(configurations(model), source):
            return max(verify(model, fused.captured, fused.graph)[1])
    except ValueError as error:
        return str(error)


PARTS = {"block": block, "vit": vit, "families": families}


def run(arguments: argparse.Namespace) -> int:
    """Runs one part."""
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    missed: list[str] = []
    PARTS[arguments.part](arguments, missed)
    return 1 if missed else 0


def main() -> int:
    """Parses the command line and runs the part that it names."""
    parser = options.Parser(prog="graph_targets.py", description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("--model", default="vit-b16", choices=("vit-b16", "vit-l16"))
    parser.add_argument("--family", default=None, choices=tuple(FAMILIES), help="this one only")
    parser.add_argument("--dtype", type=options.told(inputs.dtype_name), default="fp32")
    options.add_count(parser, "--rounds", 0, "rounds of the clock", 0)
    options.add_threads(parser)
    parser.set_defaults(run=run)
    return cli.dispatch(parser)


if __name__ == "__main__":
    sys.exit(main())
