"""The video and image transformers that fvops is for, as one block each: sizes that users run, and Ulysses attention.

A block is what matters to a plan: self-attention with its exchanges, cross-attention where the model has it, and the
feed-forward part. It is written after the published architectures and holds no weights of theirs; modulation, and what
stands before and after the blocks, is left out. Build it on the meta device: a plan needs no memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fvops

__all__ = ["MODELS", "Block", "Model"]


@dataclass(frozen=True)
class Model:
    """Sizes of one model at one resolution, batch 1.

    Attributes:
        title: for people.
        tokens: of the video or image: the sequence that is sharded.
        text: tokens that join the self-attention and that every rank holds; 0 where the text is attended to across.
        heads: of self-attention.
        head_size: channels of a head.
        blocks: how many there are.
        ffn: channels inside the feed-forward part.
        cross: text tokens of cross-attention, 0 without.
    """

    title: str
    tokens: int
    text: int
    heads: int
    head_size: int
    blocks: int
    ffn: int
    cross: int = 0

    @property
    def channels(self) -> int:
        return self.heads * self.head_size


MODELS = {
    "wan-1.3b": Model("Wan2.1 1.3B 480p 81f", 32_760, 0, 12, 128, 30, 8960, cross=512),
    "wan-14b": Model("Wan2.1 14B 480p 81f", 32_760, 0, 40, 128, 40, 13_824, cross=512),
    "wan-14b-720p": Model("Wan2.1 14B 720p 81f", 75_600, 0, 40, 128, 40, 13_824, cross=512),
    "wan-5b": Model("Wan2.2 5B 704p 121f", 27_280, 0, 24, 128, 30, 14_336, cross=512),
    "hunyuan": Model("HunyuanVideo 720p 129f", 118_800, 256, 24, 128, 60, 12_288),
    "flux": Model("FLUX.1 1024x1024", 4_096, 512, 24, 128, 57, 12_288),
    "cogvideox-5b": Model("CogVideoX-5B 49f", 17_550, 226, 48, 64, 42, 12_288),
    "ltx": Model("LTX-Video 512x768 121f", 6_144, 0, 32, 64, 28, 8_192, cross=256),
}


class Block(nn.Module):
    """One block on a rank's share of the tokens; q, k and v travel in one grouped exchange.

    Where the number of tokens is not a multiple of P, the last rank's share is padded and the padding is cut off before
    attention, of which it must not be part. A joint text goes through on every rank; its attention works on the rank's
    heads, which are then gathered.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        C = model.channels
        self.norm_1, self.norm_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.norm_q, self.norm_k = nn.RMSNorm(model.head_size), nn.RMSNorm(model.head_size)
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.ffn = nn.Sequential(nn.Linear(C, model.ffn), nn.GELU(approximate="tanh"), nn.Linear(model.ffn, C))
        if model.cross:
            self.norm_cross = nn.LayerNorm(C)
            self.cross_q, self.cross_kv, self.cross_out = nn.Linear(C, C), nn.Linear(C, 2 * C), nn.Linear(C, C)

    def inputs(self, world_size: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
        """A rank's share of the tokens, the rotary angles of these and the text, on the meta device."""
        share = -(-self.model.tokens // world_size)
        sizes = [(1, share, self.model.channels), (1, share, 1, self.model.head_size)]
        sizes.append((1, max(self.model.text, self.model.cross), self.model.channels))
        return tuple(torch.empty(size, dtype=dtype, device="meta") for size in sizes)

    def forward(self, x: Tensor, angles: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """``x [1, S/P, C]``, ``angles [1, S/P, 1, D]``, ``text [1, T, C]`` to the same x and text."""
        if self.model.text:
            attended, attended_text = self.joint_attention(x, angles, text)
            text = text + self.out(attended_text)
            text = text + self.ffn(self.norm_2(text))
        else:
            attended = self.attention(x, angles)
        x = x + self.out(attended)
        if self.model.cross:
            x = x + self.cross_attention(self.norm_cross(x), text)
        return x + self.ffn(self.norm_2(x)), text

    def attention(self, x: Tensor, angles: Tensor) -> Tensor:
        q_BSHD, k_BSHD, v_BSHD = self._exchanged(x, angles)
        return self._exchange_back(_attend(q_BSHD, k_BSHD, v_BSHD))

    def joint_attention(self, x: Tensor, angles: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        group = fvops.get_sp_group()
        qkv_BSHD = self._exchanged(x, angles)
        # Every rank has the whole text: it takes its heads of it, and nothing is sent.
        text_BSHD = [group.shard(part, 2, scale_grad=False) for part in self._heads(self.norm_1(text), None)]
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(qkv_BSHD, text_BSHD, strict=True))
        out_BSHD = _attend(q, k, v)
        video_BSHD, own_text_BSHD = out_BSHD.split([self.model.tokens, self.model.text], dim=1)
        return self._exchange_back(video_BSHD), group.all_gather(own_text_BSHD.contiguous(), dim=2).flatten(2)

    def cross_attention(self, x: Tensor, text: Tensor) -> Tensor:
        heads = (-1, self.model.head_size)
        k_BSHD, v_BSHD = (part.unflatten(2, heads) for part in self.cross_kv(text).chunk(2, dim=2))
        return self.cross_out(_attend(self.cross_q(x).unflatten(2, heads), k_BSHD, v_BSHD).flatten(2))

    def _exchanged(self, x: Tensor, angles: Tensor) -> tuple[Tensor, ...]:
        """q, k and v of all tokens, this rank's heads."""
        parts = fvops.get_sp_group().all_to_all_4D_coalesced(self._heads(self.norm_1(x), angles), 2, 1)
        return tuple(part[:, : self.model.tokens] for part in parts)

    def _exchange_back(self, out_BSHD: Tensor) -> Tensor:
        group = fvops.get_sp_group()
        padding = -self.model.tokens % group.world_size
        if padding:
            out_BSHD = F.pad(out_BSHD, (0, 0, 0, 0, 0, padding))
        return group.all_to_all_4D(out_BSHD, 1, 2).flatten(2)

    def _heads(self, x: Tensor, angles: Tensor | None) -> list[Tensor]:
        q, k, v = (part.unflatten(2, (-1, self.model.head_size)) for part in self.qkv(x).chunk(3, dim=2))
        q, k = self.norm_q(q), self.norm_k(k)
        return [q, k, v] if angles is None else [_rotated(q, angles), _rotated(k, angles), v]


def _attend(q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
    q, k, v = (part.transpose(1, 2) for part in (q_BSHD, k_BSHD, v_BSHD))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _rotated(x_BSHD: Tensor, angles: Tensor) -> Tensor:
    one, other = x_BSHD.chunk(2, dim=3)
    return x_BSHD * angles.cos() + torch.cat([-other, one], dim=3) * angles.sin()
