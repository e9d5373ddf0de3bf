"""Bytes that an enemy chose, at every decoder: an error, and no crash, no hang, no code run, no memory taken."""

from __future__ import annotations

import contextlib
import io
import pickle
import random
import time
import tracemalloc
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from fvops import store_messages, tensor_dict
from fvops.device_communicators.shm_ring import Ring, RingReader, RingWriter, ring_bytes
from fvops.objects import Wire
from fvops.serialization import add_safe_globals, decode, encode
from fvops.utils import StatelessProcessGroup
from tests.draws import profile
from tests.harness import Ranks
from tests.remains import resident_within
from tests.test_message_queue import _queue
from tests.test_objects import Hostile


def _pickles(folder: Path) -> list[bytes]:
    """Pickles that make a folder when they are loaded, in the wrappings that a careless receiver opens."""
    hostile = Hostile(str(folder / "executed"))
    buffer = io.BytesIO()
    torch.save(hostile, buffer)
    plain = [pickle.dumps(hostile, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    return [*plain, buffer.getvalue(), *[b"fvo1" + data for data in plain]]


def _frame() -> bytearray:
    x = torch.arange(6).reshape(2, 3)
    plain = [None, True, -5, 2.5, 1j, "é", b"b", {"k": (1, {2}, frozenset([3]))}, OrderedDict(a=x)]
    values = [x.half(), torch.int8, x.shape, x.device, torch.nn.Parameter(x.float())]
    arrays = [numpy.arange(4, dtype=">i2"), numpy.float32(1), numpy.datetime64("2020-01-01")]
    return encode([*plain, *values, *arrays])


# Of no bytes, of pointers, of fields, of another size: what a changed dtype might become.
_DTYPES = [b"|S0", b"<U0", b"|O8", b"|V0", b"|S1", b"<U1", b">i2", b"<f8", b"|b1", b"<M8"]


def _mutated(data: bytearray, draw: random.Random) -> bytearray:
    data = bytearray(data)
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(data))
        kind = draw.randrange(5)
        if kind == 0:
            data[at] = draw.randrange(256)
        elif kind == 1:
            # Where a length might be, a large one.
            data[at : at + 8] = draw.choice(
                [b"\xff" * 8, b"\xff" * 7 + b"\x7f", (1 << draw.randrange(64)).to_bytes(8, "little")]
            )
        elif kind == 4:
            # The text of a numpy dtype, found by its length, so that what follows it is read as before; and, sometimes,
            # where its shape is, a large one, and none of its bytes.
            found = data.find(b"s" + (3).to_bytes(8, "little"), at)
            if found >= 0:
                size = (1 << draw.randrange(61)).to_bytes(8, "little")
                shape = b"t" + (1).to_bytes(8, "little") + b"i" + (8).to_bytes(8, "little") + size
                data[found + 9 : found + 12] = draw.choice(_DTYPES)
                if draw.randrange(2):
                    data[found + 12 :] = shape + b"b" + bytes(8)
        elif kind == 2:
            del data[at : at + draw.randrange(1, 9)]
        else:
            data[at:at] = data[at : at + draw.randrange(1, 30)]
        if not data:
            return data
    return data


def _receive(manifest: bytearray) -> Any:
    return tensor_dict.receive(manifest, torch.device("cpu"), "test", lambda _, tensor: None, Wire())


# What torch and numpy take too, beside what Python traces.
_MOST_RESIDENT = 64 << 20


def _fuzz(cases: int, seed: int) -> None:
    draw, frame = random.Random(seed), _frame()
    manifest = encode(((2, 1), [(torch.float32, (2, 3), "cpu")], bytes(encode({"x": 1}))))
    for number in range(cases):
        data = _mutated(frame, draw)
        tracemalloc.start()
        with contextlib.suppress(TypeError, ValueError):
            decode(data)
        with contextlib.suppress(TypeError, ValueError):
            _receive(_mutated(manifest, draw))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 5 << 20, number


def test_mutated_frames() -> None:
    with resident_within(_MOST_RESIDENT):
        _fuzz(200, seed=1)


@pytest.mark.slow
def test_mutated_frames_by_the_thousand() -> None:
    with resident_within(_MOST_RESIDENT):
        _fuzz(10_000, seed=2)


@given(data=st.binary(max_size=60))
@profile(200)
def test_arbitrary_bytes(data: bytes) -> None:
    for frame in (data, b"fvo1" + data):
        with contextlib.suppress(TypeError, ValueError):
            decode(frame)


def test_every_truncation_is_refused() -> None:
    frame = _frame()
    for end in range(len(frame)):
        with pytest.raises(ValueError):
            decode(frame[:end])
    with pytest.raises(ValueError, match="1 bytes too many"):
        decode(frame + b"N")


def test_lengths_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    huge = (1 << 40).to_bytes(8, "little")
    for tag in b"sbBltSZdOiyzDg":
        with pytest.raises(ValueError, match="announced"):
            decode(b"fvo1" + bytes([tag]) + huge)
    tensor = bytes(encode(torch.zeros(2)))
    with pytest.raises(ValueError, match="bytes for a tensor of shape"):
        decode(
            tensor.replace(b"\x01" + (0).to_bytes(7, "little") + b"\x02", b"\x01" + (0).to_bytes(7, "little") + b"\x03")
        )
    with pytest.raises(ValueError, match="more than 128 levels"):
        decode(b"fvo1" + (b"l" + (1).to_bytes(8, "little")) * 5000 + b"N")
    monkeypatch.setenv("FVOPS_MAX_OBJECT_MB", "1")
    with pytest.raises(ValueError, match="FVOPS_MAX_OBJECT_MB"):
        encode(bytes(2 << 20))
    announced = encode(((1, 0), [(torch.uint8, (1 << 40,), "cpu")], b""))
    with pytest.raises(ValueError, match="tensors announced has 1099511627776 bytes"):
        _receive(announced)


@pytest.mark.parametrize("dtype", ["|O", "|V8", "<i4,<i4", "|O8", "(2,)i4", "<M8[ns, x]"])
def test_numpy_dtypes_with_pointers_or_fields(dtype: str) -> None:
    frame = bytearray(b"fvo1a") + encode(dtype)[4:] + encode((1,))[4:] + encode(bytes(8))[4:]
    with pytest.raises(ValueError):
        decode(frame)
    with pytest.raises(TypeError, match="dtype object"):
        encode(numpy.array([object()]))


def _array(dtype: str, shape: tuple[int, ...], content: bytes = b"") -> bytearray:
    return bytearray(b"fvo1a") + encode(dtype)[4:] + encode(shape)[4:] + encode(content)[4:]


@pytest.mark.parametrize("dtype", ["|S0", "<U0", ">U0", "S0", "|S"])
def test_numpy_items_of_no_bytes_take_no_memory(dtype: str) -> None:
    # A frame of 60 bytes that asked numpy for 8 GiB and more; here for little enough to survive it.
    for frame in (_array(dtype, (1 << 20,)), _array(dtype, (0,)), _array(dtype, ())):
        with pytest.raises(ValueError, match=r"without a size|numpy dtype"):
            decode(frame)


def test_empty_numpy_texts_travel() -> None:
    for value in (numpy.str_(""), numpy.bytes_(b""), numpy.array(""), numpy.empty(0, "U5"), numpy.empty((2, 0), "S3")):
        got = decode(encode(value))
        assert type(got) is type(value)
        assert got.shape == value.shape
        assert got.tolist() == value.tolist()


@pytest.mark.parametrize("tag", ["set", "frozenset", "dict", "ordered", "items"])
def test_keys_of_one_hash(tag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fvops.wire_format._allowed", {})
    add_safe_globals([defaultdict, int])
    make: dict[str, Any] = {
        "set": set,
        "frozenset": frozenset,
        "dict": dict.fromkeys,
        "ordered": OrderedDict.fromkeys,
        "items": lambda keys: defaultdict(int, dict.fromkeys(keys)),
    }
    keys = [number * (2**61 - 1) for number in range(101)]
    assert len({hash(key) for key in keys}) == 1
    with pytest.raises(ValueError, match="101 keys of a set or dictionary have the same hash; at most 100 are read"):
        decode(encode(make[tag](keys)))
    for honest in (keys[:100], range(1000), [2.0**power for power in range(-1000, 1000)], map(str, range(1000))):
        sent = make[tag](list(honest))
        assert decode(encode(sent)) == sent


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((0, 2**61, 2**61), "sizes whose product is 2**59 or more"),
        ((2**58, 2, 0), "sizes whose product is 2**59 or more"),
        ((1,) * 65, "65 dims, at most 64 are read"),
        ((0,) * 100, "100 dims, at most 64 are read"),
        ((2, -1), "a size below 0"),
    ],
)
def test_shapes_that_no_tensor_has(shape: tuple[int, ...], words: str) -> None:
    for dtype in (torch.uint8, torch.complex128):
        for where in ("cpu", "device"):
            with pytest.raises(ValueError) as caught:
                _receive(encode(((1, 0), [(dtype, shape, where)], bytes(encode({})))))
            assert f"test: a tensor was announced with {words}" in str(caught.value)
    # The largest that are taken.
    largest = [(torch.complex128, (0, 2**58), "cpu"), (torch.uint8, (1,) * 64, "cpu")]
    assert _receive(encode(((1, 0), largest, bytes(encode({}))))) == {}


