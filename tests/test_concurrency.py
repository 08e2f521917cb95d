"""Several threads on one model, models side by side, patches that come and go meanwhile, and
processes that fork.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from pairs import generate, noted, pair

import hf_fusion
from hf_fusion import native
from hf_fusion.attend import plan

THREADS, PROMPTS = 8, 10
HERE = Path(__file__).parent


pytestmark = pytest.mark.usefixtures("one_thread")


def work(model, number: int) -> list:
    """One short generation; `number` chooses prompt, batch and length."""
    return generate(model, number, 4, batch=1 + number % 2, length=3 + number % 5)


def scores(model, number: int) -> tuple[list, torch.Tensor]:
    """The same with the logits of every step."""
    ids = torch.tensor(work(model, number))[:, : 3 + number % 5]
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return out.sequences.tolist(), torch.stack(out.logits)


def in_threads(jobs, meanwhile=lambda: None, width: int = 1) -> list:
    """Results of `jobs`, each a list of calls for one thread of Python, which has `width` threads
    of torch.

    A thread that is not done after 60 s is a failure.
    """
    results, errors = [[] for _ in jobs], []
    barrier = threading.Barrier(len(jobs) + 1)

    def run(index):
        try:
            torch.set_num_threads(width)
            barrier.wait(30)
            for call in jobs[index]:
                results[index].append(call())
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(jobs))
    ]
    for thread in threads:
        thread.start()
    barrier.wait(30)
    while any(thread.is_alive() for thread in threads) and meanwhile():
        pass
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]
    return results


def rounds(models, serial, count: int, width: int = 1) -> None:
    """8 threads, `count` generations each; every result has the bits of the serial one."""
    jobs = [
        [
            lambda m=models[(t + i) % len(models)], n=(t * 7 + i) % PROMPTS: scores(m, n)
            for i in range(count)
        ]
        for t in range(THREADS)
    ]
    for thread, results in enumerate(in_threads(jobs, width=width)):
        for i, (tokens, logits) in enumerate(results):
            want = serial[(thread + i) % len(models)][(thread * 7 + i) % PROMPTS]
            assert tokens == want[0] and torch.equal(logits, want[1]), (
                f"thread {thread}, generation {i}"
            )


@pytest.mark.reliability(20, "concurrency")
@pytest.mark.parametrize(
    ("fusion", "width", "count"), (("full", 1, 25), ("attention+up", 1, 15), ("full", 2, 5))
)
def test_threads_on_one_model(fusion, width, count, trials):
    model, _ = pair(1, fusion)
    serial = [scores(model, n) for n in range(PROMPTS)]
    hf_fusion.patch(model, fusion)  # so that eight threads bind at once
    rounds([model], [serial], count, width)
    counters = noted(model)
    assert not counters.refused and not counters.downgraded, str(counters)
    if fusion == "full":  # counted once for every forward, none lost
        assert counters.fused == THREADS * count * 8, str(counters)
    trials(THREADS * count)


@pytest.mark.reliability(20)
def test_threads_on_two_models(trials):
    models = [pair(1)[0], pair(2, hidden_size=48, num_attention_heads=3)[0]]
    serial = [[scores(model, n) for n in range(PROMPTS)] for model in models]
    rounds(models, serial, 25)
    assert all(not noted(model).refused for model in models)
    trials(THREADS * 25)


@pytest.mark.reliability(20)
def test_threads_while_patches_come_and_go(trials):
    """A call under way ends with what it began with, fused or stock; the tokens are stock's in any
    case.
    """
    model, stock = pair(3)
    want = [work(stock, n) for n in range(PROMPTS)]
    turns = [0]

    def turn():
        turns[0] += 1
        choice = (None, "full", "attention", "attention+up", "none", "full")[turns[0] % 6]
        hf_fusion.unpatch(model) if choice is None else hf_fusion.patch(model, choice)
        return True

    jobs = [[lambda n=(t + i) % PROMPTS: work(model, n) for i in range(25)] for t in range(THREADS)]
    for thread, results in enumerate(in_threads(jobs, turn)):
        for i, tokens in enumerate(results):
            assert tokens == want[(thread + i) % PROMPTS], (
                f"thread {thread}, generation {i}, {turns[0]} turns"
            )
    assert turns[0] > 10
    hf_fusion.unpatch(model)
    assert not any("_hf_fusion" in vars(m) or "forward" in vars(m) for m in model.modules())
    trials(THREADS * 25)


@pytest.mark.reliability(20)
def test_threads_while_weights_change_between_rounds(trials):
    """Bindings made in one thread serve the others, until the weights change."""
    model, stock = pair(4)
    for number in range(5):
        with torch.no_grad():
            for m in (model, stock):
                m.lm_head.weight.data = m.lm_head.weight.data.roll(number, 0)
                m.gpt_neox.layers[1].mlp.dense_4h_to_h.weight.mul_(1.1)
        want = [work(stock, n) for n in range(PROMPTS)]
        for results in in_threads(
            [[lambda n=n: work(model, n) for n in range(PROMPTS)] for _ in range(4)]
        ):
            assert results == want, f"after edit {number}"
        trials(4 * PROMPTS)


# One process that forks many times: quicker than one for every trial, and this one stays out of it.
FORKS = """
import faulthandler, json, os, select, signal, sys, threading, time, warnings
warnings.simplefilter("ignore")
import torch
from pairs import generate, pair
import hf_fusion
model, stock = pair(1)
torch.set_num_threads(1)  # for stock: its own parallel regions do not survive a fork
want = [generate(stock, n, 4) for n in range(3)]
torch.set_num_threads(int(sys.argv[2]))
assert generate(model, 0, 4) == want[0]
kind, verdicts = sys.argv[1], []

