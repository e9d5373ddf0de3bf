"""What every worker of the harness needs, got ready once, in the server that workers are forked from.

Importing torch, fvops and Inductor takes seconds, and so do Inductor's trial compilation that finds the processor's
vector instructions and its digests of torch's and triton's files, which are in every cache key; some tests end their
workers, so that a run starts dozens of them.
Nothing here may start a thread or look for a GPU: neither survives a fork.
"""

import gc
import os

# Read when Inductor is imported; with more, it would start a pool of processes.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch._inductor.compile_fx  # noqa: F401
from torch._inductor import codecache, cpu_vec_isa
from torch._inductor.runtime import triton_compat

import fvops  # noqa: F401

cpu_vec_isa.pick_vec_isa()
codecache.torch_key()
if triton_compat.HAS_TRITON:
    triton_compat.triton_key()

# What is there by now lives as long as the workers: their collections need not look at it, which takes 0.2 s each time.
gc.collect()
gc.freeze()
