"""fvops.integrations.diffusers on a small Wan transformer: parity with one rank, gradients, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fvops
from fvops.debug import record_collectives
from fvops.integrations.diffusers import parallelize
from tests.harness import Ranks

HEADS = 12


def _model(heads: int = HEADS, layers: int = 2) -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=64,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )
    for block in model.blocks:
        # Fresh gates nearly close the blocks; opened, a fault in attention shows in the output.
        torch.nn.init.normal_(block.scale_shift_table)
    return model


def _inputs(frames: int = 3, height: int = 8, width: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 4, frames, height, width, generator=generator),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 7, 16, generator=generator),
    }


def _forward(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs, return_dict=False)[0]


def _parity(compiled: bool) -> tuple[float, int]:
    """Largest difference from one rank over two sizes, and how many collectives a forward pass issues."""
    with torch.no_grad():
        model, videos = _model(), [_inputs(), _inputs(2, 12, 16)]
        expected = [_forward(model, video) for video in videos]
        model = parallelize(model)
        if compiled:
            model = torch.compile(model, fullgraph=True, backend="aot_eager")
        with record_collectives() as records:
            got = [_forward(model, video) for video in videos]
    return max(float((g - e).abs().max()) for g, e in zip(got, expected, strict=True)), len(records) // 2


@pytest.mark.parametrize(("world_size", "compiled"), [(2, False), (2, True), (3, False)])
def test_output_is_that_of_one_rank(world_size: int, compiled: bool) -> None:
    for difference, collectives in Ranks.get(world_size).run(_parity, compiled, deadline_s=240):
        assert difference < 1e-4
        assert collectives == 2 * 2 + 1  # two exchanges a block, and the gather of the output


def _gradients() -> float:
    """Worst relative error of the parameters' gradients, averaged over the group, against one rank's."""
    inputs, model = _inputs(), _model()
    _forward(model, inputs).cos().sum().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    parallel = parallelize(_model())
    _forward(parallel, inputs).cos().sum().backward()
    worst = 0.0
    for parameter, e in zip(parallel.parameters(), expected, strict=True):
        got = fvops.get_sp_group().all_reduce(parameter.grad, torch.distributed.ReduceOp.AVG)
        worst = max(worst, float((got - e).abs().max() / e.abs().max().clamp_min(1e-6)))
    return worst


def test_averaged_gradients_are_those_of_one_rank(two_ranks: Ranks) -> None:
    assert all(error < 1e-4 for error in two_ranks.run(_gradients, deadline_s=240))


def _refusals() -> dict[str, str]:
    texts = {}
    calls: dict[str, Any] = {
        "heads": lambda: parallelize(_model(heads=fvops.get_sp_world_size() + 1, layers=1)),
        "class": lambda: parallelize(torch.nn.Linear(2, 2)),
        "twice": lambda: parallelize(parallelize(_model(layers=1))),
        "tokens": lambda: _forward(parallelize(_model(layers=1)), _inputs(1, 2, 2)),
    }
    for name, call in calls.items():
        with record_collectives() as records:
            try:
                call()
                texts[name] = "no error"
            except (ValueError, TypeError, RuntimeError) as error:
                texts[name] = f"{type(error).__name__}: {error}"
        if records:
            texts[name] += f", after sending {records}"
    return texts


def test_what_does_not_fit_is_refused_before_anything_is_sent(two_ranks: Ranks) -> None:
    P = two_ranks.world_size
    for texts in two_ranks.run(_refusals):
        assert "sent" not in " ".join(texts.values())
        assert texts["heads"].startswith("ValueError")
        assert f"num_attention_heads has size {P + 1}" in texts["heads"]
        assert texts["class"].startswith("TypeError: parallelize: Linear is not supported")
        assert texts["twice"] == "RuntimeError: parallelize: this model is parallelized already"
        assert texts["tokens"].startswith("ValueError")
        assert f"the token sequence has size 1, which is not divisible by world_size {P}" in texts["tokens"]


def _alone() -> bool:
    group = fvops.initialize_sequence_parallel_group(1, group_name_suffix="alone")
    model = _model(layers=1)
    untouched = parallelize(model, group) is model and not model.rope._forward_hooks
    group.destroy()
    return untouched


def test_one_rank_leaves_the_model_unchanged(two_ranks: Ranks) -> None:
    assert two_ranks.run(_alone) == [True, True]
