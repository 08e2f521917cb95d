"""The harness: what it accepts and refuses, and that no number leaves it without a verdict."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch

import hf_fusion
from hf_fusion import cli, harness
from hf_fusion.harness import inputs, machine, memory, models, parity, perplexity, timing

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A two-layer GPT-NeoX with a letter tokenizer, saved as a checkpoint."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import GPTNeoXConfig, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model")
    config = GPTNeoXConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=80,
        vocab_size=61, max_position_embeddings=64, rotary_pct=0.25,
    )  # fmt: skip
    models.random_model(config, "fp32", seed=1).save_pretrained(path)
    vocabulary = {letter: number for number, letter in enumerate(LETTERS + " .")}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="."))
    tokenizer.pre_tokenizer = Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=".").save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of letters drawn by a fixed seed."""
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(0, len(LETTERS), (400,), generator=generator).tolist()
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("".join(LETTERS[number] for number in drawn), encoding="utf-8")
    return str(path)


def settings(folder, **changes):
    """The smallest ablation."""
    fixed = {"model": folder, "dtype": "fp32", "rounds": 2, "prompt_tokens": 5, "new_tokens": 5}
    return harness.Settings(**{**fixed, "threads": 1, "rungs": ("full",), **changes})


def steady_stream(threads):
    """A read stream of 10 GB/s that costs no time."""
    return 1e10


# ---------------------------------------------------------------- ablation


@pytest.fixture(scope="module")
def ablation(folder):
    """All rungs once."""
    return harness.run_ablation(settings(folder, rungs=harness.RUNGS), stream=steady_stream)


def test_every_rung_has_a_time_and_a_verdict(ablation):
    assert [row.name for row in ablation.rows] == list(harness.RUNGS)
    for row in ablation.rows:
        assert row.failure is None, f"{row.name}: {row.failure}"
        assert row.step_ms.median > 0 and row.tokens_equal == 1.0
        assert row.parity.passed
    for row in ablation.rows[2:]:
        assert row.calls["fused"] > 0, row.name
        assert not row.calls["refused"], row.name
    assert ablation.passed


@pytest.mark.parametrize("loop", timing.LOOPS[1:])
def test_other_loops_give_the_same_tokens(folder, loop, monkeypatch):
    """Where the rungs run in hf_fusion.generate, stock does not."""
    original, looped = hf_fusion.generate, []

    def noting(*arguments, **named):
        looped.append(1)
        return original(*arguments, **named)

    monkeypatch.setattr(hf_fusion, "generate", noting)
    result = harness.run_ablation(settings(folder, loop=loop), stream=steady_stream)
    assert result.passed and all(row.tokens_equal == 1.0 for row in result.rows)
    assert bool(looped) == (loop == "own")
    row, new = result.row("full"), result.settings.new_tokens
    assert row.step_ms.median > 0 and row.calls["calls"]["step"] >= new - 1


@pytest.mark.parametrize("loop", ("generate", "own", "custom"))
def test_drawn_tokens_are_timed_and_not_compared(folder, loop):
    result = harness.run_ablation(
        settings(folder, loop=loop, sample=True), stream=steady_stream
    )
    assert result.passed and all(row.tokens_equal is None for row in result.rows)
    assert all(row.step_ms.median > 0 and row.parity.passed for row in result.rows)
    assert "temperature 0.8, top_k 50, top_p 0.9" in result.markdown()
    with pytest.raises(inputs.InputError, match="forward"):
        harness.run_ablation(settings(folder, loop="forward", sample=True), stream=steady_stream)


def test_ablation_as_json_and_markdown(ablation):
    plain = json.loads(json.dumps(ablation.to_dict()))
    assert plain["passed"] and plain["stream_gbs"]["median"] == pytest.approx(10.0)
    assert plain["environment"]["versions"]["torch"] == torch.__version__
    assert plain["settings"]["seed"] == 0
    text = ablation.markdown()
    assert "| Full PyTorch |" in text and "| full |" in text and "Ladder:" in text


def test_bytes_per_step_counts_what_a_step_reads(folder):
    model = harness.load_model(folder, "fp32").model
    table = model.get_input_embeddings().weight
    weights = sum(p.numel() for p in model.parameters()) - table.numel()
    cache = 2 * model.config.num_hidden_layers * 48 * 10
    assert models.bytes_per_step(model, 2, 10) == 4 * (weights + 2 * 48 + 2 * cache)


def test_a_rung_that_fuses_nothing_has_no_time(folder, monkeypatch):
    counters = {"fused": 0, "refused": {"gradients enabled": 3}, "downgraded": {}, "calls": {}}
    monkeypatch.setattr(timing, "noted_calls", lambda model: counters)
    result = harness.run_ablation(settings(folder), stream=steady_stream)
    row = result.row("full")
    assert row.step_ms is None and row.speedup is None and not result.passed
    assert "nothing was fused (gradients enabled" in result.markdown()


