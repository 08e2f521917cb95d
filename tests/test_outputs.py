"""What the command writes and prints: refused before a run, and nothing lost after it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from hf_fusion import cli, harness, native
from hf_fusion.harness import attention_study, inputs, sweep

COMMANDS = ("ablate", "perplexity", "bench", "bench attention")
PRINTS = """
import sys
from hf_fusion import cli, harness
from hf_fusion.harness import options

class Result:
    passed = True
    def to_dict(self):
        return {"kind": "fake", "text": "x" * 100_000}
    def markdown(self):
        return "\\u00b5" * 100_000

parser = options.Parser(prog="prints")
options.add_ablate(parser)
parser.set_defaults(run=lambda arguments: cli.report(Result(), arguments))
sys.exit(cli.dispatch(parser))
"""


class Result:
    """As much of a result as is written."""

    passed = True

    def to_dict(self):
        return {"kind": "fake"}

    def markdown(self):
        return "a table"


@pytest.fixture
def never(monkeypatch):
    """Fails where anything is measured."""

    def run(*arguments, **named):
        raise AssertionError("measured before the outputs were tried")

    for name in ("run_ablation", "run_perplexity", "run_bench", "run_work", "run_attention"):
        monkeypatch.setattr(harness, name, run)


def fused(*arguments, stdout, **variables):
    """A process that prints a long result."""
    return subprocess.Popen(
        [sys.executable, "-c", PRINTS, *arguments], stdout=stdout, stderr=subprocess.PIPE,
        text=True, env={**os.environ, **variables},
    )  # fmt: skip


# ---------------------------------------------------------------- before a run


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--json /proc/x.json", "'/proc/x.json' cannot be written"),
        ("--markdown /proc/x.md", "'/proc/x.md' cannot be written"),
        ("--plot /proc/x.png", "'/proc/x.png' cannot be written"),
        ("--json /dev/null/x.json", "cannot be written: its folder is a file"),
        ("--json ~nobody-of-that-name/x.json", "cannot be written"),
        ("--json", "expected one argument"),
        ("--json - --markdown -", "--json and --markdown are both -"),
    ],
)
def test_an_unwritable_output_is_refused_before_the_run(never, command, line, expected, capsys):
    if command == "perplexity" and "--plot" in line:
        pytest.skip("has no picture")
    assert cli.main([*command.split(), *line.split()]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


@pytest.mark.parametrize("option", ["--json", "--markdown", "--plot"])
def test_an_empty_output_is_refused(never, option, capsys):
    assert cli.main(["ablate", option, ""]) == 2
    assert "output file ''" in capsys.readouterr().err


def test_a_picture_needs_matplotlib_before_the_run(never, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["ablate", "--plot", str(tmp_path / "x.png")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_trying_an_output_leaves_no_trace(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("before")
    dangling = tmp_path / "link"
    dangling.symlink_to(tmp_path / "nowhere")
    for name in ("kept", "link", "new"):
        inputs.output_path(tmp_path / name)
    assert kept.read_text() == "before" and dangling.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "link"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or not os.geteuid(), reason="root writes anywhere")
def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    tmp_path.chmod(0o500)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(inputs.InputError, match="'x.json' cannot be written: Permission denied"):
        inputs.output_path("x.json")


# ---------------------------------------------------------------- after a run


def test_every_other_output_is_written_and_printed(tmp_path, capsys):
    files = SimpleNamespace(json="/dev/full", markdown=str(tmp_path / "x.md"))
    with pytest.raises(inputs.InputError, match="'/dev/full' cannot be written: No space left"):
        cli.report(Result(), files)
    assert "a table" in capsys.readouterr().out
    assert (tmp_path / "x.md").read_text() == "a table\n"


def test_files_are_utf8_whatever_the_name_of_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(Result, "markdown", lambda self: "\u00b5s of model \udcff")
    harness.write(Result(), markdown_file=tmp_path / "x.md")
    assert (tmp_path / "x.md").read_text(encoding="utf-8") == "\u00b5s of model \\udcff\n"


def test_markdown_goes_to_stdout(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.report(Result(), SimpleNamespace(json="x.json", markdown="-")) == 0
    assert capsys.readouterr().out.startswith("a table")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("where", ["closed", "full"])
def test_a_stdout_that_takes_nothing_loses_no_file(tmp_path, where):
    file = tmp_path / "x.json"
    if where == "full":
        with open("/dev/full", "w") as full:
            process = fused("--json", str(file), stdout=full)
    else:
        process = fused("--json", str(file), stdout=subprocess.PIPE)
        process.stdout.close()
    error = process.stderr.read()
    assert process.wait() == (2 if where == "full" else 141)
    assert "Traceback" not in error and "ignored" not in error
    assert ("No space left on device" in error) == (where == "full")
    assert json.loads(file.read_text())["kind"] == "fake"


def test_a_stdout_that_cannot_encode_is_written_to():
    process = fused(stdout=subprocess.PIPE, PYTHONIOENCODING="ascii")
    printed, error = process.communicate()
    assert process.returncode == 0, error
    assert printed.startswith("\\xb5")


# ---------------------------------------------------------------- several cases


@pytest.fixture(scope="module")
def finished():
    """One small ablation."""
    chosen = harness.Settings(rungs=("full",), rounds=1, new_tokens=2, threads=1)
    return harness.run_ablation(chosen, stream=lambda threads: None)


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (KeyboardInterrupt(), 130, "Interrupted: only what was finished."),
        (inputs.InputError("no such file"), 1, " has no result: no such file"),
        (RuntimeError("out of\nmemory"), 1, " has no result: RuntimeError: out of"),
    ],
)
@pytest.mark.parametrize("command", ["bench tiny:bf16 pythia-14m:fp32", "ablate --batch 1,2"])
def test_what_is_finished_is_not_lost(
    finished, monkeypatch, tmp_path, capsys, command, error, code, expected
):
    outcomes = [finished, error]

    def run(*arguments, **named):
        outcome = outcomes.pop(0)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(sweep, "run_ablation", run)
    files = ["--json", str(tmp_path / "x.json"), "--plot", str(tmp_path / "x.png")]
    assert cli.main([*command.split(), *files]) == code
    printed = capsys.readouterr()
    assert expected in printed.out
    assert ("interrupted" in printed.err) == (code == 130)
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["interrupted"] == (code == 130) and len(found["lost"]) == (code == 1)
    assert len(found.get("items", found.get("points"))) == 1 and not found["passed"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), inputs.InputError("x"), RuntimeError("x")])
def test_where_nothing_is_finished_the_error_is_raised(monkeypatch, error):
    def run(*arguments, **named):
        raise error

    monkeypatch.setattr(sweep, "run_ablation", run)
    with pytest.raises(type(error)):
        harness.run_bench(["tiny:bf16", "pythia-14m:fp32"])


def test_an_attention_study_keeps_what_is_finished(monkeypatch, tmp_path):
    settings = harness.AttentionSettings(
        lengths=(16,), head_dims=(8,), dtypes=("fp32",), contenders=("flash",), heads=4,
        context=16, decode_heads=4, rounds=1, threads=1,
    )  # fmt: skip
    real = attention_study.operands

    def failing(seed, batch, heads, kv_heads, *sizes):
        if kv_heads == 4:
            raise RuntimeError("out of memory")
        return real(seed, batch, heads, kv_heads, *sizes)

    monkeypatch.setattr(attention_study, "operands", failing)
    result = harness.run_attention(settings)
    assert [point.kind for point in result.points] == ["GQA", "MQA"] and not result.passed
    harness.write(result, tmp_path / "x.json", tmp_path / "x.md", tmp_path / "x.png")
    text = (tmp_path / "x.md").read_text()
    assert "- fp32 MHA decode at 16 has no result: RuntimeError: out of memory" in text


def test_an_interrupt_during_the_read_stream_is_one(monkeypatch):
    def interrupted(address, size, threads):
        raise KeyboardInterrupt

    library = SimpleNamespace(hff_read_stream=interrupted)
    monkeypatch.setattr(native, "load", lambda: library)
    with pytest.raises(KeyboardInterrupt):
        native.read_stream_bandwidth(1 << 20, 1)