def child(write):
    faulthandler.dump_traceback_later(8, file=sys.stderr)
    got = [generate(model, n, 4) for n in range(3)]
    if got != want:
        os.write(write, f"{got}, expected {want}".encode())
    # a patch that another thread was about to make is not made in the child
    elif kind == "after" and not hf_fusion.stats(model).fused:
        os.write(write, b"not fused")
    else:
        os.write(write, b"same")
    os._exit(0)

def trial():
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            child(write)
        except BaseException as error:
            os.write(write, repr(error).encode())
            os._exit(1)
    os.close(write)
    ready, _, _ = select.select([read], [], [], 10)
    verdict = os.read(read, 4096).decode() if ready else "hangs for 10 s"
    os.close(read)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return verdict or "died"

if kind == "during":
    stop = threading.Event()
    def busy():
        torch.set_num_threads(int(sys.argv[2]))
        while not stop.is_set():
            generate(model, 5, 4)
            # binding runs operations of torch; with two threads those hang in the child of a fork,
            # as all of torch does
            if torch.get_num_threads() == 1: hf_fusion.patch(model)
    threads = [threading.Thread(target=busy, daemon=True) for _ in range(2)]
    for thread in threads: thread.start()
for n in range(int(sys.argv[3])):
    time.sleep(0.001 * (n % 7))
    verdicts.append(trial())
    if verdicts[-1] != "same": break
if kind == "during":
    stop.set()
    for thread in threads: thread.join(20)
verdicts.append("same" if generate(model, 2, 4) == want[2] else "the parent differs")
print(json.dumps(verdicts))
"""


def run_script(source: str, *arguments) -> tuple[list, str]:
    """The JSON that a script prints last, and what it writes to stderr."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", source, *map(str, arguments)],
        cwd=HERE, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.reliability(21, "fork and spawn")
@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("kind", ("after", "during"))
def test_forks(kind, threads, trials):
    """A child of a fork after use, and during calls of other threads, generates what its parent
    does.
    """
    verdicts, traces = run_script(FORKS, kind, threads, 11)
    for number, verdict in enumerate(verdicts):
        assert verdict == "same", (
            f"fork {number} {kind} use, {threads} threads: {verdict}\n{traces}"
        )
        trials()


START = """
import json, multiprocessing, sys, warnings
def child(number):
    warnings.simplefilter("ignore")
    import torch
    from pairs import generate, pair
    import hf_fusion
    model, stock = pair(number)
    same = generate(model, number, 4) == generate(stock, number, 4)
    return "same" if same and hf_fusion.stats(model).fused else "different"
if __name__ == "__main__":
    from pairs import generate, pair
    generate(pair(0)[0], 0, 4)
    context = multiprocessing.get_context(sys.argv[1])
    if sys.argv[1] == "forkserver":
        context.set_forkserver_preload(["pairs"])
    with context.Pool(2, maxtasksperchild=1) as pool:
        print(json.dumps(pool.map_async(child, range(int(sys.argv[2])), chunksize=1).get(100)))
"""


@pytest.mark.reliability(21)
@pytest.mark.parametrize(("method", "count"), (("spawn", 2), ("forkserver", 6)))
def test_processes_of_multiprocessing(method, count, tmp_path, trials):
    script = tmp_path / "start.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(HERE)!r})\n{START}")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), method, str(count)],
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert json.loads(done.stdout.splitlines()[-1]) == ["same"] * count
    trials(count)


def test_a_team_is_no_wider_than_the_library_takes(monkeypatch):
    """torch has hundreds of threads on machines of as many cores; calls here run on one of them."""
    library, asked = native.load(), []
    forward, pack = library.hff_model_forward, library.hff_pack

    def narrow_forward(call, *others):
        asked.append(call._obj.threads)
        call._obj.threads = 1
        return forward(call, *others)

    def narrow_pack(linear, dtype, precision, threads, packed):
        asked.append(threads)
        return pack(linear, dtype, precision, 1, packed)

    monkeypatch.setattr(library, "hff_model_forward", narrow_forward)
    monkeypatch.setattr(library, "hff_pack", narrow_pack)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 300)
    model, _ = pair(fusion=None)
    hf_fusion.patch(model, packed=True)
    with torch.no_grad():
        model(torch.tensor([[3, 4, 5]]))
    assert len(asked) > 1 and set(asked) == {native.MAX_THREADS}
    plan(*torch.randn(3, 1, 2, 5, 8))
