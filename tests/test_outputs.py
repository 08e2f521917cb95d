"""What the command writes and prints: refused before a run, and nothing lost after it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from hf_fusion import cli, harness
from hf_fusion.harness import inputs

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
