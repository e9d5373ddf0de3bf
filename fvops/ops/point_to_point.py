"""send and recv: one tensor from one rank to another. They match in the order in which they are called."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fvops import checks
from fvops.ops._define import Group, checked_in_python, define
from fvops.registry import resolve

__all__ = ["recv", "send"]


def send(group: Group, tensor: Tensor, dst: int) -> None:
    """Send `tensor` to place `dst`; may return before the receiver has posted."""
    if checked_in_python(group, tensor):
        checks.check_strided("send", group.unique_name, tensor)
        checks.check_peer("send", group.unique_name, "dst", dst, group.rank_in_group, group.world_size)
        checks.check_no_grad("send", group.unique_name, tensor)
        checks.check_device("send", group.unique_name, tensor, group.device)
    send_op(tensor, dst, group.world_size, group.unique_name)


def send_eager(input_: Tensor, dst: int, world_size: int, group_name: str) -> None:
    resolve(group_name, world_size).send(input_, dst)


def send_fake(input_: Tensor, dst: int, world_size: int, group_name: str) -> None:
    checks.check_strided("send", group_name, input_)
    checks.check_place("send", group_name, "dst", dst, world_size)


def send_refuse_grad(input_: Tensor, dst: int, world_size: int, group_name: str) -> None:
    checks.check_no_grad("send", group_name, input_)


send_op = define(
    "send(Tensor input, int dst, int world_size, str group_name) -> ()",
    eager=send_eager,
    fake=send_fake,
    refuse_grad=send_refuse_grad,
)


def recv(group: Group, size: Sequence[int], dtype: torch.dtype, src: int) -> Tensor:
    """A new tensor of `size` and `dtype`, on the group's device, from place `src`."""
    if torch.compiler.is_compiling():
        checks.check_peer("recv", group.unique_name, "src", src, group.rank_in_group, group.world_size)
    return recv_op(size, dtype, group.device, src, group.world_size, group.unique_name)


def recv_eager(
    size: Sequence[int], dtype: torch.dtype, device: torch.device, src: int, world_size: int, group_name: str
) -> Tensor:
    communicator = resolve(group_name, world_size)
    if device != communicator.device:
        raise ValueError(
            f"{checks.where('recv', group_name)}: cannot receive on {device}, the group communicates on "
            f"{communicator.device}"
        )
    return communicator.recv(size, dtype, src)


def recv_fake(
    size: Sequence[int], dtype: torch.dtype, device: torch.device, src: int, world_size: int, group_name: str
) -> Tensor:
    checks.check_place("recv", group_name, "src", src, world_size)
    return torch.empty(size, dtype=dtype, device=device)


recv_op = define(
    "recv(SymInt[] size, ScalarType dtype, Device device, int src, int world_size, str group_name) -> Tensor",
    eager=recv_eager,
    fake=recv_fake,
)
