"""Heads on encoders, and pipelines over them, give stock's answers."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from encoders import TEXT, VISION, Case, arguments, cast, encoder_pair
from pairs import assert_same, noted
from shapes import DTYPES
from torch import nn
from transformers import pipeline
from twins import ENCODERS, Output, Twin, fused_hits, judge_all, resolve

import hf_fusion

pytestmark = [pytest.mark.reliability(3), pytest.mark.usefixtures("one_thread")]

HEADS = {
    "bert": ("ForPreTraining", "ForMaskedLM", "ForNextSentencePrediction"),
    "vit": ("ForImageClassification", "ForMaskedImageModeling"),
    "deit": ("ForImageClassification", "ForMaskedImageModeling",
             "ForImageClassificationWithTeacher"),
}  # fmt: skip
COMMON = (
    "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering",
    "ForMultipleChoice",
)  # fmt: skip
RUNGS = (("full", "cpu", False), ("full", "cpu", True), ("full", "reference", None),
         ("attention+up", "cpu", None), ("decomposed", "cpu", None))  # fmt: skip


def classes() -> list:
    """(family, class) of every head."""
    found = []
    for family, known in ENCODERS.items():
        base = resolve(known.base_class)
        module, prefix = importlib.import_module(base.__module__), base.__name__[: -len("Model")]
        names = HEADS.get(family, ())
        names = names if family in VISION else dict.fromkeys((*names, *COMMON))
        for name in names:
            cls = getattr(module, prefix + name)
            found.append(pytest.param(family, cls, id=cls.__name__))
    return found


def label_count(cls: type) -> int:
    return 2 if "Question" in cls.__name__ else 5


def head_call(family: str, cls: type, case: Case) -> dict:
    """Arguments of one forward in fp32, without labels."""
    if family in VISION:
        call = {"pixel_values": torch.randn(case.batch, 3, 30, 30)}
        if "MaskedImage" in cls.__name__:
            call["bool_masked_pos"] = torch.rand(case.batch, 25) < 0.4
        return call
    call = arguments(family, case)
    if "MultipleChoice" in cls.__name__:
        call = {k: v.unsqueeze(0) for k, v in call.items()}
    return call


def results(model, call: dict) -> list[torch.Tensor]:
    """Tensors of the output; what has a row per token, for tokens only."""
    mask = call.get("attention_mask")
    found = []
    for value in model(**call).to_tuple():
        if not isinstance(value, torch.Tensor):
            continue
        value = torch.stack([value, value * 0]) if value.dim() == 0 else value
        per_token = mask is not None and mask.dim() == 2 and value.shape[:2] == mask.shape
        value = value[mask != 0] if per_token else value
        found.append(value.reshape(1, value.shape[0], -1))
    return found


CASES = (Case("none", 8, 17, 1), Case("right", 12, 33, 2), Case("right", 16, 7, 3))


def outputs(model, calls: list[dict]) -> list[Output]:
    """Results of all calls; judge_all takes those of one name as draws of one error."""
    found = []
    for number, call in enumerate(calls):
        for index, value in enumerate(results(model, call)):
            live = torch.ones(value.shape[:2], dtype=torch.bool)
            found.append(Output(f"result{index} of call {number}", value, live))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family, cls", classes())
def test_heads(family, cls, dtype, trials):
    pair = Twin(family, {"num_labels": label_count(cls)}, dtype, "sdpa", 3, cls)
    # of five logits a picture stock's largest error is too much luck
    few = "ImageClassification" in cls.__name__
    times = 4 if few else 1
    cases = [case._replace(batch=times * case.batch) for case in CASES]
    calls = [head_call(family, cls, case) for case in cases]
    single = [cast(call, pair.dtype) for call in calls]
    more = [head_call(family, cls, cases[-1]) for _ in range(8 if few else 0)]
    with torch.no_grad():
        luck = outputs(pair.stock, [cast(call, pair.dtype) for call in more])
        right = outputs(pair.exact, [cast(call, torch.float64) for call in more])
        draws = list(zip(luck, right, strict=True))
        stock = outputs(pair.stock, single)
        exact = outputs(pair.exact, [cast(call, torch.float64) for call in calls])
        for fusion, backend, packed in RUNGS:
            what = f"{pair.name} {cls.__name__}: {fusion} on {backend}, {packed}"
            with (
                hf_fusion.patched(pair.fused, fusion, backend, packed=packed),
                fused_hits(pair.fused, what, least=len(calls)) as stats,
            ):
                got = outputs(pair.fused, single)
            whole = len(calls) if fusion == "full" else 0
            assert stats.calls["encode"] == whole, f"{what}\n{stats}"
            judge_all(got, stock, exact, pair.stages, what, draws)
            trials(len(calls))


def labels_of(family: str, cls: type) -> dict:
    if family in VISION or "Sequence" in cls.__name__:
        return {"labels": torch.tensor([0, 3, 1])}
    if "Question" in cls.__name__:
        spans = {"start_positions": [0, 2, 1], "end_positions": [3, 3, 1]}
        return {name: torch.tensor(at) for name, at in spans.items()}
    return {"labels": torch.randint(0, 5, (3, 17))}


LABELLED = ("MaskedLM", "Sequence", "Token", "Question", "ImageClassification")
LOSSES = [
    case for case in classes() if any(n in case.id for n in LABELLED) and "Teacher" not in case.id
]


@pytest.mark.parametrize("family, cls", LOSSES)
def test_losses_and_gradients(family, cls):
    """A loss without gradients runs fused; with gradients everything is stock's, bit for bit."""
    pair = Twin(family, {"num_labels": label_count(cls)}, "fp32", "sdpa", 4, cls)
    call = head_call(family, cls, Case("none", 3, 17, 1)) | labels_of(family, cls)
    with hf_fusion.patched(pair.fused):
        with torch.no_grad(), fused_hits(pair.fused, cls.__name__):
            got = pair.fused(**call).loss
        assert_same(got, pair.stock(**call).loss.detach(), cls.__name__)
        for model in (pair.fused, pair.stock):
            model(**call).loss.backward()
        for (name, one), two in zip(pair.fused.named_parameters(), pair.stock.parameters()):
            assert (one.grad is None) == (two.grad is None)
            assert one.grad is None or torch.equal(one.grad, two.grad), f"gradient of {name}"
        noted(pair.fused)


