"""Checkpoints that the harness loads: whole, or refused by the names of what they lack."""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM
from twins import ENCODERS, FAMILIES

from hf_fusion.harness import encoders, inputs, models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    config = FAMILIES["gpt_neox"].tiny_config()
    models.random_model(config, "fp32", seed=1).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("lost", "told"),
    [("layers.1.mlp.dense_4h_to_h.bias", r"gpt_neox\.layers\.1\.mlp\.dense_4h_to_h\.bias\)"),
     ("embed_out.weight", r"\w+\.weight\)"),
     ("layers.1.", r"(\S+, ){2}\S+layers\.1\.\S+ and 9 more\)")],
)  # fmt: skip
def test_a_checkpoint_that_lacks_weights_is_refused(lost, told, folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    rest = {name: tensor for name, tensor in weights.items() if lost not in name}
    assert len(rest) < len(weights)
    save_file(rest, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(inputs.InputError, match="its weights lack " + told):
        models.load_model(str(tmp_path))


def test_a_tied_head_and_the_pooler_of_another_head_may_lack(tmp_path):
    config = FAMILIES["gpt_neox"].tiny_config(tie_word_embeddings=True)
    models.random_model(config, "fp32", seed=1).save_pretrained(tmp_path / "tied")
    assert models.load_model(str(tmp_path / "tied")).source == "local checkpoint"
    BertForMaskedLM(ENCODERS["bert"].tiny_config()).save_pretrained(tmp_path / "masked")
    assert encoders.load_any(str(tmp_path / "masked"), "fp32", 0)[1] == encoders.TEXT
