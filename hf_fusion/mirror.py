"""The structs and constants of csrc/include/hf_fusion.h in ctypes; tests/test_abi.py holds them
against the header.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char, c_double, c_float, c_int32, c_int64, c_uint64, c_void_p

ABI_VERSION = 8
MAX_HEAD_DIM = 256
MAX_THREADS = 255
SAMPLED_ROWS = 8

OK, INVALID, UNSUPPORTED, OUT_OF_MEMORY, OUT_OF_RANGE, INTERNAL = range(6)
F32, BF16, F16 = range(3)
ACTIVATIONS = {"none": 0, "gelu_erf": 1, "gelu_tanh": 2, "relu": 3, "silu": 4}
NORMS = {"layer": 0, "rms": 1}
RESIDUALS = {"parallel": 0, "sequential": 1, "post_norm": 2}
QKV_LAYOUTS = {"per_head": 0, "stacked": 1, "separate": 1}
PRECISIONS = {"highest": 0, "high": 1, "medium": 2}
STAGES = {"attention": 0, "attention+up": 1, "full": 2}
DEVICES = {"cpu": 0, "cuda": 1}
PLANS = {"auto": 0, "chain": 1, "token": 2}
PREFETCHES = {"line": 0, "ahead": 1, "to_l2": 2}
ATTENDS = {"naive": 0, "tiled": 1, "flash": 2}
MASK_NONE, MASK_BOOL, MASK_INT64, MASK_ADDITIVE = range(4)


class Buffer(ctypes.Structure):
    """hff_input and hff_output: an address and the bytes behind it."""

    _fields_ = [("data", c_void_p), ("bytes", c_int64)]


class Linear(ctypes.Structure):
    """hff_linear."""

    _fields_ = [
        ("weight", Buffer),
        ("bias", Buffer),
        ("packed", Buffer),
        ("rows", c_int64),
        ("cols", c_int64),
        ("row_stride", c_int64),
    ]


class Norm(ctypes.Structure):
    """hff_norm."""

    _fields_ = [("weight", Buffer), ("bias", Buffer), ("eps", c_float), ("kind", c_int32)]


class Heads(ctypes.Structure):
    """hff_heads."""

    _fields_ = [
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("rotary_dim", c_int64),
        ("scale", c_float),
        ("qkv_layout", c_int32),
    ]


class Block(ctypes.Structure):
    """hff_block."""

    _fields_ = [
        ("heads", Heads),
        ("hidden", c_int64),
        ("mlp_width", c_int64),
        ("residual", c_int32),
        ("activation", c_int32),
        ("attention_norm", Norm),
        ("mlp_norm", Norm),
        ("qkv", Linear),
        ("k", Linear),
        ("v", Linear),
        ("o", Linear),
        ("up", Linear),
        ("down", Linear),
    ]


class Cache(ctypes.Structure):
    """hff_cache; `length` is the address of an int64."""

    _fields_ = [
        ("keys", Buffer),
        ("values", Buffer),
        ("batch_stride", c_int64),
        ("head_stride", c_int64),
        ("token_stride", c_int64),
        ("capacity", c_int64),
        ("length", c_void_p),
    ]


class Mask(ctypes.Structure):
    """hff_mask."""

    _fields_ = [
        ("data", Buffer),
        ("batch_stride", c_int64),
        ("query_stride", c_int64),
        ("key_stride", c_int64),
        ("keys", c_int64),
        ("kind", c_int32),
        ("reserved", c_int32),
    ]


class Call(ctypes.Structure):
    """hff_call."""

    _fields_ = [
        ("struct_size", c_uint64),
        ("dtype", c_int32),
        ("threads", c_int32),
        ("batch", c_int64),
        ("queries", c_int64),
        ("causal", c_int32),
        ("precision", c_int32),
        ("starts", Buffer),
        ("positions", Buffer),
        ("position_batch_stride", c_int64),
        ("position_query_stride", c_int64),
        ("cos", Buffer),
        ("sin", Buffer),
        ("rope_rows", c_int64),
        ("mask", Mask),
        ("device", c_int32),
        ("ordinal", c_int32),
        ("plan", c_int32),
        ("reserved", c_int32),
        ("stream", c_void_p),
        ("workspace", Buffer),
    ]


class BlockIo(ctypes.Structure):
    """hff_block_io."""

    _fields_ = [
        ("struct_size", c_uint64),
        ("x", Buffer),
        ("attention_out", Buffer),
        ("up_out", Buffer),
        ("out", Buffer),
        ("stage", c_int32),
        ("reserved", c_int32),
    ]


class Model(ctypes.Structure):
    """hff_model."""

    _fields_ = [
        ("struct_size", c_uint64),
        ("hidden", c_int64),
        ("vocab", c_int64),
        ("embedding", Buffer),
        ("blocks", POINTER(Block)),
        ("block_count", c_int64),
        ("final_norm", Norm),
        ("head", Linear),
    ]


class Sampling(ctypes.Structure):
    """hff_sampling."""

    _fields_ = [
        ("struct_size", c_uint64),
        ("uniforms", Buffer),
        ("top_p", c_double),
        ("top_k", c_int64),
        ("temperature", c_float),
        ("reserved", c_int32),
    ]


class ModelIo(ctypes.Structure):
    """hff_model_io."""

    _fields_ = [
        ("struct_size", c_uint64),
        ("ids", Buffer),
        ("id_batch_stride", c_int64),
        ("id_query_stride", c_int64),
        ("x", Buffer),
        ("logits", Buffer),
        ("hidden", Buffer),
        ("next", Buffer),
        ("sampling", c_void_p),
        ("keep", c_int64),
        ("steps", c_int64),
    ]


class LinearIo(ctypes.Structure):
    """hff_linear_io."""

    _fields_ = [
        ("struct_size", c_uint64),
        ("dtype", c_int32),
        ("threads", c_int32),
        ("rows", c_int64),
        ("activation", c_int32),
        ("precision", c_int32),
        ("x", Buffer),
        ("out", Buffer),
    ]


class NormIo(ctypes.Structure):
    """hff_norm_io."""

    _fields_ = [
        ("struct_size", c_uint64),
        ("dtype", c_int32),
        ("threads", c_int32),
        ("rows", c_int64),
        ("hidden", c_int64),
        ("x", Buffer),
        ("out", Buffer),
    ]


class Device(ctypes.Structure):
    """hff_device."""

    _fields_ = [
        ("struct_size", c_uint64),
        ("name", c_char * 64),
        ("arch", c_int32),
        ("sms", c_int32),
        ("shared_bytes", c_int64),
        ("host_memory", c_int32),
        ("reserved", c_int32),
    ]


class Strides(ctypes.Structure):
    """hff_strides."""

    _fields_ = [("batch", c_int64), ("head", c_int64), ("token", c_int64)]


class AttendIo(ctypes.Structure):
    """hff_attend_io."""

    _fields_ = [
        ("struct_size", c_uint64),
        ("kernel", c_int32),
        ("dtype", c_int32),
        ("threads", c_int32),
        ("causal", c_int32),
        ("batch", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("queries", c_int64),
        ("keys", c_int64),
        ("window", c_int64),
        ("q", Buffer),
        ("k", Buffer),
        ("v", Buffer),
        ("out", Buffer),
        ("q_strides", Strides),
        ("k_strides", Strides),
        ("v_strides", Strides),
        ("out_strides", Strides),
        ("mask", Mask),
        ("mask_head_stride", c_int64),
        ("scale", c_float),
        ("device", c_int32),
        ("ordinal", c_int32),
        ("reserved", c_int32),
        ("block_queries", c_int64),
        ("block_keys", c_int64),
        ("stream", c_void_p),
        ("workspace", Buffer),
    ]


class AttendPlan(ctypes.Structure):
    """hff_attend_plan."""

    _fields_ = [
        ("struct_size", c_uint64),
        ("block_queries", c_int64),
        ("block_keys", c_int64),
        ("scratch_bytes", c_int64),
        ("workspace_bytes", c_int64),
    ]


STRUCTS = (
    Buffer, Buffer, Linear, Norm, Heads, Block, Cache, Mask, Call, BlockIo, Model, Sampling,
    ModelIo, LinearIo, NormIo, Device, Strides, AttendIo, AttendPlan,
)  # fmt: skip  in the header's order of declaration


def sized(struct: type[ctypes.Structure]) -> ctypes.Structure:
    """A zeroed struct that carries its size."""
    return struct(struct_size=ctypes.sizeof(struct))
