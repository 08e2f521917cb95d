"""hf_fusion.generate gives model.generate's greedy tokens, what it streams, and its errors."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading

import pytest
import torch
from conftest import available_isas
from devices import Emulated
from pairs import tokens
from test_cuda import SIZES
from transformers import BertForSequenceClassification, TextIteratorStreamer
from twins import ENCODERS, build

import hf_fusion
from hf_fusion import FusionError, generation, native
from hf_fusion.harness import load_model
from hf_fusion.report import Reason
from hf_fusion.step import CpuBackend

pytestmark = [pytest.mark.reliability(4), pytest.mark.usefixtures("one_thread")]

# (fusion, back end); None: not patched
MODELS = (
    (None, None), ("none", "cpu"), ("attention", "cpu"), ("full", "cpu"), ("full", "reference"),
)  # fmt: skip
NEW = 20


@functools.lru_cache(maxsize=None)
def model_of(dtype: str = "fp32", **changes):
    model = build("gpt_neox", {**SIZES, **changes}, dtype, "sdpa", 3)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, None
    return model


def prompt(batch: int, length: int, seed: int, padded: bool) -> dict:
    ids = tokens(seed, batch, length)
    mask = torch.ones_like(ids)
    for row in range(batch if padded else 0):
        mask[row, :row] = 0
    return {"input_ids": ids, "attention_mask": mask}


CALLS = {
    "one row": (1, 7, False), "one token": (1, 1, False), "three rows": (3, 5, False),
    "left padded": (4, 6, True), "eight rows, padded": (8, 9, True),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("fusion, backend", MODELS)
def test_greedy_tokens_are_those_of_the_model(fusion, backend, name, trials):
    batch, length, padded = CALLS[name]
    model = model_of()
    for seed in range(3):
        inputs = prompt(batch, length, seed, padded)
        given = inputs["input_ids"].clone()
        plain = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        ends = plain[:, length + NEW // 2].tolist()  # tokens that rows come to, each at its time
        want = [
            plain,
            model.generate(**inputs, max_new_tokens=NEW, eos_token_id=ends[0], pad_token_id=5),
            model.generate(**inputs, max_new_tokens=NEW, eos_token_id=ends),
        ]
        options = (
            {},
            {"eos_token_id": ends[0], "pad_token_id": 5, "check_every": 3},
            {"eos_token_id": ends, "check_every": 1 + seed},
        )
        if fusion is not None:
            hf_fusion.patch(model, fusion, backend)
        try:
            for one, call in zip(want, options):
                got = hf_fusion.generate(model, **inputs, max_new_tokens=NEW, **call)
                assert torch.equal(got, one), f"{name}, seed {seed}, {call}\n{got}\n{one}"
                trials()
            assert (hf_fusion.stats(model).fused > 0) == (fusion not in (None, "none"))
            assert not hf_fusion.stats(model).refused
        finally:
            hf_fusion.unpatch(model)
        assert torch.equal(inputs["input_ids"], given), "the caller's ids have been written to"


def test_ids_come_from_the_configuration(trials):
    model, inputs = model_of(), prompt(2, 6, 1, False)
    config = model.generation_config
    plain = model.generate(**inputs, max_new_tokens=NEW, pad_token_id=0)
    try:
        config.eos_token_id, config.pad_token_id = plain[:, 12].tolist(), 7
        ids = inputs["input_ids"].clone()
        ids[1, :2] = 7
        for given in (inputs, {"input_ids": ids}):
            want = model.generate(**given, max_new_tokens=NEW, do_sample=False)
            assert torch.equal(hf_fusion.generate(model, **given, max_new_tokens=NEW), want)
            trials()
        every = hf_fusion.generate(model, **inputs, max_new_tokens=NEW, eos_token_id=())
        assert torch.equal(every, plain)
    finally:
        config.eos_token_id = config.pad_token_id = None


@pytest.mark.parametrize("batch, padded", ((1, False), (4, True)))
def test_greedy_on_a_device(native_build, monkeypatch, batch, padded, trials):
    """The steps run on the CUDA kernels, emulated; only the prompt is stock's."""
    device = Emulated(native_build / native.library_path().name)
    monkeypatch.setattr(native, "_library", device)
    model, inputs = model_of("fp16"), prompt(batch, 6, 2, padded)
    with hf_fusion.patched(model, backend="reference"):
        want = hf_fusion.generate(model, **inputs, max_new_tokens=8)
    with hf_fusion.patched(model, backend="cuda"):
        assert torch.equal(hf_fusion.generate(model, **inputs, max_new_tokens=8), want)
        assert hf_fusion.stats(model).refused == {Reason.ROWS.value: 1} and device.calls == 7
        trials()


