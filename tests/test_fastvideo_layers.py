"""FastVideo's own attention layer, its files untouched, over fvops: the same values on two ranks as on one.

Needs the unpacked wheel of FastVideo in the folder that ``FASTVIDEO_DIR`` names, and what its attention imports:
transformers, diffusers, cloudpickle, einops, imageio, remote-pdb. `fastvideo/__init__.py`, which imports the whole
video generator, is not run; torchvision, used only to write pictures, gets a stand-in where it is missing.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.harness import Ranks

FOLDER = os.environ.get("FASTVIDEO_DIR")

pytestmark = pytest.mark.skipif(FOLDER is None, reason="FASTVIDEO_DIR names no folder with FastVideo's unpacked wheel")


class _StandIn(ModuleType):
    """A module with whatever name is taken from it, and nothing behind."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def _layer_module(folder: str) -> Any:
    """``fastvideo.attention.layer``, with fvops as its ``fastvideo.distributed``."""
    from transformers import PreTrainedModel  # noqa: F401  (before a stand-in misleads it)

    from fvops.integrations import fastvideo as integration

    if importlib.util.find_spec("torchvision") is None:
        for name in ("torchvision", "torchvision.utils", "torchvision.transforms"):
            sys.modules[name] = _StandIn(name)
    integration.install()
    package = ModuleType("fastvideo")
    package.__path__ = [str(Path(folder, "fastvideo"))]
    sys.modules["fastvideo"] = package
    return importlib.import_module("fastvideo.attention.layer")


def _attend(folder: str, compiled: bool) -> list[Any]:
    """Largest difference from one rank's attention over the whole sequence; the collectives; where they come from."""
    import fvops
    from fvops.debug import record_collectives

    os.environ["FASTVIDEO_DISABLE_ATTENTION_COMPILE"] = "0" if compiled else "1"
    module = _layer_module(folder)
    context = importlib.import_module("fastvideo.forward_context")
    platforms = importlib.import_module("fastvideo.platforms")
    # FastVideo names no attention backend for the CPU; its own over torch's attention runs there.
    sdpa = "fastvideo.attention.backends.sdpa.SDPABackend"
    type(platforms.current_platform).get_attn_backend_cls = classmethod(lambda *_: sdpa)
    attention = module.DistributedAttention(
        4, 8, supported_attention_backends=(platforms.AttentionBackendEnum.TORCH_SDPA,)
    )
    group = fvops.get_sp_group()
    generator = torch.Generator().manual_seed(0)
    whole_BSHD = [torch.randn(2, 6 * group.world_size, 4, 8, generator=generator) for _ in range(3)]
    wanted_BSHD = scaled_dot_product_attention(*[x.transpose(1, 2) for x in whole_BSHD]).transpose(1, 2)
    own = [x.chunk(group.world_size, 1)[group.rank_in_group] for x in (*whole_BSHD, wanted_BSHD)]
    call = torch.compile(attention, fullgraph=True) if compiled else attention
    with context.set_forward_context(0, None), record_collectives() as records, torch.no_grad():
        output, _ = call(*own[:3])
    difference = (output - own[3]).abs().max().item()
    return [difference, [record.op for record in records], module.get_sp_world_size.__module__]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_distributed_attention(compiled: bool) -> None:
    ranks = Ranks(2, "auto")  # not the shared ones: FastVideo stays loaded in them
    try:
        for difference, ops, home in ranks.run(_attend, FOLDER, compiled):
            assert difference < 1e-5
            assert ops == ["all_to_all_4D"] * 2
            assert home == "fvops.parallel_state"
    finally:
        ranks.kill()
