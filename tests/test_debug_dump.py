"""dump and the signal handler: what a rank has done, what it waits for, told while its main thread is blocked in C."""

from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from fvops.debug import journal
from tests.harness import Ranks
from tests.waiting import wait_until
from tests.worlds import initialized


def _text() -> str:
    from fvops.debug import dump

    out = io.StringIO()
    dump(out)
    return out.getvalue()


def _after_calls() -> str:
    import fvops

    group = fvops.get_sp_group()
    group.all_reduce(torch.ones(2, 3))
    with pytest.raises(ValueError, match="dim 7"):
        group.all_gather(torch.ones(2), 7)
    group.gather(torch.ones(4), 1)
    return _text()


def test_it_holds_the_groups_and_the_last_calls(two_ranks: Ranks) -> None:
    for place, text in enumerate(two_ranks.run(_after_calls)):
        lines = text.splitlines()
        assert any(f"sp:0: place {place} of global ranks [0, 1], cpu" in line and "ok" in line for line in lines)
        done = [line for line in lines if " ago " in line]
        assert "all_reduce on group 'sp:0', call " in done[-2]
        assert "of (2, 3) float32 (op=sum), took" in done[-2]
        assert "gather on group 'sp:0'" in done[-1]
        assert lines[lines.index("under way:") + 1] == "last calls, the newest last:"


def _waits() -> str:
    """Rank 0 waits for rank 1, which comes once a thread of rank 0 has dumped."""
    import torch.distributed as dist

    import fvops

    group, texts = fvops.get_sp_group(), []
    store = dist.distributed_c10d._get_default_store()
    if group.rank_in_group == 0:
        from fvops.debug.journal import running

        def look() -> None:
            wait_until(lambda: any(time.monotonic() - entry.began > 0.3 for entry in running().values()))
            texts.append(_text())
            store.set("dumped", "")

        thread = threading.Thread(target=look)
        thread.start()
        group.all_reduce(torch.ones(5))
        thread.join()
        return texts[0]
    store.wait(["dumped"], timedelta(seconds=60))
    group.all_reduce(torch.ones(5))
    return ""


@pytest.mark.parametrize("transport", ["auto", "process_group"])
def test_a_call_under_way_is_told_with_whom_it_waits_for(transport: str) -> None:
    text = Ranks.get(2, transport).run(_waits)[0]
    (line,) = [line for line in text.splitlines() if "all_reduce" in line and ", for " in line]
    assert "of (5,) float32" in line
    assert transport != "auto" or "waits for place 1 (global rank 1)" in line


def _say_when_inside(store: Any) -> None:
    """Once the main thread has begun its collective; it does not use the store meanwhile."""
    wait_until(lambda: bool(journal.running()))
    store.set("inside", str(os.getpid()))


def _blocked(folder: str) -> None:
    """Rank 0 blocks in a transport; the last rank signals it, and comes when it has answered."""
    import torch.distributed as dist

    import fvops
    from fvops.debug import install_signal_handler

    with initialized(suffix="a"):
        group, store = fvops.get_sp_group(), dist.distributed_c10d._get_default_store()
        path = Path(folder, "answer")
        if group.rank_in_group == 0:
            # Twice: the second replaces the first.
            install_signal_handler(signal.SIGUSR2, open(os.devnull, "w"))  # noqa: SIM115
            install_signal_handler(signal.SIGUSR2, path.open("w"))
            threading.Thread(target=_say_when_inside, args=(store,)).start()
        else:
            pid = int(store.get("inside"))
            wait_until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S")
            os.kill(pid, signal.SIGUSR2)
            wait_until(lambda: path.exists() and "end of dump" in path.read_text())
        group.all_reduce(torch.ones(5))


@pytest.mark.parametrize("transport", ["auto", "process_group"])
def test_a_signal_is_answered_while_the_main_thread_is_blocked_in_c(tmp_path: Path, transport: str) -> None:
    Ranks.get(2, transport).run(_blocked, str(tmp_path), initialize=False, deadline_s=60)
    text = (tmp_path / "answer").read_text()
    assert "most recent call first" in text
    assert "_blocked" in text
    assert any("all_reduce on group 'sp:0'" in line and ", for " in line for line in text.splitlines())
    assert text.count("end of dump") == 1


OBJECT_CALLS: dict[str, tuple[Any, Any]] = {
    "recv_object": (lambda group: group.recv_object(1), lambda group: group.send_object("x", 0)),
    "broadcast_object": (lambda group: group.broadcast_object(None, 1), lambda group: group.broadcast_object("x", 1)),
    "broadcast_object_list": (
        lambda group: group.broadcast_object_list([None], 1),
        lambda group: group.broadcast_object_list(["x"], 1),
    ),
    "broadcast_tensor_dict": (
        lambda group: group.broadcast_tensor_dict(None, 1),
        lambda group: group.broadcast_tensor_dict({"x": torch.ones(2)}, 1),
    ),
    "recv_tensor_dict": (
        lambda group: group.recv_tensor_dict(1),
        lambda group: group.send_tensor_dict({"x": torch.ones(2)}, 0),
    ),
}


