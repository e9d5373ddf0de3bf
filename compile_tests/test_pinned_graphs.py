"""Promise 9: the graphs that a user sees. ``EXPECTTEST_ACCEPT=1 pytest`` on this file rewrites them.

Dynamo's graph for each helper, and for a Ulysses attention block also AOTAutograd's forward and backward. The texts
hold for the torch of constraints.txt; under another version the sequence of fvops calls in them is compared.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

import fvops
from tests.harness import Ranks

PINNED_TORCH = re.search(r"torch==(\S+)", Path(__file__).parent.parent.joinpath("constraints.txt").read_text())[1]

HELPERS: dict[str, Any] = {
    "tensor_model_parallel_all_reduce": lambda x: fvops.tensor_model_parallel_all_reduce(x),
    "tensor_model_parallel_all_gather": lambda x: fvops.tensor_model_parallel_all_gather(x),
    "sequence_model_parallel_all_to_all_4D": lambda x: fvops.sequence_model_parallel_all_to_all_4D(x),
    "sequence_model_parallel_all_gather": lambda x: fvops.sequence_model_parallel_all_gather(x, dim=1),
    "sequence_model_parallel_shard": lambda x: fvops.sequence_model_parallel_shard(x, dim=1)[0],
    "sequence_model_parallel_all_gather_with_unpad": lambda x: fvops.sequence_model_parallel_all_gather_with_unpad(
        x, 5, dim=1
    ),
}


def _ulysses_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v ``[B, S/P, H, D]`` of this rank; attention over the whole sequence with H/P heads; ``[B, S/P, H, D]``."""
    q, k, v = (fvops.sequence_model_parallel_all_to_all_4D(x, 2, 1) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    return fvops.sequence_model_parallel_all_to_all_4D(out, 1, 2)


def _text(graph: torch.fx.GraphModule) -> str:
    """The graph's code without the noise: annotations, and the freeing of names."""
    lines = []
    for line in graph.code.strip().splitlines():
        line = re.sub(r";  [\w = ]+ = None$", "", line.rstrip())
        line = re.sub(r" : [\w\".\[\], ]+(?= =|,|\))", "", line)
        lines.append(line)
    return "\n".join(line for line in lines if line.strip()) + "\n"


def _dynamo_graph(name: str) -> str:
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        seen.append(_text(graph))
        return graph

    torch.compile(HELPERS[name], backend=backend, fullgraph=True)(torch.ones(1, 3, 4, 2))
    return seen[0]


def _block_graphs() -> dict[str, str]:
    seen: dict[str, str] = {}

    def keep(key: str) -> Any:
        def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
            seen[key] = _text(graph)
            return graph

        return compiler

    aot = aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"))

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        seen["dynamo"] = _text(graph)
        return aot(graph, inputs)

    q, k, v = (torch.rand(1, 3, 4, 2, requires_grad=True) for _ in range(3))
    torch.compile(_ulysses_attention, backend=backend, fullgraph=True)(q, k, v).sum().backward()
    return seen


def _calls(text: str) -> list[str]:
    return re.findall(r"fvops\.(\w+)\.default", text)


def _assert_graph(got: str, pinned: str) -> None:
    if torch.__version__.split("+")[0] == PINNED_TORCH:
        assert_expected_inline(got, pinned, skip=1)
    else:
        assert _calls(got) == _calls(pinned)


@pytest.fixture(scope="module")
def helper_graphs() -> dict[str, str]:
    return {name: Ranks.get(2).run(_dynamo_graph, name)[0] for name in HELPERS}


@pytest.fixture(scope="module")
def block_graphs() -> dict[str, str]:
    return Ranks.get(2).run(_block_graphs)[0]


def test_tensor_model_parallel_all_reduce(helper_graphs: dict[str, str]) -> None:
    _assert_graph(
        helper_graphs["tensor_model_parallel_all_reduce"],
        """\
def forward(self, L_x_):
    l_x_ = L_x_
    return (l_x_,)
""",
    )


def test_tensor_model_parallel_all_gather(helper_graphs: dict[str, str]) -> None:
    _assert_graph(
        helper_graphs["tensor_model_parallel_all_gather"],
        """\
def forward(self, L_x_):
    l_x_ = L_x_
    return (l_x_,)
""",
    )


def test_sequence_model_parallel_all_to_all_4D(helper_graphs: dict[str, str]) -> None:
    _assert_graph(
        helper_graphs["sequence_model_parallel_all_to_all_4D"],
        """\
def forward(self, L_x_):
    l_x_ = L_x_
    all_to_all_4d_default = torch.ops.fvops.all_to_all_4D.default(l_x_, 2, 1, 2, 'sp:0')
    return (all_to_all_4d_default,)
""",
    )


def test_sequence_model_parallel_all_gather(helper_graphs: dict[str, str]) -> None:
    _assert_graph(
        helper_graphs["sequence_model_parallel_all_gather"],
        """\
def forward(self, L_x_):
    l_x_ = L_x_
    all_gather_default = torch.ops.fvops.all_gather.default(l_x_, 1, 2, 'sp:0')
    return (all_gather_default,)
""",
    )


def test_sequence_model_parallel_shard(helper_graphs: dict[str, str]) -> None:
    _assert_graph(
        helper_graphs["sequence_model_parallel_shard"],
        """\
def forward(self, L_x_):
    l_x_ = L_x_
    input_ = torch._C._nn.pad(l_x_, [0, 0, 0, 0, 0, 1], 'constant', 0.0)
    shard_default = torch.ops.fvops.shard.default(input_, 1, True, 0, 2, 'sp:0')
    return (shard_default,)
""",
    )


def test_sequence_model_parallel_all_gather_with_unpad(helper_graphs: dict[str, str]) -> None:
    _assert_graph(
        helper_graphs["sequence_model_parallel_all_gather_with_unpad"],
        """\
def forward(self, L_x_):
    l_x_ = L_x_
    all_gather_default = torch.ops.fvops.all_gather.default(l_x_, 1, 2, 'sp:0')
    narrow = all_gather_default.narrow(1, 0, 5)
    return (narrow,)
""",
    )


def test_ulysses_attention_dynamo(block_graphs: dict[str, str]) -> None:
    _assert_graph(
        block_graphs["dynamo"],
        """\
def forward(self, L_q_, L_k_, L_v_):
    l_q_ = L_q_
    l_k_ = L_k_
    l_v_ = L_v_
    q = torch.ops.fvops.all_to_all_4D.default(l_q_, 2, 1, 2, 'sp:0')
    k = torch.ops.fvops.all_to_all_4D.default(l_k_, 2, 1, 2, 'sp:0')
    v = torch.ops.fvops.all_to_all_4D.default(l_v_, 2, 1, 2, 'sp:0')
    transpose = q.transpose(1, 2)
    transpose_1 = k.transpose(1, 2)
    transpose_2 = v.transpose(1, 2)
    scaled_dot_product_attention = torch._C._nn.scaled_dot_product_attention(transpose, transpose_1, transpose_2)
    out = scaled_dot_product_attention.transpose(1, 2)
    all_to_all_4d_default_3 = torch.ops.fvops.all_to_all_4D.default(out, 1, 2, 2, 'sp:0')
    return (all_to_all_4d_default_3,)
""",
    )


def test_ulysses_attention_forward(block_graphs: dict[str, str]) -> None:
    _assert_graph(
        block_graphs["forward"],
        """\
def forward(self, primals_1, primals_2, primals_3, primals_4):
    with_effects = torch.ops.higher_order.with_effects(primals_1, torch.ops.fvops.all_to_all_4D.default, primals_2, 2, 1, 2, 'sp:0')
    getitem = with_effects[0]
    getitem_1 = with_effects[1]
    with_effects_1 = torch.ops.higher_order.with_effects(getitem, torch.ops.fvops.all_to_all_4D.default, primals_3, 2, 1, 2, 'sp:0')
    getitem_2 = with_effects_1[0]
    getitem_3 = with_effects_1[1]
    with_effects_2 = torch.ops.higher_order.with_effects(getitem_2, torch.ops.fvops.all_to_all_4D.default, primals_4, 2, 1, 2, 'sp:0')
    getitem_4 = with_effects_2[0]
    getitem_5 = with_effects_2[1]
    transpose = torch.ops.aten.transpose.int(getitem_1, 1, 2)
    transpose_1 = torch.ops.aten.transpose.int(getitem_3, 1, 2)
    transpose_2 = torch.ops.aten.transpose.int(getitem_5, 1, 2)
    _scaled_dot_product_flash_attention_for_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(transpose, transpose_1, transpose_2)
    getitem_6 = _scaled_dot_product_flash_attention_for_cpu[0]
    getitem_7 = _scaled_dot_product_flash_attention_for_cpu[1]
    detach = torch.ops.aten.detach.default(getitem_6)
    transpose_3 = torch.ops.aten.transpose.int(getitem_6, 1, 2)
    with_effects_3 = torch.ops.higher_order.with_effects(getitem_4, torch.ops.fvops.all_to_all_4D.default, transpose_3, 1, 2, 2, 'sp:0')
    getitem_8 = with_effects_3[0]
    getitem_9 = with_effects_3[1]
    return (getitem_8, getitem_9, transpose, transpose_1, transpose_2, getitem_7, detach)
""",
    )


def test_ulysses_attention_backward(block_graphs: dict[str, str]) -> None:
    _assert_graph(
        block_graphs["backward"],
        """\
def forward(self, transpose, transpose_1, transpose_2, getitem_7, detach, tangents_1, tangents_token):
    with_effects_4 = torch.ops.higher_order.with_effects(tangents_token, torch.ops.fvops.all_to_all_4D.default, tangents_1, 2, 1, 2, 'sp:0')
    getitem_10 = with_effects_4[0]
    getitem_11 = with_effects_4[1]
    transpose_4 = torch.ops.aten.transpose.int(getitem_11, 1, 2)
    detach_1 = torch.ops.aten.detach.default(detach)
    _scaled_dot_product_flash_attention_for_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default(transpose_4, transpose, transpose_1, transpose_2, detach_1, getitem_7, 0.0, False)
    getitem_12 = _scaled_dot_product_flash_attention_for_cpu_backward[0]
    getitem_13 = _scaled_dot_product_flash_attention_for_cpu_backward[1]
    getitem_14 = _scaled_dot_product_flash_attention_for_cpu_backward[2]
    transpose_5 = torch.ops.aten.transpose.int(getitem_14, 1, 2)
    transpose_6 = torch.ops.aten.transpose.int(getitem_13, 1, 2)
    transpose_7 = torch.ops.aten.transpose.int(getitem_12, 1, 2)
    with_effects_5 = torch.ops.higher_order.with_effects(getitem_10, torch.ops.fvops.all_to_all_4D.default, transpose_5, 1, 2, 2, 'sp:0')
    getitem_15 = with_effects_5[0]
    getitem_16 = with_effects_5[1]
    with_effects_6 = torch.ops.higher_order.with_effects(getitem_15, torch.ops.fvops.all_to_all_4D.default, transpose_6, 1, 2, 2, 'sp:0')
    getitem_17 = with_effects_6[0]
    getitem_18 = with_effects_6[1]
    with_effects_7 = torch.ops.higher_order.with_effects(getitem_17, torch.ops.fvops.all_to_all_4D.default, transpose_7, 1, 2, 2, 'sp:0')
    getitem_19 = with_effects_7[0]
    getitem_20 = with_effects_7[1]
    return (getitem_20, getitem_18, getitem_16, getitem_19)
""",
    )
