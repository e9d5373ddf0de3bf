"""A Wan video transformer, sequence-parallel and compiled as one graph, checked against itself on one rank.

    torchrun --standalone --nproc-per-node 2 examples/wan_sequence_parallel.py [--layers N | --checkpoint DIR]

diffusers' own model at the width of Wan 2.1 1.3B denoises random latents at two resolutions, three times over: whole on
every rank, sequence-parallel, and sequence-parallel under ``torch.compile(model, fullgraph=True)``. At the end rank 0
prints what differed and what it cost. The program fails, on every rank, when the results differ by more than rounding,
when the graph breaks or is compiled more often than it should, or when a compiled forward sends anything else than an
eager one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from torch import Tensor
from torch._dynamo.utils import counters
from tqdm import tqdm

import fvops
from fvops import debug
from fvops.integrations.diffusers import parallelize

# Latent frames, height and width, which make frames x height/2 x width/2 tokens: a multiple of 2, 3 and 4 ranks. No two
# videos share a size, or the compiler would take the shared one for a constant until a third video changes it.
VIDEOS = [(3, 16, 24), (4, 12, 40)]
ANOTHER_VIDEO = (5, 8, 36)
TEXT_TOKENS = 512
IMAGE_TOKENS = 257

# Largest difference allowed in one forward pass, relative to the largest value: 256 times float32's epsilon. The
# compiled kernels, and matrix products of other shapes, add up to 8960 (ffn_dim) products in another order, which costs
# about sqrt(8960) = 95 epsilons. A token in the wrong place costs 100,000 and more.
TOLERANCE = 256 * torch.finfo(torch.float32).eps


@dataclass
class Run:
    """What one way of running the model gave for one video; ms is the median denoising step's."""

    output: Tensor
    latents: Tensor
    ms: float
    collectives: list[tuple[str, str, int]]


def main() -> None:
    args = parse_args()
    fvops.maybe_init_distributed_environment_and_model_parallel(tp_size=1, sp_size=fvops.envs.WORLD_SIZE)
    device = fvops.get_local_torch_device()
    model = build_model(args).to(device).eval()
    videos = [random_inputs(model, shape, device) for shape in VIDEOS]

    say("one rank: the whole model on every rank, as diffusers runs it")
    alone = [run(model, video, args.steps, "one rank") for video in videos]

    model = parallelize(model)
    say(f"eager: the sequence over {fvops.get_sp_world_size()} ranks")
    eager = [run(model, video, args.steps, "eager") for video in videos]

    say("compiled, as fvops.report tells it:")
    told = fvops.report(forward, model, videos[0])
    say(f"  {told.summary()}")

    compiled_model = torch.compile(model, fullgraph=True)
    counters.clear()
    compiled, graphs = [], []
    for video in videos:
        say("compiled: the first step compiles, which takes a while")
        compiled.append(run(compiled_model, video, args.steps, "compiled"))
        graphs.append(counters["stats"]["unique_graphs"])
    say("compiled: one step at a third resolution, which must not compile anything")
    forward(compiled_model, random_inputs(model, ANOTHER_VIDEO, device))
    graphs.append(counters["stats"]["unique_graphs"])
    breaks = sum(counters["graph_break"].values())

    print_table(model, alone, eager, compiled, graphs, breaks)
    problems = find_problems(alone, eager, compiled, graphs, breaks, args.steps)
    if len(told.collectives) != len(compiled[0].collectives):
        problems.append(
            f"the report tells of {len(told.collectives)} collectives, a step sends {compiled[0].collectives}"
        )
    failed = fail_together(problems)
    fvops.cleanup_dist_env_and_memory()
    if failed:
        sys.exit(1)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="transformer blocks, with random weights (default: 2)")
    parser.add_argument("--checkpoint", metavar="DIR", help="a local WanTransformer3DModel instead, of any size")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps (default: 4)")
    args = parser.parse_args()
    if args.layers < 1 or args.steps < 1:
        parser.error("--layers and --steps must be at least 1")
    return args