def test_a_rung_beyond_the_parity_limit_has_no_time(folder, monkeypatch):
    honest = parity.logits_along
    calls = []

    def wrong_at_the_end(model, *arguments):
        calls.append(model)
        return honest(model, *arguments) * (1.001 if len(calls) == 3 else 1.0)

    monkeypatch.setattr(parity, "logits_along", wrong_at_the_end)
    result = harness.run_ablation(settings(folder), stream=steady_stream)
    assert len(calls) == 3  # reference, stock, full
    assert result.row("full").step_ms is None
    assert "times stock's own" in result.row("full").failure


def test_a_contender_that_raises_is_a_failed_row(folder):
    class Broken:
        name = "broken"

        def run(self, prompt, new_tokens):
            raise RuntimeError("no such engine\nsecond line")

    result = harness.run_ablation(settings(folder), peers=[Broken()], stream=steady_stream)
    assert result.row("broken").failure == "RuntimeError: no such engine"
    assert result.row("full").step_ms and not result.passed


def test_rotation_runs_everyone_once_a_round():
    order = []

    class Contender:
        def __init__(self, name):
            self.name = name

        def run(self, prompt, new_tokens):
            order.append(self.name)
            return timing.Sample(0.0, (1.0,), torch.zeros(1, 1, dtype=torch.int64))

    contenders = [Contender(name) for name in "abc"]
    prompt = torch.zeros(1, 2, dtype=torch.int64)
    recording = timing.interleave(contenders, [prompt] * 2, 2, 1, lambda threads: None)
    assert order == list("abc" + "bca" + "cab")
    assert [len(recording.samples[name]) for name in "abc"] == [2, 2, 2]  # the warm-up is dropped


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with timing.torch_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_peak_memory_of_a_rung(folder):
    chosen = settings(folder, memory=True, rungs=("stock",))
    result = harness.run_ablation(chosen, stream=steady_stream)
    memory = result.row("stock").memory
    assert 0 < memory["loaded"] <= memory["peak"]


def test_peak_memory_is_that_of_the_loop(folder, monkeypatch):
    original, looped = hf_fusion.generate, []

    def noting(*arguments, **named):
        looped.append(1)
        return original(*arguments, **named)

    def in_this_process(module, request, what):
        return memory._measure(json.loads(json.dumps(request)))

    monkeypatch.setattr(hf_fusion, "generate", noting)
    monkeypatch.setattr(memory, "fresh_process", in_this_process)
    for loop in ("generate", "own"):
        chosen = settings(folder, loop=loop, new_tokens=2).checked()
        assert memory.peak_memory(asdict(chosen), "full")["peak"] > 0
        assert bool(looped) == (loop == "own")


@pytest.mark.parametrize("kind", ["context", "batch"])
def test_sweeps(folder, tmp_path, kind):
    run = harness.run_context_sweep if kind == "context" else harness.run_batch_sweep
    result = run(settings(folder, rounds=1), (1, 3), stream=steady_stream)
    assert result.passed and [value for value, _ in result.points] == [1, 3]
    harness.write(result, tmp_path / "s.json", tmp_path / "s.md", tmp_path / "s.svg")
    assert json.loads((tmp_path / "s.json").read_text())["over"] == kind
    assert (tmp_path / "s.md").read_text().count(f"| {3} |") == 1
    assert "<svg" in (tmp_path / "s.svg").read_text()


