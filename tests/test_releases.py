"""What releases of transformers differ in: each form is tried whichever release is installed."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, GPTNeoXForCausalLM
from transformers.cache_utils import DynamicLayer

import hf_fusion
from hf_fusion import decoding, guard, registry
from hf_fusion.cache import GrowableLayer
from hf_fusion.patches import bert, gpt_neox


class Renamed:
    """Takes its cache as models do from transformers 5.24 on."""

    def forward(self, input_ids=None, cache=None, use_cache=None):
        """Never called."""


@pytest.mark.parametrize("known", (gpt_neox._BASE_PARAMETERS, bert._DECODING))
def test_a_model_may_call_its_cache_so(known):
    registry.expect_parameters("the model", Renamed(), ("input_ids", *known))


@pytest.mark.parametrize("name", ("cache", "past_key_values"))
def test_a_cache_is_taken_under_the_name_and_the_old_one(name, monkeypatch):
    monkeypatch.setattr(guard, "CACHE", "cache")
    monkeypatch.setattr(guard, "_MODEL_ARGUMENTS", guard._MODEL_ARGUMENTS | {"cache"})
    model = GPTNeoXForCausalLM(gpt_neox.tiny_config()).eval()
    hf_fusion.patch(model, strict=True)
    cache, ids = DynamicCache(config=model.config), torch.arange(3, 9)[None]
    with torch.no_grad():
        model(ids, **{name: cache})
    assert cache.get_seq_length() == ids.shape[1]
    assert hf_fusion.stats(model).calls["step"] == 1


def test_a_layer_that_keeps_no_dtype_is_taken_over():
    keys, layer = torch.randn(1, 4, 3, 8), DynamicLayer()
    layer.update(keys, keys)
    vars(layer).pop("dtype", None)  # gone in transformers 5.24
    grown = GrowableLayer.adopt(layer)
    assert torch.equal(grown.update(keys, keys)[0], torch.cat((keys, keys), -2))


def test_a_cache_that_is_not_marked_may_be_the_callers(monkeypatch):
    monkeypatch.setattr(decoding, "_MARKS", False)
    model = GPTNeoXForCausalLM(gpt_neox.tiny_config()).eval()
    hf_fusion.patch(model)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
    for rows in (1, 2):
        ids = torch.arange(3, 9)[None].expand(rows, -1)
        model.generate(
            ids, attention_mask=torch.ones_like(ids), custom_generate=hf_fusion.custom_generate,
            **options,
        )  # fmt: skip
        assert bool(hf_fusion.stats(model).downgraded) == (rows == 2)
