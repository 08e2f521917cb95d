"""What a fused model was captured for: registries, masks, sizes, arguments, and the model itself."""

from __future__ import annotations

import graphs
import pytest
import torch
import transformers
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

import hf_fusion
from hf_fusion.transform import fuse
from hf_fusion.transform.inputs import like


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    with torch.no_grad():
        yield


def test_registries_are_as_they_were():
    registries = [AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping]
    hf_fusion.register_attention()
    before = [dict(registry) for registry in registries]
    fuse(graphs.model("bert"), shapes=1)
    assert [dict(registry) for registry in registries] == before
    assert hf_fusion.register_attention()


OWN = {"MPNet": {}, "RoFormer": {}, "Bloom": {"n_head": 4}, "Falcon": {}}


@pytest.mark.parametrize("name", OWN)
def test_models_with_attention_of_their_own_are_padded_as_they_pad(name):
    torch.manual_seed(0)
    sizes = graphs.SIZES | {"vocab_size": 99} | OWN[name]
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes))
    ids, seen = torch.randint(5, 99, (2, 7)), torch.ones(2, 7, dtype=torch.int64)
    fused = fuse(model.eval(), {"input_ids": ids, "attention_mask": seen}, backends=("aten",))
    assert fused.report.road == "export"
    seen[0, 4:] = 0
    want = model(input_ids=ids, attention_mask=seen, **fused.captured.signature.defaults)
    got = fused(input_ids=ids, attention_mask=seen)
    assert graphs.furthest(want, got) < 5e-6 and fused.stats.fused == 1


@pytest.mark.parametrize("kind", [torch.int64, torch.float32, torch.bool])
def test_masks_that_hide_nothing_are_drawn_with_padding(kind):
    drawn = like("attention_mask", torch.ones(2, 7, dtype=kind), (3, 6), torch.Generator())
    assert drawn.dtype == kind and drawn.sum(1).tolist() == [4, 6, 5]
    assert drawn[0].tolist() == [1, 1, 1, 1, 0, 0]
