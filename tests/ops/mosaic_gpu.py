"""Mosaic GPU kernels in tests: run where there is a GPU (pytest --gpu), else interpreted on the CPU, matrix products with their
left operand in registers included."""

from __future__ import annotations

import contextlib
from unittest import mock

import jax
import numpy as np
from jax._src.state import primitives as state_primitives
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen35_jax.ops.hopper import matrices


def _wgmma(*, token, thread, mesh_location, acc_allocation_key_as_array, acc_transforms, a_allocation_key_as_array, a_transforms,
           b_allocation_key_as_array, b_transforms, source_info, **_):  # fmt: skip
    """As the interpreter's own, which takes operands in shared memory alone: what is no key to a buffer is the operand."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as interpreter

    where = interpreter.memory.GPULoggingInfo(mesh_location, thread, source_info)
    shared = interpreter._get_shared_memory()

    def read(key, transforms):
        if np.ndim(key) != 1:
            return None, None, np.asarray(key)
        key = interpreter.HostAllocationKey.from_array(key)
        place = shared.access(key, jax.tree.map(int, interpreter._remove_noop_transforms(transforms)))
        return key, place, shared.get_buffer_content(key, place, thread, logging_info=where)[0]

    key, place, acc = read(acc_allocation_key_as_array, acc_transforms)
    a, b = read(a_allocation_key_as_array, a_transforms)[2], read(b_allocation_key_as_array, b_transforms)[2]
    result = acc + np.matmul(a.astype(np.float32), b.astype(np.float32))
    shared.store_buffer_content(key, place, result, thread, logging_info=where)
    return token


def _store(accumulator, value):
    """As `wgmma_accumulator_store`, of which the interpreter knows nothing: it has accumulators among its buffers."""
    state_primitives.swap_p.bind(accumulator, value, tree=jax.tree.structure(()))


def _but_for_registers(check):
    """The interpreter's search for races, but for accumulators: they are a thread's own, yet several have one key."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as interpreter

    registers = interpreter.memory.get_memory_space_idx(interpreter.mosaic_gpu_core.MemorySpace.REGS)

    def check_write(self, thread, clock, key, *place, **options):
        if key.memory_space_id != registers:
            check(self, thread, clock, key, *place, **options)

    return check_write


def _sum_of_rows(x, _):
    """As `matrices.sum_of_rows`, of which the interpreter knows nothing."""
    return x.sum(0)


def has_gpu() -> bool:
    return jax.default_backend() == "gpu"


@contextlib.contextmanager
def run_or_interpreted():
    """Under it GPU kernels run, where that is possible, or are interpreted, with memory that starts as NaN."""
    with contextlib.nullcontext() if has_gpu() else interpreted():
        yield


@contextlib.contextmanager
def interpreted(**options):
    """Under it, GPU kernels run interpreted, with the options of `plgpu.InterpretGPUParams`."""
    from jax._src.pallas.mosaic_gpu import primitives
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as interpreter
    from jax._src.pallas.mosaic_gpu.interpret.race_detection_state import GPURaceDetectionState as Races

    with (
        plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(**options)),
        mock.patch.object(interpreter, "wgmma", interpreter.fail_on_exception(_wgmma)),
        mock.patch.object(primitives, "wgmma_accumulator_store", _store),
        mock.patch.object(Races, "check_write", _but_for_registers(Races.check_write)),
        mock.patch.object(matrices, "sum_of_rows", _sum_of_rows),
    ):
        yield
