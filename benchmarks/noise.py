"""What the parts of a training sample cost, beside the ways that were tried instead.

    python benchmarks/noise.py                # 5.2M weights in groups of 8
    python benchmarks/noise.py --weights 50   # millions

The ways take turns; medians in milliseconds. docs/performance.md says what came of it.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from torch import Tensor

from diffq.numerics import draws, grid, noise
from diffq.numerics.flat import Flat
from diffq.numerics.grid import BitsLaw
from diffq.numerics.noise import Drawn
from diffq.reports.tables import table

LAW = BitsLaw(2, 15)
ROW = 256


def by_autograd(weight: Tensor, unit: Tensor, logits: Tensor, group_size: int) -> Tensor:
    """Equation 6 as an expression, every part of it in the graph."""
    step = grid.step_size(weight.amin().view(1), weight.amax().view(1), LAW.bits(logits))
    added = (unit * 0.5 * step[:, None]).view(weight.shape)
    return weight + added


def by_hand(weight: Tensor, unit: Tensor, logits: Tensor, group_size: int) -> Tensor:
    """The same sample without a graph, and its gradients by hand."""
    with torch.no_grad():
        value = by_autograd(weight, unit, logits, group_size)
        drawn = Drawn.of(Flat([weight.shape], group_size), [weight], [value])
    return noise.pass_noise(drawn, LAW, logits, [weight], [value])[0]


def box_muller(buffer: Tensor, generator: np.random.Generator) -> None:
    """Gaussian numbers in pairs, from 32 random bits each."""
    half = buffer.numel() // 2
    bits = generator.integers(-(2**63), 2**63 - 1, size=half, endpoint=True).view(np.int32)
    radius, angle = torch.from_numpy(bits).to(torch.float32).split(half)
    radius.mul_(2**-32).add_(0.5 + 2**-33).log_().mul_(-2).sqrt_()
    angle.mul_(math.pi * 2**-31)
    torch.cos(angle, out=buffer[:half]).mul_(radius)
    torch.sin(angle, out=buffer[half:]).mul_(radius)


def ways(count: int, group_size: int) -> dict[str, Callable[[], object]]:
    """What is timed, by the name of its row."""
    weight = torch.randn(count // ROW, ROW).mul_(0.02).requires_grad_()
    logits = torch.zeros(count // group_size, requires_grad=True)
    stored, upstream, buffer = weight.detach(), torch.randn_like(weight), torch.empty(count)
    unit, flat = torch.randn(count // group_size, group_size), Flat([stored.shape], group_size)
    bits = torch.full((count // group_size,), 4.0)
    generator = np.random.Generator(np.random.SFC64(0))

    def numpy_draw() -> None:
        generator.standard_normal(out=buffer.numpy(), dtype=np.float32)

    def gradients(sample: Callable[..., Tensor]) -> Callable[[], object]:
        def run() -> object:
            noisy = sample(weight, unit, logits, group_size)
            return torch.autograd.grad(noisy, (weight, logits), upstream)

        return run

    return {
        "draw: torch.randn": lambda: torch.randn(count),
        "draw: normal_ into a buffer": buffer.normal_,
        "draw: NumPy's fastest generator": numpy_draw,
        "draw: NumPy's bits, Box-Muller": lambda: box_muller(buffer, generator),
        "draw: NumPy's bits, quantiles (used)": lambda: draws.source(
            "gaussian", count, buffer, buffer.dtype
        )(buffer),
        "sample: extremes, draw, scale, add (used)": lambda: noise.perturb(
            flat, [stored], bits, "gaussian", 0.5, [False]
        ),
        "copy of the weights, a floor": stored.clone,
        "forward and backward: by autograd": gradients(by_autograd),
        "forward and backward: by hand (used)": gradients(by_hand),
        "place of minimum and maximum: torch": lambda: (stored.argmin(), stored.argmax()),
        "place of minimum and maximum: NumPy (used)": lambda: flat.ends([stored]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=float, default=5.2, help="millions (default: 5.2)")
    parser.add_argument("--group-size", type=int, default=8, help="default: 8")
    parser.add_argument("--rounds", type=int, default=15, help="default: 15")
    args = parser.parse_args()
    multiple = math.lcm(ROW, args.group_size)
    timed = ways(int(args.weights * 1e6) // multiple * multiple, args.group_size)
    times: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(args.rounds + 1):
        for name, run in timed.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    rows = [
        (name, f"{median(spent[1:]):.1f}", f"{min(spent):.1f}") for name, spent in times.items()
    ]
    print(f"{args.weights} M weights, {torch.get_num_threads()} threads\n")
    print(table(("way", "ms", "least"), rows))


if __name__ == "__main__":
    main()
