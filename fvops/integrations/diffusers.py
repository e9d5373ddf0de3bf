"""Sequence parallelism for diffusers' models, their code untouched.

Supported: `WanTransformer3DModel` (Wan 2.1 and 2.2, text- and image-to-video). Between the patch embedding and the
output projection a rank holds ``[B, S/P, ...]`` of the tokens. Self-attention is Ulysses (Jacobs et al., 2023,
https://arxiv.org/abs/2309.14509); everything else in a block works token by token, or, in cross-attention, against a
text that every rank has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fvops.checks import check_divisible
from fvops.group_coordinator import GroupCoordinator
from fvops.parallel_state import get_sp_group

__all__ = ["UlyssesWanAttnProcessor", "parallelize"]


def parallelize(model: nn.Module, group: GroupCoordinator | None = None) -> nn.Module:
    """Shard the model's token sequence over `group`; inputs and outputs stay whole on every rank. Returns `model`.

    The inputs must be equal on all ranks of the group; the output then is. Works eagerly and under
    ``torch.compile(model, fullgraph=True)``; call this first, compile afterwards. With one rank the model is unchanged.

    Gradients: when every rank computes the same loss from the output, each parameter's gradients *averaged* over the
    group (what DDP does) are those of a single rank. A rank's own gradient holds only its tokens' part, times P. The
    gradient of the latents is complete on every rank; those of text, image and a timestep that all tokens share are
    averaged like parameters'.

    Args:
        model: a diffusers `WanTransformer3DModel` with diffusers' own attention processors.
        group: default: the current sequence-parallel group.

    Raises:
        ImportError: diffusers is not installed.
        TypeError: the model, or a self-attention's processor, is not of a supported class.
        RuntimeError: the model is parallelized already, by this function or by diffusers' ``enable_parallelism``.
        ValueError: the number of heads is not divisible by P. The same for the number of tokens, in the forward pass
            and before anything is sent: tokens are never padded, since padding would take part in attention.
    """
    try:
        from diffusers import WanTransformer3DModel
        from diffusers.models.attention_dispatch import dispatch_attention_fn
    except ImportError as error:
        raise ImportError(f"fvops.integrations.diffusers needs diffusers, as tested with 0.42 ({error})") from error
    if not isinstance(model, WanTransformer3DModel):
        raise TypeError(
            f"parallelize: {type(model).__name__} is not supported; supported: WanTransformer3DModel "
            "(itself, before torch.compile or any other wrapper)"
        )
    group = get_sp_group() if group is None else group
    wan: Any = model
    _check_untouched(wan)
    if group.world_size == 1:
        return model
    heads = wan.config.num_attention_heads
    check_divisible("parallelize", group.unique_name, "num_attention_heads", heads, group.world_size)

    # The way of the tokens, from the first hook to the last.
    wan.rope.register_forward_hook(_shard_rotary_embedding(group))
    wan.condition_embedder.register_forward_pre_hook(_shard_timestep_per_token(group), with_kwargs=True)
    wan.blocks[0].register_forward_pre_hook(_shard_tokens(group))
    for block in wan.blocks:
        backend = block.attn1.processor._attention_backend
        block.attn1.set_processor(UlyssesWanAttnProcessor(group, dispatch_attention_fn, backend))
    wan.proj_out.register_forward_hook(_gather_tokens(group))
    return model


class UlyssesWanAttnProcessor:
    """diffusers' `WanAttnProcessor` for self-attention on sequence shards: exchange, attend to all tokens, exchange.

    Args:
        group: who holds the other shards.
        attention: diffusers' `dispatch_attention_fn`.
        backend: the attention backend; ``model.set_attention_backend`` changes it here as in diffusers' processors.
    """

    def __init__(self, group: GroupCoordinator, attention: Callable[..., Tensor], backend: Any = None) -> None:
        self.group = group
        self.attention = attention
        self._attention_backend = backend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """``[B, S/P, C] -> [B, S/P, C]``; the rotary embedding is this shard's, a mask is the whole sequence's."""
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q_BSHD = attn.norm_q(query).unflatten(2, (attn.heads, -1))
        k_BSHD = attn.norm_k(key).unflatten(2, (attn.heads, -1))
        v_BSHD = value.unflatten(2, (attn.heads, -1))
        if rotary_emb is not None:
            q_BSHD, k_BSHD = _rotate(q_BSHD, *rotary_emb), _rotate(k_BSHD, *rotary_emb)
        # One exchange instead of three. Concatenated, they would be copied first.
        q_BSHD, k_BSHD, v_BSHD = self.group.all_to_all_4D_coalesced([q_BSHD, k_BSHD, v_BSHD], 2, 1)
        out_BSHD = self.attention(
            q_BSHD, k_BSHD, v_BSHD, attn_mask=attention_mask, backend=self._attention_backend, parallel_config=None
        )
        out_BSHD = self.group.all_to_all_4D(out_BSHD, 1, 2)
        output = out_BSHD.flatten(2, 3).type_as(q_BSHD)
        return attn.to_out[1](attn.to_out[0](output))


def _check_untouched(model: Any) -> None:
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    if getattr(model, "_parallel_config", None) is not None:
        raise RuntimeError("parallelize: diffusers' enable_parallelism has parallelized this model already")
    for block in model.blocks:
        processor = block.attn1.processor
        if isinstance(processor, UlyssesWanAttnProcessor):
            raise RuntimeError("parallelize: this model is parallelized already")
        if type(processor) is not WanAttnProcessor:
            raise TypeError(
                f"parallelize: self-attention uses {type(processor).__name__}, which would be replaced; "
                "supported: WanAttnProcessor"
            )


def _rotate(x_BSHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of D; `cos` and `sin` ``[1, S, 1, D]`` hold each value twice."""
    even, odd = x_BSHD.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x_BSHD)


def _shard_rotary_embedding(group: GroupCoordinator) -> Callable[..., Any]:
    def hook(rope: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        # The model's first step, and the first to know how many tokens there will be.
        cos, sin = output
        check_divisible("parallelize", group.unique_name, "the token sequence", cos.size(1), group.world_size)
        return group.shard(cos, 1, scale_grad=True), group.shard(sin, 1, scale_grad=True)

    return hook


def _shard_timestep_per_token(group: GroupCoordinator) -> Callable[..., Any]:
    def hook(embedder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tokens = kwargs.get("timestep_seq_len")
        # Wan 2.2 TI2V has a timestep per token, flattened to [B*S]. A single one is broadcast to all tokens.
        if tokens is None or tokens == 1:
            return None
        timestep = group.shard(args[0].unflatten(0, (-1, tokens)), 1, scale_grad=True)
        return (timestep.flatten(), *args[1:]), {**kwargs, "timestep_seq_len": timestep.size(1)}

    return hook


def _shard_tokens(group: GroupCoordinator) -> Callable[..., Any]:
    def hook(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # The gather's backward sums P equal gradients; scale_grad takes the P out again for what comes before.
        return (group.shard(args[0], 1, scale_grad=True), *args[1:])

    return hook


def _gather_tokens(group: GroupCoordinator) -> Callable[..., Any]:
    def hook(proj_out: nn.Module, args: Any, output: Tensor) -> Tensor:
        return group.all_gather(output, dim=1)

    return hook
