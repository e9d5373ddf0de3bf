"""Collectives over a collective library's own C interface: what NCCL and HCCL share.

They work on the caller's tensors and the caller's stream, need no torch.distributed backend, and issue nothing that a
CUDA graph could not capture. Every argument is checked before its address is handed on.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fvops import checks
from fvops.checks import where
from fvops.device_communicators.library_arguments import check_pair, check_rows
from fvops.device_communicators.library_connection import LibraryConnection
from fvops.reduce_op import reduce_op_name

__all__ = ["Exchange", "LibraryCommunicator"]


class Exchange(NamedTuple):
    """An all-to-all as a library is handed it: addresses, its dtype, bytes of an element, elements by peer."""

    send: int
    recv: int
    dtype: int
    width: int
    send_counts: Sequence[int]
    recv_counts: Sequence[int]


class LibraryCommunicator(LibraryConnection):
    """The methods of one communicator; see `LibraryConnection` for its arguments, attributes and life.

    All methods work on `stream`, None for the current one, and return when the call is issued. They raise, besides
    what their arguments deserve, `BrokenCommunicatorError` (a RuntimeError) when the library fails or a deadline
    passes, and RuntimeError on a disabled communicator. Arguments: ValueError for memory that is not contiguous or not
    on the device, a wrong size or rank; TypeError for a dtype that the library does not reduce. Data movers take every
    dtype, as bytes where the library has no name for it.
    """

    DTYPES: ClassVar[Mapping[torch.dtype, int]]  # the library's numbers
    HAS_AVG: ClassVar[bool]

    def reduces(self, dtype: torch.dtype, op: Any = dist.ReduceOp.SUM) -> bool:
        """Can the library itself reduce this dtype so? What it cannot is refused."""
        return self._native(dtype, reduce_op_name(op)) is not None

    def all_reduce(
        self, in_tensor: Tensor, op: Any = dist.ReduceOp.SUM, stream: Any = None, *, out: Tensor | None = None
    ) -> Tensor:
        """The reduction of the ranks' tensors, in `out` (default: a new tensor; it may be `in_tensor` itself)."""
        name, stream = self._prepare("all_reduce", stream, in_tensor=in_tensor, **({} if out is None else {"out": out}))
        out = self._like(in_tensor, stream) if out is None else out
        check_pair(name, self.group_name, out, in_tensor)
        reduction, dtype, number = self._reduction(name, op, in_tensor.dtype)
        arguments = (in_tensor.data_ptr(), out.data_ptr(), in_tensor.numel(), dtype, number)
        self._run(name, stream, self.library.all_reduce, *arguments)
        self._average(out, reduction, stream)
        return out

    def reduce(
        self, in_tensor: Tensor, dst: int, op: Any = dist.ReduceOp.SUM, stream: Any = None, *, out: Tensor | None = None
    ) -> Tensor | None:
        """The reduction of the ranks' tensors, in `out` (default: a new tensor), on `dst`; None elsewhere."""
        name, stream = self._prepare("reduce", stream, in_tensor=in_tensor, **({} if out is None else {"out": out}))
        out = self._like(in_tensor, stream) if out is None else out
        check_pair(name, self.group_name, out, in_tensor)
        checks.check_place(name, self.group_name, "dst", dst, self.world_size)
        reduction, dtype, number = self._reduction(name, op, in_tensor.dtype)
        arguments = (in_tensor.data_ptr(), out.data_ptr(), in_tensor.numel(), dtype, number, dst)
        self._run(name, stream, self.library.reduce, *arguments)
        if self.rank != dst:
            return None
        self._average(out, reduction, stream)
        return out

    def all_gather(self, output_tensor: Tensor, input_tensor: Tensor, stream: Any = None) -> None:
        """`output_tensor` is the ranks' `input_tensor` one after another: P times its elements."""
        name, stream = self._prepare("all_gather", stream, output_tensor=output_tensor, input_tensor=input_tensor)
        check_pair(name, self.group_name, output_tensor, input_tensor, output_parts=self.world_size)
        dtype, factor = self._wire(input_tensor)
        arguments = (input_tensor.data_ptr(), output_tensor.data_ptr(), input_tensor.numel() * factor, dtype)
        self._run(name, stream, self.library.all_gather, *arguments)

    def reduce_scatter(
        self, output_tensor: Tensor, input_tensor: Tensor, op: Any = dist.ReduceOp.SUM, stream: Any = None
    ) -> None:
        """`output_tensor` is this rank's P-th part of the reduction of the ranks' `input_tensor`."""
        name, stream = self._prepare("reduce_scatter", stream, output_tensor=output_tensor, input_tensor=input_tensor)
        check_pair(name, self.group_name, output_tensor, input_tensor, input_parts=self.world_size)
        reduction, dtype, number = self._reduction(name, op, input_tensor.dtype)
        arguments = (input_tensor.data_ptr(), output_tensor.data_ptr(), output_tensor.numel(), dtype, number)
        self._run(name, stream, self.library.reduce_scatter, *arguments)
        self._average(output_tensor, reduction, stream)

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        """`tensor` of `src` on every rank, in place."""
        name, stream = self._prepare("broadcast", stream, tensor=tensor)
        checks.check_place(name, self.group_name, "src", src, self.world_size)
        dtype, factor = self._wire(tensor)
        self._broadcast(name, stream, tensor.data_ptr(), tensor.numel() * factor, dtype, src)

    def send(self, tensor: Tensor, dst: int, stream: Any = None) -> None:
        """Send to place `dst`; may wait for the receiver. To oneself only inside a group."""
        name, stream = self._prepare("send", stream, tensor=tensor)
        self._check_partner(name, "dst", dst)
        self._transfer(name, stream, tensor, dst, sending=True)

    def recv(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        """Fill `tensor` with what place `src` sends. From oneself only inside a group."""
        name, stream = self._prepare("recv", stream, tensor=tensor)
        self._check_partner(name, "src", src)
        self._transfer(name, stream, tensor, src, sending=False)

    def all_to_all_single(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        output_split_sizes: Sequence[int] | None = None,
        input_split_sizes: Sequence[int] | None = None,
        stream: Any = None,
    ) -> None:
        """Part j of the input's dim 0 goes to rank j, part j of the output comes from it: equal, or so many rows."""
        name, stream = self._prepare(
            "all_to_all_single", stream, output_tensor=output_tensor, input_tensor=input_tensor
        )
        split = (output_split_sizes, input_split_sizes)
        check_rows(name, self.group_name, output_tensor, input_tensor, *split, self.world_size)
        dtype, factor = self._wire(input_tensor)
        place = (input_tensor.data_ptr(), output_tensor.data_ptr(), dtype, input_tensor.element_size() // factor)
        if output_split_sizes is None or input_split_sizes is None:
            count = input_tensor.numel() * factor // self.world_size
            counts = [count] * self.world_size
            self._all_to_all(name, stream, Exchange(*place, counts, counts), count)
            return
        row = input_tensor.shape[1:].numel() * factor
        sends, recvs = [size * row for size in input_split_sizes], [size * row for size in output_split_sizes]
        self._all_to_all_v(name, stream, Exchange(*place, sends, recvs))

    @abstractmethod
    def group_start(self) -> None:
        """Collect sends and receives until `group_end`; nests."""

    @abstractmethod
    def group_end(self) -> None:
        """Issue what was collected since `group_start`, all in progress together.

        Raises:
            RuntimeError: no group is open.
        """

    # Where the libraries differ; counts are in the library's elements

    @abstractmethod
    def _native(self, dtype: torch.dtype, reduce_op: str) -> tuple[int, int] | None:
        """The library's numbers of a dtype and a reduction, None where it does not have them together."""

    @abstractmethod
    def _broadcast(self, op: str, stream: Any, buffer: int, count: int, dtype: int, src: int) -> None: ...

    @abstractmethod
    def _transfer(self, op: str, stream: Any, tensor: Tensor, peer: int, *, sending: bool) -> None: ...

    @abstractmethod
    def _all_to_all(self, op: str, stream: Any, parts: Exchange, count: int) -> None:
        """Every part has `count` elements."""

    @abstractmethod
    def _all_to_all_v(self, op: str, stream: Any, parts: Exchange) -> None: ...

    # Shared steps

    def _wire(self, tensor: Tensor) -> tuple[int, int]:
        """How data movers send a dtype: the library's number, or that of bytes, and how many of these an element is."""
        number = self.DTYPES.get(tensor.dtype)
        return (number, 1) if number is not None else (self.DTYPES[torch.uint8], tensor.element_size())

    def _reduction(self, op: str, reduce_op: Any, dtype: torch.dtype) -> tuple[str, int, int]:
        name = reduce_op_name(reduce_op)
        checks.check_reduce_op(op, self.group_name, name, dtype)
        native = self._native(dtype, name)
        if native is None:
            raise TypeError(f"{where(op, self.group_name)}: {self.BACKEND} does not reduce {dtype} with {name} here")
        return (name, *native)

    def _average(self, total: Tensor, reduction: str, stream: Any) -> None:
        if reduction == "avg" and not self.HAS_AVG:
            with self._streams.use(stream):
                total.div_(self.world_size)

    def _like(self, tensor: Tensor, stream: Any) -> Tensor:
        with self._streams.use(stream):  # the allocator ties memory to the stream that it is asked on
            out = torch.empty_like(tensor)
        if self._group_depth:
            self._group_keeps.append(out)
        return out

    def _check_partner(self, op: str, what: str, peer: int) -> None:
        if self._group_depth:
            checks.check_place(op, self.group_name, what, peer, self.world_size)
        else:
            checks.check_peer(op, self.group_name, what, peer, self.rank, self.world_size)

    def _check_group_open(self) -> str:
        op = f"{self.NAME}.group_end"
        if not self._group_depth:
            self._refuse_if_broken(op)  # a failure has closed the group, and is what to report
            raise RuntimeError(f"{where(op, self.group_name)}: no group is open; call group_start first")
        return op