def build_model(args: argparse.Namespace) -> WanTransformer3DModel:
    """The checkpoint's model, or Wan 2.1 1.3B with fewer layers and the same random weights on every rank."""
    if args.checkpoint:
        say(f"loading {args.checkpoint} in float32")
        return WanTransformer3DModel.from_pretrained(args.checkpoint, torch_dtype=torch.float32)
    say(f"building Wan 2.1 1.3B with {args.layers} of its 30 layers, random weights, float32")
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=12,
        attention_head_dim=128,
        in_channels=16,
        out_channels=16,
        text_dim=4096,
        freq_dim=256,
        ffn_dim=8960,
        num_layers=args.layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )
    for block in model.blocks:
        # Fresh gates nearly close the blocks; opened, a fault in attention shows in the output.
        torch.nn.init.normal_(block.scale_shift_table)
    return model


def random_inputs(model: WanTransformer3DModel, shape: tuple[int, int, int], device: torch.device) -> dict[str, Tensor]:
    """Everything the model takes but the timestep, the same on every rank; `latents` are what is denoised."""
    config = model.config
    generator = torch.Generator().manual_seed(sum(shape))

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    latent_channels = config.out_channels or config.in_channels
    inputs = {
        "latents": random(1, latent_channels, *shape),
        "encoder_hidden_states": random(1, TEXT_TOKENS, config.text_dim),
    }
    if config.in_channels > latent_channels:  # image-to-video: the first frame rides along as further channels
        inputs["condition"] = random(1, config.in_channels - latent_channels, *shape)
    if config.image_dim is not None:
        images = 1 if config.pos_embed_seq_len is None else 2
        inputs["encoder_hidden_states_image"] = random(images, IMAGE_TOKENS, config.image_dim)
    return inputs


def run(model: Any, video: dict[str, Tensor], steps: int, label: str) -> Run:
    """One forward pass, with its collectives recorded, then the denoising loop."""
    with debug.record_collectives() as records:
        output = forward(model, video)
    latents, ms = denoise(model, video, steps, label)
    return Run(output, latents, ms, debug.canonical(records))


@torch.no_grad()
def forward(model: Any, video: dict[str, Tensor], timestep: Tensor | None = None) -> Tensor:
    inputs = dict(video)
    latents = inputs.pop("latents")
    condition = inputs.pop("condition", None)
    hidden_states = latents if condition is None else torch.cat([latents, condition], dim=1)
    if timestep is None:
        timestep = torch.tensor(500, device=latents.device)
    return model(hidden_states=hidden_states, timestep=timestep.expand(1), **inputs, return_dict=False)[0]


def denoise(model: Any, video: dict[str, Tensor], steps: int, label: str) -> tuple[Tensor, float]:
    """The loop of diffusers' WanPipeline, without guidance: the last latents, and the median step in ms."""
    latents = video["latents"]
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.set_timesteps(steps, device=latents.device)
    times = []
    size = "x".join(map(str, latents.shape[1:]))
    for timestep in tqdm(scheduler.timesteps, desc=f"  {label:8} {size}", disable=not is_first(), ncols=80):
        start = time.perf_counter()
        velocity = forward(model, {**video, "latents": latents}, timestep)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        if latents.device.type != "cpu":
            torch.accelerator.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return latents, statistics.median(times)


def difference(run: Run, alone: Run) -> tuple[float, float]:
    """Largest absolute differences of one forward pass and of the last latents."""
    return float((run.output - alone.output).abs().max()), float((run.latents - alone.latents).abs().max())


