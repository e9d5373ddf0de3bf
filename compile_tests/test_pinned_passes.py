"""What each pass does to one small Ulysses block: the lowered graph's text, before and after.

``EXPECTTEST_ACCEPT=1 pytest`` on this file rewrites them. The texts hold for constraints.txt's torch; under another
version nothing is compared here: what the passes must do is counted in test_pass_*.py.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch._inductor import config

import fvops
from compile_tests.test_pinned_graphs import PINNED_TORCH
from fvops.graph_report import planned_groups

pytestmark = pytest.mark.skipif(
    torch.__version__.split("+")[0] != PINNED_TORCH, reason=f"the texts are torch {PINNED_TORCH}'s"
)


def _block(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """Two exchanges there, one back, a projection: x, y ``[1, 4, 2, 3]``, w ``[6, 5]``."""
    group = fvops.get_sp_group()
    a, b = group.all_to_all_4D(x, 2, 1), group.all_to_all_4D(y, 2, 1)
    return group.all_to_all_4D(a.flip(1) * b, 1, 2).flatten(2) @ w


def _there_and_back(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    group = fvops.get_sp_group()
    return group.all_to_all_4D(group.all_to_all_4D(x, 2, 1).sin(), 1, 2).flatten(2) @ w


def _lowered(program: Any, switches: dict[str, Any]) -> str:
    """The graph that Inductor lowers, after our passes, a call a line."""
    seen: list[torch.fx.Graph] = []
    with planned_groups(sp_size=2), config.patch(post_grad_custom_post_pass=lambda graph: seen.append(graph)):
        with torch.device("meta"):
            inputs = torch.empty(1, 4, 2, 3), torch.empty(1, 4, 2, 3), torch.empty(6, 5)
        with fvops.compiler.enable(**switches):
            fvops.report(program, *inputs)
    return _text(seen[0])


def _text(graph: torch.fx.Graph) -> str:
    lines = []
    for node in graph.nodes:
        if node.op == "call_function":
            target = str(getattr(node.target, "__name__", node.target)).removesuffix(".default")
            lines.append(f"{node.name} = {target}({', '.join(map(str, node.args))})")
    text = "\n".join(lines)
    return re.sub(r"fvops\.(\w+)\.default", r"\1", text) + "\n"


def test_exchanges_that_stay_whole() -> None:
    assert_expected_inline(
        _lowered(_block, {"layout": "exchange"}),
        """\
_make_token_default = _make_token()
with_effects = with_effects(_make_token_default, all_to_all_4D, arg1_1, 2, 1, 2, planned_sp:0)
getitem = getitem(with_effects, 0)
getitem_1 = getitem(with_effects, 1)
with_effects_1 = with_effects(getitem, all_to_all_4D, arg2_1, 2, 1, 2, planned_sp:0)
getitem_2 = getitem(with_effects_1, 0)
getitem_3 = getitem(with_effects_1, 1)
rev = rev(getitem_1, [1])
mul = mul.Tensor(rev, getitem_3)
with_effects_2 = with_effects(getitem_2, all_to_all_4D, mul, 1, 2, 2, planned_sp:0)
getitem_4 = getitem(with_effects_2, 0)
getitem_5 = getitem(with_effects_2, 1)
_sink_tokens_default = _sink_tokens([getitem_4])
view = reshape(getitem_5, [1, 4, 6])
view_1 = reshape(view, [4, 6])
mm = mm(view_1, arg3_1)
view_2 = reshape(mm, [1, 4, 5])
""",
    )


def test_layout() -> None:
    assert_expected_inline(
        _lowered(_block, {"layout": "fused"}),
        """\
_make_token_default = _make_token()
view_default = view(arg1_1, [1, 4, 2, 1, 3])
permute_default = permute(view_default, [2, 0, 1, 3, 4])
clone_default = clone(permute_default)
with_effects_3 = with_effects(_make_token_default, all_to_all_4D_packed, [clone_default], 2, 1, True, 2, planned_sp:0)
getitem_6 = getitem(with_effects_3, 0)
getitem_7 = getitem(with_effects_3, 1)
getitem_8 = getitem(getitem_7, 0)
view_default_1 = view(getitem_8, [1, 8, 1, 3])
view_default_2 = view(arg2_1, [1, 4, 2, 1, 3])
permute_default_1 = permute(view_default_2, [2, 0, 1, 3, 4])
clone_default_1 = clone(permute_default_1)
with_effects_4 = with_effects(getitem_6, all_to_all_4D_packed, [clone_default_1], 2, 1, True, 2, planned_sp:0)
getitem_9 = getitem(with_effects_4, 0)
getitem_10 = getitem(with_effects_4, 1)
getitem_11 = getitem(getitem_10, 0)
view_default_3 = view(getitem_11, [1, 8, 1, 3])
rev = rev(view_default_1, [1])
mul = mul.Tensor(rev, view_default_3)
view_default_4 = view(mul, [2, 1, 4, 1, 3])
with_effects_5 = with_effects(getitem_9, all_to_all_4D_packed, [view_default_4], 1, 2, True, 2, planned_sp:0)
getitem_12 = getitem(with_effects_5, 0)
getitem_13 = getitem(with_effects_5, 1)
getitem_14 = getitem(getitem_13, 0)
permute_default_2 = permute(getitem_14, [1, 2, 0, 3, 4])
clone_default_2 = clone(permute_default_2)
view_default_5 = view(clone_default_2, [1, 4, 2, 3])
_sink_tokens_default = _sink_tokens([getitem_12])
view = reshape(view_default_5, [1, 4, 6])
view_1 = reshape(view, [4, 6])
mm = mm(view_1, arg3_1)
view_2 = reshape(mm, [1, 4, 5])
""",
    )


def test_merge() -> None:
    assert_expected_inline(
        _lowered(_block, {"merge": True}),
        """\
