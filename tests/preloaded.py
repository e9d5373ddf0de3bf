"""What every worker of the harness needs, imported once, by the server that workers are forked from.

Importing torch, fvops and Inductor takes seconds; some tests end their workers, so that a run starts dozens of them.
Nothing here may start a thread or look for a GPU: neither survives a fork.
"""

import os

# Read when Inductor is imported; with more, it would start a pool of processes.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch._inductor.compile_fx  # noqa: F401

import fvops  # noqa: F401