def one_by_one(model, inputs, monkeypatch, **options) -> torch.Tensor:
    """hf_fusion.generate with a call of the model for every token."""
    with monkeypatch.context() as patch:
        patch.setattr(generation, "native_steps", lambda *arguments: None)
        return hf_fusion.generate(model, **inputs, **options)


@pytest.mark.parametrize("dtype", ("fp32", "bf16", "fp16"))
@pytest.mark.parametrize("batch, padded", ((1, False), (3, True), (17, True)))
def test_one_native_call_decodes_several_tokens(
    dtype, batch, padded, native_calls, monkeypatch, trials
):
    """Past the first 256 rows of the rotary table, too; a token counts as a call."""
    model, inputs = model_of(dtype), prompt(batch, 24, 6, padded)
    new = 260 if batch == 1 else 40
    with hf_fusion.patched(model):
        want = one_by_one(model, inputs, monkeypatch, max_new_tokens=new)
        counted = hf_fusion.stats(model).calls["step" if batch <= 16 else "prefill"]
        hf_fusion.stats(model).clear()
        assert torch.equal(hf_fusion.generate(model, **inputs, max_new_tokens=new), want)
        stats = hf_fusion.stats(model)
        assert stats.calls["step" if batch <= 16 else "prefill"] == counted and not stats.refused
    assert sum(native_calls) == new - 1 and len(native_calls) == 2, native_calls
    trials()


def test_no_native_call_is_long(native_calls, monkeypatch):
    model, inputs = model_of(), prompt(2, 6, 7, False)
    monkeypatch.setattr(generation, "_LONGEST_CALL", 0.0)
    with hf_fusion.patched(model):
        hf_fusion.generate(model, **inputs, max_new_tokens=9)
    assert native_calls == [1] * 8


def test_rows_end_inside_a_native_call(native_calls, monkeypatch, trials):
    """What a row that has ended goes on to is not seen, nor is an id past the vocabulary read."""
    model, inputs = model_of(), prompt(4, 6, 8, True)
    with hf_fusion.patched(model):
        plain = hf_fusion.generate(model, **inputs, max_new_tokens=NEW, pad_token_id=0)
        native_calls.clear()
        for column in range(6, 6 + NEW):
            eos = plain[1:, column].tolist()
            options = {"max_new_tokens": NEW, "eos_token_id": eos, "check_every": 7}
            want = one_by_one(model, inputs, monkeypatch, pad_token_id=0, **options)
            got = hf_fusion.generate(model, **inputs, pad_token_id=0, **options)
            assert torch.equal(got, want), eos
            far = hf_fusion.generate(model, **inputs, pad_token_id=10**9, **options)
            assert torch.equal(far.where(far != 10**9, 0), want)
            trials()
    assert max(native_calls) == 7


def test_who_listens_hears_every_token(native_calls):
    """Hooks, replaced forwards and a __call__ of one's own get a call for each token."""
    model, inputs = copy.deepcopy(model_of()), prompt(1, 5, 9, False)
    want = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    heard: list[int] = []

    def listen(*arguments, **named):
        heard.append(1)

    class Listening(type(model)):
        def __call__(self, *arguments, **named):
            listen()
            return super().__call__(*arguments, **named)

    def replaced(*arguments, _forward=None, **named):
        listen()
        return _forward(*arguments, **named)

    def generated() -> None:
        heard.clear()
        assert torch.equal(hf_fusion.generate(model, **inputs, max_new_tokens=8), want)
        assert len(heard) == 8 and not native_calls

    with hf_fusion.patched(model):
        for register in (model.register_forward_hook, model.register_forward_pre_hook):
            handle = register(listen)
            generated()
            handle.remove()
        model.forward = functools.partial(replaced, _forward=model.forward)
        generated()
        model.forward = model.forward.keywords["_forward"]
        base, model.__class__ = type(model), Listening
        generated()
        model.__class__ = base
        heard.clear()
        assert torch.equal(hf_fusion.generate(model, **inputs, max_new_tokens=8), want)
        assert not heard and sum(native_calls) == 7