_make_token_default = _make_token()
with_effects_3 = with_effects(_make_token_default, all_to_all_4D_coalesced, [arg1_1, arg2_1], 2, 1, 2, planned_sp:0)
getitem_6 = getitem(with_effects_3, 0)
getitem_7 = getitem(with_effects_3, 1)
getitem_8 = getitem(getitem_7, 0)
getitem_9 = getitem(getitem_7, 1)
rev = rev(getitem_8, [1])
mul = mul.Tensor(rev, getitem_9)
with_effects_2 = with_effects(getitem_6, all_to_all_4D, mul, 1, 2, 2, planned_sp:0)
getitem_4 = getitem(with_effects_2, 0)
getitem_5 = getitem(with_effects_2, 1)
_sink_tokens_default = _sink_tokens([getitem_4])
view = reshape(getitem_5, [1, 4, 6])
view_1 = reshape(view, [4, 6])
mm = mm(view_1, arg3_1)
view_2 = reshape(mm, [1, 4, 5])
""",
    )


def test_absorb() -> None:
    assert_expected_inline(
        _lowered(_block, {"layout": "fused", "absorb": True}),
        """\
_make_token_default = _make_token()
view_default_3 = view(arg1_1, [1, 4, 2, 1, 3])
permute_default_1 = permute(view_default_3, [2, 0, 1, 3, 4])
clone_default_1 = clone(permute_default_1)
with_effects_4 = with_effects(_make_token_default, all_to_all_4D_packed, [clone_default_1], 2, 1, True, 2, planned_sp:0)
getitem_9 = getitem(with_effects_4, 0)
getitem_10 = getitem(with_effects_4, 1)
getitem_11 = getitem(getitem_10, 0)
view_default_4 = view(getitem_11, [1, 8, 1, 3])
view_default_5 = view(arg2_1, [1, 4, 2, 1, 3])
permute_default_2 = permute(view_default_5, [2, 0, 1, 3, 4])
clone_default_2 = clone(permute_default_2)
with_effects_5 = with_effects(getitem_9, all_to_all_4D_packed, [clone_default_2], 2, 1, True, 2, planned_sp:0)
getitem_12 = getitem(with_effects_5, 0)
getitem_13 = getitem(with_effects_5, 1)
getitem_14 = getitem(getitem_13, 0)
view_default_6 = view(getitem_14, [1, 8, 1, 3])
rev = rev(view_default_4, [1])
mul = mul.Tensor(rev, view_default_6)
view_default = reshape(mul, [2, 1, 4, 1, 3])
with_effects_3 = with_effects(getitem_12, all_to_all_4D_packed, [view_default], 1, 2, True, 2, planned_sp:0)
getitem_6 = getitem(with_effects_3, 0)
getitem_7 = getitem(with_effects_3, 1)
getitem_8 = getitem(getitem_7, 0)
_sink_tokens_default = _sink_tokens([getitem_6])
view_default_2 = reshape(getitem_8, [2, -1, 3])
select_int = select.int(view_default_2, 0, 0)
slice_tensor = slice.Tensor(arg3_1, 0, 0, 3)
select_int_1 = select.int(view_default_2, 0, 1)
slice_tensor_1 = slice.Tensor(arg3_1, 0, 3, 6)
sum_of_products_default = sum_of_products(None, [select_int, select_int_1], [slice_tensor, slice_tensor_1])
view_2 = reshape(sum_of_products_default, [1, 4, 5])
""",
    )


def test_a_pair_that_stays() -> None:
    assert_expected_inline(
        _lowered(_there_and_back, {"layout": "exchange"}),
        """\
_make_token_default = _make_token()
with_effects = with_effects(_make_token_default, all_to_all_4D, arg1_1, 2, 1, 2, planned_sp:0)
getitem = getitem(with_effects, 0)
getitem_1 = getitem(with_effects, 1)
sin = sin(getitem_1)
with_effects_1 = with_effects(getitem, all_to_all_4D, sin, 1, 2, 2, planned_sp:0)
getitem_2 = getitem(with_effects_1, 0)
getitem_3 = getitem(with_effects_1, 1)
_sink_tokens_default = _sink_tokens([getitem_2])
view = reshape(getitem_3, [1, 4, 6])
view_1 = reshape(view, [4, 6])
mm = mm(view_1, arg2_1)
view_2 = reshape(mm, [1, 4, 5])
""",
    )


def test_cancel() -> None:
    assert_expected_inline(
        _lowered(_there_and_back, {"cancel": True}),
        """\
_make_token_default = _make_token()
_sink_tokens_default = _sink_tokens([_make_token_default])
sin_default = sin(arg1_1)
view = reshape(sin_default, [1, 4, 6])
view_1 = reshape(view, [4, 6])
mm = mm(view_1, arg2_1)
view_2 = reshape(mm, [1, 4, 5])
""",
    )