def find_problems(
    alone: list[Run], eager: list[Run], compiled: list[Run], graphs: list[int], breaks: int, steps: int
) -> list[str]:
    """What this rank has to complain about, a line each."""
    problems = []
    for shape, one, by_way in zip(VIDEOS, alone, zip(eager, compiled, strict=True), strict=True):
        for way, run in zip(("eager", "compiled"), by_way, strict=True):
            # Every step hands its rounding on to the next.
            allowed = (TOLERANCE * float(one.output.abs().max()), TOLERANCE * steps * float(one.latents.abs().max()))
            for what, found, limit in zip(("output", "last latents"), difference(run, one), allowed, strict=True):
                if not found <= limit:  # a NaN fails too
                    problems.append(f"{shape}: {way} {what} differs by {found:.2e}, allowed {limit:.2e}")
        if by_way[0].collectives != by_way[1].collectives:
            problems.append(f"{shape}: eager sent {by_way[0].collectives}, compiled {by_way[1].collectives}")
        if by_way[1].collectives != fvops.get_sp_group().broadcast_object(by_way[1].collectives):
            problems.append(f"{shape}: this rank sent other collectives than the first: {by_way[1].collectives}")
    if breaks:
        problems.append(f"{breaks} graph breaks: {dict(counters['graph_break'])}")
    if graphs[0] != 1 or graphs[1] > 2 or graphs[2] != graphs[1]:
        problems.append(f"graphs compiled after each resolution: {graphs}, expected [1, 2, 2] or fewer")
    return problems


def fail_together(problems: list[str]) -> bool:
    """Print this rank's problems; True, on every rank, when any rank has some."""
    group = fvops.get_sp_group()
    for problem in problems:
        print(f"FAILED on rank {group.rank_in_group}: {problem}", file=sys.stderr, flush=True)
    failed = int(group.all_reduce(torch.tensor([int(bool(problems))], device=group.device)))
    say(f"FAILED on {failed} of {group.world_size} ranks" if failed else "passed on every rank")
    return failed > 0


def print_table(
    model: Any, alone: list[Run], eager: list[Run], compiled: list[Run], graphs: list[int], breaks: int
) -> None:
    ranks = fvops.get_sp_world_size()
    rows: list[tuple[str, list[str]]] = [
        ("latents", ["x".join(map(str, run.latents.shape[1:])) for run in alone]),
        ("tokens, on each rank", [f"{tokens(model, shape)}, {tokens(model, shape) // ranks}" for shape in VIDEOS]),
        ("largest value: output, latents", [pair(run.output.abs().max(), run.latents.abs().max()) for run in alone]),
        ("eager - one rank", [pair(*difference(*runs)) for runs in zip(eager, alone, strict=True)]),
        ("compiled - one rank", [pair(*difference(*runs)) for runs in zip(compiled, alone, strict=True)]),
        ("graph breaks", [str(breaks), ""]),
        ("graphs compiled", [str(graphs[0]), f"{graphs[1] - graphs[0]} (dynamic), then {graphs[2] - graphs[1]}"]),
        ("collectives a step", [str(len(run.collectives)) for run in compiled]),
        ("MB a step, handed in by a rank", [f"{megabytes(run):.1f}" for run in compiled]),
        ("ms a step: one rank", [f"{run.ms:.0f}" for run in alone]),
        ("ms a step: eager", [f"{run.ms:.0f}" for run in eager]),
        ("ms a step: compiled", [f"{run.ms:.0f}" for run in compiled]),
    ]
    say("")
    for name, cells in rows:
        say(f"{name:32}" + "".join(f"{cell:>24}" for cell in cells))
    say("differences are the largest absolute ones: of one forward pass, and of the latents after the last step")


def tokens(model: Any, shape: tuple[int, int, int]) -> int:
    frames, height, width = (size // patch for size, patch in zip(shape, model.config.patch_size, strict=True))
    return frames * height * width


def megabytes(run: Run) -> float:
    return sum(nbytes for _group, _op, nbytes in run.collectives) / 1e6


def pair(output: float | Tensor, latents: float | Tensor) -> str:
    return f"{float(output):.2g}, {float(latents):.2g}"


def is_first() -> bool:
    return fvops.get_world_rank() == 0


def say(line: str) -> None:
    if is_first():
        print(line, flush=True)


if __name__ == "__main__":
    main()
