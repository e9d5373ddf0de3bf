"""The names and signatures of the interface contract, and that the package imports without what it can do without."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Written from the contract: "name(arguments)". Types are left out.
PARALLEL_STATE = """
init_distributed_environment(world_size=1, rank=0, distributed_init_method='env://', local_rank=0, backend=None, \
device_id=None)
initialize_model_parallel(tensor_model_parallel_size=1, sequence_model_parallel_size=1, data_parallel_size=1, \
backend=None)
maybe_init_distributed_environment_and_model_parallel(tp_size, sp_size, distributed_init_method='env://')
model_parallel_is_initialized()
init_world_group(ranks, local_rank, backend)
init_model_parallel_group(group_ranks, local_rank, backend, use_message_queue_broadcaster=False, group_name=None)
initialize_tensor_parallel_group(tensor_model_parallel_size=1, backend=None, group_name_suffix='')
initialize_sequence_parallel_group(sequence_model_parallel_size=1, backend=None, group_name_suffix='')
patch_tensor_parallel_group(tp_group)
patch_sequence_parallel_group(sp_group)
get_world_group()
get_tp_group()
get_sp_group()
get_dp_group()
get_node_group()
get_world_size()
get_world_rank()
get_tp_world_size()
get_tp_rank()
get_sp_world_size()
get_sp_parallel_rank()
get_dp_world_size()
get_dp_rank()
get_local_torch_device()
destroy_model_parallel()
destroy_distributed_environment()
cleanup_dist_env_and_memory(shutdown_ray=False)
is_the_same_node_as(pg, source_rank=0)
get_same_node_ranks(pg, source_rank=0)
"""
COORDINATOR = """
all_reduce(input_, op=SUM)
all_gather(input_, dim=-1)
reduce_scatter(input_, op=SUM, dim=-1)
all_to_all_4D(input_, scatter_dim=2, gather_dim=1)
all_to_all_4D_coalesced(inputs, scatter_dim=2, gather_dim=1)
gather(input_, dst=0, dim=-1)
broadcast(input_, src=0)
shard(input_, dim=-1, *, scale_grad)
send(tensor, dst=None)
recv(size, dtype, src=None)
barrier()
broadcast_object(obj=None, src=0)
broadcast_object_list(obj_list, src=0, group=None)
send_object(obj, dst)
recv_object(src)
broadcast_tensor_dict(tensor_dict=None, src=0, group=None, metadata_group=None)
send_tensor_dict(tensor_dict, dst=None, all_gather_group=None)
recv_tensor_dict(src=None, all_gather_group=None)
graph_capture(graph_capture_context=None)
warmup(shapes, dtype)
destroy()
from_process_group(pg, group_name=None)
from_device_mesh(mesh, mesh_dim, group_name=None)
"""
COMMUNICATION_OP = """
tensor_model_parallel_all_reduce(input_)
tensor_model_parallel_all_gather(input_, dim=-1)
sequence_model_parallel_all_to_all_4D(input_, scatter_dim=2, gather_dim=1)
sequence_model_parallel_all_gather(input_, dim=-1)
sequence_model_parallel_shard(input_, dim=1)
sequence_model_parallel_all_gather_with_unpad(input_, original_seq_len, dim=-1)
warmup_sequence_parallel_communication(device=None)
"""
UTILS = """
divide(numerator, denominator)
ensure_divisibility(numerator, denominator)
split_tensor_along_last_dim(tensor, num_partitions, contiguous_split_chunks=False)
compute_padding_for_sp(seq_len, sp_world_size)
pad_sequence_tensor(tensor, target_seq_len, seq_dim=1, pad_value=0.0)
unpad_sequence_tensor(tensor, original_seq_len, seq_dim=1)
add_safe_globals(classes)
"""
STATELESS = """
create(host, port, rank, world_size, data_expiration_seconds=3600)
send_obj(obj, dst)
recv_obj(src)
broadcast_obj(obj, src)
all_gather_obj(obj)
barrier()
expire_data()
"""


def _lines(text: str) -> list[str]:
    return text.strip().splitlines()


def _plain(function: Callable[..., Any]) -> str:
    """The signature without types and `self`; an argument of ours may follow the contract's if it has a default."""
    parts, keyword_only = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            parts.append("*")
            keyword_only = True
        default = parameter.default
        if default is parameter.empty:
            parts.append(parameter.name)
        else:
            parts.append(f"{parameter.name}={'SUM' if 'SUM' in str(default) else repr(default)}")
    return f"{function.__name__}({', '.join(parts)})"


def _agrees(function: Callable[..., Any], wanted: str) -> bool:
    plain = _plain(function)
    extra = plain[len(wanted) - 1 : -1]
    return plain == wanted or (
        plain.startswith(wanted[:-1]) and all("=" in part or part == "*" for part in extra.split(", ") if part)
    )


def _check(owner: Any, prefix: str, wanted: str) -> None:
    name = wanted[: wanted.index("(")]
    assert hasattr(owner, name), f"{prefix}{name} does not exist"
    assert _agrees(getattr(owner, name), wanted), (_plain(getattr(owner, name)), wanted)


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        (module, line)
        for module, text in (
            ("parallel_state", PARALLEL_STATE),
            ("communication_op", COMMUNICATION_OP),
            ("utils", UTILS),
        )
        for line in _lines(text)
    ],
)
def test_functions(module: str, wanted: str) -> None:
    _check(importlib.import_module(f"fvops.{module}"), "", wanted)


