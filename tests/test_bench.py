"""The bench of encoders and prompts: every option on tiny models, and no time without a verdict."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import save_file

from hf_fusion import cli, harness
from hf_fusion.harness import (
    contenders,
    encoders,
    inputs,
    machine,
    models,
    peers,
    work,
    work_memory,
    workloads,
)
from hf_fusion.registry import families

FAMILIES = {"text": "bert", "image": "vit", "decoder": "gpt_neox"}
LABELS = {"text": "2x9", "image": "2 images", "decoder": "2x9"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny checkpoint of each kind."""
    from transformers import AutoModel

    found = {}
    for kind, name in FAMILIES.items():
        family = next(known for known in families() if known.name == name)
        auto = None if kind == "decoder" else AutoModel
        model = models.random_model(family.tiny_config(), "fp32", 3, auto)
        found[kind] = str(tmp_path_factory.mktemp(kind))
        model.save_pretrained(found[kind])
    return found


def settings(folder, dtype="fp32", **changes):
    """The smallest bench."""
    fixed = {"rungs": ("full",), "rounds": 1, "threads": 1, "batches": (2,)}
    return harness.WorkSettings(cases=((folder, dtype),), **{**fixed, **changes})


def of_kind(folders, kind, **changes):
    """The same for one kind, with sequences of nine tokens."""
    lengths = None if kind == "image" else (9,)
    return settings(folders[kind], **{"lengths": lengths, **changes})


def steady_peak(dtype):
    """A peak of 10 GFLOP/s that costs no time."""
    return lambda threads: 1e10


@pytest.fixture
def quick_peak(monkeypatch):
    """The command's peak, costing no time."""
    monkeypatch.setattr(machine, "multiply_add_peak", steady_peak)


# ---------------------------------------------------------------- rungs and verdicts


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_rung_has_a_time_and_a_verdict(folders, kind, dtype):
    chosen = of_kind(folders, kind, rungs=contenders.WORK_RUNGS, rounds=2)
    chosen = harness.WorkSettings(**{**vars(chosen), "cases": ((folders[kind], dtype),)})
    result = harness.run_work(chosen, steady_peak)
    (item,) = result.items
    assert [row.name for row in item.rows] == list(contenders.WORK_RUNGS)
    for row in item.rows:
        assert row.failure is None, f"{row.name}: {row.failure}"
        assert row.ms.median > 0 and row.parity.passed
        expected = item.flops / (row.ms.median / 1e3) / 1e10
        assert row.peak_share == pytest.approx(expected)
    for row in item.rows[2:]:
        assert row.calls["fused"] > 0 and not row.calls["refused"], row.name
    assert result.passed and item.work.label == LABELS[kind]
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["items"][0]["measured_peak_gflops"]["median"] == pytest.approx(10.0)
    text = result.markdown()
    assert "| full, packed copies |" in text and item.work.unit in text


def test_a_rung_beyond_the_limit_has_no_time_and_a_peer_keeps_its_own(folders, monkeypatch):
    honest, runs = workloads.run_model, contenders.run_model

    def wrong(model, kind, given):
        return runs(model, kind, given) * (1.001 if hasattr(model, "_hf_fusion") else 1.0)

    monkeypatch.setattr(contenders, "run_model", wrong)
    monkeypatch.setattr(
        peers, "build", lambda peer, model, kind, *_: (lambda x: honest(model, kind, x) + 1, None)
    )
    monkeypatch.setattr(peers, "absent", lambda *_: None)
    result = harness.run_work(of_kind(folders, "text", peers=("openvino",)), steady_peak)
    full, peer = result.items[0].row("full"), result.items[0].row("openvino")
    assert full.ms is None and "times stock's own" in full.failure
    assert peer.ms and "times stock's own" in peer.failure and not result.passed
    assert result.markdown().count("failed") == 2


def test_a_rung_that_fuses_nothing_has_no_time(folders, monkeypatch):
    counters = {"fused": 0, "refused": {"gradients enabled": 3}, "downgraded": {}, "calls": {}}
    monkeypatch.setattr(contenders, "noted_calls", lambda model: counters)
    result = harness.run_work(of_kind(folders, "image"), steady_peak)
    row = result.items[0].row("full")
    assert row.ms is None and "nothing was fused" in result.markdown() and not result.passed