def test_a_head_of_more_rows_than_the_vocabulary(native_calls):
    """Such a token has no embedding to go on from; the rows here repeat the first and never win."""
    model, inputs = copy.deepcopy(model_of()), prompt(2, 5, 10, False)
    head = model.get_output_embeddings()
    rows = torch.cat([head.weight.data, head.weight.data[:1].expand(8, -1)])
    head.weight, head.out_features = torch.nn.Parameter(rows), len(rows)
    want = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    with hf_fusion.patched(model):
        assert torch.equal(hf_fusion.generate(model, **inputs, max_new_tokens=8), want)
        assert hf_fusion.stats(model).fused == 8 and native_calls == [1, 6]


def test_an_interrupted_native_call_leaves_nothing_behind(monkeypatch):
    """Nowhere to write tokens to is left in the structs of later calls."""
    model, inputs = model_of(), prompt(2, 5, 11, False)

    def interrupted(self, *arguments):
        raise KeyboardInterrupt

    with hf_fusion.patched(model), torch.no_grad():
        want = model(**inputs).logits
        with monkeypatch.context() as patch:
            patch.setattr(CpuBackend, "_run", interrupted)
            patch.setattr(generation.Loop, "step", lambda self: None)
            with pytest.raises(KeyboardInterrupt):
                hf_fusion.generate(model, inputs["input_ids"][:, :1], max_new_tokens=3)
        frame = vars(model)["_hf_fusion"].binding.backend._frames.idle[-1]
        assert frame.next.data
        assert torch.equal(model(**inputs).logits, want)
        assert not frame.next.data and not frame.io.steps


def given_logits(vocabulary: int, dtype: str):
    """A model whose logits are its head's first column, whatever it reads."""
    model = copy.deepcopy(model_of(dtype, vocab_size=vocabulary))
    norm, head = model.gpt_neox.final_layer_norm, model.get_output_embeddings()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, head.weight):
            tensor.zero_()
        norm.bias[0] = 1.0
    return model, head.weight.data[:, 0]


