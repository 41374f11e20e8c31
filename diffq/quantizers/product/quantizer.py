"""Product quantization: blocks of weights share a codebook (arXiv:2004.07320)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

from torch import Tensor, nn

from diffq.attach.patterns import matches
from diffq.attach.plan import Overrides, Rules, TensorPlan
from diffq.attach.weight import WeightQuantizer
from diffq.checks import check_patterns
from diffq.errors import ConfigError
from diffq.numerics.kmeans import Clustering
from diffq.quantizers.base import BaseQuantizer
from diffq.quantizers.product.blocks import BlockSize, check_blocks, choose_block_size, layer_kind
from diffq.quantizers.product.centroids import Centroids
from diffq.quantizers.product.weight import BlockNoise, Picked, ProductSettings, ProductWeight
from diffq.quantizers.progress import ProgressBar


class ProductQuantizer(BaseQuantizer[ProductSettings]):
    """Stores weights as indices into codebooks of blocks, and trains models to bear it.

    Product quantization with Quant-Noise ("Training with Quantization Noise for Extreme
    Model Compression", arXiv:2004.07320). Each tensor of two or more dimensions is cut in
    blocks, whose codebook k-means finds. In training, a random part of the blocks is
    replaced by noise (Equations 6 to 8), and eval computes with the nearest codewords
    (Equation 11). `quantize_stage()` does iterative quantization (iPQ): groups of tensors
    are fixed one after the other, and their centroids trained (Equation 4) while the rest
    is finetuned. Load trained weights before attaching, or call `refresh()` after.

    Examples:
        >>> quantizer = ProductQuantizer(model, block_size=8, stages=["*.ffn.*", "*.attn.*"])
        >>> quantizer.setup_optimizer(opt)
        >>> for epoch in range(10):
        ...     train(model)
        ...     quantizer.refresh()
        >>> while quantizer.quantize_stage():
        ...     finetune(model)

    Args:
        model: a plain model, changed in place until `detach()`.
        block_size: weights per block along the inputs of linear layers, embeddings and
            1x1 convolutions, which it must divide; other convolutions have blocks of
            whole kernels. Or a mapping of "linear", "embedding", "conv1x1", "conv" and
            "depthwise" to sizes.
        codebook_size: codewords per tensor, 1 to 65536; at most as many as blocks.
        p: probability that a block gets noise in a training forward, 0 to 1.
        noise: what a picked block becomes: its nearest codeword ("exact"), zero
            ("proxy", the paper's choice, which needs no codebook), or the mean of all
            blocks of the tensor ("mean").
        picked: "blocks" picks each by itself, "clusters" all blocks of a codeword at once.
        centroids: what codewords are stored in: "float32", "float16" or "int8"
            (Section 3.3).
        iterations: the most iterations of k-means.
        stages: for `quantize_stage()`, a name pattern or a list of them for each stage, in
            order. Tensors that none matches are the last stage.
        seed: of the random numbers of k-means.
        min_size: only parameters of more than this many MB (in float32) are quantized.
        include: name patterns; if given, only matching parameters are quantized.
        exclude: name patterns of parameters to leave alone.
        overrides: name pattern to a dict of `block_size`, `codebook_size`, `p`, `noise`,
            `picked`, `centroids` or `iterations` for the parameters that match.
        float16: store the parameters that are not quantized as float16.
        small_bits: bitwidth, 4 to 15, of the parameters that are too small to be quantized,
            with one scale each; None stores them as they are.

    Raises:
        AttachError: the model is wrapped, compiled or quantized already.
        ConfigError: a setting breaks a rule, a pattern or a stage matches nothing, blocks do
            not divide a tensor, or a tensor has fewer blocks than codewords.
        WeightError: a weight to quantize holds NaN or Inf.
    """

    _weight_quantizer = ProductWeight

    def __init__(
        self,
        model: nn.Module,
        *,
        block_size: BlockSize = 8,
        codebook_size: int = 256,
        p: float = 0.1,
        noise: BlockNoise = "proxy",
        picked: Picked = "blocks",
        centroids: Centroids = "float16",
        iterations: int = 15,
        stages: Sequence[str | Sequence[str]] = (),
        seed: int = 0,
        min_size: float = 0.01,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        overrides: Overrides | None = None,
        float16: bool = False,
        small_bits: int | None = None,
    ) -> None:
        settings = ProductSettings(
            block_size, codebook_size, p, noise, picked, centroids, iterations
        )
        self._seed = seed
        rules = Rules(min_size, include, exclude, overrides, float16, small_bits, least_dims=2)
        super().__init__(model, settings, rules)
        try:
            self._stages = _group_stages([q.plan for q in self._products()], stages)
            self._learn(self._products(), warm=False)
        except BaseException:
            self.detach()
            raise

    def _make_quantizer(
        self, plan: TensorPlan, settings: ProductSettings, model: nn.Module
    ) -> WeightQuantizer:
        if plan.pruned:
            raise ConfigError(
                f"A block is stored as its codeword, so the pruned weights of {plan.name} would "
                f"not stay zero. Pass exclude=[{plan.name!r}], or make the pruning permanent with "
                "torch.nn.utils.parametrize.remove_parametrizations."
            )
        kind, size = layer_kind(plan.sites[0].owner(model), plan.shape), settings.block_size
        if isinstance(size, Mapping) or "block_size" not in plan.overrides:
            size = choose_block_size(size, kind, plan.shape)
        check_blocks(plan.name, kind, plan.shape, size, settings.codebook_size)
        return super()._make_quantizer(plan, replace(settings, block_size=size), model)

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """The names of the tensors that each `quantize_stage()` fixes."""
        return self._stages

    def refresh(self) -> None:
        """Learns the codebooks anew from the weights as they are now; meant for once an epoch.

        k-means goes on from the present codebooks. Tensors that a stage has fixed keep theirs.
        A collective if the model is sharded.

        Raises:
            AttachError: the quantizer was detached.
            WeightError: a weight is not finite; nothing has changed then.
        """
        self._learn([q for q in self._products() if not q.fixed], warm=True)

    def quantize_stage(self) -> tuple[str, ...]:
        """Fixes the tensors of the next stage to their nearest codewords, of fresh codebooks.

        From then on they are the same in training and in eval, and the optimizer that
        `setup_optimizer` was given trains their centroids in their place. A collective if the
        model is sharded.

        Returns:
            The names of these tensors; empty once all stages are done.

        Raises:
            AttachError: the quantizer was detached.
            WeightError: a weight is not finite; nothing has changed then.
        """
        for names in self._stages:
            waiting = [q for q in self._products() if q.plan.name in names and not q.fixed]
            if waiting:
                self._learn(waiting, warm=True)
                codebooks = self._attachment.each_quantizer(lambda _, codebook: codebook)
                for quantizer in waiting:
                    quantizer.fix(cast(Tensor, codebooks[quantizer.index]))
                self._attachment.forget()
                return names
        return ()

    def _products(self) -> list[ProductWeight]:
        return [q for q in self._attachment.quantizers if isinstance(q, ProductWeight)]

    def _learn(self, quantizers: list[ProductWeight], warm: bool) -> None:
        """Learns the codebooks of some tensors: all of them or, after an error, none."""
        total = sum(q.settings.iterations * q.plan.numel for q in quantizers)

        def learn(
            q: WeightQuantizer, weight: Tensor, learned: Tensor | None
        ) -> tuple[ProductWeight, Clustering] | None:
            if not isinstance(q, ProductWeight) or q not in quantizers or weight.is_meta:
                return None
            return q, q.learn(weight, learned if warm else None, self._seed, bar)

        attachment = self._attachment
        with ProgressBar("k-means", total) as bar:
            found = list(filter(None, attachment.each_weight(learn)))
        codebooks: list[Tensor | None] = [None] * len(attachment.quantizers)
        for quantizer, clusters in found:
            quantizer.take(clusters.indices)
            codebooks[quantizer.index] = clusters.codebook
        attachment.learned.write(codebooks)
        attachment.forget()


def _group_stages(
    plans: Sequence[TensorPlan], stages: Sequence[str | Sequence[str]]
) -> tuple[tuple[str, ...], ...]:
    """The names of the tensors of each stage; the last one takes what is left."""
    if not isinstance(stages, list | tuple):
        raise ConfigError(f"stages must be a list of name patterns, got {stages!r}.")
    left, grouped = list(plans), []
    for number, stage in enumerate(stages):
        patterns = [stage] if isinstance(stage, str) else stage
        check_patterns(patterns, f"stages[{number}]")
        chosen = [plan for plan in left if matches(patterns, plan.names)]
        if not chosen:
            names = ", ".join(repr(plan.name) for plan in left[:3]) or "none"
            raise ConfigError(
                f"Each stage must match a quantized tensor that no earlier one has, got {stage!r}. "
                f"Quantized tensors that are left: {names}."
            )
        left = [plan for plan in left if plan not in chosen]
        grouped.append(chosen)
    return tuple(tuple(plan.name for plan in chosen) for chosen in [*grouped, left] if chosen)
