"""One tensor as indices into a codebook of blocks, with noise on its blocks in training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from diffq.attach.plan import TensorPlan
from diffq.attach.sample import Sample
from diffq.attach.weight import WeightQuantizer
from diffq.checks import check_choice, check_number, check_whole
from diffq.errors import ConfigError, MismatchError, WeightError
from diffq.format.kinds.product import MAX_CODEWORDS, SCALE_BITS, ProductRecord, index_bits
from diffq.numerics.kmeans import Clustering, kmeans_with_zeros, nearest, nonzero, smallest
from diffq.quantizers.product.blocks import BlockSize, check_block_size
from diffq.quantizers.product.centroids import (
    Centroids,
    StoredCodebook,
    pass_to_centroids,
    store_codebook,
)
from diffq.quantizers.progress import ProgressBar
from diffq.torch_inside.graph import is_plain

#: What the picked blocks of a training forward become: their nearest codeword, zero, or the
#: mean of all blocks.
BlockNoise = Literal["exact", "proxy", "mean"]

#: Blocks are picked one by one, or all those of a codeword together.
Picked = Literal["blocks", "clusters"]


@dataclass(frozen=True)
class ProductSettings:
    """How one tensor is quantized; see `ProductQuantizer` for the meaning of each field."""

    block_size: BlockSize
    codebook_size: int
    p: float
    noise: BlockNoise
    picked: Picked
    centroids: Centroids
    iterations: int

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        check_whole(self.codebook_size, "codebook_size")
        if self.codebook_size > MAX_CODEWORDS:
            raise ConfigError(
                f"codebook_size must be at most {MAX_CODEWORDS}, got {self.codebook_size}."
            )
        check_number(self.p, "p", 0, 1)
        check_whole(self.iterations, "iterations")
        check_choice(self.noise, "noise", get_args(BlockNoise))
        check_choice(self.picked, "picked", get_args(Picked))
        check_choice(self.centroids, "centroids", get_args(Centroids))


class ProductWeight(WeightQuantizer):
    """One tensor in blocks, with a codebook that they share.

    Until it is fixed, training sees noise on some blocks, and eval the nearest codeword of
    every block as the weights are then. Once fixed, the tensor is made of codewords in
    training too: each block keeps its own, and the codebook is trained in the weights' place.

    Blocks of zeros stay exactly zero: noise leaves them alone, and a codeword is zero for them.

    What is learned is the codebook, float32 [K, d].

    Attributes:
        indices: int32 [blocks], the codeword of each block when the codebook was learned.
        counts: int32 [K], blocks of each codeword once it is fixed, at least 1.
        may_have_zeros: whether blocks were zero at the last look; codewords, once fixed.
    """

    method = "ProductQuantizer"

    def __init__(self, plan: TensorPlan, settings: ProductSettings) -> None:
        super().__init__(plan)
        self.settings = settings
        # One number for this tensor by now.
        block_size = cast(int, settings.block_size)
        self.group_size = block_size
        self.blocks = plan.numel // block_size
        self.may_have_zeros = False
        self.size = settings.codebook_size
        self.index_bits = index_bits(self.size) * self.blocks
        self.indices = torch.zeros(self.blocks, dtype=torch.int32, device="cpu")
        self.counts = torch.ones_like(self.indices[:1]).repeat(self.size)

    @property
    def fixed(self) -> bool:
        """Whether blocks keep their codewords."""
        return self.stage == 1

    @property
    def learning(self) -> bool:
        """Whether centroids are trained: once the tensor is fixed."""
        return self.fixed

    def start(self, weight: Tensor) -> Tensor:
        """Codewords of zeros, [K, d], until k-means has learned others."""
        return weight.new_zeros(self.size, self.group_size, dtype=torch.float32)

    def look(self, weight: Tensor, learned: Tensor | None) -> None:
        """Looks for blocks of zeros, among the codewords once they are what training moves."""
        blocks = learned if self.fixed and learned is not None else self._in_blocks(weight)
        self.may_have_zeros = not bool(nonzero(blocks).all())

    def draw(self, weight: Tensor, learned: Tensor | None) -> Sample | None:
        """Equation 7: the weight with noise on some blocks; codewords once it is fixed."""
        self._move(weight.device)
        if self.fixed:
            return Sample(weight, self._codewords(self._stored(weight, learned), self.indices))
        return Sample(weight, self._noisy(weight.detach(), learned)) if self.settings.p else None

    def connect(self, weight: Tensor, sample: Sample, learned: Tensor | None) -> Tensor:
        """Equation 8, the identity to the weight; Equation 4 to the codebook once it is fixed."""
        if not self.fixed or learned is None:
            return super().connect(weight, sample, learned)
        places = self.indices.long(), self.counts
        # Codewords of zeros are not trained, so that optimizers leave them exactly zero.
        trained = nonzero(learned.detach()) if self.may_have_zeros else None
        return pass_to_centroids(weight, sample.value, learned, *places, trained)

    def quantize(self, weight: Tensor, learned: Tensor | None) -> Tensor:
        """Every block's codeword, as it is stored."""
        stored = self._checked_codebook(weight, learned)
        return self._codewords(stored, self._assign(weight, stored)).to(weight.dtype)

    @torch.no_grad()
    def record(self, weight: Tensor, learned: Tensor | None) -> ProductRecord:
        """Codebook and indices."""
        stored = self._checked_codebook(weight, learned)
        return stored.record(weight, self._assign(weight, stored))

    def size_bits(self) -> float:
        """Equation 5 without activations: codebook and ceil(log2 K) bits a block."""
        scale = SCALE_BITS if self.settings.centroids == "int8" else 0
        word = 8 * self.group_size * getattr(torch, self.settings.centroids).itemsize
        return float(self.size * word + scale + self.index_bits)

    def meaning(self) -> dict[str, Any]:
        """The shape of the codebook, and what it is stored in."""
        shape = {"codebook_size": self.size, "block_size": self.group_size}
        return {**shape, "centroids": self.settings.centroids}

    def kept(self) -> Tensor:
        """The codeword of each block."""
        return self.indices

    def learn(
        self, weight: Tensor, learned: Tensor | None, seed: int, bar: ProgressBar
    ) -> Clustering:
        """k-means of the weight's blocks, from a codebook or, if it is None, random blocks.

        Returns:
            The codebook, and the indices of what is nearest once it is stored.

        Raises:
            WeightError: the weight is not finite.
            ConfigError: the only codeword cannot be zero for some blocks alone.
        """
        self._check_finite(weight)
        self._check_zeros(weight, learned)
        blocks = self._in_blocks(weight).float()
        found = kmeans_with_zeros(
            blocks,
            self.size,
            start=learned,
            iterations=self.settings.iterations,
            generator=torch.Generator().manual_seed(seed),
            report=lambda _: bar.advance(self.plan.numel, self.plan.name),
        )
        stored = store_codebook(found.codebook, self.settings.centroids)
        return replace(found, indices=self._nearest(blocks, stored.values()))

    def take(self, indices: Tensor) -> None:
        """Takes the codeword of each block, [blocks]."""
        self.indices = indices.to(torch.int32)
        counts = torch.bincount(self.indices, minlength=self.size)
        self.counts = counts.clamp(min=1).to(torch.int32)

    def fix(self, learned: Tensor) -> None:
        """Has each block keep the codeword that it was given last."""
        self.stage = 1
        self.look(learned, learned)

    def set_stage(self, stage: int, learned: Tensor | None, kept: Tensor | None) -> None:
        """Takes up the stage and the indices of a state dict."""
        if kept is not None:
            if int(kept.max()) >= self.size:
                raise MismatchError(
                    f"The state dict was made with another codebook_size for {self.plan.name}. "
                    "Make the quantizer with the same arguments."
                )
            self.take(kept.to(self.indices.device))
        self.stage = stage
        if learned is not None and not learned.is_meta and self.fixed:
            self.look(learned, learned)

    def read_earlier(
        self, entries: Mapping[str, Tensor], learned: Tensor | None
    ) -> tuple[int, Tensor | None]:
        """Reads the codebook, the indices, and whether they are fixed."""
        super().read_earlier(entries, learned)
        return int(entries["_extra_state"][0]), entries.get("indices")

    def _move(self, device: torch.device) -> None:
        if self.indices.device != device:
            self.indices, self.counts = self.indices.to(device), self.counts.to(device)

    def _check_finite(self, weight: Tensor) -> None:
        if not torch.isfinite(weight).all():
            raise WeightError(
                f"Weights to quantize must be finite, but {self.plan.name} holds NaN or Inf. "
                "Find the step that diverged, or exclude the tensor."
            )

    def _check_zeros(self, weight: Tensor, learned: Tensor | None) -> None:
        self.look(weight, learned)
        if self.fixed or not self.may_have_zeros or self.size > 1:
            return
        if nonzero(self._in_blocks(weight)).any():
            raise ConfigError(
                "Blocks of zeros stay zero, which takes a codeword of their own, but "
                f"{self.plan.name} has other blocks too and one codeword for all. Pass "
                f"overrides={{{self.plan.name!r}: {{'codebook_size': 2}}}}, or exclude it."
            )

    def _in_blocks(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.blocks, self.group_size)

    def _codewords(self, stored: StoredCodebook, indices: Tensor) -> Tensor:
        return stored.take(indices).view(self.plan.shape)

    def _assign(self, weight: Tensor, stored: StoredCodebook) -> Tensor:
        """The codeword of each block: its own once fixed, else the nearest."""
        self._move(weight.device)
        if self.fixed:
            return self.indices
        if is_plain():
            self._check_finite(weight)
        return self._nearest(self._in_blocks(weight), stored.values())

    def _nearest(self, blocks: Tensor, words: Tensor) -> Tensor:
        """The nearest codeword of each block; of blocks of zeros the one that is zero."""
        found = nearest(blocks, words)
        if not self.may_have_zeros:
            return found
        return torch.where(nonzero(blocks), found, smallest(words))

    def _stored(self, weight: Tensor, learned: Tensor | None) -> StoredCodebook:
        codebook = cast(Tensor, learned).detach()
        if self.may_have_zeros and not self.fixed:
            # Blocks may have become zero since the codebook was learned.
            place, none = smallest(codebook), nonzero(self._in_blocks(weight)).all()
            word = torch.where(none, codebook.index_select(0, place), 0)
            codebook = codebook.index_copy(0, place, word)
        return store_codebook(codebook, self.settings.centroids)

    def _checked_codebook(self, weight: Tensor, learned: Tensor | None) -> StoredCodebook:
        if not is_plain():
            return self._stored(weight, learned)
        self._check_zeros(weight, learned)
        stored = self._stored(weight, learned)
        largest = torch.finfo(torch.float32).max / 256
        if not torch.isfinite(stored.values()).all() or not stored.scale <= largest:
            found = None if learned is None else learned.abs().max().item()
            raise WeightError(
                f"The centroids of {self.plan.name} must be finite in {self.settings.centroids}, "
                f"got values up to {found}. Find the step that diverged, or pass "
                "centroids='float32'."
            )
        return stored

    def _noisy(self, weight: Tensor, learned: Tensor | None) -> Tensor:
        """Equation 6: some blocks become noise, all others stay."""
        blocks = self._in_blocks(weight)
        picked = self._pick(weight.device)
        if self.may_have_zeros:
            picked &= nonzero(blocks)
        return torch.where(picked[:, None], self._noise(blocks, picked, learned), blocks).view(
            weight.shape
        )

    def _pick(self, device: torch.device) -> Tensor:
        """The set J of Equation 6 as bool [blocks]."""
        if self.settings.picked == "clusters":
            return self._draw(self.size, device)[self.indices.long()]
        return self._draw(self.blocks, device)

    def _draw(self, count: int, device: torch.device) -> Tensor:
        """True at a rate of p, bool [count]."""
        return torch.rand(count, dtype=torch.float32, device=device) < self.settings.p

    def _noise(self, blocks: Tensor, picked: Tensor, learned: Tensor | None) -> Tensor:
        """What the picked blocks become, [blocks, d] or like it."""
        if self.settings.noise == "proxy":
            return blocks.new_zeros(())
        if self.settings.noise == "mean":
            return blocks.mean(0)
        stored = self._stored(blocks, learned)
        words = stored.values()
        if blocks.device.type != "cpu" or torch.compiler.is_compiling():
            # How many are picked is not known there without waiting for the device.
            return stored.take(nearest(blocks, words))
        places = picked.nonzero().view(-1)
        noise = blocks.to(words.dtype, copy=True)
        noise[places] = stored.take(nearest(blocks[places], words))
        return noise
