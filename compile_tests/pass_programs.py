"""Programs for the passes, and how a run with passes is compared with eager.

Each takes ``x [B, 2P, 4PP, 5]``, this rank's part, and takes means rather than sums: compiled code rounds otherwise
than eager, and what that makes of the result may not grow with the world. `compare_with_eager` compiles one under some
switches, checks values and gradients, and hands back what both runs issued.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fvops
from fvops.debug import CollectiveRecord, record_collectives

__all__ = [
    "ABSORBED",
    "CANCELLED",
    "KEPT",
    "MERGED",
    "OVERLAPPED",
    "PROGRAMS",
    "Issued",
    "compare_with_eager",
    "example",
    "issued",
]

Program = Callable[[Tensor], Any]
# (op, shapes of the tensors, arguments) of each collective, in order.
Issued = list[tuple[str, tuple[tuple[int, ...], ...], tuple[Any, ...]]]


def _heads(x: Tensor) -> Tensor:
    return fvops.get_sp_group().all_to_all_4D(x, 2, 1)


def _sequence(x: Tensor) -> Tensor:
    return fvops.get_sp_group().all_to_all_4D(x, 1, 2)


def _qkv(x: Tensor) -> Tensor:
    q, k, v = (_heads(y).transpose(1, 2) for y in (x.sin(), x * 2, x.cos()))
    # Nothing that Inductor takes for attention: in torch 2.11 that fails in float64 on CPU, in the compiled backward.
    attended = (q @ k.mT).sin() @ v
    return _sequence(attended.transpose(1, 2)) + x


def _dependent(x: Tensor) -> Tensor:
    y = _heads(x)
    z = _heads(x + y.mean())
    return y + z + _heads(x.cos())


def _another_op_between(x: Tensor) -> Tensor:
    y = _heads(x)
    total = fvops.get_sp_group().all_reduce(x)
    return y.mean() + _heads(x * 2).mean() + total


def _both_directions(x: Tensor) -> Tensor:
    return _heads(x).mean() + _sequence(x.sin()).mean()


def _with_a_list(x: Tensor) -> Tensor:
    y = _heads(x.sin())
    z, w = fvops.get_sp_group().all_to_all_4D_coalesced([x * 3, x[..., :2].cos()], 2, 1)
    return y * z + w.mean()


def _one_unread(x: Tensor) -> Tensor:
    _heads(x.sin())
    return _heads(x * 2)


def _read_before_the_second(x: Tensor) -> tuple[Tensor, Tensor]:
    early = _heads(x).sin()
    return early.mean(), _heads(x.exp()) + early


# name -> (program, the tensors in each exchange of the forward under `merge`)
MERGED: dict[str, tuple[Program, list[int]]] = {
    "q, k and v": (_qkv, [3, 1]),
    "one reads another": (_dependent, [1, 2]),
    "another op between": (_another_op_between, [1, 1]),
    "both directions": (_both_directions, [1, 1]),
    "with a list": (_with_a_list, [3]),
    "one unread": (_one_unread, [2]),
    "read before the second": (_read_before_the_second, [2]),
}

# Whose exchanges all disappear under `cancel`, in forward and backward.
CANCELLED: dict[str, Program] = {
    "nothing between": lambda x: _sequence(_heads(x)),
    "elementwise": lambda x: _sequence(_heads(x.exp()).sin() * 2 + 1),
    "of two": lambda x: _sequence(_heads(x) * _heads(x.cos())) + x,
    "permuted and back": lambda x: _sequence(_heads(x).transpose(1, 2).sin().transpose(1, 2)),
    "other direction first": lambda x: _heads(_sequence(x).cos()),
    "pair after pair": lambda x: _sequence(_heads(_sequence(_heads(x).sin()).cos()).tanh()),
    "pair in pair": lambda x: _sequence(_sequence(_heads(_heads(x)).sin())).cos(),
    "another dtype": lambda x: _sequence(_heads(x * 100).int().double()),
    "flattened and back": lambda x: _sequence(_heads(x).flatten(2).sin().view(_heads_shape(x))),
    "of two, flattened": lambda x: _sequence((_heads(x).flatten() * _heads(x.cos()).flatten()).view(_heads_shape(x))),
    "permuted, then viewed": lambda x: _sequence(_permuted_and_viewed(_heads(x.cos()))),
    "numbers in tensors": lambda x: _sequence(_filled(_heads(x - 0.5))),
    "dims of size 1 dropped": lambda x: _sequence(_heads(x[:1]).squeeze().exp().view(_heads_shape(x[:1]))),
    "another memory format": lambda x: _sequence(_heads(x).clone(memory_format=torch.channels_last).exp()),
    "of sizes that were received": lambda x: _sequence((y := _heads(x)).flatten(0, 1).sin().unflatten(0, y.shape[:2])),
    "of a rounded size": lambda x: _sequence((y := _heads(_rounded(x))).flatten(0, 1).sin().unflatten(0, y.shape[:2])),
    "scaled by a size": lambda x: _sequence((y := _heads(x)) * y.size(1) ** -0.5 + torch.full_like(y, x.size(1))),
    "lists": lambda x: tuple(_sequences([y.sin() for y in _heads_of([x, x.cos(), x * 2])])),
    "a list, then single ones": lambda x: tuple(_sequence(y.exp()) for y in _heads_of([x, x.cos()])),
    "single ones, then a list": lambda x: tuple(_sequences([_heads(x).tanh(), _heads(x.cos()) * _heads(x.sin())])),
}


def _filled(y: Tensor) -> Tensor:
    """Work with tensors of one number, of which one decides the dtype; in backward, zeros where gradients stop."""
    z = torch.relu(y).clamp(max=0.4).masked_fill(y > 0.3, 2).expand(y.shape)
    # Whole numbers in float32: what else is rounded to it, compiled code of torch 2.11 rounds less often than eager.
    steps = (z.detach() * 8).int().float() + torch.full_like(y, 0.5)
    return torch.where(z < 0.1, torch.full_like(z, 3), z + steps)


def _rounded(x: Tensor) -> Tensor:
    """Half as long again, as a program says that rounds: ``[B, int(1.5*S), H, D]``."""
    return torch.cat([x, x.cos()], 1)[:, : int(x.size(1) * 1.5)]


def _heads_of(tensors: list[Tensor]) -> list[Tensor]:
    return fvops.get_sp_group().all_to_all_4D_coalesced(tensors, 2, 1)


def _sequences(tensors: list[Tensor]) -> list[Tensor]:
    return fvops.get_sp_group().all_to_all_4D_coalesced(tensors, 1, 2)


def _heads_shape(x: Tensor) -> tuple[int, ...]:
    """Of what `_heads` returns."""
    P = fvops.get_sp_group().world_size
    return x.size(0), x.size(1) * P, x.size(2) // P, x.size(3)


def _permuted_and_viewed(y: Tensor) -> Tensor:
    """Through a copy: what is permuted has no flat view. Two views one after the other, a dim of size 1 among them."""
    permuted = y.transpose(1, 2)
    return permuted.flatten(1, 2).unsqueeze(0).exp().squeeze(0).reshape(permuted.shape).transpose(1, 2)


def _square(x: Tensor) -> Tensor:
    """Something that dims 1 and 2 can be swapped in after the exchange: ``[B, n, n*P*P, D]``."""
    P = fvops.get_sp_group().world_size
    return x[:, :2, : 2 * P * P]


def _halved(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Half as many heads, twice the sequence."""
    B, S, H, D = shape
    return B, 2 * S, H // 2, D


