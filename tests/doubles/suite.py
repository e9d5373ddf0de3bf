"""The tests that both communicators must pass, as a class for each library's test file to inherit.

Calls are drawn from a seed and sent to the workers in one job for each method and world size; results are compared with
`tests.reference`, which knows nothing of either library.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from tests import reference
from tests.doubles import bodies, misuse
from tests.doubles.bodies import Call
from tests.doubles.build import build
from tests.draws import ALL_DTYPES, bits
from tests.harness import Ranks

__all__ = ["LibrarySuite"]

_SHAPES = ((0,), (1,), (5,), (3, 2), (2, 0), (4, 1, 3), (64, 33))
_CALLS = 14


class LibrarySuite:
    """Methods, refusals and misuse; see `faults` for what goes wrong at run time."""

    which: ClassVar[str]
    reduced: ClassVar[Sequence[torch.dtype]]  # what the library reduces, beside bool
    no_product: ClassVar[Sequence[torch.dtype]] = ()

    @property
    def path(self) -> str:
        """The double."""
        return build(f"{self.which}_double")

    def run(self, ranks: Ranks, calls: Sequence[Call]) -> list[list[Tensor | None]]:
        """For each call, the ranks' results."""
        results = ranks.run(bodies.run_calls, self.which, self.path, list(calls))
        return [list(one) for one in zip(*results, strict=True)]

    def draw_reductions(self, method: str, P: int) -> list[Call]:
        """Every dtype once, with an op and a shape by lot."""
        lot = random.Random(f"{method} {P}")
        calls = []
        for dtype in [*self.reduced, torch.bool, *lot.choices([*self.reduced], k=_CALLS // 2)]:
            ops = ["max", "min"] if dtype == torch.bool else ["sum", "max", "min"]
            ops += [] if dtype in self.no_product else ["product"]
            ops += ["avg"] if dtype.is_floating_point else []
            shape = lot.choice(_SHAPES)
            shape = (shape[0] * P, *shape[1:]) if method == "reduce_scatter" else shape
            args = {"op": lot.choice(ops), "dst": lot.randrange(P)}
            calls.append(Call(method, [shape] * P, dtype, lot.randrange(99), args, numbers=True))
        return calls

    def draw_movement(self, method: str, P: int) -> list[Call]:
        """Every dtype once, arbitrary bits."""
        lot = random.Random(f"{method} {P}")
        calls = []
        for dtype in (*ALL_DTYPES, torch.uint16, torch.uint64):
            shape, args = lot.choice(_SHAPES), {"src": lot.randrange(P)}
            calls.append(Call(method, [shape] * P, dtype, lot.randrange(99), args))
        return calls

    def test_all_reduce(self, ranks: Ranks) -> None:
        calls = self.draw_reductions("all_reduce", ranks.world_size)
        for call, results in zip(calls, self.run(ranks, calls), strict=True):
            _agree_rounded(call, results, reference.all_reduce(call.inputs(), call.args["op"]))

    def test_reduce(self, ranks: Ranks) -> None:
        calls = self.draw_reductions("reduce", ranks.world_size)
        for call, results in zip(calls, self.run(ranks, calls), strict=True):
            total, dst = reference.all_reduce(call.inputs(), call.args["op"])[0], call.args["dst"]
            _agree_rounded(call, results, [total if rank == dst else None for rank in range(ranks.world_size)])

    def test_reduce_scatter(self, ranks: Ranks) -> None:
        calls = self.draw_reductions("reduce_scatter", ranks.world_size)
        for call, results in zip(calls, self.run(ranks, calls), strict=True):
            _agree_rounded(call, results, reference.reduce_scatter(call.inputs(), call.args["op"], 0))

    def test_all_gather(self, ranks: Ranks) -> None:
        calls = self.draw_movement("all_gather", ranks.world_size)
        for call, results in zip(calls, self.run(ranks, calls), strict=True):
            _agree(call, results, reference.all_gather(call.inputs(), 0))

    def test_broadcast(self, ranks: Ranks) -> None:
        calls = self.draw_movement("broadcast", ranks.world_size)
        for call, results in zip(calls, self.run(ranks, calls), strict=True):
            _agree(call, results, reference.broadcast(call.inputs(), call.args["src"]))

    def test_send_and_recv(self, ranks: Ranks) -> None:
        P = ranks.world_size
        calls = self.draw_movement("ring", P) + self.draw_movement("chain", P) + self.draw_movement("everyone", P)
        for call, results in zip(calls, self.run(ranks, calls), strict=True):
            x = call.inputs()
            if call.method == "ring":
                _agree(call, results, [x[rank - 1] for rank in range(P)])
            elif call.method == "chain":
                _agree(call, results, [x[0]] * P)
            else:
                expected = x[0].new_empty((2 * P, *x[0].shape))
                for place in range(2 * P):
                    expected[place].copy_(x[place // 2])
                _agree(call, results, [expected] * P)

    def test_all_to_all_single(self, ranks: Ranks) -> None:
        P, lot, calls = ranks.world_size, random.Random(ranks.world_size), []
        for number, dtype in enumerate((*ALL_DTYPES, torch.uint16)):
            even, tail = number % 2 == 0, lot.choice([(), (3,), (2, 2), (0,)])
            n = lot.choice([0, 1, 4])
            rows = [[n if even else lot.choice([0, 1, 2, 5]) for _ in range(P)] for _ in range(P)]
            shapes = [(sum(rows[rank]), *tail) for rank in range(P)]
            calls.append(Call("all_to_all_single", shapes, dtype, lot.randrange(99), {"rows": rows, "even": even}))
        for call, results in zip(calls, self.run(ranks, calls), strict=True):
            _agree(call, results, reference.all_to_all_single(call.inputs(), call.args["rows"]))

    def test_messages_larger_than_the_doubles_buffers(self, ranks: Ranks) -> None:
        P, n = ranks.world_size, 300_001  # 1.2 MB: several chunks, the last one odd
        flat, rows = [(n,)] * P, [[(n + 7 * (j - r)) // P for r in range(P)] for j in range(P)]
        calls = [
            Call("all_reduce", flat, torch.int32, 1, {"op": "sum"}),
            Call("reduce_scatter", [(n * P,)] * P, torch.int32, 2, {"op": "max"}),
            Call("all_gather", flat, torch.float32, 3),
            Call("broadcast", flat, torch.float32, 4, {"src": 1}),
            Call("ring", flat, torch.float32, 5),
            Call("chain", flat, torch.float32, 6),
            Call("everyone", flat, torch.uint8, 7),
            Call("all_to_all_single", [(n * P,)] * P, torch.uint8, 8, {"rows": [[n] * P] * P, "even": True}),
            Call("all_to_all_single", [(sum(row),) for row in rows], torch.int16, 9, {"rows": rows}),
        ]
        for call, results in zip(calls, self.run(ranks, calls), strict=True):
            x = call.inputs()
            everything = torch.cat(x)
            expected: dict[str, Any] = {
                "all_reduce": lambda: [sum(x)] * P,  # noqa: B023
                "reduce_scatter": lambda: list(torch.stack(x).amax(0).chunk(P)),  # noqa: B023
                "all_gather": lambda: [everything] * P,  # noqa: B023
                "broadcast": lambda: [x[1]] * P,  # noqa: B023
                "ring": lambda: [x[rank - 1] for rank in range(P)],  # noqa: B023
                "chain": lambda: [x[0]] * P,  # noqa: B023
                "everyone": lambda: [torch.stack([x[peer] for peer in range(P) for _ in range(2)])] * P,  # noqa: B023
                "all_to_all_single": lambda: [
                    torch.cat([x[j].split(call.args["rows"][j])[rank] for j in range(P)])  # noqa: B023
                    for rank in range(P)
                ],
            }
            _agree(call, results, expected[call.method]())

    def test_wrong_arguments_are_refused_by_name_and_nothing_is_sent(self, two_ranks: Ranks) -> None:
        for rank, (lines, sent) in enumerate(two_ranks.run(misuse.refusals, self.which, self.path)):
            for what, wanted, text in lines:
                assert text.startswith(wanted), (rank, what, wanted, text)
                assert f"py{self.which}" in text or "all_to_all_single" in text, (what, text)
                assert " on group '" in text, (what, text)
            assert sent == 0, rank

    def test_the_double_catches_misuse_on_every_rank(self, two_ranks: Ranks) -> None:
        names = misuse.names(self.which)
        results = two_ranks.run(misuse.raw, self.which, self.path, names)
        for name, *texts in zip(names, *results, strict=True):
            for rank, (text, later) in enumerate(texts):
                assert text.startswith("LibraryError"), (name, rank, text)
                assert misuse.expected(name) in text, (name, rank, text)
                assert later != 0, (name, rank, "a communicator with a failed check still looks whole")

    def test_the_double_catches_misuse_of_handles(self, two_ranks: Ranks) -> None:
        for rank, lines in enumerate(two_ranks.run(misuse.handles, self.which, self.path)):
            for what, wanted, text in lines:
                assert wanted in text, (rank, what, wanted, text)


def _agree(call: Call, results: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    for rank, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        assert result is not None, (call, rank)
        assert wanted is not None
        assert result.shape == wanted.shape, (call, rank, result.shape, wanted.shape)
        assert torch.equal(bits(result), bits(wanted)), (call, rank, result, wanted)


def _agree_rounded(call: Call, results: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    """By value, and exact but for averages: sums and products of a few eighths need no rounding in float."""
    for rank, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        if wanted is None:
            assert result is None, (call, rank)
            continue
        assert result is not None, (call, rank)
        assert (result.shape, result.dtype) == (wanted.shape, wanted.dtype), (call, rank)
        exact = call.args["op"] in ("max", "min") or not call.dtype.is_floating_point
        bound = 0.0 if exact else len(call.shapes) * torch.finfo(call.dtype).eps
        off = (result.double() - wanted.double()).abs()
        assert bool((off <= bound * wanted.double().abs()).all()), (call, rank, result, wanted)