def test_contenders_share_parameters(folders):
    model = encoders.load_any(folders["text"], "fp32", 0)[0].model
    own = contenders.sharing_copy(model)
    assert own is not model
    pairs = list(zip(model.parameters(), own.parameters(), strict=True))
    assert pairs and all(a is b for a, b in pairs)


def test_matmul_precision_is_put_back(folders):
    before = torch.get_float32_matmul_precision()
    seen = []

    def peak(dtype):
        seen.append(torch.get_float32_matmul_precision())
        return lambda threads: 1e10

    harness.run_work(of_kind(folders, "text", matmul_precision="medium"), peak)
    assert seen == ["medium"] and torch.get_float32_matmul_precision() == before


def test_measured_peak(monkeypatch):
    monkeypatch.setattr(machine, "PEAK_SIZE", 64)
    for dtype in inputs.DTYPES.values():
        assert machine.multiply_add_peak(dtype)(1) > 0


@pytest.mark.parametrize("rung", ["stock", "packed"])
def test_peak_memory_of_a_contender(folders, tmp_path, rung):
    given = {"input_ids": torch.arange(8)[None], "attention_mask": torch.ones(1, 8).long()}
    save_file(given, tmp_path / "inputs.safetensors")
    request = dict(
        contender=rung, model=folders["text"], dtype="bf16", kind="text", backend="auto",
        precision=None, matmul_precision="highest", threads=1, seed=0, file=None,
        inputs=str(tmp_path / "inputs.safetensors"),
    )  # fmt: skip
    found = work_memory._measure(request)
    assert 0 < found["loaded"] and 0 < found["peak"]


# ---------------------------------------------------------------- work


def test_ragged_lengths_follow_the_seed_and_padding_is_not_judged(folders):
    loaded, kind = encoders.load_any(folders["text"], "fp32", 0)
    first, again = (workloads.make_work(loaded, kind, 5, 16, True, 4) for _ in range(2))
    assert first == again and first.ragged and max(first.lengths) == 16
    (given,) = workloads.make_inputs(loaded, first, 1, 0)
    assert given["attention_mask"].sum(1).tolist() == list(first.lengths)
    padding = loaded.model.config.pad_token_id
    assert torch.equal(given["input_ids"] == padding, given["attention_mask"] == 0)
    kept = workloads.judged(first, torch.zeros(5, 16, 3))
    assert kept.shape == (sum(first.lengths), 3)


def test_operations_by_hand(folders):
    hidden, up, layers = 32, 37, 2
    text, kind = encoders.load_any(folders["text"], "fp32", 0)
    made = workloads.make_work(text, kind, 2, 9, False, 0)
    one = layers * (9 * (4 * hidden**2 + 2 * hidden * up) + 2 * 81 * hidden) + hidden**2
    assert workloads.work_flops(text.model, made) == 2 * 2 * one
    image, kind = encoders.load_any(folders["image"], "fp32", 0)
    made = workloads.make_work(image, kind, 1, 0, False, 0)
    assert made.lengths == (26,)
    one = layers * (26 * (4 * hidden**2 + 2 * hidden * up) + 2 * 26**2 * hidden)
    one += hidden**2 + 25 * hidden * 3 * 36
    assert workloads.work_flops(image.model, made) == 2 * one
    decoder, kind = encoders.load_any(folders["decoder"], "fp32", 0)
    made = workloads.make_work(decoder, kind, 1, 9, False, 0)
    config = decoder.model.config
    hidden, up, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    one = layers * (9 * (4 * hidden**2 + 2 * hidden * up) + 2 * 45 * hidden)
    assert workloads.work_flops(decoder.model, made) == 2 * (one + hidden * config.vocab_size)


@pytest.mark.parametrize("name", encoders.ENCODER_SHAPES)
def test_shapes_are_known_families(name):
    config = encoders.encoder_config(name)
    assert config.model_type.replace("-", "_") in {known.name for known in families()}
    kind = encoders.kind_of(name)
    assert kind == ("image" if name.startswith(("vit", "deit")) else "text")
    assert config.hidden_size == encoders.ENCODER_SHAPES[name][1]


