"""FastVideo 0.2.1's own modules and layers over fvops, unmodified: they import, and give what one rank gives.

Runs where ``FASTVIDEO_DIR`` names a folder with the unpacked wheel. FastVideo has no attention back end for the CPU;
it is told to take its own `SDPABackend` there, and nothing else of it is changed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fastvideo_wheel import ABSENT, FOLDER, import_module, users_of_distributed
from tests.harness import Ranks

pytestmark = pytest.mark.skipif(not FOLDER, reason="FASTVIDEO_DIR does not name a folder with FastVideo's wheel")

TOKENS, HEADS, HEAD, TEXT = 12, 4, 8, 3


def _on_the_cpu() -> None:
    """FastVideo with fvops in it, and with its SDPA back end."""
    from fvops.integrations import fastvideo

    fastvideo.install()
    import_module("fastvideo")  # whole, before anything in it looks for the platform
    platforms: Any = import_module("fastvideo.platforms")
    sdpa = "fastvideo.attention.backends.sdpa.SDPABackend"
    type(platforms.current_platform).get_attn_backend_cls = classmethod(lambda *_: sdpa)


def _imports() -> tuple[list[str], dict[str, str], list[str]]:
    """The modules that import, why others do not, and the packages that were stood in for."""
    _on_the_cpu()
    good, bad = [], {}
    for name in users_of_distributed():
        try:
            module = import_module(name)
        except Exception as error:
            bad[name] = f"{type(error).__name__}: {error}"
            continue
        good.append(name)
        for attribute, value in vars(module).items():
            home = getattr(value, "__module__", None)
            assert not str(home).startswith("fastvideo.distributed"), f"{name}.{attribute} is FastVideo's own"
    return good, bad, sorted(ABSENT)


def test_its_modules_import_their_names_from_fvops() -> None:
    good, bad, absent = Ranks.get(2).run(_imports, deadline_s=600)[0]
    print(f"{len(good)} import; stood in for {absent}; not: {bad}")
    for name in ("attention.layer", "layers.linear", "layers.vocab_parallel_embedding", "models.dits.wanvideo"):
        assert f"fastvideo.{name}" in good, bad
    # Whatever else may be missing on this machine, nothing of fvops is.
    assert not {name: why for name, why in bad.items() if "fvops" in why or "fastvideo.distributed" in why}


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _attention(compiled: bool) -> tuple[float, float, list[str]]:
    """The largest differences from attention over all tokens, of the sequence and of the text; and the collectives."""
    import fvops
    from fvops.debug import record_collectives

    _on_the_cpu()
    layers: Any = import_module("fastvideo.attention.layer")
    context: Any = import_module("fastvideo.forward_context")
    kinds: Any = import_module("fastvideo.platforms").AttentionBackendEnum
    group = fvops.get_sp_group()
    qkv, text = _draw(3, 1, TOKENS, HEADS, HEAD), _draw(3, 1, TEXT, HEADS, HEAD)
    layer = layers.DistributedAttention(HEADS, HEAD, supported_attention_backends=(kinds.TORCH_SDPA,))
    if compiled:
        layer._set_compile_forward_enabled(True)
        layer = torch.compile(layer, fullgraph=True, backend="aot_eager")
    own = qkv.chunk(group.world_size, 2)[group.rank_in_group]
    # The last token is padding.
    with record_collectives() as records, context.set_forward_context(0, None), torch.no_grad():
        out, out_of_text = layer(*own, TOKENS - 1, *text)
    q, k, v = torch.cat([qkv[:, :, : TOKENS - 1], text], 2).transpose(2, 3)
    expected = ((q @ k.mT / HEAD**0.5).softmax(-1) @ v).transpose(1, 2)
    padded = torch.cat([expected[:, : TOKENS - 1], torch.zeros(1, 1, HEADS, HEAD)], 1)
    part = padded.chunk(group.world_size, 1)[group.rank_in_group]
    differences = (out - part).abs().max(), (out_of_text - expected[:, TOKENS - 1 :]).abs().max()
    return float(differences[0]), float(differences[1]), [record.op for record in records]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_its_distributed_attention(compiled: bool) -> None:
    for sequence, text, ops in Ranks.get(2).run(_attention, compiled, deadline_s=300):
        assert sequence < 1e-5
        assert text < 1e-5
        assert ops == ["all_to_all_4D", "all_gather", "all_to_all_4D"]


def _wan() -> Any:
    config: Any = import_module("fastvideo.configs.models.dits.wanvideo")
    model: Any = import_module("fastvideo.models.dits.wanvideo")
    arch = config.WanVideoArchConfig(
        num_attention_heads=HEADS,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=64,
        num_layers=2,
    )
    torch.manual_seed(0)
    wan = model.WanTransformer3DModel(config.WanVideoConfig(arch_config=arch), {})
    with torch.no_grad():
        # FastVideo leaves its layers' weights to be loaded.
        for parameter in wan.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return wan


def _wan_against_one_rank() -> tuple[float, float]:
    """The largest difference of Wan's output over the group from that of a group of one; and how large it is."""
    import fvops
    from fvops.parallel_state import initialize_sequence_parallel_group, patch_sequence_parallel_group

    _on_the_cpu()
    wan = _wan()
    context: Any = import_module("fastvideo.forward_context")
    inputs = _draw(1, 4, 3, 6, 10), _draw(1, 7, 16), torch.tensor([500])  # 45 tokens, which 2 does not divide
    alone = initialize_sequence_parallel_group(1, group_name_suffix="alone")
    try:
        with context.set_forward_context(0, None), torch.no_grad():
            with patch_sequence_parallel_group(alone):
                expected = wan(*inputs)
            got = wan(*inputs)
    finally:
        alone.destroy()
    assert fvops.get_sp_world_size() > 1
    return float((got - expected).abs().max()), float(expected.abs().max())


def test_its_wan_transformer() -> None:
    for difference, size in Ranks.get(2).run(_wan_against_one_rank, deadline_s=300):
        assert difference < 1e-4 * max(size, 1.0)
        assert size > 0.01
