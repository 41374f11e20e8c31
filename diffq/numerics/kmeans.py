"""k-means over blocks of weights: codebooks for product quantization. Pure, and chunked.

Distances never exist all at once: chunks of them stay in a core's cache between the
matrix product that makes them and the search for the nearest codeword.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffq.errors import ConfigError

#: Points and codewords whose scores are computed at a time, and how many times in one call:
#: measured on two cores with 2 MiB of cache each; a call's scores take 8 MiB.
_POINTS = 1024
_WORDS = 256
_BATCH = 8

#: Distance of a new codeword from that of the cluster that it splits, in standard deviations.
_SPLIT = 0.01


@dataclass(frozen=True)
class Clustering:
    """What k-means found.

    Attributes:
        codebook: float32 [K, d], by falling number of members.
        indices: int64 [n], the nearest codeword of each block.
        errors: sum of squared distances of the blocks to their codewords (Equation 3 of
            arXiv:2004.07320): at the start, then after each iteration. Never rises.
    """

    codebook: Tensor
    indices: Tensor
    errors: tuple[float, ...]


@torch.no_grad()
def kmeans(
    blocks: Tensor,
    size: int,
    iterations: int = 15,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
    report: Callable[[int], None] | None = None,
) -> Clustering:
    """Lloyd's algorithm, from random blocks or from a codebook.

    An empty cluster takes a half of a populous one. Ends early once an iteration gains
    nothing. On a CPU, the same generator gives the same codebook.

    Args:
        blocks: [n, d], finite; computed with in float32.
        size: K, number of codewords, from 1 to n.
        iterations: the most iterations to run.
        generator: random numbers on the CPU.
        start: codebook to start from, [K, d], in place of random blocks.
        report: called with the number of iterations that are done.

    Raises:
        ConfigError: fewer blocks than codewords.
    """
    if not 1 <= size <= len(blocks):
        raise ConfigError(
            f"A codebook has from 1 codeword to as many as there are blocks ({len(blocks)}), "
            f"got {size}."
        )
    # Around the mean, float32 tells distances apart that a common offset would hide.
    center = blocks.float().mean(0)
    points = _Points(blocks.float() - center)
    if start is None:
        chosen = torch.randperm(len(blocks), generator=generator, device="cpu")[:size]
        start = blocks[chosen.to(blocks.device)]
    best = _State(points, start.float() - center)
    errors = [best.error]
    for iteration in range(iterations):
        state = _State(points, best.next_codebook(generator))
        if report is not None:
            report(iteration + 1)
        if state.error >= best.error:
            break
        best = state
        errors.append(state.error)
    return best.clustering(center, tuple(errors))


@torch.no_grad()
def kmeans_with_zeros(
    blocks: Tensor, size: int, start: Tensor | None = None, **options: Any
) -> Clustering:
    """`kmeans`, in which the first codeword is exactly zero if some block is.

    The other codewords are those of the other blocks; where there are too few of them, the
    rest of the codewords is zero too.

    Args:
        blocks: as `kmeans`.
        size: K; more than 1 if some blocks are zero and others are not.
        start: as `kmeans`; codewords are left out by their largest magnitude, smallest first.
        **options: further arguments of `kmeans`.
    """
    kept = nonzero(blocks)
    others = blocks[kept]
    if len(others) == len(blocks):
        return kmeans(blocks, size, start=start, **options)
    codebook = torch.zeros(size, blocks.shape[1], device=blocks.device)
    indices = torch.zeros_like(kept, dtype=torch.int64)
    errors: tuple[float, ...] = (0.0,)
    words = min(size - 1, len(others))
    if words:
        if start is not None:
            start = start[start.abs().amax(1).topk(words).indices.sort().values]
        found = kmeans(others, words, start=start, **options)
        codebook[1 : 1 + words] = found.codebook
        indices[kept] = found.indices + 1
        errors = found.errors
    return Clustering(codebook, indices, errors)


def nonzero(blocks: Tensor) -> Tensor:
    """The blocks of [n, d] that are not all zero, bool [n]."""
    return (blocks != 0).any(1)


def smallest(codebook: Tensor) -> Tensor:
    """Index of the codeword whose largest magnitude is least, int64 [1]."""
    return codebook.abs().amax(1).argmin(0, keepdim=True)


@torch.no_grad()
def nearest(blocks: Tensor, codebook: Tensor) -> Tensor:
    """The nearest codeword of each block (Equation 11 of arXiv:2004.07320).

    Args:
        blocks: [n, d].
        codebook: [K, d].

    Returns:
        int64 [n]; the first of several at the same distance, as float32 sees it.
    """
    if not len(blocks):
        return torch.empty(0, dtype=torch.int64, device=blocks.device)
    center = codebook.float().mean(0)
    return _Points(blocks.float() - center).nearest(codebook.float() - center)


def member_sums(blocks: Tensor, indices: Tensor, size: int) -> Tensor:
    """Sum of the blocks of each codeword, [K, d], in the dtype of the blocks.

    Args:
        blocks: [n, d].
        indices: int64 [n], the codeword of each block.
        size: K.
    """
    sums = blocks.new_zeros(size, blocks.shape[1])
    return sums.scatter_add_(0, indices[:, None].expand_as(blocks), blocks)


class _Points:
    """Blocks laid out for the search.

    Attributes:
        blocks: float64 [n, d], so that sums and errors are exact to float32.
        squares: float64 [n, 1], their squared lengths.
        chunks: float32 [chunks, d + 1, points]; the last row holds ones, as do the blocks
            that fill up the last chunk there.
        total: sum of `squares`.
    """

    def __init__(self, blocks: Tensor) -> None:
        count, dim = blocks.shape
        width = min(_POINTS, -(-count // 16) * 16)
        padded = blocks.new_zeros(-(-count // width) * width, dim + 1)
        padded[:count, :dim] = blocks
        padded[:, dim] = 1
        self.chunks = padded.view(-1, width, dim + 1).transpose(1, 2).contiguous()
        self.blocks = blocks.double()
        self.squares = self.blocks.square().sum(1, keepdim=True)
        self.total = self.squares.sum()

    def nearest(self, codebook: Tensor) -> Tensor:
        """The nearest codeword of each block, int64 [n].

        |x - c|^2 is smallest where <x, c> - |c|^2 / 2 is largest.
        """
        words = torch.cat([codebook, codebook.square().sum(1, keepdim=True) / -2], 1)
        found = [_search(chunk, words) for chunk in torch.split(self.chunks, _BATCH)]
        return torch.cat(found).view(-1)[: len(self.blocks)]


def _search(chunk: Tensor, words: Tensor) -> Tensor:
    """Index of the best word for each point, [batch, points]; the first of equals."""
    best, where = _search_tile(chunk, words[:_WORDS])
    for start in range(_WORDS, len(words), _WORDS):
        score, place = _search_tile(chunk, words[start : start + _WORDS])
        better = score > best
        best = torch.where(better, score, best)
        where = torch.where(better, place + start, where)
    return where


def _search_tile(chunk: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """The best score of each point and the index of its word."""
    scores = torch.matmul(words, chunk)
    if scores.device.type != "cpu":
        best, where = scores.max(1)
        return best, where
    # On CPUs, a maximum with its index is scalar code, except in max pooling over
    # channels-last images: with points as channels and words as rows, five times faster.
    image = scores.unsqueeze(2).permute(0, 3, 1, 2)
    best, where = F.max_pool2d(image, (len(words), 1), return_indices=True)
    return best.flatten(1), where.flatten(1)


class _State:
    """A codebook and the assignment of all blocks to it."""

    def __init__(self, points: _Points, codebook: Tensor) -> None:
        self.points = points
        self.codebook = codebook
        self.indices = points.nearest(codebook)
        self.counts = torch.bincount(self.indices, minlength=len(codebook))
        self.sums = member_sums(points.blocks, self.indices, len(codebook))
        words = codebook.double()
        error = points.total - 2 * (words * self.sums).sum()
        self.error = float(error + (self.counts * words.square().sum(1)).sum())

    def next_codebook(self, generator: torch.Generator | None) -> Tensor:
        """The mean of each cluster's blocks; empty clusters get a share of others."""
        means = self.sums / self.counts.clamp(min=1)[:, None]
        empty = (self.counts == 0).nonzero().view(-1)
        if len(empty):
            self._split(means, empty, generator)
        return means.float()

    def _split(self, means: Tensor, empty: Tensor, generator: torch.Generator | None) -> None:
        """Puts each empty codeword beside that of a populous cluster.

        That codeword stays where it is, so that no block is farther from its nearest
        codeword than before. Clusters whose blocks are all equal cannot be split.
        """
        squares = member_sums(self.points.squares, self.indices, len(means)).view(-1)
        spread = squares - self.counts * means.square().sum(1)
        population = torch.where(spread > 1e-10 * squares, self.counts, 0)
        donors = population.topk(min(len(empty), int((population > 0).sum()))).indices
        shape = len(donors), means.shape[1]
        offset = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        deviation = (spread[donors] / (population[donors] * means.shape[1])).sqrt()
        means[empty[: len(donors)]] = means[donors] + _SPLIT * deviation[:, None] * offset.to(means)

    def clustering(self, center: Tensor, errors: tuple[float, ...]) -> Clustering:
        """The result: frequent codewords first, which makes indices easier to compress."""
        order = self.counts.argsort(descending=True, stable=True)
        place = torch.empty_like(order).scatter_(
            0, order, torch.arange(len(order), device=order.device)
        )
        return Clustering(self.codebook[order] + center, place[self.indices], errors)