# name -> (program, exchanges that stay under `cancel` without gradients)
KEPT: dict[str, tuple[Program, int]] = {
    "result read elsewhere": (lambda x: (_sequence((y := _heads(x)).sin()), y), 1),
    "a tensor of this rank": (lambda x: _sequence(_heads(x) * x.repeat(1, 1, 1, 1)[:, :1, :1].sum(1, keepdim=True)), 2),
    "a number in a tensor": (lambda x: _sequence(_heads(x) + x.mean()), 2),
    "another order": (lambda x: _sequence(_heads(x).flip(1)), 2),
    "a sum": (lambda x: _sequence(_heads(x) + _heads(x).sum(1, keepdim=True)), 3),
    "permuted": (lambda x: _sequence(_heads(_square(x)).transpose(1, 2)), 2),
    "viewed, not as before": (lambda x: _sequence(_heads(x).view(_halved(_heads_shape(x)))), 2),
    "viewed, then permuted": (lambda x: _sequence(_heads(x).flatten(1, 2).mT.reshape(_heads_shape(x))), 2),
    "expanded": (lambda x: _sequence(_heads(x) * _heads(x[..., :1]).expand(_heads_shape(x))), 3),
    "the same direction": (lambda x: _heads(_heads(x)), 2),
    "one of a list not undone": (lambda x: tuple(_sequences([_heads(x), _heads(x.cos()).flip(1)])), 3),
    "one of a list read elsewhere": (lambda x: (_sequence((ys := _heads_of([x, x.cos()]))[0]), ys[1]), 1),
    # Nothing stays; but the gradient's exchanges do, for they carry zeros for what is unread.
    "lists with an unread one": (lambda x: _sequences([_heads_of([x * 3, x.sin()])[1].cos(), _heads(x)])[0], 0),
    "an unread list": (lambda x: (_heads_of([x.sin(), x]), _sequence(_heads(x)))[1], 1),
    "an unread one": (lambda x: (_heads(x.sin()), _sequence(_heads(x)))[1], 1),
}


