"""The gated delta rule for Hopper: shapes, launches and gradient around the kernels of `gpu_chunks.py`, `gpu_states.py` and
`gpu_gradients.py`. `docs/kernels/gated_delta_hopper.md` explains the tiling.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen35_jax.compat import HAS_MOSAIC_GPU
from qwen35_jax.errors import UserError
from qwen35_jax.ops.gated_delta.gates import gates_of, padded
from qwen35_jax.ops.gated_delta.gpu_chunks import BLOCK, CHUNK, NARROW, SQUARES, WIDTH, bf16, chunk_kernel, f32, tiled
from qwen35_jax.ops.gated_delta.gpu_gradients import ROWS, SUMS, gate_gradients, gradient_kernel
from qwen35_jax.ops.gated_delta.gpu_states import HALF, PARTS, STAGES, forward_kernel, reverse_kernel
from qwen35_jax.ops.gated_delta.kept import STATES, UPDATES
from qwen35_jax.ops.gated_delta.xla import GRAIN
from qwen35_jax.ops.hopper.ring import SMS


def supports(key_width: int, value_width: int, dtype: str) -> bool:
    """Whether heads of these widths can be run on q, k and v of this dtype."""
    return key_width == value_width == WIDTH and dtype == "bfloat16"


def gated_delta_rule(q, k, v, g, beta, initial_state, segment_ids, normalize_qk):
    """See `ops.gated_delta.gated_delta_rule`. q, k and v must be bfloat16: Hopper multiplies nothing wider exactly."""
    if not HAS_MOSAIC_GPU:
        raise UserError(f"gated_delta_rule: pallas_gpu needs jax 0.11 or newer, this is {jax.__version__}; use xla")
    batch, time, _, key_width = q.shape
    heads, value_width = v.shape[2:]
    if key_width != WIDTH or value_width != WIDTH:
        raise UserError(f"gated_delta_rule: pallas_gpu needs Hk = Hv = {WIDTH}, not {key_width}, {value_width}; use xla")
    if not q.dtype == k.dtype == v.dtype == bf16:
        raise UserError(f"gated_delta_rule: pallas_gpu needs q, k, v in bfloat16, not {q.dtype}, {k.dtype}, {v.dtype}; use xla")
    g, beta = (_chunked(x) for x in gates_of(g, beta, segment_ids))
    tokens = (padded(x, 1, CHUNK) for x in (q, k, v))
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, key_width, value_width), f32)
    out, final = _rule(*tokens, g, beta, jnp.swapaxes(initial_state.astype(f32), 2, 3), normalize_qk)
    return out[:, :time], jnp.swapaxes(final, 2, 3)


def _chunked(x):
    """[B, T, N] -> [B, M, N, C], padded with zeros."""
    x = padded(x, 1, CHUNK)
    return jnp.swapaxes(x.reshape(x.shape[0], -1, CHUNK, x.shape[2]), 2, 3)


def _gate_rows(g, beta):
    """g, beta [B, M, N, C] -> [B, M, N, 6, C], the rows that `gpu_chunks.py` names."""
    g = g * math.log2(math.e)
    coarse = jnp.floor(g * GRAIN + 0.5) / GRAIN  # multiples of 1 / GRAIN, which fp32 adds exactly, and rests
    until = jnp.triu(jnp.ones((CHUNK, CHUNK), f32))
    coarse, rest = jnp.matmul(jnp.stack([coarse, g - coarse]), until, precision="highest")
    after = (coarse[..., -1:] - coarse) + (rest[..., -1:] - rest)
    before = jnp.exp2(coarse + rest)
    total = jnp.broadcast_to(before[..., -1:], before.shape)
    return jnp.stack([coarse, rest, beta, before, jnp.exp2(after), total], axis=-2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _rule(q, k, v, g, beta, initial_state, normalize_qk):
    squares, scalars = _chunks(q, k, _gate_rows(g, beta), normalize_qk)
    return tuple(_states(forward_kernel, q, k, v, squares, scalars, initial_state, save=False))


def _chunks(q, k, gates, normalize_qk):
    """squares [B, M, N, 3 C, C] bf16 and scalars [B, M, N, 4, C] fp32 of `gpu_chunks.chunk_kernel`."""
    batch, chunks, heads = shape = gates.shape[:3]
    return _launch(
        functools.partial(chunk_kernel, normalize_qk, heads // q.shape[2]),
        "gated_delta_chunks",
        (q, k, gates),
        [jax.ShapeDtypeStruct((*shape, SQUARES * CHUNK, CHUNK), bf16), jax.ShapeDtypeStruct((*shape, 4, CHUNK), f32)],
        dict(grid=(heads, chunks, batch), grid_names=("head", "chunk", "batch")),
        [
            tiled(CHUNK, WIDTH),
            tiled(CHUNK, WIDTH),
            plgpu.SMEM(gates.shape[3:], f32),
            tiled(SQUARES * CHUNK, CHUNK),
            tiled(NARROW, CHUNK, BLOCK, row=BLOCK),
            plgpu.SMEM((CHUNK,), f32),
            plgpu.SMEM((4, CHUNK), f32),
            plgpu.Barrier(num_arrivals=3),
        ],
    )


def _states(kernel, q, k, values, squares, scalars, state, save: bool):
    """One of the kernels of `gpu_states.py`: its outputs, with what each chunk saves where `save`."""
    batch, chunks, heads = squares.shape[:3]
    outputs = [values, state]
    if save:
        outputs.append(jax.ShapeDtypeStruct((batch, chunks, heads, WIDTH, WIDTH), bf16))
        if kernel is forward_kernel:
            outputs.append(jax.ShapeDtypeStruct((batch, chunks, heads, WIDTH, CHUNK), bf16))
    buffers = [tiled(STAGES, CHUNK, WIDTH)] * 3 + [tiled(STAGES, SQUARES * CHUNK, CHUNK), plgpu.SMEM((STAGES, 4, CHUNK), f32)]
    barriers = [plgpu.Barrier(num_arrivals=n, num_barriers=STAGES) for n in (len(buffers), PARTS)]
    return _launch(
        functools.partial(kernel, chunks, heads // q.shape[2]),
        "gated_delta_" + kernel.__name__.removesuffix("_kernel"),
        (q, k, values, squares, scalars, state),
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        dict(grid=(heads, batch), grid_names=("head", "batch"), num_threads=PARTS, thread_name="part"),
        [buffers, tiled(PARTS, CHUNK, HALF), tiled(PARTS, HALF, WIDTH), barriers],
    )


def _gradients(q, k, gates, scalars, updates, d_out, dv, states, d_states, normalize_qk):
    """dq, dk and the gates' rows of `gpu_gradients.gradient_kernel`; gates [B, M, N, 6, C]."""
    batch, time, keys = q.shape[:3]
    heads = gates.shape[2]
    tokens = jax.ShapeDtypeStruct((batch, time, heads, WIDTH), bf16)
    *d_tokens, rows = _launch(
        functools.partial(gradient_kernel, normalize_qk, heads // keys),
        "gated_delta_gradients",
        (q, k, gates, scalars, updates, d_out, dv, states, d_states),
        [tokens, tokens, jax.ShapeDtypeStruct((*gates.shape[:3], ROWS, CHUNK), f32)],
        dict(grid=(min(SMS, math.prod(gates.shape[:3])),), grid_names=("sm",), num_threads=2, thread_name="part"),
        [
            tiled(2, 2, CHUNK, WIDTH),
            plgpu.SMEM((2, *gates.shape[3:]), f32),
            plgpu.SMEM((1, 4, CHUNK), f32),
            tiled(1, WIDTH, CHUNK),
            tiled(1, 2, CHUNK, WIDTH),
            tiled(1, WIDTH, WIDTH),
            tiled(1, WIDTH, WIDTH),
            tiled(1, 2, CHUNK, CHUNK),
            tiled(1, CHUNK, CHUNK),
            plgpu.SMEM((1, CHUNK), f32),
            plgpu.SMEM((1, ROWS, CHUNK), f32),
            [plgpu.SMEM((SUMS,), f32)] * 2,
            plgpu.Barrier(num_arrivals=3, num_barriers=2),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=3),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_arrivals=2),
        ],
    )
    if heads > keys:
        d_tokens = [jnp.sum(x.reshape(*q.shape[:3], -1, WIDTH), axis=3, dtype=f32).astype(bf16) for x in d_tokens]
    return *d_tokens, rows


