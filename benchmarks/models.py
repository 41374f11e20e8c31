"""The models that benchmarks train, in plain PyTorch; arguments make small variants for tests.

Every model maps a batch of inputs to class scores in the last dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TiedEmbedding(nn.Embedding):
    """An embedding whose weight is also the output head."""

    def scores(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class BandedEmbedding(nn.Module):
    """A tied embedding whose rarer tokens have narrower vectors (Baevski and Auli, 2019).

    Each band is (tokens, width). The head scores all tokens, so that no shape depends on data.
    """

    def __init__(self, bands: Sequence[tuple[int, int]], width: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(TiedEmbedding(count, narrow) for count, narrow in bands)
        self.projections = nn.ModuleList(TiedProjection(narrow, width) for _, narrow in bands)

    def forward(self, tokens: Tensor) -> Tensor:
        total = torch.zeros((), device=tokens.device)
        for table, projection in zip(self.tables, self.projections, strict=True):
            inside = (tokens >= 0) & (tokens < table.num_embeddings)
            vectors = projection(table(tokens.where(inside, 0)))
            total = total + vectors * inside.unsqueeze(-1)
            tokens = tokens - table.num_embeddings
        return total

    def scores(self, x: Tensor) -> Tensor:
        parts = zip(self.tables, self.projections, strict=True)
        return torch.cat([table.scores(projection.reverse(x)) for table, projection in parts], -1)


class TiedProjection(nn.Linear):
    """A projection whose transpose maps back."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reverse(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.t())


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(2, (3, self.heads, -1))  # [batch, time, 3, head, features]
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.project(attended.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """A pre-norm layer: attention, then a GELU network."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attend = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x)
        return x + self.feed(x)


class Transformer(nn.Module):
    """A causal language model with a tied head; 5.3M parameters as it stands.

    Args:
        bands: (tokens, width) of each part of the vocabulary; one of full width is not projected.
        width: of the vectors between layers.
        layers: number of blocks.
        heads: per attention.
        context: most tokens of a sequence.
    """

    def __init__(
        self,
        bands: Sequence[tuple[int, int]] = ((8192, 256),),
        width: int = 256,
        layers: int = 4,
        heads: int = 4,
        context: int = 128,
    ) -> None:
        super().__init__()
        plain = len(bands) == 1 and bands[0][1] == width
        self.embed = TiedEmbedding(*bands[0]) if plain else BandedEmbedding(bands, width)
        self.position = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.normal_(self.position, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        return self.embed.scores(self.norm(self.blocks(x)))


class Convolution(nn.Sequential):
    """A convolution without bias, BatchNorm, and perhaps an activation."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        activation: type[nn.Module] = nn.Identity,
    ) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            activation(),
        )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            Convolution(inputs, outputs, 3, stride, activation=nn.ReLU),
            Convolution(outputs, outputs, 3),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else Convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Sequential):
    """ResNet-18 for 32x32 images; 11.2M parameters as it stands.

    Args:
        widths: channels of each stage; all but the first halve the image.
        depth: blocks of each stage.
        classes: number of outputs.
    """

    def __init__(
        self, widths: Sequence[int] = (64, 128, 256, 512), depth: int = 2, classes: int = 10
    ) -> None:
        stages = []
        inputs = widths[0]
        for stage, width in enumerate(widths):
            strides = [2 if stage else 1] + [1] * (depth - 1)
            blocks = [
                ResidualBlock(inputs if i == 0 else width, width, s) for i, s in enumerate(strides)
            ]
            stages.append(nn.Sequential(*blocks))
            inputs = width
        super().__init__(
            Convolution(3, widths[0], 3, activation=nn.ReLU),
            *stages,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(widths[-1], classes),
        )


class SqueezeExcite(nn.Module):
    """Scales channels by what all of the image holds."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, squeezed, 1),
            nn.SiLU(),
            nn.Conv2d(squeezed, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class MBConv(nn.Module):
    """An inverted bottleneck: widen, depthwise convolution, squeeze-excite, narrow."""

    def __init__(self, inputs: int, outputs: int, expand: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = expand * inputs
        self.body = nn.Sequential(
            Convolution(inputs, wide, 1, activation=nn.SiLU),
            Convolution(wide, wide, kernel, stride, groups=wide, activation=nn.SiLU),
            SqueezeExcite(wide, max(1, inputs // 4)),
            Convolution(wide, outputs, 1),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


#: Expansion, channels, layers, stride and kernel of each stage of EfficientNet-B3.
EFFICIENTNET_B3 = (
    (1, 24, 2, 1, 3),
    (6, 32, 3, 2, 3),
    (6, 48, 3, 2, 5),
    (6, 96, 5, 2, 3),
    (6, 136, 5, 1, 5),
    (6, 232, 6, 2, 5),
    (6, 384, 2, 1, 3),
)


class EfficientNet(nn.Sequential):
    """Like EfficientNet-B3: hundreds of small tensors; 10.7M parameters as it stands.

    Args:
        stages: as in `EFFICIENTNET_B3`.
        head: channels before the classifier.
        classes: number of outputs.
    """

    def __init__(
        self,
        stages: Sequence[tuple[int, int, int, int, int]] = EFFICIENTNET_B3,
        head: int = 1536,
        classes: int = 100,
    ) -> None:
        blocks = []
        stem = inputs = 40
        for expand, width, layers, stride, kernel in stages:
            for layer in range(layers):
                blocks.append(MBConv(inputs, width, expand, kernel, stride if layer == 0 else 1))
                inputs = width
        super().__init__(
            Convolution(3, stem, 3, activation=nn.SiLU),
            *blocks,
            Convolution(inputs, head, 1, activation=nn.SiLU),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(head, classes),
        )
        # As after a training: weights that are all one or zero have no range to quantize.
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)


class Recurrent(nn.Module):
    """A language model on an LSTM; 4.4M parameters as it stands."""

    def __init__(self, vocabulary: int = 256, width: int = 512, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.recur = nn.LSTM(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.recur(self.embed(tokens))[0])


def token_batch(vocabulary: int, sequences: int, length: int) -> tuple[Tensor, Tensor]:
    """Random tokens, and the ones that follow each."""
    tokens = torch.randint(vocabulary, (sequences, length + 1))
    return tokens[:, :-1], tokens[:, 1:]


def image_batch(classes: int, images: int, size: int) -> tuple[Tensor, Tensor]:
    """Random images and their classes."""
    return torch.randn(images, 3, size, size), torch.randint(classes, (images,))


def task_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(scores.flatten(0, -2), targets.flatten())
