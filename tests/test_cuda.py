"""The CUDA back end from Python, its kernels emulated on the host's memory: what runs, what is
refused, and that caches, weights and calls mean there what they mean on the CPU.
"""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace

import pytest
import shapes
import torch
from devices import SHARED, Emulated, Unreadable
from pairs import tokens
from test_patching import picture
from transformers import DynamicCache, StaticCache
from twins import Output, Twin, build, fused_hits, judge_all

import hf_fusion
from hf_fusion import FusionError, generation, native, streams
from hf_fusion.report import Reason

pytestmark = [
    pytest.mark.reliability(14, "CUDA through Python"),
    pytest.mark.usefixtures("one_thread"),
]

RUNGS = ("decomposed", "attention", "attention+up", "full")
HALVES = ("fp16", "bf16")
RESIDUALS = {"parallel": True, "sequential": False}
# sizes that the CUDA kernels know: a head of 32, 8 elements to a load
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96}
PROMPT, STEPS = 6, 4


@pytest.fixture
def device(native_build, monkeypatch) -> Emulated:
    """The emulated device in place of the package's library."""
    library = Emulated(native_build / native.library_path().name)
    monkeypatch.setattr(native, "_library", library)
    return library


@functools.lru_cache(maxsize=None)
def twin_of(residual: str, dtype: str) -> Twin:
    return Twin("gpt_neox", {**SIZES, "use_parallel_residual": RESIDUALS[residual]}, dtype, "sdpa")


def model_of(dtype: str = "fp16", seed: int = 0, **changes):
    model = build("gpt_neox", {**SIZES, **changes}, dtype, "sdpa", seed)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def new_cache(model, static: bool):
    if static:
        return StaticCache(config=model.config, max_cache_len=PROMPT + STEPS)
    return DynamicCache(config=model.config)


@torch.no_grad()
def steps(model, batch: int, padded: bool, static: bool, seed: int) -> list[Output]:
    """Logits of STEPS single tokens after a prompt, and at the end the cache."""
    ids, mask = tokens(seed, batch, PROMPT + STEPS), torch.ones(batch, PROMPT + STEPS).long()
    for row in range(batch if padded else 0):
        mask[row, : row + 1] = 0
    cache, outputs = new_cache(model, static), []
    for past, end in [(0, PROMPT)] + [(n, n + 1) for n in range(PROMPT, PROMPT + STEPS)]:
        call = {"past_key_values": cache, "use_cache": True}
        if padded:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:end]
            call |= {"attention_mask": mask[:, :end], "position_ids": positions}
        logits = model(ids[:, past:end], **call).logits
        if past:
            live = shapes.live_queries(mask[:, :end], 1)
            outputs.append(Output(f"logits of step {past}", logits, live))
    assert int(cache.get_seq_length()) == PROMPT + STEPS
    live = shapes.live_queries(mask, PROMPT + STEPS)
    for name in ("keys", "values"):
        tensor = getattr(cache.layers[-1], name).transpose(1, 2).flatten(2)
        outputs.append(Output(name, tensor.clone(), live))
    return outputs


def patched(model, fusion: str = "full", **options):
    return hf_fusion.patched(model, fusion, "cuda", **options)


def test_the_report_names_the_device(device):
    model = model_of()
    before = picture(model)
    report = hf_fusion.patch(model, backend="cuda")
    assert report.fused_layers == 2 and report.reason is None and not report.packed_bytes
    kernels = {(layer.backend, layer.kernel) for layer in report.layers}
    assert kernels == {("cuda", "sm_90 emulated")}
    rows = hf_fusion.supported().to_dict()
    assert {row["status"] for row in rows if row["backend"] == "cuda"} == {"yes"}
    with fused_hits(model, refused=(Reason.ROWS,)):
        model.generate(tokens(0), max_new_tokens=3, do_sample=False)
    hf_fusion.unpatch(model)
    assert picture(model) == before


