"""Tiny models of the families that the graph road is held against, with seeded random weights."""

from __future__ import annotations

import functools

import torch
import torch.utils._pytree as pytree
import transformers as t
from torch import Tensor, nn

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
IDS = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}


class Positions(nn.Module):
    """A BERT of nn.TransformerEncoder whose positions come from torch.arange."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(99, 32), nn.Embedding(64, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, ids: Tensor, padding: Tensor | None = None) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))[None]
        return self.encoder(x, src_key_padding_mask=padding)


def _detr() -> nn.Module:
    backbone = t.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"]
    )
    return t.DetrModel(
        t.DetrConfig(
            backbone_config=backbone, use_timm_backbone=False, d_model=32, encoder_layers=1,
            decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=64, decoder_ffn_dim=64, num_queries=5,
        )
    )  # fmt: skip


def _bart() -> nn.Module:
    return t.BartModel(
        t.BartConfig(
            **IDS, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
            max_position_embeddings=64,
        )
    )  # fmt: skip


def _swin() -> nn.Module:
    return t.SwinModel(
        t.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4],
                     window_size=4)
    )  # fmt: skip


def _t5() -> nn.Module:
    return t.T5ForConditionalGeneration(
        t.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    )


_GROUPED = {**SIZES, **IDS, "num_key_value_heads": 2}
MODELS = {
    "vit": lambda: t.ViTModel(t.ViTConfig(image_size=32, patch_size=8, **SIZES)),
    "bert": lambda: t.BertModel(t.BertConfig(**SIZES, vocab_size=99)),
    "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SIZES, **IDS)),
    "gpt2": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **IDS)
    ),
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**_GROUPED)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**_GROUPED, sliding_window=4)),
    "swin": _swin,
    "t5": _t5,
    "bart": _bart,
    "detr": _detr,
    "positions": Positions,
}
PADDED = (
    "bert", "gpt_neox", "gpt2", "llama", "mistral", "t5", "bart", "detr", "positions",
)  # fmt: skip
LAYERS = dict.fromkeys(MODELS, 2) | {"swin": 4, "t5": 6, "bart": 6, "detr": 3}


@functools.lru_cache(maxsize=None)
def model(name: str) -> nn.Module:
    """The model in eval mode; biases are not zero, so that one left out shows."""
    torch.manual_seed(0)
    made = MODELS[name]().eval()
    for key, parameter in made.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return made


def examples(name: str, mask: bool = False) -> dict | None:
    """Inputs where the model has no configuration that says them, or a large default."""
    torch.manual_seed(0)
    if name == "positions":
        padding = {"padding": torch.arange(7) >= torch.tensor([[5], [7]])} if mask else {}
        return {"ids": torch.randint(5, 99, (2, 7)), **padding}
    if name == "detr":
        seen = (torch.arange(64) < torch.tensor([[40], [64]])).long()
        masks = {"pixel_mask": seen[:, None].repeat(1, 64, 1)} if mask else {}
        return {"pixel_values": torch.randn(2, 3, 64, 64), **masks}
    return None


def tensors(output: object) -> list[Tensor]:
    """The tensors of a model's output in order."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def furthest(left: object, right: object) -> float:
    """The largest difference between two outputs, which must have the same tensors."""
    pairs = list(zip(tensors(left), tensors(right), strict=True))
    assert pairs and all(a.shape == b.shape and a.std() > 0 for a, b in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs)


@functools.lru_cache(maxsize=None)
def fused(name: str, mask: bool = False):
    """The model fused with library operators, verified at three shapes; shared by tests."""
    from hf_fusion.transform import fuse

    return fuse(model(name), examples(name, mask), mask=mask, backends=("aten",))