def test_a_store_message_in_many_pieces_ends_at_the_deadline() -> None:
    store = dist.HashStore()
    store.set("k/0", (4 << 20).to_bytes(8, "little"))

    class Endless:
        """A store in which each piece is there as soon as it is asked for, after a while, and has one byte."""

        asked = 0

        def wait(self, keys: list[str], _: Any) -> None:
            pass

        def get(self, key: str) -> bytes:
            if key == "k/0":
                return store.get(key)
            self.asked += 1
            time.sleep(0.005)
            return b"x"

    endless = Endless()
    with pytest.raises(
        store_messages.StoreTimeout, match=r"within 0.1 s under .* of 4194304 bytes came, in \d+ pieces"
    ):
        store_messages.take(endless, "k", 0.1)
    assert 0 < endless.asked <= 21


def test_a_hostile_pickle_in_the_store(tmp_path: Path) -> None:
    for data in _pickles(tmp_path):
        store = dist.HashStore()
        group = StatelessProcessGroup.over_store(store, "a", 1, 2)
        scoped = dist.PrefixStore("fvops/stateless/a", store)
        for mark in (b"\0", b"\1", b""):
            store_messages.put(scoped, f"fvops/2/1/sent/0-1/{group.recv_src_counter[0]}", mark + data)
            with pytest.raises((ValueError, TypeError)):
                group.recv_obj(0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("piece", [b"", b"1234", b"\xff" * 8, (9).to_bytes(8, "little") + b"12345678901"])
def test_store_messages_cut_or_swollen(piece: bytes) -> None:
    store = dist.HashStore()
    store.set("k/0", piece)
    with pytest.raises(ValueError):
        store_messages.take(store, "k", 1.0)


class _Present:
    """A peer that lives."""

    pid = 0

    def alive(self) -> bool:
        return True

    def condition(self) -> str:
        return "is alive"

    def close(self) -> None:
        pass


def _ring(folder: Path) -> tuple[Ring, Any, Any]:
    with open(folder / "ring", "wb+") as file:
        file.truncate(ring_bytes(64, 4, 1))
        ring = Ring(file.fileno(), 64, 4, 1)
    peer: Any = _Present()
    return ring, RingWriter(ring, [peer], ["the reader"], [0]), RingReader(ring, 0, peer, "the writer")


def test_a_ring_full_of_garbage(tmp_path: Path) -> None:
    draw = random.Random(3)
    for _ in range(50):
        ring, writer, reader = _ring(tmp_path)
        writer.write(bytes(100), time.monotonic() + 5)
        header = ring.slot(0)
        at = draw.randrange(16)
        header[at] = header[at] ^ draw.randrange(1, 256)
        with pytest.raises((ValueError, TimeoutError)):
            reader.read(time.monotonic() + 0.01)


def _hostile_peer(frames: list[bytes], way: str) -> list[str]:
    """Place 0 was taken over, and sends `frames` where objects are due."""
    import fvops
    from fvops import objects
    from fvops.objects import Message
    from fvops.parallel_state import init_model_parallel_group

    group = fvops.get_sp_group()
    queue = _queue() if way == "queue" else None
    ways: dict[str, tuple[Any, Any]] = {
        "broadcast": (lambda: group.broadcast_object(1), lambda: group.broadcast_object()),
        "list": (lambda: group.broadcast_object_list([1]), lambda: group.broadcast_object_list([1])),
        "send": (lambda: group.send_object(1, 1), lambda: group.recv_object(0)),
        "dict": (lambda: group.broadcast_tensor_dict({}), lambda: group.broadcast_tensor_dict()),
        "queue": (lambda: queue.enqueue(1), lambda: queue.dequeue()),
        "send dict": (lambda: group.send_tensor_dict({}, 1), lambda: group.recv_tensor_dict(0)),
    }
    send, receive = ways[way]
    texts = []
    for number, frame in enumerate(frames):
        if "dict" in way:
            # A manifest that is refused may have tensors behind it, and breaks its group.
            group = init_model_parallel_group([[0, 1]], 0, "gloo", group_name=f"hostile{number}")
        if group.rank_in_group:
            with pytest.raises((TypeError, ValueError)) as caught:
                receive()
            texts.append(str(caught.value))
        else:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(objects, "pack", lambda *_, frame=frame: Message(bytearray(frame)))
                send()
        if "dict" in way:
            group.destroy()
    return texts


def test_a_hostile_peer_runs_nothing(two_ranks: Ranks, tmp_path: Path) -> None:
    frames = [*_pickles(tmp_path), b"", b"fvo1", bytes(encode(5)), bytes(_frame()[:50])]
    for way in ("broadcast", "list", "send", "dict", "send dict", "queue"):
        # An object that decodes is no attack on these two.
        chosen = [frame for frame in frames if way not in ("send", "queue") or frame != bytes(encode(5))]
        assert len(two_ranks.run(_hostile_peer, chosen, way, deadline_s=60)[1]) == len(chosen)
    assert list(tmp_path.iterdir()) == []
