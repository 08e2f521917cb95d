"""The command's options: what is wrong or contradicts itself is refused, what is odd is noted."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

import hf_fusion
from hf_fusion import cli, harness
from hf_fusion.harness import inputs, models


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "COMMAND"),
        ("draw", "invalid choice: 'draw'"),
        ("ablate --model pythia-71m", "unknown model 'pythia-71m': accepted are tiny, pythia-14m"),
        ("ablate --model ./nowhere", "'./nowhere' has no config.json"),
        ("ablate --dtype fp8", "unknown dtype 'fp8': accepted are fp32, bf16, fp16"),
        ("ablate --rungs ful", "did you mean full?"),
        ("ablate --backend gpu", "unknown back end 'gpu'"),
        ("ablate --rounds 0", "--rounds: the value is 0: expected an integer of at least 1"),
        ("ablate --new-tokens 1", "at least 2"),
        ("ablate --batch 1,x", "'1,x': expected integers separated by commas"),
        ("ablate --context 8 --batch 1,2", "expected one sweep"),
        ("ablate --plot picture.gif", "accepted endings are .png, .svg, .pdf"),
        ("bench pythia-70m", "expected model:dtype"),
        ("bench pythia-70m:int3", "unknown dtype 'int3'"),
        ("perplexity --text nowhere.txt", "'nowhere.txt' is not there"),
        ("perplexity --path sideways", "unknown path 'sideways'"),
        ("perplexity --rungs compiled", "'compiled'"),
        ("perplexity --window 1", "at least 2"),
        ("perplexity --text a.txt --dataset b", "expected one"),
        ("ablate --threads abc", "--threads: the value is 'abc': expected one integer"),
        ("ablate --threads 1,2", "expected one integer"),
        ("ablate --threads 0", "expected an integer of at least 1"),
        ("ablate --threads 4097", "expected an integer of at most 4096"),
        ("bench attention --threads 5000", "expected an integer of at most 4096"),
        (f"ablate --seed {2**63}", f"expected an integer of at most {2**63 - 1}"),
        (f"bench attention --seed {2**63}", f"expected an integer of at most {2**63 - 1}"),
        ("ablate --seed -1", "expected an integer of at least 0"),
        ("ablate --rungs ,", "the value is ',': expected words separated by commas"),
        ("ablate --context 8 --prompt 32", "--context and --prompt are given"),
        ("perplexity --split train", "split 'train' is given without a dataset"),
        ("perplexity --column text", "column 'text' is given without a dataset"),
        ("perplexity --dataset-config x", "dataset config 'x' is given without a dataset"),
        ("perplexity --text {folder}", "is a folder: expected a UTF-8 text file"),
        ("perplexity --rungs ful", "decomposed, attention, attention+up, full; did you mean"),
        ("bench attention --dtypes ,", "expected words separated by commas"),
        ("bench attention --head-dims 8,257", "head size is 257: expected at most 256"),
        ("bench --threads 1 attention", "expected hf-fusion bench attention"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(line, expected, tmp_path, capsys):
    assert cli.main(line.format(folder=tmp_path).split()) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--version", f"hf-fusion {hf_fusion.__version__}"),
        ("bench attention --help", "usage: hf-fusion bench attention "),
        ("bench --help", "usage: hf-fusion bench "),
        ("ablate --help", "auto, cpu, cuda, reference (default auto)"),
    ],
)
def test_what_is_asked_about_the_command(line, expected, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(line.split())
    printed = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and expected in printed


def test_the_comparison_with_llama_cpp_has_defaults_of_its_own(monkeypatch, capsys):
    script = Path(__file__).resolve().parents[1] / "scripts" / "compare_llama_cpp.py"
    if not script.exists():
        pytest.skip("the tests run apart from their tree")
    main = runpy.run_path(str(script))["main"]
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit):
        main()
    printed = " ".join(capsys.readouterr().out.split())
    assert "(default pythia-160m)" in printed and "(default stock,full)" in printed
    monkeypatch.setattr(sys, "argv", [script.name, "--sample"])
    assert main() == 2 and "no --sample" in capsys.readouterr().err


def test_the_longest_seed_is_taken():
    model = harness.load_model("pythia-14m", "fp32", inputs.MOST_SEED)
    assert models.prompts(model, 1, 1, 4, inputs.MOST_SEED)[0].shape == (1, 4)


def test_tokens_beyond_the_positions_are_noted():
    positions = harness.load_model("tiny", "fp32").positions
    chosen = harness.Settings(
        dtype="fp32", rungs=("full",), rounds=1, new_tokens=2, threads=1, prompt_tokens=positions,
        loop="forward",
    )  # fmt: skip
    result = harness.run_ablation(chosen, stream=lambda threads: None)
    note = f"{positions + 2}, exceed the model's {positions} positions"
    assert note in result.markdown() and "loop forward" in result.markdown()
    for made in (harness.BenchResult([result]), harness.SweepResult("context", [(1, result)])):
        assert note in made.markdown() and "loop forward" in made.markdown()


def test_a_window_beyond_the_positions_is_noted():
    positions = harness.load_model("tiny", "fp32").positions
    chosen = harness.PerplexitySettings(
        rungs=(), paths=("prefill",), window=positions + 1, max_windows=1, threads=1
    )
    text = harness.run_perplexity(chosen).markdown()
    assert f"The window exceeds the model's {positions} positions." in text