class Tagger(nn.Module):
    """An encoder under a head of somebody's own, which takes no mask."""

    def __init__(self, encoder: nn.Module, kind: str):
        super().__init__()
        self.encoder = encoder
        self.head = {
            "recurrent": lambda: nn.LSTM(32, 8, batch_first=True, bidirectional=True),
            "convolution": lambda: nn.Conv1d(32, 8, 3, padding=1),
            "attention": lambda: nn.MultiheadAttention(32, 4, batch_first=True),
        }[kind]()

    def forward(self, **call):
        x = self.encoder(**call).last_hidden_state
        if isinstance(self.head, nn.Conv1d):
            return self.head(x.transpose(1, 2)).transpose(1, 2)
        return (self.head(x, x, x) if isinstance(self.head, nn.MultiheadAttention) else
                self.head(x))[0]  # fmt: skip


@pytest.mark.parametrize("kind", ("recurrent", "convolution", "attention"))
@torch.no_grad()
def test_a_head_that_reads_padding_reads_stock_s(kind):
    stock = Tagger(encoder_pair("bert", None)[0], kind).eval()
    model = copy.deepcopy(stock)
    hf_fusion.patch(model)
    call = arguments("bert", Case("right", 3, 17, 1))
    live = call["attention_mask"] != 0
    assert not bool(live.all())
    assert_same([model(**call)[live]], [stock(**call)[live]], kind)
    assert noted(model).calls["encode"] == 1


def same_pipeline(task: str, model, inputs, numbers, **parts) -> None:
    """One pipeline over stock, fused with and without packed copies; `numbers` reads its result."""
    model.eval()
    want = pipeline(task, model=copy.deepcopy(model), device="cpu", **parts)(inputs, batch_size=4)
    for packed in (False, True):
        fused = copy.deepcopy(model)
        hf_fusion.patch(fused, packed=packed)
        made = pipeline(task, model=fused, device="cpu", **parts)
        with fused_hits(fused, task):
            got = made(inputs, batch_size=4)
        for one, two in zip(numbers(got), numbers(want), strict=True):
            assert_same(one, two, task)


def test_image_classification_pipeline():
    pytest.importorskip("PIL", reason="pillow is not installed")
    from PIL import Image
    from transformers import ViTImageProcessor

    try:
        processor = ViTImageProcessor(size={"height": 30, "width": 30})
    except ImportError as error:
        pytest.skip(f"transformers cannot build its image processor: {error}".splitlines()[0])
    pair = Twin("vit", {"num_labels": 4}, "fp32", "sdpa", 5, resolve(
        "transformers.models.vit.modeling_vit:ViTForImageClassification"))  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    pixels = [
        torch.randint(0, 256, (20 + 3 * i, 41, 3), generator=draw, dtype=torch.uint8).numpy()
        for i in range(7)
    ]

    def scores(result):
        rows = [sorted(row, key=lambda entry: entry["label"]) for row in result]
        return [torch.tensor([entry["score"] for entry in row]) for row in rows]

    same_pipeline("image-classification", pair.stock, [Image.fromarray(p) for p in pixels], scores,
                  image_processor=processor)  # fmt: skip


WORDS = "a bird in the hand is worth two in the bush but who would hold one for long".split()


def local_tokenizer():
    """A word tokenizer over WORDS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(WORDS)]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]", model_max_length=64,
    )  # fmt: skip


@pytest.mark.parametrize("family", TEXT)
def test_feature_extraction_pipeline(family):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    pair = Twin(family, {}, "fp32", "sdpa", 6)
    texts = [" ".join(WORDS[i % 5 : i % 5 + 1 + i % 11]) for i in range(23)]
    counts = [len(text.split()) for text in texts]

    def tokens_only(result):
        return [torch.tensor(row)[0, :n] for row, n in zip(result, counts, strict=True)]

    same_pipeline("feature-extraction", pair.stock, texts, tokens_only, tokenizer=local_tokenizer(),
                  tokenize_kwargs={"return_token_type_ids": False})  # fmt: skip


def test_fill_mask_pipeline():
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    cls = resolve("transformers.models.bert.modeling_bert:BertForMaskedLM")
    words = local_tokenizer()
    pair = Twin("bert", {"vocab_size": len(words)}, "fp32", "sdpa", 7, cls)
    texts = ["a bird in the [MASK]", "[MASK] is worth two in the bush", "who would [MASK]"]

    def scores(result):
        rows = [sorted(row, key=lambda entry: entry["token"]) for row in result]
        return [torch.tensor([entry["score"] for entry in row]) for row in rows]

    same_pipeline("fill-mask", pair.stock, texts, scores, tokenizer=words, top_k=len(words))