@pytest.mark.parametrize("wanted", _lines(COORDINATOR))
def test_coordinator_methods(wanted: str) -> None:
    from fvops.parallel_state import GroupCoordinator

    _check(GroupCoordinator, "GroupCoordinator.", wanted)


def test_ensure_model_parallel_initialized_by_position() -> None:
    from fvops.parallel_state import ensure_model_parallel_initialized

    plain = _plain(ensure_model_parallel_initialized)
    parameters = plain[plain.index("(") + 1 : -1].split(", ")
    assert [part.partition("=")[2] for part in parameters] == ["", "", "1", "None"]


def test_ensure_model_parallel_initialized_by_the_contracts_names() -> None:
    from fvops.parallel_state import ensure_model_parallel_initialized

    names = list(inspect.signature(ensure_model_parallel_initialized).parameters)
    assert names == ["tp_size", "sp_size", "dp_size", "backend"]


def test_the_coordinators_constructor() -> None:
    from fvops.parallel_state import GroupCoordinator

    wanted = (
        "__init__(group_ranks, local_rank, torch_distributed_backend, use_device_communicator, "
        "use_message_queue_broadcaster=False, group_name=None)"
    )
    assert _agrees(GroupCoordinator.__init__, wanted)


def test_the_coordinators_properties() -> None:
    from fvops.parallel_state import GroupCoordinator

    for name in ("first_rank", "last_rank", "is_first_rank", "is_last_rank", "next_rank", "prev_rank"):
        assert isinstance(inspect.getattr_static(GroupCoordinator, name), property)


def test_stateless_process_group() -> None:
    from fvops import utils

    for line in _lines(STATELESS):
        _check(utils.StatelessProcessGroup, "StatelessProcessGroup.", line)


def test_the_device_communicators() -> None:
    from fvops.device_communicators.base_device_communicator import DeviceCommunicatorBase, DistributedAutograd
    from fvops.device_communicators.cpu_communicator import CpuCommunicator

    wanted = "__init__(cpu_group, device=None, device_group=None, unique_name='')"
    assert _agrees(DeviceCommunicatorBase.__init__, wanted)
    assert issubclass(CpuCommunicator, DeviceCommunicatorBase)
    assert DeviceCommunicatorBase.slice is DeviceCommunicatorBase.shard
    for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all_4D", "gather", "broadcast", "send", "recv"):
        assert callable(getattr(DeviceCommunicatorBase, name))
    orders = {
        "AllReduce": ["group", "input_", "op"],
        "AllGather": ["group", "input_", "world_size", "dim"],
        "AllToAll4D": ["group", "input_", "world_size", "scatter_dim", "gather_dim"],
        "Slice": ["group", "input_", "world_size", "dim", "scale_grad"],
    }
    for name, order in orders.items():
        function = getattr(DistributedAutograd, name)
        assert list(inspect.signature(function.forward).parameters) == ["ctx", *order]


def test_logger_and_debug() -> None:
    from fvops import debug
    from fvops.logger import init_logger

    log = init_logger("fvops.tests")
    assert callable(log.info_once)
    assert callable(log.warning_once)
    assert _plain(init_logger) == "init_logger(name)"
    parameters = inspect.signature(log.info).parameters
    assert parameters["main_process_only"].default is False
    assert parameters["local_main_process_only"].default is True
    assert _plain(debug.record_collectives) == "record_collectives()"
    assert _plain(debug.check_collectives) == "check_collectives()"
    assert _plain(debug.dump) == "dump(file=None)"


_OFFERED = [line[: line.index("(")] for line in _lines(COMMUNICATION_OP) + _lines(UTILS)]
# Of parallel_state: the initialisers, the getters, GroupCoordinator and the clean-up.
_OFFERED += [
    line[: line.index("(")]
    for line in _lines(PARALLEL_STATE)
    if not line.startswith(("patch_", "is_the_same_node_as", "get_same_node_ranks"))
]
_OFFERED += ["GroupCoordinator", "ensure_model_parallel_initialized", "init_logger", "__version__"]


@pytest.mark.parametrize("without", ["", "triton"])
def test_import_offers_the_contracts_names(without: str) -> None:
    script = (
        f"import sys\nif {without!r}: sys.modules[{without!r}] = None\n"
        "import fvops, torch\n"
        f"missing = [name for name in {_OFFERED!r} if not hasattr(fvops, name) or name not in fvops.__all__]\n"
        "assert not missing, missing\n"
        "assert all(hasattr(fvops, name) for name in fvops.__all__)\n"
        "ops = 'all_reduce reduce all_gather reduce_scatter all_to_all_4D all_to_all_single broadcast gather shard '\n"
        "ops += 'send recv barrier'\n"
        "assert all(hasattr(torch.ops.fvops, name) for name in ops.split())\n"
        "assert not torch.distributed.is_initialized() and 'torch._inductor.lowering' not in sys.modules\n"
        "assert isinstance(fvops.__version__, str)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_package_is_typed() -> None:
    from importlib.resources import files

    assert (files("fvops") / "py.typed").is_file()


def test_every_folder_of_the_package_is_installed() -> None:
    import tomllib

    root = Path(__file__).resolve().parents[1]
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {".".join(path.parent.relative_to(root).parts) for path in (root / "fvops").rglob("__init__.py")}
    assert set(listed) == folders | {"fvops.kernels"}
