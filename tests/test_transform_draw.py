"""Pictures: every operator once, edges between what is shown, layers folded, shown by a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import graphs
import pytest

from hf_fusion.cli import main
from hf_fusion.transform.draw import to_dot, to_html, to_mermaid
from hf_fusion.transform.nodes import is_kernel
from hf_fusion.transform.tree import GROUP, picture

NAMES = ("vit", "llama", "t5", "swin")


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    yield


class Page(HTMLParser):
    """Counts what a page has, and that every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.nodes, self.groups, self.remote = [], [], 0, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in ("meta", "input"):
            self.open.append(tag)
        self.nodes += [attrs["data-node"]] if "data-node" in attrs else []
        self.groups += attrs.get("class") == "group"
        self.remote += [v for k, v in attrs.items() if k in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("groups", [False, True])
def test_every_operator_is_there_once_and_edges_join_what_is_shown(name, groups):
    report = graphs.fused(name).report
    kernels = {node.name for node in report.source.graph.nodes if is_kernel(node)}
    whole = picture(report, groups, fold=False)
    shown = [box.identity for box in whole.root.operators()]
    assert len(shown) == len(set(shown)) and set(shown) == kernels
    assert sum(box.level == GROUP for box in whole.root.walk()) == groups * len(report.subgraphs)
    folded = picture(report, groups)
    boxes = {box.identity for box in folded.root.operators()}
    for drawn, names in ((whole, kernels), (folded, boxes)):
        assert {end for edge in drawn.edges for end in edge} <= names
        assert len(drawn.edges) == len(set(drawn.edges))
    reached = {end for _, end in whole.edges}
    assert len(reached) > 0.8 * len(kernels)


def test_identical_layers_fold():
    report = graphs.fused("vit").report
    folded, whole = picture(report, groups=False), picture(report, groups=False, fold=False)
    counts = [box.count for box in folded.root.walk() if box.count > 1]
    assert counts == [2] and len(folded.root.operators()) < len(whole.root.operators())
    assert "layers" in to_mermaid(report, groups=False) and "×2" in to_mermaid(report, groups=False)


@pytest.mark.parametrize("name", NAMES)
def test_text_pictures_are_well_formed(name):
    report = graphs.fused(name).report
    mermaid = to_mermaid(report).splitlines()
    opened = sum(line.strip().startswith("subgraph") for line in mermaid)
    assert opened == sum(line.strip() == "end" for line in mermaid) > 0
    declared = set(re.findall(r"^\s*(?:subgraph )?(\w+)\[", "\n".join(mermaid), re.M))
    for start, end in re.findall(r"(\w+) --> (\w+)", "\n".join(mermaid)):
        assert {start, end} <= declared
    dot = to_dot(report)
    assert dot.count("{") == dot.count("}") and dot.count('"') % 2 == 0
    if shutil.which("dot"):
        subprocess.run(["dot", "-Tsvg"], input=dot.encode(), check=True, capture_output=True)


def test_the_page_is_whole_and_needs_nothing_else():
    report = graphs.fused("vit").report
    report.model = "<script>alert(1)</script>"
    page = Page(to_html(report))
    report.model = "ViTModel"
    assert not page.open and not page.remote and "script" not in page.open
    assert page.groups and page.nodes


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder that `hf-fusion graph` writes for a checkpoint on disk."""
    root = tmp_path_factory.mktemp("graph")
    graphs.model("vit").save_pretrained(root / "tiny")
    code = main(["graph", str(root / "tiny"), "--out", str(root / "out"), "--rounds", "0",
                 "--batch", "2", "--backends", "aten"])  # fmt: skip
    assert code == 0
    return root / "out"


def test_the_command_writes_its_three_files(written, capsys):
    assert {p.name for p in written.iterdir()} == {"report.md", "report.json", "graph.html"}
    found = json.loads((written / "report.json").read_text())
    assert found["attention"]["expected"].keys() == {"layers.0.attention", "layers.1.attention"}
    measured = found["measured"]
    assert measured["fused"]["kernels"] < measured["model, sdpa"]["kernels"]
    assert "kernels" not in found["estimated"] and "seconds" not in found["estimated"]
    page = (written / "report.md").read_text()
    assert "| fused |" in page and "Equal to the model at" in page
    assert main(["graph", "vit-b16", "--backends", "nothing"]) == 2
    assert "nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [(("--threads", "-3"), "at least 1"), (("--threads", "0"), "at least 1"),
     (("--seed", str(10**30)), "at most"), (("--length", "100000"), "at most"),
     (("--out", "file"), "cannot be made"), (("--out", "file/below"), "cannot be made"),
     (("--rounds", "-1"), "at least 0"), (("--batch", "x"), "expected one integer"),
     (("--dtype", "x"), "accepted are fp32, bf16, fp16"), (("--backends", ","), "expected words")],
)  # fmt: skip
def test_the_command_refuses_in_one_line(options, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    graphs.model("bert").save_pretrained("tiny")
    (tmp_path / "file").touch()
    capsys.readouterr()
    assert main(["graph", "tiny", "--rounds", "0", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


def test_a_browser_shows_the_page(written, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("chromium is not installed")
    shot = tmp_path / "page.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
               f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000"]  # fmt: skip
    address = (written / "graph.html").as_uri()
    done = subprocess.run([*command, "--dump-dom", address], capture_output=True, timeout=120)
    page = Page(done.stdout.decode())
    assert page.groups > 0 and "attention core" in done.stdout.decode()
    assert set(page.nodes) == set(Page((written / "graph.html").read_text()).nodes)
    subprocess.run(
        [*command, f"--screenshot={shot}", "--window-size=1000,900", address],
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    from PIL import Image

    with Image.open(shot) as image:
        assert image.size == (1000, 900)
        assert len(image.convert("RGB").resize((100, 90)).getcolors(9000)) > 10, "a blank page"