def _launch(kernel, name: str, operands, outputs, grid: dict, scratch):
    """Layouts are all given, and found by the assembler's older way (Lane): searching for them takes it minutes. approx_math:
    powers of two and roots as the device has them, to 2^-22; what they scale is rounded to 2^-9, or 2^-17 in two parts.
    Without reduction_scratch_bytes a `jnp.sum` over warps does not compile: a block's warpgroups would share them."""
    parameters = plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=True, reduction_scratch_bytes=0
    )
    return plgpu.kernel(kernel, out_type=outputs, scratch_types=scratch, compiler_params=parameters, kernel_name=name, **grid)(
        *operands
    )


def _rule_fwd(q, k, v, g, beta, initial_state, normalize_qk):
    squares, scalars = _chunks(q, k, _gate_rows(g, beta), normalize_qk)
    out, final, *saved = _states(forward_kernel, q, k, v, squares, scalars, initial_state, save=True)
    saved = [checkpoint_name(x, name) for x, name in zip(saved, (STATES, UPDATES), strict=True)]
    return (out, final), (q, k, g, beta, *saved)


def _rule_bwd(normalize_qk, residuals, cotangents):
    """Gradients of q, k, v, g, beta and initial_state. What each chunk needs for itself is made again, not kept."""
    q, k, g, beta, states, updates = residuals
    d_out, d_final = cotangents
    gates = _gate_rows(g, beta)
    squares, scalars = _chunks(q, k, gates, normalize_qk)
    dv, d_first, d_states = _states(reverse_kernel, q, k, d_out, squares, scalars, d_final, save=True)
    dq, dk, rows = _gradients(q, k, gates, scalars, updates, d_out, dv, states, d_states, normalize_qk)
    dg, dbeta = gate_gradients(rows, gates)
    return dq, dk, dv, dg, dbeta, d_first


_rule.defvjp(_rule_fwd, _rule_bwd)