def test_bench(folder, tmp_path):
    result = harness.run_bench([f"{folder}:bf16"], settings(folder, rounds=1), steady_stream)
    harness.write(result, picture_file=tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert result.items[0].settings.dtype == "bf16" and "stock / full" in result.markdown()


def test_token_comparison_names_the_first_divergence(folder):
    model = harness.load_model(folder, "fp32").model
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    stock = torch.tensor([[7, 8, 9], [7, 8, 9]])
    other = torch.tensor([[7, 8, 9], [7, 1, 9]])
    share, found = parity.compare_tokens(model, [prompt], [stock], [other], error=0.0)
    assert share == 0.5 and (found[0].row, found[0].token) == (1, 1)
    assert found[0].gap > 0 and not found[0].explained


def test_every_sequence_that_leaves_stocks_is_examined(folder):
    model = harness.load_model(folder, "fp32").model
    prompt, stock = torch.tensor([[1, 2]] * 12), torch.tensor([[7, 8]] * 12)
    share, found = parity.compare_tokens(model, [prompt], [stock], [stock + 1], error=0.0)
    assert share == 0 and [item.row for item in found] == list(range(12))


# ---------------------------------------------------------------- perplexity


def test_perplexity_of_the_wrapper_is_stocks(folder, text):
    chosen = harness.PerplexitySettings(
        model=folder, text=text, rungs=("none", "full"), window=32, stride=16, batch=3, threads=1
    )
    result = harness.run_perplexity(chosen)
    assert [(row.path, row.name) for row in result.rows] == [
        (path, rung) for path in ("prefill", "decode") for rung in ("stock", "none", "full")
    ]
    for row in result.rows:
        assert row.failure is None, f"{row.name}, {row.path}: {row.failure}"
        if row.name == "none":
            assert (row.difference, row.standard_error, row.within_noise) == (0.0, 0.0, True)
        if row.name == "full":
            assert row.calls["fused"] > 0 and not row.calls["refused"]
    stock = {row.path: row.nll for row in result.rows if row.name == "stock"}
    assert stock["prefill"] == pytest.approx(stock["decode"], rel=1e-5)
    assert json.loads(json.dumps(result.to_dict()))["windows"] == 24


def test_perplexity_by_hand(folder):
    loaded = harness.load_model(folder, "fp32")
    ids = torch.arange(20)
    windows, fresh = perplexity.cut_windows(ids, 8, 4)
    assert windows.shape == (4, 8) and fresh.tolist() == [7, 4, 4, 4]
    found = perplexity.window_nll(loaded.model, windows, fresh, "prefill")
    with torch.no_grad():
        scores = loaded.model(input_ids=windows).logits.double().log_softmax(-1)
    expected = [
        -sum(scores[n, i - 1, windows[n, i]] for i in range(8 - int(fresh[n]), 8)) for n in range(4)
    ]
    torch.testing.assert_close(found, torch.stack(expected))


def test_windows_of_a_short_text():
    windows, fresh = perplexity.cut_windows(torch.arange(5), 512)
    assert windows.shape == (1, 5) and fresh.tolist() == [4]
    with pytest.raises(inputs.InputError, match="expected at least 2"):
        perplexity.cut_windows(torch.arange(1), 512)


def test_a_difference_beyond_the_limit_fails():
    fresh = torch.tensor([10, 10])

    def row(name, nll):
        calls = {"fused": 1, "refused": {}}
        mean = sum(nll) / 20
        return perplexity.PerplexityRow(
            name, name, "decode", mean, math.exp(mean), calls=calls, window_nll=nll
        )

    stock, full = row("stock", [10.0, 20.0]), row("full", [10.01, 20.03])
    perplexity._judge(full, stock, fresh, 1e-5)
    assert full.difference == pytest.approx(0.002)
    assert full.standard_error == pytest.approx(0.001)
    assert full.relative_difference == pytest.approx(math.expm1(0.002))
    assert "beyond" in full.failure


# ---------------------------------------------------------------- models


def test_shapes_are_the_published_ones():
    model = models.random_pythia("pythia-14m", "bf16", seed=5)
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (128, 6, 512)
    assert config.rope_parameters["partial_rotary_factor"] == 0.25 and config.use_parallel_residual
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    norm, linear = model.gpt_neox.final_layer_norm, model.gpt_neox.layers[0].mlp.dense_h_to_4h
    assert torch.all(norm.weight == 1) and torch.all(norm.bias == 0)
    assert float(linear.weight.detach().float().std()) == pytest.approx(0.02, rel=0.05)
    again = models.random_pythia("pythia-14m", "bf16", seed=5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_prompts_follow_the_seed(folder):
    loaded = harness.load_model(folder)
    first, again, other = (models.prompts(loaded, 2, 3, 7, seed) for seed in (0, 0, 1))
    assert first[0].shape == (3, 7) and int(max(p.max() for p in first)) < loaded.vocabulary
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], other[0])


# ---------------------------------------------------------------- command line


def test_command_writes_every_file(folder, tmp_path, capsys):
    files = {kind: str(tmp_path / "deep" / f"out.{kind}") for kind in ("json", "md", "png")}
    code = cli.main([
        "ablate", "--model", folder, "--dtype", "fp32", "--rungs", "attention,full",
        "--rounds", "1", "--new-tokens", "4", "--prompt", "4", "--threads", "1",
        "--json", files["json"], "--markdown", files["md"], "--plot", files["png"],
    ])  # fmt: skip
    assert code == 0
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / "deep" / "out.md").read_text().strip()
    rows = json.loads((tmp_path / "deep" / "out.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["stock", "attention", "full"]
    assert (tmp_path / "deep" / "out.png").read_bytes().startswith(b"\x89PNG")


def test_command_perplexity_prints_json(folder, text, capsys):
    code = cli.main([
        "perplexity", "--model", folder, "--text", text, "--window", "16", "--windows", "2",
        "--path", "decode", "--json", "-",
    ])  # fmt: skip
    assert code == 0
    assert json.loads(capsys.readouterr().out)["rows"][1]["path"] == "decode"


def test_variables_that_move_timings_stand_beside_the_machine(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.setenv("UNRELATED", "1")
    record = machine.environment()
    assert record["variables"]["OMP_WAIT_POLICY"] == "passive"
    assert "UNRELATED" not in record["variables"]
    assert "; OMP_WAIT_POLICY=passive" in machine.describe(record)
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert "OMP_WAIT_POLICY" not in machine.describe(machine.environment())


def test_command_info(capsys):
    assert cli.main(["info"]) == 0
    assert "gpt_neox" in capsys.readouterr().out
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["backends"]["reference"] is None
    assert (found["backends"]["cuda"] is None) == (found["device"]["name"] is not None)
    assert found["device"]["name"] or found["device"]["reason"]


def test_bad_text_files(tmp_path):
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for name, message in (("empty", "is empty"), ("latin", "not UTF-8 .byte 3"), ("", "a folder")):
        with pytest.raises(inputs.InputError, match=message):
            inputs.read_text(tmp_path / name)