def _stuck_in_objects(checked: bool) -> list[tuple[list[str], str]]:
    """Rank 0 waits in each call until a thread of it has been warned and has dumped; only then does rank 1 come."""
    import contextlib

    import torch.distributed as dist

    from fvops.debug import check_collectives

    told: list[tuple[list[str], str]] = []
    os.environ["FVOPS_WARN_AFTER_S"] = "0.3"
    try:
        with initialized(suffix="a"), check_collectives() if checked else contextlib.nullcontext():
            import fvops

            group, store = fvops.get_sp_group(), dist.distributed_c10d._get_default_store()
            group.barrier()
            for op, (wait, come) in OBJECT_CALLS.items():
                if group.rank_in_group == 1:
                    while not store.check([f"warned about {op}"]):
                        time.sleep(0.01)
                    come(group)
                    continue
                warnings: list[str] = []

                class Handler(logging.Handler):
                    def emit(self, record: logging.LogRecord, op: str = op, warnings: list[str] = warnings) -> None:
                        # A warning about the call before may have taken until now.
                        if f" in {op} on group " in record.getMessage():
                            warnings.extend([record.getMessage(), _text()])
                            store.set(f"warned about {op}", "")

                handler = Handler()
                logging.getLogger("fvops.debug.patience").addHandler(handler)
                wait(group)
                logging.getLogger("fvops.debug.patience").removeHandler(handler)
                told.append((warnings[:2], _text()))
            group.barrier()
    finally:
        del os.environ["FVOPS_WARN_AFTER_S"]
    return told


@pytest.mark.parametrize("checked", [False, True])
def test_objects_under_way_are_dumped_and_warned_about(two_ranks: Ranks, checked: bool) -> None:
    told = two_ranks.run(_stuck_in_objects, checked, initialize=False, deadline_s=100)[0]
    messages = 0
    for n, (op, ((warning, during), after)) in enumerate(zip(OBJECT_CALLS, told, strict=True)):
        messages += op.startswith("recv")
        # The barrier was the first call of the group.
        which = f"message 1-0 {messages}" if op.startswith("recv") else f"call {n - messages + 2}"
        entry = f"{op} on group 'sp:0', {which} (src=1)"
        assert "rank 0 waits since" in warning
        assert f"in {entry}, deadline 300 s" in warning
        assert "place 1 (global rank 1)" in warning
        (line,) = [line for line in during.splitlines() if ", for " in line]
        assert line.startswith(f"  {entry}, for ")
        assert not op.startswith("recv") or line.endswith("; waits for place 1 (global rank 1)")
        assert [line for line in after.splitlines() if f" ago {entry}, took " in line]
        assert ", for " not in after


def test_importing_fvops_installs_no_handler() -> None:
    code = "import fvops, fvops.debug; print(open('/proc/self/status').read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    (caught,) = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("SigCgt")]
    assert not int(caught, 16) >> (signal.SIGUSR1 - 1) & 1


def _warned() -> list[str]:
    """Rank 0 waits until it has been warned; only then does rank 1 come."""
    import torch.distributed as dist

    import fvops

    texts: list[str] = []
    os.environ["FVOPS_WARN_AFTER_S"] = "0.4"
    try:
        with initialized(suffix="a"):
            group, store = fvops.get_sp_group(), dist.distributed_c10d._get_default_store()

            class Handler(logging.Handler):
                def emit(self, record: logging.LogRecord) -> None:
                    texts.append(record.getMessage())
                    store.set("warned", "")

            handler = Handler()
            logging.getLogger("fvops.debug.patience").addHandler(handler)
            if group.rank_in_group == 1:
                store.wait(["warned"], timedelta(seconds=60))
            group.all_reduce(torch.ones(5))
            logging.getLogger("fvops.debug.patience").removeHandler(handler)
    finally:
        del os.environ["FVOPS_WARN_AFTER_S"]
    return texts


@pytest.mark.parametrize("transport", ["auto", "process_group"])
def test_a_long_wait_is_warned_about(transport: str) -> None:
    (text, *_), late = Ranks.get(2, transport).run(_warned, initialize=False, deadline_s=60)
    assert "rank 0 waits since" in text
    assert "in all_reduce on group 'sp:0', call 1 of (5,) float32" in text
    assert "deadline 300 s" in text
    assert "place 1 (global rank 1)" in text
    assert all("all_reduce" not in other for other in late)