def awkward(size: int) -> list[dict[int, float]]:
    """Values to put at places, the last place among them: ties, both infinities, NaN."""
    last, middle = size - 1, size // 2
    inf, nan = torch.inf, torch.nan
    return [
        {}, {middle: 9.0, last: 9.0}, {0: 9.0, last: 9.0}, {last: 9.0}, {middle: inf},
        {middle: inf, last: inf}, {0: inf, last: nan}, {middle: nan, last: nan},
        {0: 9.0, middle: -inf}, {last: nan}, dict.fromkeys(range(size), -inf),
        dict.fromkeys(range(size), nan), dict.fromkeys(range(size), -0.0) | {middle: 0.0},
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", ("fp32", "bf16", "fp16"))
@pytest.mark.parametrize("isa", available_isas())
def test_the_largest_logit_is_the_one_that_torch_finds(
    isa, dtype, force_isa, native_calls, trials
):
    force_isa(isa)
    for size in (1, 7, 8, 9, 33, 511, 512, 513, 1025, 1500):
        model, column = given_logits(size, dtype)
        column.copy_(torch.randn(size, generator=torch.Generator().manual_seed(size)))
        plain = column.clone()
        for values in awkward(size):
            column.copy_(plain)
            for place, value in values.items():
                column[place] = value
            with hf_fusion.patched(model):
                got = hf_fusion.generate(model, torch.zeros(2, 1).long(), max_new_tokens=4)
            assert (got[:, 1:] == column.max(0).indices).all(), f"{size} {list(values)[:3]}"
            trials()
    assert native_calls


class Streamer:
    """Keeps what it is given."""

    def __init__(self):
        self.given, self.ended = [], 0

    def put(self, value):
        assert not self.ended and value.device.type == "cpu"
        self.given.append(value.tolist())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("fusion", (None, "attention", "full"))
@pytest.mark.parametrize("batch", (1, 3))
def test_a_streamer_is_given_what_generate_gives(fusion, batch, trials):
    model, inputs = model_of(), prompt(batch, 6, 12, batch > 1)
    plain = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    for eos in (None, plain[:, 6].tolist(), plain[:, 17].tolist(), plain[0, 25].item()):
        options = {"max_new_tokens": NEW, "eos_token_id": eos, "pad_token_id": 0}
        want, got = Streamer(), Streamer()
        model.generate(**inputs, **options, do_sample=False, streamer=want)
        with hf_fusion.patched(model, fusion) if fusion else contextlib.nullcontext():
            hf_fusion.generate(model, **inputs, **options, streamer=got, check_every=5)
        assert got.given == want.given and got.ended == want.ended == 1, eos
        trials()


def test_text_is_streamed_to_another_thread():
    loaded = load_model("tiny", "fp32")
    ids = loaded.tokenizer("The expression", return_tensors="pt").input_ids
    streamer = TextIteratorStreamer(loaded.tokenizer, timeout=60)
    with hf_fusion.patched(loaded.model):
        call = {"max_new_tokens": 30, "eos_token_id": (), "streamer": streamer}
        thread = threading.Thread(
            target=hf_fusion.generate, args=(loaded.model, ids), kwargs=call
        )
        thread.start()
        text = "".join(streamer)
        thread.join()
        want = hf_fusion.generate(loaded.model, ids, max_new_tokens=30, eos_token_id=())
    assert text == loaded.tokenizer.decode(want[0])


def test_what_a_streamer_raises_is_raised():
    model, inputs = model_of(), prompt(1, 6, 13, False)
    streamer = Streamer()
    streamer.put = lambda value: 1 / (value.dim() - 1)
    with hf_fusion.patched(model):
        want = hf_fusion.generate(model, **inputs, max_new_tokens=NEW)
        with pytest.raises(ZeroDivisionError):
            hf_fusion.generate(model, **inputs, max_new_tokens=NEW, streamer=streamer)
        assert torch.equal(hf_fusion.generate(model, **inputs, max_new_tokens=NEW), want)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"check_every": 0}, "check_every is 0"),
        ({"do_sample": "yes"}, "do_sample is 'yes'"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": 10**309}, "temperature is 10000"),
        ({"streamer": "stdout"}, "streamer is 'stdout'"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"eos_token_id": -1}, "eos_token_id is"),
        ({"pad_token_id": "x"}, "pad_token_id is 'x'"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, "shape (2, 0)"),
        ({"input_ids": torch.zeros(3, dtype=torch.int64)}, "shape (3,)"),
        ({"input_ids": torch.zeros(1, 3)}, "torch.float32"),
        ({"attention_mask": torch.ones(1, 4)}, "shape (1, 4), expected (1, 3)"),
    ],
)
def test_a_wrong_value_is_named(options, words):
    call = {"input_ids": tokens(0, 1, 3), "max_new_tokens": 2, **options}
    with pytest.raises(FusionError) as caught:
        hf_fusion.generate(model_of(), **call)
    assert words in caught.value.message


def test_a_configuration_that_asks_for_more_is_refused():
    model = model_of()
    more = {"repetition_penalty": 1.2, "num_beams": 3, "min_new_tokens": 4}
    for name, value in (more | {"token_healing": True, "constraints": ()}).items():
        before = getattr(model.generation_config, name, None)
        setattr(model.generation_config, name, value)
        with pytest.raises(FusionError, match=f"{name} is {value}"):
            hf_fusion.generate(model, tokens(0, 1, 3), max_new_tokens=2)
        setattr(model.generation_config, name, before)
    encoder = BertForSequenceClassification(ENCODERS["bert"].tiny_config())
    with pytest.raises(FusionError) as caught:
        hf_fusion.generate(encoder, tokens(0, 1, 3), max_new_tokens=2)
    assert caught.value.reason is Reason.NOT_A_MODEL
