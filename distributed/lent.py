"""A process lent to a run, as a notebook's is: whatever the run changes in it is put back."""

import contextlib
import gc
import os
import random
import sys
from collections.abc import Iterator

import numpy
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from common.streams import steady_streams
from data.cache import given_back
from distributed.accelerator import FILLING, cpu_asked


@contextlib.contextmanager
def lent() -> Iterator[None]:
    """Within, a run finds the process as a fresh one has it; afterwards it is as it was.

    Signals, threads and groups are the world's, which gives them back itself.
    """
    with contextlib.ExitStack() as kept:
        for part in (
            _environment, _output, _switches, _generators, _accelerate, given_back, _memory,
        ):  # fmt: skip
            kept.enter_context(part())
        yield


@contextlib.contextmanager
def _accelerate() -> Iterator[None]:
    """Accelerate's objects share these dicts: emptied and filled in place, a user's own go on."""
    shared = [s._shared_state for s in (AcceleratorState, PartialState, GradientState)]
    before = [dict(state) for state in shared]
    for state in shared:
        state.clear()
    try:
        yield
    finally:
        for state, values in zip(shared, before, strict=True):
            state.clear()
            state.update(values)


@contextlib.contextmanager
def _switches() -> Iterator[None]:
    """Those of torch; a run computes in float32 with gradients, whatever is usual around it."""
    cudnn, threads = torch.backends.cudnn, torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = FILLING.fill_uninitialized_memory
    benchmark, precision = cudnn.benchmark, torch.get_float32_matmul_precision()
    usual = torch.get_default_dtype()
    anomalies, nan_checks = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    try:
        torch.set_default_dtype(torch.float32)
        with torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(usual)
        torch.autograd.set_detect_anomaly(anomalies, nan_checks)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        FILLING.fill_uninitialized_memory = filled
        torch.backends.cudnn.benchmark = benchmark
        if torch.get_float32_matmul_precision() != precision:
            torch.set_float32_matmul_precision(precision)


@contextlib.contextmanager
def _generators() -> Iterator[None]:
    """Of Python, numpy and torch, on every device."""
    python, legacy, host = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    cuda = [] if cpu_asked() or not torch.cuda.is_available() else torch.cuda.get_rng_state_all()
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        numpy.random.set_state(legacy)
        torch.set_rng_state(host)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        if mps is not None:
            torch.mps.set_rng_state(mps)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    before, places = dict(os.environ), list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = places
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def _output() -> Iterator[None]:
    """How stdout writes characters that its encoding lacks, and what stands for it in a script."""
    stream, errors, other = sys.stdout, getattr(sys.stdout, "errors", None), sys.stderr
    steady_streams()
    try:
        yield
    finally:
        with contextlib.suppress(AttributeError, OSError, ValueError):
            sys.stdout.flush()
        sys.stdout, sys.stderr = stream, other
        with contextlib.suppress(AttributeError, ValueError):  # a stream that has no such switch
            stream.reconfigure(errors=errors)  # pyright: ignore[reportAttributeAccessIssue]


@contextlib.contextmanager
def _memory() -> Iterator[None]:
    """What the run held is free for the next one, also where Accelerate left circles."""
    frozen = gc.get_freeze_count()
    try:
        yield
    finally:
        if gc.get_freeze_count() > frozen:
            gc.unfreeze()
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
