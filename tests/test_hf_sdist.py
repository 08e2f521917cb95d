"""transformers' own ModelTesterMixin over patched models: the same tests pass as over stock ones.

    pip download --no-deps --no-binary :all: transformers==<installed>
    tar xzf transformers-*.tar.gz
    HF_FUSION_TRANSFORMERS_TESTS=$PWD/transformers-<installed>/tests pytest test_hf_sdist.py

The source distribution lacks two modules that the mixin imports; empty ones take their place.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.reliability(5)

FOLDER = os.environ.get("HF_FUSION_TRANSFORMERS_TESTS", "")
MODES = ("none", "full")

SUITE = """
import unittest
import torch
from transformers.testing_utils import torch_device
from hf_fusion.registry import families
from twins import resolve
from .test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask

FAMILY = {family!r}

class Tester:
    def __init__(self, parent):
        self.parent, self.batch_size, self.seq_length, self.is_training = parent, 13, 7, True
        config = self.get_config()
        self.hidden_size, self.num_hidden_layers = config.hidden_size, config.num_hidden_layers
        self.num_attention_heads, self.vocab_size = config.num_attention_heads, config.vocab_size
        self.encoder_seq_length = self.key_length = self.seq_length

    def get_config(self):
        family = next(f for f in families() if f.name == FAMILY)
        return family.tiny_config(pad_token_id=1, num_labels=3)

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        ids, mask = ids_tensor(shape, self.vocab_size), random_attention_mask(shape)
        return self.get_config(), dict(input_ids=ids, attention_mask=mask)

class ModelTest(ModelTesterMixin, unittest.TestCase):
    family = next(f for f in families() if f.name == FAMILY)
    all_model_classes = (resolve(family.base_class), resolve(family.causal_lm_class))
    all_generative_model_classes = all_model_classes[1:]
    pipeline_model_mapping = dict()

    def setUp(self):
        self.model_tester = Tester(self)
"""

CONFTEST = """
import functools, os, sys
import pytest, torch
sys.path.insert(0, {here!r})
import hf_fusion
from hf_fusion.registry import families
from twins import resolve
MODE = os.environ["SUITE_MODE"]
PATCHED = []

def wrap(cls):
    original = cls.__init__

    @functools.wraps(original)
    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if type(self) is cls:
            hf_fusion.patch(self, MODE)
            PATCHED.append(hf_fusion.stats(self))

    cls.__init__ = init

if MODE != "stock":
    for family in families():
        if family.encoder is not None:
            continue
        wrap(resolve(family.base_class))
        wrap(resolve(family.causal_lm_class))

@pytest.fixture(autouse=True)
def gradients(request):
    needed = any(word in request.node.name for word in ("train", "grad"))
    off = os.environ["SUITE_GRAD"] == "0" and not needed
    with torch.set_grad_enabled(not off):
        yield

def pytest_terminal_summary(terminalreporter):
    terminalreporter.line("fused calls " + str(sum(stats.fused for stats in PATCHED)))
"""


def run_suite(root: Path, mode: str, grad: bool) -> tuple[dict[str, str], int]:
    """({test: outcome}, fused calls) of the suite in a process of its own."""
    environment = {
        **os.environ,
        "SUITE_MODE": mode,
        "SUITE_GRAD": str(int(grad)),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "suite/test_model.py"],
        cwd=root, env=environment, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    outcomes = dict(
        re.findall(r"^suite/\S+::(\S+) (PASSED|FAILED|SKIPPED|ERROR)", done.stdout, re.M)
    )
    fused = re.search(r"^fused calls (\d+)", done.stdout, re.M)
    assert outcomes and fused, done.stdout[-2000:] + done.stderr[-2000:]
    return outcomes, int(fused.group(1))


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """A folder with the mixins, two empty modules they import, and one test module per family."""
    if not FOLDER:
        pytest.skip(
            "HF_FUSION_TRANSFORMERS_TESTS names no tests of a transformers source distribution"
        )
    pytest.importorskip(
        "parameterized", reason="transformers' tests need the package parameterized"
    )
    root = tmp_path_factory.mktemp("transformers")
    package = root / "suite"
    for name, text in (
        ("__init__.py", ""), ("exporters/__init__.py", ""), ("generation/__init__.py", ""),
        ("exporters/test_export.py", "class ExportTesterMixin:\n    pass\n"),
        ("generation/test_utils.py", "class GenerationTesterMixin:\n    pass\n"),
        ("conftest.py", CONFTEST.format(here=str(Path(__file__).parent))),
        ("test_model.py", SUITE.format(family="gpt_neox")),
    ):  # fmt: skip
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    for source in Path(FOLDER).glob("test_*.py"):
        (package / source.name).write_text(source.read_text())
    return root


@pytest.mark.parametrize("grad", (True, False), ids=("grad", "no_grad"))
def test_the_same_tests_pass(suite, grad, trials):
    stock, _ = run_suite(suite, "stock", grad)
    passed = {name for name, outcome in stock.items() if outcome == "PASSED"}
    assert len(passed) > 40, f"only {len(passed)} tests pass over stock models: {stock}"
    for mode in MODES:
        outcomes, fused = run_suite(suite, mode, grad)
        lost = sorted(name for name in passed if outcomes.get(name) != "PASSED")
        assert not lost, (
            f"{mode}, {'grad' if grad else 'no grad'}: {len(lost)} tests no longer pass: {lost}"
        )
        assert fused > 0 or mode == "none" or grad, f"{mode}: nothing ran fused"
        trials(len(passed))
