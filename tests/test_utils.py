"""Helpers that need no process group: padding, divisibility, environment variables, the logger, the platform."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fvops import envs, logger, platforms, utils
from tests.draws import profile


@given(numerator=st.integers(0, 1000), denominator=st.integers(1, 40))
@profile(40)
def test_divide(numerator: int, denominator: int) -> None:
    if numerator % denominator == 0:
        utils.ensure_divisibility(numerator, denominator)
        assert utils.divide(numerator, denominator) * denominator == numerator
    else:
        for function in (utils.divide, utils.ensure_divisibility):
            with pytest.raises(ValueError, match=f"{numerator}.*{denominator}"):
                function(numerator, denominator)


def test_dividing_by_zero_names_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"3.*0"):
        utils.divide(3, 0)


@given(seq_len=st.integers(0, 500), P=st.integers(1, 17))
@profile(40)
def test_padding_is_the_least_that_makes_a_multiple(seq_len: int, P: int) -> None:
    padded, amount = utils.compute_padding_for_sp(seq_len, P)
    assert padded == seq_len + amount
    assert padded % P == 0
    assert 0 <= amount < P


@given(shape=st.lists(st.integers(0, 4), min_size=1, max_size=4), number=st.integers(0, 7), extra=st.integers(0, 3))
@profile(40)
def test_pad_and_unpad(shape: list[int], number: int, extra: int) -> None:
    dim = number % (2 * len(shape)) - len(shape)
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape) + 1
    padded = utils.pad_sequence_tensor(x, shape[dim] + extra, dim, pad_value=-2.0)
    filler = list(shape)
    filler[dim] = extra
    assert torch.equal(padded, torch.cat([x, torch.full(filler, -2.0)], dim))
    assert torch.equal(utils.unpad_sequence_tensor(padded, shape[dim], dim), x)


def test_pad_defaults_and_refusals() -> None:
    x = torch.ones(2, 3, 4)
    assert utils.pad_sequence_tensor(x, 3) is x
    assert utils.pad_sequence_tensor(x, 5)[:, 3:].abs().sum() == 0
    assert utils.unpad_sequence_tensor(x, 2).shape == (2, 2, 4)
    assert utils.pad_sequence_tensor(torch.ones(1, 1, dtype=torch.int64), 2).dtype == torch.int64
    for call in (
        lambda: utils.pad_sequence_tensor(x, 2),
        lambda: utils.unpad_sequence_tensor(x, 4),
        lambda: utils.unpad_sequence_tensor(x, -1),
        lambda: utils.pad_sequence_tensor(x, 9, 3),
        lambda: utils.compute_padding_for_sp(3, 0),
    ):
        with pytest.raises(ValueError, match=r"\d"):
            call()


def test_split_along_the_last_dim() -> None:
    x = torch.arange(24).reshape(2, 12)
    views = utils.split_tensor_along_last_dim(x, 3)
    assert [piece.tolist() for piece in views] == [piece.tolist() for piece in x.chunk(3, -1)]
    assert all(piece.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for piece in views)
    assert not views[0].is_contiguous()
    assert all(piece.is_contiguous() for piece in utils.split_tensor_along_last_dim(x, 3, True))
    with pytest.raises(ValueError, match=r"12.*5"):
        utils.split_tensor_along_last_dim(x, 5)


def test_variables_are_read_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FVOPS_TIMEOUT_S", raising=False)
    default = envs.FVOPS_TIMEOUT_S
    monkeypatch.setenv("FVOPS_TIMEOUT_S", "12.5")
    assert envs.FVOPS_TIMEOUT_S == 12.5
    monkeypatch.setenv("FVOPS_TIMEOUT_S", "")
    assert default == envs.FVOPS_TIMEOUT_S
    assert [name for name in envs.VARIABLES if name.startswith("FVOPS_")]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FVOPS_TIMEOUT_S", "soon"),
        ("FVOPS_TIMEOUT_S", "-1"),
        ("FVOPS_TIMEOUT_S", "nan"),
        ("FVOPS_TIMEOUT_S", "inf"),
        ("FVOPS_LOG_LEVEL", "LOUD"),
        ("RANK", "first"),
    ],
)
def test_a_bad_value_names_the_variable(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name}='{value}'"):
        getattr(envs, name)


def test_an_unknown_variable_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="FVOPS_NO_SUCH"):
        _ = envs.FVOPS_NO_SUCH


def _say(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, rank: int, local_rank: int) -> list[str]:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    log = logger.init_logger("fvops.tests")
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="fvops.tests"):
        log.info("default %d", 1)
        log.info("main", main_process_only=True)
        log.info("all", local_main_process_only=False)
        log.info("neither", main_process_only=False, local_main_process_only=False)
        log.warning("a warning")
    return [record.getMessage() for record in caplog.records]


def test_info_speaks_on_the_ranks_it_is_meant_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    everywhere = ["all", "neither", "a warning"]
    assert _say(monkeypatch, caplog, 0, 0) == ["default 1", "main", *everywhere]
    assert _say(monkeypatch, caplog, 8, 0) == ["default 1", *everywhere]
    assert _say(monkeypatch, caplog, 1, 1) == everywhere


def test_once_means_once_per_logger_and_text(caplog: pytest.LogCaptureFixture) -> None:
    log, other = logger.init_logger("fvops.tests.once"), logger.init_logger("fvops.tests.other")
    with caplog.at_level(logging.INFO, logger="fvops.tests"):
        for _ in range(3):
            log.info_once("hello %s", "you")
            log.info_once("hello %s", "they")
            log.warning_once("careful")
            other.info_once("hello you")
    assert [record.getMessage() for record in caplog.records] == ["hello you", "hello they", "careful", "hello you"]
    assert [record.levelname for record in caplog.records].count("WARNING") == 1


def test_a_record_names_the_line_that_logged(caplog: pytest.LogCaptureFixture) -> None:
    log = logger.init_logger("fvops.tests.lines")
    with caplog.at_level(logging.INFO, logger="fvops.tests"):
        log.info("here", local_main_process_only=False)
        log.info_once("and here")
    assert [record.filename for record in caplog.records] == ["test_utils.py"] * 2


def test_importing_configures_no_logger() -> None:
    script = (
        "import logging; before = list(logging.getLogger().handlers)\n"
        "import fvops; fvops.init_logger('fvops.x').info('nothing is printed')\n"
        "assert logging.getLogger().handlers == before == [], logging.getLogger().handlers\n"
        "assert logging.getLogger().level == logging.WARNING\n"
        "assert logging.getLogger('fvops').handlers == []\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "nothing is printed" not in done.stdout + done.stderr


def test_the_platform_is_one_of_ours() -> None:
    platform = platforms.current_platform
    assert platforms.current_platform is platform
    assert platform.device_type in ("cuda", "npu", "cpu")
    assert platform.device_name in ("cuda", "rocm", "npu", "cpu")
    told = [platform.is_cuda(), platform.is_cuda_alike(), platform.is_npu(), platform.is_cpu()]
    if not torch.cuda.is_available() and not hasattr(torch, "npu"):
        assert told == [False, False, False, True]
        assert platforms.default_backend() == "gloo"
    assert sum(told[1:]) == 1
