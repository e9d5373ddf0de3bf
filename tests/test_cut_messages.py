"""Errors in the middle of an object's message break the group; what of it is still under way reaches no later call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fvops.device_communicators.shm_broadcast import MessageQueue
from tests import harness
from tests.harness import Ranks
from tests.refusal import refusal


def _alone(scenario: Callable[[Any, bool], list[str]]) -> list[str]:
    """What the receiver tells of `scenario` in a group of its own; then a new group works."""
    import fvops
    from fvops.parallel_state import init_model_parallel_group

    harness.init_fvops(suffix="cut")
    group = init_model_parallel_group([[0, 1]], 0, "gloo", group_name="cut", timeout_s=2.0)
    texts = scenario(group, group.rank_in_group == 1)
    if group.rank_in_group == 1:
        for call in (
            lambda: group.broadcast_object(),
            lambda: group.recv_object(0),
            lambda: group.recv_tensor_dict(0),
            lambda: group.all_reduce(torch.ones(2)),
        ):
            texts.append(refusal(call))
    fvops.get_world_group().barrier()
    fvops.cleanup_dist_env_and_memory()
    harness.init_fvops(suffix="anew")
    assert fvops.get_sp_group().broadcast_object("new" if dist.get_rank() == 0 else None) == "new"
    fvops.get_world_group().barrier()
    fvops.cleanup_dist_env_and_memory()
    return texts


def _oversized(way: str) -> Callable[[Any, bool], list[str]]:
    """Place 0 sends 2 MiB and one object more; place 1 takes 1 MiB at most."""
    large = bytes(2 << 20)
    send: dict[str, Callable[[Any], Any]] = {
        "broadcast_object": lambda group: group.broadcast_object(large),
        "broadcast_object_list": lambda group: group.broadcast_object_list([large]),
        "recv_object": lambda group: group.send_object(large, 1),
        "broadcast_tensor_dict": lambda group: group.broadcast_tensor_dict({"x": torch.zeros(2 << 20).byte()}),
        "recv_tensor_dict": lambda group: group.send_tensor_dict({"x": torch.zeros(2 << 20).byte()}, 1),
    }
    receive: dict[str, Callable[[Any], Any]] = {
        "broadcast_object": lambda group: group.broadcast_object(),
        "broadcast_object_list": lambda group: group.broadcast_object_list([None]),
        "recv_object": lambda group: group.recv_object(0),
        "broadcast_tensor_dict": lambda group: group.broadcast_tensor_dict(),
        "recv_tensor_dict": lambda group: group.recv_tensor_dict(0),
    }

    def scenario(group: Any, receives: bool) -> list[str]:
        if not receives:
            # They may not be received: either says so after the group's deadline.
            return [refusal(lambda: send[way](group)), refusal(lambda: group.broadcast_object("small"))]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FVOPS_MAX_OBJECT_MB", "1")
            with pytest.raises(ValueError) as caught:
                receive[way](group)
        return [str(caught.value)]

    return scenario


_WAYS = ["broadcast_object", "broadcast_object_list", "recv_object", "broadcast_tensor_dict", "recv_tensor_dict"]


def _run_oversized(way: str) -> list[str]:
    return _alone(_oversized(way))


@pytest.mark.parametrize("way", _WAYS)
def test_more_than_this_rank_takes_breaks_its_group(way: str) -> None:
    first, *later = Ranks.get(2).run(_run_oversized, way, initialize=False, deadline_s=60)[1]
    assert first.startswith(f"fvops.{way} on group 'cut:0': ")
    assert "FVOPS_MAX_OBJECT_MB=1" in first
    assert len(later) == 4
    for text in later:
        assert "this group is broken since" in text
        assert first in text


def _run_interrupted(way: str) -> list[str]:
    """Place 1 is interrupted between an object's header and its bytes."""
    calls = {"broadcast_object": "broadcast", "recv_object": "recv"}

    def scenario(group: Any, receives: bool) -> list[str]:
        if not receives:
            send = group.broadcast_object if way == "broadcast_object" else lambda obj: group.send_object(obj, 1)
            return [refusal(lambda: send(bytes(2 << 20)))]
        original, came = getattr(dist, calls[way]), []

        def interrupted(tensor: torch.Tensor, *args: Any, **named: Any) -> Any:
            came.append(tensor)
            if len(came) == 2:
                raise KeyboardInterrupt
            return original(tensor, *args, **named)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, calls[way], interrupted)
            with pytest.raises(KeyboardInterrupt):
                group.broadcast_object() if way == "broadcast_object" else group.recv_object(0)
        return []

    return _alone(scenario)


@pytest.mark.parametrize("way", ["broadcast_object", "recv_object"])
def test_an_interrupt_in_a_message_breaks_the_group(way: str) -> None:
    for text in Ranks.get(2).run(_run_interrupted, way, initialize=False, deadline_s=60)[1]:
        assert "this group is broken since" in text
        assert f"KeyboardInterrupt in fvops.{way} on group 'cut:0'" in text


class _Unknown:
    pass


def _refused_whole() -> list[Any]:
    """What place 1 refuses once all of it has come, or place 0 before any of it was sent."""
    import fvops

    group = fvops.get_sp_group()
    receives = group.rank_in_group == 1
    got: list[Any] = []
    for _ in range(2):
        with pytest.raises(TypeError):
            group.broadcast_tensor_dict({"x": torch.ones(4), "y": _Unknown()} if not receives else None)
        with pytest.raises(ValueError, match="src"):
            group.broadcast_object(1, 7)
        if not receives:
            with pytest.MonkeyPatch.context() as patch:
                # Only this rank allows the class: the other refuses it with the tensors at hand.
                patch.setattr("fvops.wire_format._allowed", {f"{__name__}._Unknown": _Unknown})
                group.broadcast_tensor_dict({"x": torch.ones(4), "y": _Unknown()})
                group.broadcast_object(_Unknown())
        else:
            with pytest.raises(TypeError, match="_Unknown"):
                group.broadcast_tensor_dict()
            with pytest.raises(TypeError, match="_Unknown"):
                group.broadcast_object()
        got.append(group.broadcast_object(5 if not receives else None))
    return got


def test_what_is_refused_whole_breaks_nothing(two_ranks: Ranks) -> None:
    assert two_ranks.run(_refused_whole) == [[5, 5]] * 2


def _nothing_comes() -> list[str]:
    def scenario(group: Any, receives: bool) -> list[str]:
        return [refusal(lambda: group.broadcast_object()), refusal(lambda: group.recv_object(0))] if receives else []

    return _alone(scenario)


def test_an_object_that_does_not_come_names_who_is_missing() -> None:
    first, second, *_ = Ranks.get(2).run(_nothing_comes, initialize=False, deadline_s=60)[1]
    assert first.startswith("fvops.broadcast_object on group 'cut:0' failed on place 1 of 2 (global ranks [0, 1], ")
    assert "deadline 2 s); missing: place 0 (global rank 0). The transport says: " in first
    assert first in second


def test_an_interrupt_in_an_object_breaks_the_queue() -> None:
    class End:
        """Has an object, and is interrupted when that is read."""

        def wait_for_chunk(self, _: float) -> None:
            pass

        def read(self, _: float) -> bytearray:
            raise KeyboardInterrupt

        def close(self) -> None:
            pass

    end: Any = End()
    queue = MessageQueue(1, 0, end, None)
    with pytest.raises(KeyboardInterrupt):
        queue.dequeue()
    assert "in the middle of an object" in queue.failure
    with pytest.raises(RuntimeError, match="cannot be used any more: it failed in the middle of an object"):
        queue.dequeue()
