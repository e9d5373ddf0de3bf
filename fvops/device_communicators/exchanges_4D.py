"""The 4D exchange in each of its forms: checked, cut into rank-major parts and handed to whoever issues it.

A form is issued at once (`DeviceCommunicatorBase._issue`) or begun and waited for later (`start`); what is sent,
checked and recorded is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fvops import checks
from fvops.device_communicators.asynchronous import Later, Started
from fvops.kernels import layout

if TYPE_CHECKING:
    from fvops.device_communicators.base_device_communicator import DeviceCommunicatorBase

__all__ = ["FORMS", "coalesced", "packed", "single", "start"]

FORMS = ("single", "coalesced", "packed single", "packed coalesced")

# Called with the op's name, the tensors and arguments to record, the transport's method and its arguments.
Issue = Callable[..., None]


def single(
    communicator: DeviceCommunicatorBase, issue: Issue, input_: Tensor, scatter_dim: int, gather_dim: int
) -> Tensor:
    """One tensor; `DeviceCommunicatorBase.all_to_all_4D`."""
    communicator.check("all_to_all_4D", input_)
    checks.check_all_to_all_4D(communicator.unique_name, input_, scatter_dim, gather_dim, communicator.world_size)
    output = _output(communicator, input_, scatter_dim)
    arguments = {"scatter_dim": scatter_dim, "gather_dim": gather_dim}
    issue("all_to_all_4D", input_, arguments, communicator.transport.exchange_4D, [output], [input_], scatter_dim)
    return output


def coalesced(
    communicator: DeviceCommunicatorBase, issue: Issue, inputs: list[Tensor], scatter_dim: int, gather_dim: int
) -> list[Tensor]:
    """Several tensors; `DeviceCommunicatorBase.all_to_all_4D_coalesced`."""
    checks.check_all_to_all_4D_coalesced(
        communicator.unique_name, inputs, scatter_dim, gather_dim, communicator.world_size
    )
    for input_ in inputs:
        communicator.check("all_to_all_4D_coalesced", input_)
    outputs = [_output(communicator, input_, scatter_dim) for input_ in inputs]
    arguments = {"scatter_dim": scatter_dim, "gather_dim": gather_dim}
    exchange = communicator.transport.exchange_4D
    issue("all_to_all_4D_coalesced", inputs, arguments, exchange, outputs, inputs, scatter_dim)
    return outputs


def packed(
    communicator: DeviceCommunicatorBase,
    issue: Issue,
    sends: list[Tensor],
    scatter_dim: int,
    gather_dim: int,
    was_single: bool,
) -> list[Tensor]:
    """Parts that a compiled graph has packed; `DeviceCommunicatorBase.all_to_all_4D_packed`."""
    checks.check_all_to_all_4D_packed(communicator.unique_name, sends, scatter_dim, gather_dim, communicator.world_size)
    for send in sends:
        communicator.check("all_to_all_4D_packed", send)
    recvs = [communicator.transport.empty(send.shape, send.dtype) for send in sends]
    arguments = {"scatter_dim": scatter_dim, "gather_dim": gather_dim}
    # For the records and for messages only, and never read: tensors of the shapes before packing.
    handed_in = [send.as_strided(layout.unpacked_shape(send.shape, scatter_dim), (0,) * 4) for send in sends]
    op = "all_to_all_4D" if was_single else "all_to_all_4D_coalesced"
    issue(op, handed_in, arguments, communicator.transport.exchange, recvs, sends)
    return recvs


def start(
    communicator: DeviceCommunicatorBase,
    later: Later,
    inputs: list[Tensor],
    scatter_dim: int,
    gather_dim: int,
    form: str,
) -> Started:
    """Begin the exchange; `DeviceCommunicatorBase.start_all_to_all_4D`. ValueError when there is no such form."""
    if form not in FORMS:
        where = checks.where("all_to_all_4D_start", communicator.unique_name)
        raise ValueError(f"{where}: form={form!r} must be one of {', '.join(map(repr, FORMS))}")
    begun: list[Any] = []

    def issue(*call: Any) -> None:
        begun.append(later.begin(inputs, *call))

    if form == "single":
        (input_,) = inputs
        outputs = [single(communicator, issue, input_, scatter_dim, gather_dim)]
    elif form == "coalesced":
        outputs = coalesced(communicator, issue, inputs, scatter_dim, gather_dim)
    else:
        outputs = packed(communicator, issue, inputs, scatter_dim, gather_dim, form == "packed single")
    return Started(outputs, *begun)


def _output(communicator: DeviceCommunicatorBase, input_: Tensor, scatter_dim: int) -> Tensor:
    """Memory for the result."""
    B, S, H, D = input_.shape
    P = communicator.world_size
    shape = (B, S * P, H // P, D) if scatter_dim == 2 else (B, S // P, H * P, D)
    return communicator.transport.empty(shape, input_.dtype)