# ---------------------------------------------------------------- peers


@pytest.mark.parametrize(
    ("peer", "kind"),
    [("openvino", "text"), ("openvino", "decoder"), ("onnxruntime", "text")],
)
def test_peers_agree_with_stock(folders, kind, peer):
    if reason := peers.absent(peer, "fp32", "highest"):
        pytest.skip(reason)
    result = harness.run_work(of_kind(folders, kind, peers=(peer,), rungs=()), steady_peak)
    (item,) = result.items
    assert not item.absent
    row = item.row(peer)
    assert row.ms and row.parity.relative_l2 < 1e-5 and row.label.endswith("fp32")


def test_compile_wraps_the_model(folders, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda entry, dynamic: entry)
    monkeypatch.setattr(peers, "_compiler", lambda: "c++")
    result = harness.run_work(of_kind(folders, "decoder", peers=("compile",)), steady_peak)
    assert result.passed and result.items[0].row("compile").label == "torch.compile fp32"


def test_absent_peers_are_listed_with_the_reason(folders, monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    monkeypatch.setattr(peers, "_compiler", lambda: None)
    result = harness.run_work(of_kind(folders, "text", peers=peers.PEERS), steady_peak)
    assert list(result.items[0].absent) == list(peers.PEERS) and result.passed
    text = result.markdown()
    assert "not installed: pip install onnxruntime onnx onnxscript" in text
    assert "no C++ compiler" in text and text.count("| absent |") == 3


def test_a_peer_that_does_not_take_the_model_says_so(folders, monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("unsupported\noperation")

    monkeypatch.setattr(peers, "_compile", refuse)
    monkeypatch.setattr(peers, "_compiler", lambda: "c++")
    result = harness.run_work(of_kind(folders, "text", peers=("compile",)), steady_peak)
    absent = result.items[0].absent["compile"]
    assert absent == "torch.compile does not take the model: RuntimeError: unsupported operation"


@pytest.mark.parametrize(
    ("peer", "dtype", "matmul", "precision"),
    [
        ("compile", "fp16", "highest", "fp16"),
        ("openvino", "bf16", "highest", "bf16"),
        ("openvino", "fp32", "highest", "fp32"),
        ("openvino", "fp32", "medium", "bf16"),
        ("openvino", "fp16", "highest", None),
        ("onnxruntime", "bf16", "highest", "fp32"),
    ],
)
def test_precision_of_peers(peer, dtype, matmul, precision):
    assert peers.precision_of(peer, dtype, matmul) == precision
    if precision is None and find_spec(peer):
        assert "not in fp16" in peers.absent(peer, dtype, matmul)


# ---------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("kind", "line", "count"),
    [
        ("text", "--batch 1,3 --length 4,9 --ragged --rungs packed --seed 2", 4),
        ("image", "--images 1,2 --backend reference --rungs full", 2),
        ("decoder", "--work prefill --length 5,9 --rungs full --matmul-precision high", 2),
        ("image", "--rungs full,packed --matmul-precision high", 1),
        ("text", "--length 40 --batch 2 --rungs full --matmul-precision medium", 1),
        ("text", "--length 7 --batch 2 --rungs attention", 1),
    ],
)
def test_command_writes_every_file(folders, tmp_path, capsys, quick_peak, kind, line, count):
    files = {name: str(tmp_path / f"out.{name}") for name in ("json", "md", "png")}
    code = cli.main([
        "bench", f"{folders[kind]}:fp32", *line.split(), "--rounds", "1", "--threads", "1",
        "--json", files["json"], "--markdown", files["md"], "--plot", files["png"],
    ])  # fmt: skip
    assert code == 0
    assert capsys.readouterr().out.strip() == (tmp_path / "out.md").read_text().strip()
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["kind"] == "work" and len(found["items"]) == count
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_what_high_precision_grants():
    parity = work.Parity(9.0, 1.0, 2.0**-14, granted=work.GRANTED_BY_HIGH)
    assert parity.passed and not replace(parity, relative_l2=2.0**-13).passed
    assert not replace(parity, error=float("nan"), relative_l2=float("nan")).passed


def test_a_failed_verdict_makes_the_command_fail(folders, capsys, quick_peak, monkeypatch):
    wrong = work.Parity(3.0, 1.0, 1.0)
    monkeypatch.setattr(work, "_parity", lambda *_: {"stock": wrong, "full": wrong})
    line = ["bench", f"{folders['text']}:fp32", "--rungs", "full", "--rounds", "1", "--length", "4"]
    assert cli.main(line) == 1
    assert "3 times stock's own" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("bert-bas:bf16", "unknown model 'bert-bas': accepted are vit-s16"),
        ("bert-bas:bf16", "did you mean bert-base?"),
        ("vit-b61:bf16", "did you mean vit-b16?"),
        ("./nowhere:bf16", "'./nowhere' has no config.json"),
        ("bert-base:int8", "unknown dtype 'int8'"),
        ("bert-base:bf16 --peers openvin", "unknown peer 'openvin': accepted are compile"),
        ("bert-base:bf16 --rungs ful", "unknown rung 'ful'"),
        ("bert-base:bf16 --batch 0", "the value is 0: expected an integer of at least 1"),
        ("bert-base:bf16 --length 1,x", "'1,x': expected integers separated by commas"),
        ("bert-base:bf16 --rounds 0", "expected an integer of at least 1"),
        ("bert-base:bf16 --backend gpu", "unknown back end 'gpu'"),
        ("bert-base:bf16 --matmul-precision low", "unknown matmul precision 'low'"),
        ("bert-base:bf16 --images 2", "takes no images, --images is 2"),
        ("vit-b16:bf16 --images 2 --batch 3", "--batch is 3 and --images is 2"),
        ("vit-b16:bf16 --length 128", "takes images: expected no length 128"),
        ("vit-b16:bf16 --ragged", "takes images: expected no ragged lengths"),
        ("bert-base:bf16 --work prefill", "an encoder of text: expected a decoder for prefill"),
        ("pythia-14m:bf16 --work encode", "is a decoder: expected an encoder for encode"),
        ("pythia-14m:bf16 bert-base:bf16", "'bert-base:bf16' is an encoder of text"),
        ("pythia-14m:bf16 --images 2", "takes no images, --images is 2"),
        ("pythia-14m:bf16 --work prefill --ragged", "expected a text encoder for ragged"),
        ("pythia-14m:bf16 --peers compile", "--peers is given for decode"),
        ("pythia-14m:bf16 --batch 1,2", "--batch is 1,2: expected one number for decode"),
        ("bert-base:bf16 --new-tokens 4", "--new-tokens is given for encode"),
        ("bert-base:bf16 --compiled", "expected --peers compile"),
        ("bert-base:bf16 --work draw", "invalid choice: 'draw'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(line, expected, capsys):
    assert cli.main(["bench", *line.split()]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


@pytest.mark.parametrize("command", ["ablate --model {}", "perplexity --model {}"])
@pytest.mark.parametrize("kind", ["text", "image"])
def test_an_encoder_names_its_command(folders, capsys, command, kind):
    assert cli.main(command.format(folders[kind]).split()) == 2
    error = capsys.readouterr().err
    assert f"is an encoder of {kind}s" in error and f"hf-fusion bench {folders[kind]}:" in error


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: _shorten(folder / "model.safetensors"), "SafetensorError"),
        (lambda folder: _widen(folder / "config.json"), "do not have the sizes"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON file"),
    ],
)
@pytest.mark.parametrize("kind", ["text", "decoder"])
def test_a_damaged_checkpoint_is_one_line(folders, tmp_path, capsys, kind, damage, expected):
    folder = tmp_path / "damaged"
    shutil.copytree(folders[kind], folder)
    damage(folder)
    assert cli.main(["bench", f"{folder}:fp32", "--rounds", "1"]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1 and "cannot be loaded" in error


def _shorten(file):
    file.write_bytes(file.read_bytes()[:-100])


def _widen(file):
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "vocab_size": 2 * config["vocab_size"]}))


def test_a_length_beyond_the_positions_is_refused(folders):
    with pytest.raises(inputs.InputError, match="length is 513: expected at most 512"):
        harness.run_work(settings(folders["text"], lengths=(513,)), steady_peak)
