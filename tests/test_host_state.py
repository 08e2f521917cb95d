"""The state of the process and of the libraries in it is the same before and after import, patch,
call and unpatch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

# Runs in a process of its own: the first import of hf_fusion is one of the things to look at.
SCRIPT = """
import ctypes, gc, json, locale, logging, os, platform, random, resource, signal, sys, threading
import warnings
import numpy, torch, transformers, accelerate
import transformers.models.gpt_neox.modeling_gpt_neox as modeling
import transformers.modeling_utils, transformers.cache_utils, transformers.masking_utils
import transformers.generation.utils, transformers.activations, transformers.utils.output_capturing
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, DynamicCache
import torch.nn.functional, torch.overrides, torch.utils._device

MODULES = [torch, torch.nn.functional, torch.nn.modules.module, torch.nn.modules.linear, modeling,
           transformers.modeling_utils, transformers.cache_utils, transformers.masking_utils,
           transformers.generation.utils, transformers.activations,
           transformers.utils.output_capturing]
FOUND = [value for module in MODULES for value in vars(module).values()]
CLASSES = list({id(c): c for c in FOUND if isinstance(c, type)}.values())
libc = ctypes.CDLL(None)

def float_mode():
    # fenv_t of glibc on x86-64: the x87 environment of 28 bytes, then MXCSR; its low six bits are
    # sticky flags
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return 5e-324 / 1 > 0, 1 / 3
    environment = (ctypes.c_uint8 * 64)()
    libc.fegetenv(environment)
    control = int.from_bytes(environment[0:2], "little")
    return control, int.from_bytes(environment[28:32], "little") & ~0x3f

def signals():
    masks = []
    if os.path.exists("/proc/self/status"):
        masks = [l for l in open("/proc/self/status") if l.startswith(("Sig", "Shd"))
                 and not l.startswith(("SigQ", "SigP", "ShdPnd"))]
    return masks, {s: repr(signal.getsignal(s)) for s in signal.valid_signals()}

def contents(namespace):
    passing = "__annotations__", "__warningregistry__"
    return {k: id(v) for k, v in namespace.items() if k not in passing}

def state():
    return {
        "float mode": float_mode(),
        "float mode of another thread": in_thread(float_mode),
        "signals": signals(),
        "environment": dict(os.environ),
        "getenv": [ctypes.string_at(libc_getenv(n)) if libc_getenv(n) else None
                   for n in (b"OMP_NUM_THREADS", b"LD_LIBRARY_PATH", b"KMP_AFFINITY",
                             b"HF_FUSION_ISA")],
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "python threads": len(threading.enumerate()),
        "affinity": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "limits": [resource.getrlimit(getattr(resource, n)) for n in dir(resource)
                   if n.startswith("RLIMIT_")],
        "random": hash((random.getstate(), torch.get_rng_state().numpy().tobytes(),
                        numpy.random.get_state()[1].tobytes())),
        "torch": (torch.get_default_dtype(), str(torch.get_default_device()),
                  torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
                  torch.are_deterministic_algorithms_enabled(),
                  torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu"),
                  torch.backends.mkldnn.enabled, torch._C._get_flash_sdp_enabled(),
                  torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
        "hooks": [len(d) for d in (torch.nn.modules.module._global_forward_hooks,
                                   torch.nn.modules.module._global_forward_pre_hooks,
                                   torch.nn.modules.module._global_backward_hooks)],
        "attention functions": contents(
            transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS._global_mapping),
        "cache types": contents(getattr(transformers.cache_utils, "LAYER_TYPE_CACHE_MAPPING", {})),
        "modules": {m.__name__: contents(vars(m)) for m in MODULES},
        "classes": {f"{c.__module__}.{c.__qualname__}": contents(vars(c)) for c in CLASSES},
        "interpreter": (sys.getswitchinterval(), sys.getrecursionlimit(), sys.gettrace(),
                        sys.getprofile(), sys.excepthook is sys.__excepthook__,
                        gc.get_threshold(), gc.isenabled(), [repr(f) for f in sys.meta_path],
                        list(sys.path), os.getcwd(), locale.setlocale(locale.LC_ALL),
                        logging.root.level, len(logging.root.handlers)),
        "warnings": [str(f) for f in warnings.filters],
        "verbosity": transformers.utils.logging.get_verbosity(),
    }

def in_thread(function):
    result = []
    thread = threading.Thread(target=lambda: result.append(function()))
    thread.start(); thread.join()
    return result[0]

libc_getenv = libc.getenv
libc_getenv.restype, libc_getenv.argtypes = ctypes.c_void_p, [ctypes.c_char_p]

def changed(before, after, path=""):
    if isinstance(before, dict) and isinstance(after, dict):
        return [x for k in {**before, **after}
                for x in changed(before.get(k), after.get(k), f"{path}/{k}")]
    return [] if before == after else [f"{path}: {before!r:.200} -> {after!r:.200}"]

torch.set_num_threads(int(sys.argv[2]))
torch.set_flush_denormal(len(sys.argv) > 1 and sys.argv[1] == "flush")
torch.manual_seed(5); random.seed(5); numpy.random.seed(5)
model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=300, hidden_size=64, num_hidden_layers=2,
    num_attention_heads=4, intermediate_size=128, max_position_embeddings=64)).eval()
ids = torch.randint(0, 99, (2, 7))
def call(m):
    with torch.no_grad():
        cache = DynamicCache(config=m.config)
        m(ids, past_key_values=cache); m(ids[:, :1], past_key_values=cache)
        m(ids.repeat(1, 5))
    m.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
call(model)  # what transformers and torch leave behind themselves
found = {}
before = state()
def look(stage):
    found[stage] = changed(before, state())
import hf_fusion
look("import")
for fusion in ("full", "attention+up", "attention", "decomposed", "none"):
    for backend in ("cpu", "reference"):
        hf_fusion.patch(model, fusion, backend)
        look(f"patch {fusion} {backend}")
        call(model)
        if fusion != "none":
            assert hf_fusion.stats(model).fused > 0
        look(f"call {fusion} {backend}")
        thread = threading.Thread(target=call, args=(model,)); thread.start(); thread.join()
        look(f"call in a thread {fusion} {backend}")
        model.train(); call(model); model.eval()
        before["random"] = state()["random"]
        look(f"refused call {fusion} {backend}")
        try: hf_fusion.patch(model, "no such fusion")
        except hf_fusion.FusionError: pass
        look(f"error {fusion} {backend}")
        hf_fusion.unpatch(model)
        look(f"unpatch {fusion} {backend}")
hf_fusion.supported(); look("supported")
print(json.dumps(found))
"""


@pytest.mark.reliability(24, "host and model state")
@pytest.mark.parametrize(("mode", "threads"), (("default", 2), ("flush", 1)))
def test_the_process_is_left_as_it_was_found(mode, threads, trials):
    """`flush`: the same where the host lets denormals be flushed to zero, which is then its wish.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, mode, str(threads)],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) > 50
    for stage, changes in found.items():
        assert not changes, f"{mode}, after {stage}: " + "\n".join(changes[:20])
        trials()
