"""llama.cpp beside stock and the fused rungs: same weights, prompts and interleaved rounds.

Writes the model's weights as a GGUF file in the model's dtype (norms and biases as fp32, as
llama.cpp wants them), loads it with llama-cpp-python and decodes greedily through the C API,
argmax included. Its key/value cache has llama.cpp's default type, fp16.

    python scripts/compare_llama_cpp.py --model pythia-160m --dtype bf16 --threads 2
"""

from __future__ import annotations

import ctypes
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from hf_fusion import cli, harness
from hf_fusion.harness import inputs, machine, options
from hf_fusion.harness.timing import Sample

NAME = "llama.cpp"
# GGUF's name of each part of a GPT-NeoX layer
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}


def packages() -> tuple[Any, Any]:
    """(llama_cpp, gguf), or an InputError that says what to install."""
    try:
        import gguf
        import llama_cpp
    except ImportError as error:
        raise inputs.InputError(
            f"{error.name} is not installed: pip install llama-cpp-python gguf (the first builds "
            "llama.cpp and needs a C++ compiler)"
        ) from None
    return llama_cpp, gguf


def write_gguf(model: nn.Module, path: Path, gguf: Any) -> None:
    """The weights of a GPT-NeoX causal language model as a GGUF file without vocabulary."""
    config = model.config
    if config.model_type != "gpt_neox":
        raise inputs.InputError(f"model type {config.model_type!r}: expected gpt_neox")
    writer = gguf.GGUFWriter(str(path), "gptneox")
    head_dim = config.hidden_size // config.num_attention_heads
    rotary = int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_dimension_count(rotary)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_head_count(config.num_attention_heads)
    writer.add_parallel_residual(config.use_parallel_residual)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in renamed_weights(model):
        array, kind = as_gguf(tensor, gguf)
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def renamed_weights(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """(GGUF name, tensor) of every weight; the fused projection as all q rows, all k, all v."""
    base, heads = model.gpt_neox, model.config.num_attention_heads
    found = [
        ("token_embd.weight", base.embed_in.weight),
        ("output_norm.weight", base.final_layer_norm.weight),
        ("output_norm.bias", base.final_layer_norm.bias),
        ("output.weight", model.get_output_embeddings().weight),
    ]
    for index, layer in enumerate(base.layers):
        for ours, theirs in LAYER_NAMES.items():
            module = layer.get_submodule(ours)
            for kind in ("weight", "bias"):
                tensor = getattr(module, kind)
                if theirs == "attn_qkv":
                    tensor = stacked(tensor, heads)
                found.append((f"blk.{index}.{theirs}.{kind}", tensor))
    return found


def stacked(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (heads, q|k|v, head_dim) reordered to (q|k|v, heads, head_dim)."""
    per_head = tensor.detach().unflatten(0, (heads, 3, -1))
    return per_head.transpose(0, 1).flatten(0, 2).contiguous()


def as_gguf(tensor: torch.Tensor, gguf: Any) -> tuple[numpy.ndarray, Any]:
    """(array, GGUF type): vectors as fp32, matrices in their own dtype; bf16 travels as its 16-bit
    patterns.
    """
    tensor = tensor.detach().contiguous()
    if tensor.dim() == 1:
        return tensor.float().numpy(), gguf.GGMLQuantizationType.F32
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy(), gguf.GGMLQuantizationType.BF16
    if tensor.dtype == torch.float16:
        return tensor.numpy(), gguf.GGMLQuantizationType.F16
    return tensor.numpy(), gguf.GGMLQuantizationType.F32


class LlamaRunner:
    """A contender for `hf_fusion.harness.run_ablation`: greedy decoding of a GGUF file, batch 1."""

    name = NAME

    def __init__(self, path: Path, vocabulary: int, context: int, threads: int, llama: Any):
        self._llama, self._vocabulary = llama, vocabulary
        self._silence = llama.llama_log_callback(lambda level, text, data: None)
        llama.llama_log_set(self._silence, ctypes.c_void_p())
        llama.llama_backend_init()
        model_options = llama.llama_model_default_params()
        model_options.n_gpu_layers = 0
        self._model = llama.llama_model_load_from_file(str(path).encode(), model_options)
        if not self._model:
            raise inputs.InputError(f"llama.cpp cannot load {path.name}: expected a GGUF file")
        options = llama.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = context
        options.n_threads = options.n_threads_batch = threads
        self._context = llama.llama_init_from_model(self._model, options)
        if not self._context:
            llama.llama_model_free(self._model)
            raise inputs.InputError(f"llama.cpp refuses a context of {context} tokens")

    def run(self, prompt: torch.Tensor, new_tokens: int) -> Sample:
        """One timed generation from an empty cache."""
        if prompt.shape[0] != 1:
            raise inputs.InputError(f"batch is {prompt.shape[0]}: llama.cpp is compared at batch 1")
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        fed, times, tokens = prompt[0].tolist(), [time.perf_counter()], []
        for _ in range(new_tokens):
            tokens.append(self._next(fed))
            times.append(time.perf_counter())
            fed = tokens[-1:]
        gaps = [after - before for before, after in zip(times, times[1:])]
        return Sample(gaps[0], tuple(gaps[1:]), torch.tensor([tokens]))

    def close(self) -> None:
        """Frees the context and the model."""
        self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)

    def _next(self, fed: list[int]) -> int:
        ids = (self._llama.llama_token * len(fed))(*fed)
        status = self._llama.llama_decode(
            self._context, self._llama.llama_batch_get_one(ids, len(fed))
        )
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        logits = self._llama.llama_get_logits_ith(self._context, -1)
        return int(numpy.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())


def compare(arguments: Any) -> int:
    """Runs the comparison the command line asks for."""
    options.check_outputs(arguments)
    rungs = arguments.rungs or (inputs.STOCK, "full")
    settings = cli.ablation_settings(arguments, rungs).checked()
    if settings.batch != 1 or arguments.context or settings.sample:
        raise inputs.InputError(
            "llama.cpp is compared at batch 1, one context (--prompt) and greedily: expected no "
            "several --batch, no --context, no --sample"
        )
    llama, gguf = packages()
    loaded = harness.load_model(settings.model, settings.dtype, settings.seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(loaded.model, path, gguf)
        room = -(-(settings.prompt_tokens + settings.new_tokens + 1) // 256) * 256
        peer = LlamaRunner(path, loaded.vocabulary, room, settings.threads, llama)
        try:
            result = harness.run_ablation(settings, loaded, [peer], machine.read_stream)
        finally:
            peer.close()
    result.environment["versions"]["llama-cpp-python"] = llama.__version__
    return cli.report(result, arguments)


def main() -> int:
    """Parses the command line and compares."""
    parser = options.Parser(prog="compare_llama_cpp.py")
    options.add_ablate(parser, "pythia-160m", "stock,full")
    parser.set_defaults(run=compare)
    parser.description = (
        "Times llama.cpp on the same weights in the same rounds as stock and rungs."
    )
    return cli.dispatch(parser)


if __name__ == "__main__":
    sys.exit(main())