def _matrix(x: Tensor) -> Tensor:
    return torch.linspace(-1, 1, 5 * 5, dtype=x.dtype).view(5, 5)


def _two_branches(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each branch's projection, and what reads neither exchange."""
    a = _heads(x.sin()) @ _matrix(x)
    b = _heads(x.flip(1)) @ _matrix(x)
    return a + b, (x @ _matrix(x)).cos()


def _reused_memory(x: Tensor) -> tuple[Tensor, Tensor]:
    """Tensors of the size of what is sent, made while it is under way."""
    y = _heads(x.sin())
    z = x @ _matrix(x)
    for _ in range(3):
        z = z.tanh() @ _matrix(x)
    return y.cos(), z


def _written_in_place(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    received = _heads(y)
    z = x @ _matrix(x)
    y.add_(z)
    return received.sin(), y @ _matrix(x)


def _reduced_meanwhile(x: Tensor) -> tuple[Tensor, Tensor]:
    y = _heads(x.cos())
    z = fvops.get_sp_group().all_reduce(x @ _matrix(x))
    return y @ _matrix(x), z + _sequence(x * 3).mean()


def _views(x: Tensor) -> tuple[Tensor, Tensor]:
    """What is sent is a part of something, or has its dims permuted."""
    y = _heads((x @ _matrix(x))[:, 1:-1])
    z = _sequence(x.transpose(1, 2))
    return y @ _matrix(x), z @ _matrix(x)


# name -> (program, how many exchanges of the forward are split under `overlap`)
OVERLAPPED: dict[str, tuple[Program, int]] = {
    "two branches": (_two_branches, 2),
    "reused memory": (_reused_memory, 1),
    "written in place": (_written_in_place, 1),
    "reduced meanwhile": (_reduced_meanwhile, 2),
    "views": (_views, 2),
    "a list, and a product": (lambda x: (_with_a_list(x), x @ _matrix(x)), 2),
    "an unread one, and a product": (lambda x: (_one_unread(x), x @ _matrix(x)), 1),
    "nothing beside it": (lambda x: _sequence(_heads(x).sin()), 0),
}


def _weight(x: Tensor, rows: int, columns: int) -> Tensor:
    """A matrix that depends on x, so that its gradient is looked at."""
    steps = torch.linspace(0, 3, rows * columns, dtype=x.dtype).view(rows, columns)
    return (steps * x.mean()).sin() / max(rows, columns)


def _projected(x: Tensor, bias: bool) -> Tensor:
    """An output projection: exchange, then ``[B, s, H, D] -> [B, s, 6]``."""
    y = _sequence(x.sin()).flatten(2)
    return F.linear(y, _weight(x, 6, y.size(2)), x[0, 0, 0, :1].expand(6).cos() if bias else None)


def _projected_from_the_left(x: Tensor) -> Tensor:
    y = _sequence(x.sin()).flatten(2).flatten(0, 1)
    return torch.mm(_weight(x, 6, y.size(1)), y.t())


def _with_itself(x: Tensor, transposed_first: bool) -> Tensor:
    y = _sequence(x.sin()).flatten(2).flatten(0, 1)
    return y.t() @ y if transposed_first else y @ y.t()


def _projected_twice(x: Tensor) -> Tensor:
    y = _sequence(x.sin()).flatten(2)
    return F.linear(y, _weight(x, 6, y.size(2))) * F.linear(y, _weight(x.cos(), 6, y.size(2)))


def _projected_before(x: Tensor, bias: bool) -> Tensor:
    """A projection of what only the exchange reads: ``[B, S, H*D] -> [B, S, P*H*D]``, exchanged."""
    channels = x.size(2) * x.size(3)
    heads = fvops.get_sp_group().world_size
    weight = _weight(x, 3 * heads, channels)
    y = F.linear(x.sin().flatten(2), weight, x[0, 0, 0, :1].expand(3 * heads).cos() if bias else None)
    return _heads(y.unflatten(2, (heads, 3)))


def _projected_before_with_one_number(x: Tensor) -> Tensor:
    """addmm spreads one number over all columns."""
    heads = fvops.get_sp_group().world_size
    rows = x.sin().flatten(2).flatten(0, 1)
    y = torch.addmm(x[0, 0, 0, :1].cos(), rows, _weight(x, rows.size(1), 3 * heads))
    return _heads(y.view(x.size(0), x.size(1), heads, 3))


def _only_summed(x: Tensor) -> Tensor:
    y = _sequence(x.sin()).flatten(2)
    # A sum, which absorb reads where it lies; it does not look for means.
    return F.linear(y, _weight(x, 6, y.size(2))).mean() * (y.sum((0, 1)) / (y.size(0) * y.size(1))).cos()


# name -> (program, products that read received parts, products that write packed buffers), without gradients
ABSORBED: dict[str, tuple[Program, int, int]] = {
    "projected": (lambda x: _projected(x, bias=False), 1, 0),
    "projected with a bias": (lambda x: _projected(x, bias=True), 1, 0),
    "projected from the left": (_projected_from_the_left, 1, 0),
    "projected twice": (_projected_twice, 2, 0),
    "projected before": (lambda x: _projected_before(x, bias=False), 0, 1),
    "projected before with a bias": (lambda x: _projected_before(x, bias=True), 0, 1),
    "projected before with one number": (_projected_before_with_one_number, 0, 0),
    "projected and summed": (_only_summed, 1, 0),
    "with itself": (lambda x: _with_itself(x, transposed_first=False), 0, 0),
    "with itself, transposed first": (lambda x: _with_itself(x, transposed_first=True), 0, 0),
}

PROGRAMS: dict[str, Program] = {
    **{name: program for name, (program, _) in OVERLAPPED.items()},
    **{name: program for name, (program, _, _) in ABSORBED.items()},
    **{name: program for name, (program, _) in MERGED.items()},
    **CANCELLED,
    **{name: program for name, (program, _) in KEPT.items()},
}


def example(batch: int = 1, part: int = 0) -> Tensor:
    """An input that differs between ranks, float64: rounding shall hide nothing; `part` lengthens the sequence."""
    group = fvops.get_sp_group()
    P = group.world_size
    # No two sizes alike: torch.compile takes equal dynamic sizes for one.
    generator = torch.Generator().manual_seed(group.rank_in_group)
    return torch.rand(batch, (2 + part) * P, 4 * P * P, 5, generator=generator, dtype=torch.float64)


def issued(records: list[CollectiveRecord]) -> Issued:
    """What is compared of the records."""
    return [(record.op, record.shapes, record.arguments) for record in records]


def compare_with_eager(
    names: list[str], switches: dict[str, Any], train: bool, batch: int = 1, **compile_arguments: Any
) -> dict[str, tuple[Issued, Issued]]:
    """For each program what eager and compiled code issued; AssertionError where values or gradients differ.

    All are compiled as one graph, a barrier after each: no pass looks past it. Without `train`, which is forward and
    backward together, the sequence of a program ends at its barrier; with it only the whole is told, under "all".

    Args:
        switches: arguments of `fvops.compiler.options`.
        compile_arguments: more for `torch.compile`; with ``dynamic=True`` a second length is run by the same graph.
    """

    def together(x: Tensor) -> list[Tensor]:
        outputs = []
        for name in names:
            result = PROGRAMS[name](x)
            outputs.extend(result if isinstance(result, tuple) else [result])
            fvops.get_sp_group().barrier()
        return outputs

    options = fvops.compiler.options(**switches)
    compiled = torch.compile(together, fullgraph=True, options=options, **compile_arguments)
    sequences: tuple[Issued, Issued] = ([], [])
    for part in (0, 1) if compile_arguments.get("dynamic") else (0,):
        expected, sequence = _run(together, example(batch, part), train)
        got, compiled_sequence = _run(compiled, example(batch, part), train)
        for index, (e, g) in enumerate(zip(expected, got, strict=True)):
            torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-9, msg=lambda t, index=index: f"result {index}: {t}")
            if g.stride() != e.stride():
                raise AssertionError(f"result {index}: eager strides {e.stride()}, compiled {g.stride()}")
        sequences[0].extend(sequence)
        sequences[1].extend(compiled_sequence)
    if train:
        return {"all": sequences}
    return dict(zip(names, zip(_split(sequences[0]), _split(sequences[1]), strict=True), strict=False))


def _split(sequence: Issued) -> list[Issued]:
    """The sequence cut at its barriers."""
    parts: list[Issued] = [[]]
    for call in sequence:
        if call[0] == "barrier":
            parts.append([])
        else:
            parts[-1].append(call)
    return parts[:-1]


def _run(program: Callable[[Tensor], list[Tensor]], x: Tensor, train: bool) -> tuple[list[Tensor], Issued]:
    x.requires_grad_(train)
    with record_collectives() as records, torch.set_grad_enabled(train):
        outputs = program(x)
        results = [output.detach() for output in outputs]
        if train:
            sum(output.cos().sum() for output in outputs).backward()
            results.append(x.grad)
    return results, issued(records)
