"""What a model's blocks need on P ranks, worked out on one process: no rank, no memory, no weights.

One block is traced and multiplied; blocks are alike. What stands before and after them is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fvops import checks
from fvops.graph_report import report
from fvops.graph_report.contents import Machine, Report
from fvops.graph_report.models import Block, Model
from fvops.graph_report.planning import planned_groups

__all__ = ["Plan", "plan", "report_of_block"]


@dataclass(frozen=True)
class Plan:
    """A model on `world_size` ranks, for one forward pass of all its blocks; every number is one rank's.

    Attributes:
        model: its title.
        refused: fvops' own words where the model cannot run on so many ranks; everything below is 0 then.
        padding: tokens added so that every rank has as many.
        collectives: calls.
        sent_bytes: bytes that leave the rank.
        layout_kernels: kernels that only move elements; as lowered for CPU, where an exchange lays out by itself.
        parameter_bytes: every rank holds all of them.
        activation_bytes: a block's inputs, and the largest sum of its results that are alive at once.
        us: estimated time.
        exposed_us: estimated time in which nothing but communication runs.
    """

    model: str
    world_size: int
    refused: str = ""
    padding: int = 0
    collectives: int = 0
    sent_bytes: int = 0
    layout_kernels: int = 0
    parameter_bytes: int = 0
    activation_bytes: int = 0
    us: float = 0.0
    exposed_us: float = 0.0


def plan(model: Model, world_size: int, machine: Machine | None = None) -> Plan:
    """The plan of one forward pass in bfloat16."""
    share = -(-model.tokens // world_size)
    x_BSHD = torch.empty(1, share, model.heads, model.head_size, device="meta")
    try:
        # What the exchange would say, before anything is compiled.
        checks.check_all_to_all_4D(f"sp of {world_size}", x_BSHD, 2, 1, world_size)
    except ValueError as error:
        return Plan(model.title, world_size, refused=str(error))
    block = report_of_block(model, world_size, machine=machine)
    module = _meta_block(model)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    inputs = sum(tensor.numel() for tensor in module.inputs(world_size))
    return Plan(
        model=model.title,
        world_size=world_size,
        padding=share * world_size - model.tokens,
        collectives=model.blocks * len(block.collectives),
        sent_bytes=model.blocks * block.sent_bytes,
        layout_kernels=model.blocks * len(block.layout_kernels),
        parameter_bytes=model.blocks * parameters * torch.bfloat16.itemsize,
        activation_bytes=block.peak_bytes + inputs * torch.bfloat16.itemsize,
        us=model.blocks * block.us,
        exposed_us=model.blocks * block.exposed_us,
    )


def report_of_block(model: Model, world_size: int, *, backward: bool = False, machine: Machine | None = None) -> Report:
    """The report of one block of `model` in bfloat16 on `world_size` ranks that need not exist.

    Raises:
        ValueError: the heads are not divisible by `world_size`.
    """
    block = _meta_block(model)
    inputs = block.inputs(world_size)
    with planned_groups(sp_size=world_size):
        return report(block, *inputs, backward=backward, machine=machine)


def _meta_block(model: Model) -> Block:
    with torch.device("meta"):
        return Block(model).to(torch.bfloat16)
