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