@pytest.mark.parametrize("fusion", RUNGS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_steps_are_as_right_as_stock_s(device, residual, dtype, fusion, trials):
    pair = twin_of(residual, dtype)
    kinds = [(batch, padded) for batch in (1, 2, 3, 4) for padded in (False, True)]
    for number, (batch, padded) in enumerate(kinds):
        case = (batch, padded, (number + RUNGS.index(fusion)) % 2 == 1, number)
        device.become(seed=number)
        what = f"{pair.name}: {fusion}, {case}"
        stock, exact = steps(pair.stock, *case), steps(pair.exact, *case)
        with patched(pair.fused, fusion):
            # the reference back end, which runs "decomposed", takes prompts too
            refused = () if fusion == "decomposed" else (Reason.ROWS,)
            with fused_hits(pair.fused, what, refused) as stats:
                device.calls = 0
                got = steps(pair.fused, *case)
            if fusion == "full":
                assert stats.calls == {**stats.calls, "step": STEPS, "layer": 0}, f"{what}\n{stats}"
                assert device.calls == STEPS and stats.refused == {Reason.ROWS.value: 1}
            elif fusion != "decomposed":
                assert stats.calls["layer"] == device.calls == 2 * STEPS, f"{what}\n{stats}"
        judge_all(got, stock, exact, pair.stages, what)
        trials()


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("plan", native.PLANS)
def test_every_plan_on_every_architecture(device, plan, arch, trials):
    """The same tokens, whatever the device and the order in which its threads run."""
    model = model_of("bf16", seed=1)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1] * 5])
    inputs = {"input_ids": tokens(1, 2, 5), "attention_mask": mask}
    with hf_fusion.patched(model, backend="reference"):
        want = model.generate(**inputs, max_new_tokens=6)
    for seed in range(3):
        device.become(arch, 2 + seed, seed, whole_team=seed == 0)
        with patched(model), fused_hits(model, f"{plan}, {arch}, {seed}", (Reason.ROWS,)):
            vars(model)["_hf_fusion"].state.backends.of(torch.device("cpu")).plan = plan
            assert torch.equal(model.generate(**inputs, max_new_tokens=6), want), (plan, arch, seed)
        trials()


GENERATIONS = {
    "greedy": {},
    "left padded": {"padded": True},
    "four rows": {"batch": 4, "padded": True},
    "static cache": {"cache_implementation": "static"},
    "static cache, padded": {"cache_implementation": "static", "batch": 3, "padded": True},
    "past the first buffers": {"max_new_tokens": 80},
    "beams": {"num_beams": 2, "batch": 2},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("name", GENERATIONS)
@pytest.mark.parametrize("fusion", ("attention+up", "full"))
def test_generate_gives_the_reference_s_tokens(device, fusion, name, trials):
    options = dict(GENERATIONS[name])
    batch, padded = options.pop("batch", 1), options.pop("padded", False)
    model = model_of()
    for seed in range(3):
        inputs = {"input_ids": tokens(seed, batch, 7)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        for row in range(batch if padded else 0):
            inputs["attention_mask"][row, : row + 1] = 0
        made = []
        for backend in ("reference", "cuda"):
            with hf_fusion.patched(model, fusion, backend):
                refused = (Reason.ROWS,) if backend == "cuda" else ()
                with fused_hits(model, f"{name}, seed {seed}, {backend}", refused):
                    torch.manual_seed(seed)
                    made.append(model.generate(**inputs, **{"max_new_tokens": 12, **options}))
        assert torch.equal(*made), f"{name}, {fusion}, seed {seed}\n{made[0]}\n{made[1]}"
        trials()


def refusals(model, batch: int = 1, **call) -> dict:
    """Reasons counted for one step after a prompt of two; the step gives stock's result."""
    stock = copy.deepcopy(model)
    hf_fusion.patch(model, backend="cuda")
    ids, answers = tokens(1, batch, 3), []
    with torch.no_grad():
        for each in (model, stock):
            given = {name: value(each) for name, value in call.items()}
            if given.get("use_cache", True):
                given.setdefault("past_key_values", DynamicCache(config=each.config))
                each(ids[:, :2], past_key_values=given["past_key_values"])
            hf_fusion.stats(each).clear()
            answers.append(each(ids[:, 2:], **given).logits)
    assert torch.equal(*answers), "a refused call is not stock's"
    assert hf_fusion.stats(model).fused == 0
    return hf_fusion.stats(model).refused


def test_what_no_kernel_takes_runs_stock_and_is_counted(device):
    assert refusals(model_of(), batch=5) == {Reason.ROWS.value: 1}
    assert refusals(model_of("fp32")) == {Reason.DTYPE.value: 1}
    assert refusals(model_of(), use_cache=lambda _: False) == {Reason.CACHE_TYPE.value: 1}
    at = torch.tensor([2])
    late = {"position_ids": lambda _: at[None], "cache_position": lambda _: at}
    assert set(refusals(model_of(), **late)) == {Reason.POSITIONS.value}
    report = hf_fusion.patch(build("bert", {}, "fp16", "sdpa"), backend="cuda")
    assert {layer.reason for layer in report.layers} == {Reason.UNSUPPORTED}
    model = model_of("fp32")
    with pytest.raises(FusionError) as caught:
        hf_fusion.patch(model, backend="cuda", strict=True)
        model(tokens(0))
    assert caught.value.reason in (Reason.DTYPE, Reason.ROWS)


def test_a_device_elsewhere_is_named(device, monkeypatch):
    """A library for real devices leaves the host's memory alone."""
    describe = device.hff_describe_device

    def real(number, ordinal, out):
        status = describe(number, ordinal, out)
        out._obj.host_memory = 0
        return status

    monkeypatch.setattr(device, "hff_describe_device", real)
    report = hf_fusion.patch(model_of(), backend="cuda")
    assert {layer.reason for layer in report.layers} == {Reason.DEVICE}
    assert "expected cuda" in report.layers[0].detail


@pytest.mark.parametrize("fusion", RUNGS[1:])
@pytest.mark.parametrize("static", (False, True), ids=("dynamic", "static"))
@torch.no_grad()
def test_a_step_reads_nothing_back(device, static, fusion):
    model, ids = model_of(), tokens(3, 2, PROMPT + 2)
    mask = torch.ones_like(ids)
    with patched(model, fusion):
        cache = new_cache(model, static)
        model(ids[:, :PROMPT], past_key_values=cache)
        model(ids[:, PROMPT : PROMPT + 1], past_key_values=cache)
        positions = torch.full((2, 1), PROMPT + 1)
        before = device.calls
        call = {"position_ids": positions, "past_key_values": cache}
        if fusion == "full":
            with Unreadable():
                model(ids[:, PROMPT + 1 :], attention_mask=mask, **call)
        else:  # what is between the layers is stock's, which does read
            layer, x = model.gpt_neox.layers[0], torch.randn(2, 1, 64).half()
            rope = model.gpt_neox.rotary_emb(x, positions)
            width = PROMPT + STEPS if static else PROMPT + 2
            seen = (torch.arange(width) < PROMPT + 2).expand(2, 1, 1, width)
            with Unreadable():
                layer(x, attention_mask=seen, layer_past=cache, position_embeddings=rope)
        assert device.calls > before


@torch.no_grad()
def test_the_host_counts_along(device):
    """Every way to change a cache leaves both counts right: the next step is the reference's."""
    model, ids = model_of(), tokens(4, 2, 12)
    edits = {
        "crop": lambda cache: cache.crop(-2),
        "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        "select": lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
        "repeat": lambda cache: cache.batch_repeat_interleave(1),
        "stock prompt": lambda cache: model(ids[:, 6:9], past_key_values=cache),
        "copy": copy.deepcopy,
        "reset": lambda cache: cache.reset(),
    }
    for name, edit in edits.items():
        made = []
        for backend in ("reference", "cuda"):
            with hf_fusion.patched(model, "full", backend):
                cache = DynamicCache(config=model.config)
                for part in (ids[:, :4], ids[:, 4:5], ids[:, 5:6]):
                    model(part, past_key_values=cache)
                copied = edit(cache) if name == "copy" else edit(cache)
                cache = copied if name == "copy" else cache
                made += [model(ids[:, n : n + 1], past_key_values=cache).logits for n in (9, 10)]
                made.append(torch.tensor(cache.get_seq_length()))
        for one, two in zip(made[:3], made[3:]):
            torch.testing.assert_close(one, two, rtol=2e-2, atol=2e-2, msg=lambda m: f"{name}: {m}")


@torch.no_grad()
def test_the_end_of_a_static_cache_gives_nan(device):
    model, ids = model_of(), tokens(5, 1, 4)
    with patched(model):
        cache = StaticCache(config=model.config, max_cache_len=3)
        model(ids[:, :2], past_key_values=cache)
        assert model(ids[:, 2:3], past_key_values=cache).logits.isfinite().all()
        keys = cache.layers[0].keys.clone()
        assert model(ids[:, 3:], past_key_values=cache).logits.isnan().all()
        assert torch.equal(cache.layers[0].keys, keys) and int(cache.get_seq_length()) == 3


@torch.no_grad()
def test_positions_reach_as_far_as_the_model_does(device):
    model, ids = model_of(max_position_embeddings=700), tokens(6, 1, 3)
    cache = DynamicCache(config=model.config)
    with patched(model):
        model(ids[:, :2], past_key_values=cache)
        for position, finite in ((699, True), (700, False)):
            step = model(ids[:, 2:], position_ids=torch.tensor([[position]]), past_key_values=cache)
            assert bool(step.logits.isfinite().all()) == finite, position


@torch.no_grad()
def test_changed_weights_and_frequencies_are_seen(device):
    ids = tokens(7, 1, 5)

    def step(model):
        cache = DynamicCache(config=model.config)
        model(ids[:, :4], past_key_values=cache)
        return model(ids[:, 4:], past_key_values=cache).logits

    model = model_of()
    rotary = model.gpt_neox.rotary_emb
    edits = (
        lambda: model.gpt_neox.layers[1].mlp.dense_4h_to_h.weight.mul_(1.5),
        lambda: setattr(model.lm_head, "weight", torch.nn.Parameter(model.lm_head.weight * 2)),
        lambda: rotary.inv_freq.mul_(0.5),
        lambda: rotary.register_buffer("inv_freq", rotary.inv_freq * 3, persistent=False),
    )
    hf_fusion.patch(model, backend="cuda")
    for number, edit in enumerate(edits):
        before = step(model)
        edit()
        after, calls = step(model), device.calls
        with hf_fusion.patched(copy.deepcopy(model), backend="reference"):
            want = step(copy.deepcopy(model))
        what = f"edit {number}"
        assert not torch.allclose(before, after, rtol=5e-2, atol=5e-2), f"{what} changes nothing"
        torch.testing.assert_close(
            after, want, rtol=3e-2, atol=3e-2, msg=lambda text: f"{what}: {text}"
        )
        assert calls
    hf_fusion.unpatch(model)


@torch.no_grad()
def test_calls_bring_a_clean_workspace(device):
    """One for every bound model and batch, zero before its first use and kept for the next."""
    model = model_of()
    with patched(model):
        for batch in (1, 2, 1, 2):
            ids, cache = tokens(8, batch, 5), DynamicCache(config=model.config)
            for n in range(5):
                model(ids[:, n : n + 1], past_key_values=cache)
    assert len(device.workspaces) == 2 and not device.stale and device.calls == 20


@torch.no_grad()
def test_a_capture_takes_what_is_ready(device, monkeypatch):
    """Inside a graph capture nothing is bound, and only a static cache is used."""
    model, ids = model_of(), tokens(9, 1, 4)
    for static, bound, seen in (
        (True, True, ()),
        (True, False, ("downgraded",)),  # the layers, which are bound, run one by one
        (False, True, ("refused",)),
    ):
        with patched(model):
            cache = new_cache(model, static)
            for n in range(3):
                model(ids[:, n : n + 1], past_key_values=cache)
            if not bound:
                vars(model)["_hf_fusion"].binding = None
            hf_fusion.stats(model).clear()
            with monkeypatch.context() as patch:
                patch.setattr(streams, "capturing", lambda: True)
                model(ids[:, 3:], past_key_values=cache)
            counted = hf_fusion.stats(model).to_dict()
        for kind in ("downgraded", "refused"):
            expected = {Reason.CAPTURING.value: 1} if kind in seen else {}
            assert counted[kind] == expected, f"static {static}, bound {bound}\n{counted}"


@torch.no_grad()
def test_a_step_with_many_ends_can_be_recorded():
    """No operator gives a result whose size depends on values: a capture cannot wait for it."""
    ids, logits = tokens(0, 1, 1), torch.zeros(1, 1, 16)
    model = SimpleNamespace(config=model_of().config)
    given = model, ids, torch.ones_like(ids), 4, generation.Sampler(), None, [*range(16)], 0, None
    loop = generation.Loop(*given)
    loop.model = lambda **_: SimpleNamespace(logits=logits)
    loop.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loop.step()
    ran = {event.key for event in profile.key_averages()}
    assert "aten::index_copy_" in ran and "aten::_unique" not in ran
