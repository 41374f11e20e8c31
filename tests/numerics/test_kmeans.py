"""k-means: its error, its starts, its empty clusters, and the search for the nearest codeword."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import diffq
from diffq.numerics.kmeans import kmeans, kmeans_with_zeros, member_sums, nearest
from tests.compare import same_bits
from tests.processors import repeatable


def squared_error(blocks, codebook, indices):
    """Equation 3: the sum of squared distances, in float64."""
    return float((blocks.double() - codebook.double()[indices]).square().sum())


def brute_force(blocks, codebook):
    """The squared distance of each block to each codeword, in float64."""
    difference = blocks.double()[:, None] - codebook.double()[None]
    return difference.square().sum(-1)


def mixture(count, dim, centers, seed=0):
    """Blocks around some centers."""
    generator = torch.Generator().manual_seed(seed)
    middles = torch.randn(centers, dim, generator=generator)
    chosen = torch.randint(centers, (count,), generator=generator)
    return middles[chosen] + 0.1 * torch.randn(count, dim, generator=generator)


@st.composite
def blocks_and_size(draw):
    """Blocks of any size and number, some equal, with an offset, and a number of codewords."""
    count, dim = draw(st.integers(1, 120)), draw(st.integers(1, 10))
    seed = draw(st.integers(0, 2**32))
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randn(count, dim, generator=generator)
    if draw(st.booleans()):
        blocks = blocks.round()
    if draw(st.booleans()):
        blocks = blocks + 100 * torch.randn(dim, generator=generator)
    return blocks, draw(st.integers(1, count)), seed


@given(blocks_and_size())
@repeatable()
def test_error_never_rises(drawn):
    """With every further iteration, the true error of what k-means returns is at most the last."""
    blocks, size, seed = drawn
    found = []
    for iterations in range(6):
        generator = torch.Generator().manual_seed(seed)
        clusters = kmeans(blocks, size, iterations, generator)
        found.append(squared_error(blocks, clusters.codebook, clusters.indices))
    rounding = 1e-6 * float(blocks.double().square().sum())
    assert all(later <= earlier + rounding for earlier, later in pairwise(found))
    assert list(clusters.errors) == sorted(clusters.errors, reverse=True)


@given(blocks_and_size())
def test_reported_errors_are_true(drawn):
    """The last error that is reported is that of the codebook and indices that are returned."""
    blocks, size, seed = drawn
    clusters = kmeans(blocks, size, 3, torch.Generator().manual_seed(seed))
    spread = float((blocks - blocks.mean(0)).double().square().sum())
    true = squared_error(blocks, clusters.codebook, clusters.indices)
    offset = 1e-9 * float(blocks.double().square().sum())
    assert clusters.errors[-1] == pytest.approx(true, rel=1e-4, abs=1e-6 * spread + offset)


@given(blocks_and_size())
def test_nearest_is_nearest(drawn):
    """No codeword is nearer than the one that is found, beyond float32's rounding."""
    blocks, size, _ = drawn
    codebook = blocks[torch.randperm(len(blocks))[:size]] + 0.1
    assert _are_nearest(nearest(blocks, codebook), blocks, codebook)


def _are_nearest(found, blocks, codebook):
    distances = brute_force(blocks, codebook)
    chosen = distances.gather(1, found[:, None])[:, 0]
    scale = float((blocks - blocks.mean(0)).square().sum(1).max()) + 1
    return bool((chosen <= distances.amin(1) + 1e-5 * scale).all())


@pytest.mark.parametrize("count", [1, 15, 16, 1023, 1024, 1025, 9000])
@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 700])
def test_nearest_in_chunks(count, size):
    """Chunks of blocks and tiles of codewords of any number give what one search would."""
    blocks, codebook = torch.randn(count, 3), torch.randn(size, 3)
    assert _are_nearest(nearest(blocks, codebook), blocks, codebook)


def test_nearest_of_nothing():
    """No blocks have no codewords."""
    assert nearest(torch.empty(0, 3), torch.ones(2, 3)).shape == (0,)


def test_first_of_equals():
    """Of several codewords at the same distance, the first is taken, in other tiles too."""
    codebook = torch.zeros(600, 2)
    codebook[:300] = 1
    assert nearest(torch.tensor([[2.0, 2.0], [-1.0, 0.0]]), codebook).tolist() == [0, 300]


def test_offset_does_not_hide_distances():
    """Blocks far from zero are told apart as well as the same blocks around zero."""
    blocks = torch.randint(-256, 256, (500, 4)).float() / 32
    found = nearest(blocks + 2.0**18, blocks[:50] + 2.0**18)
    distances = brute_force(blocks, blocks[:50])
    chosen = distances.gather(1, found[:, None])[:, 0]
    assert (chosen <= distances.amin(1) + 1e-3).all()


@pytest.mark.parametrize("dim", [1, 4, 8, 9])
@pytest.mark.parametrize("size", [16, 256])
def test_agrees_with_scikit_learn(dim, size):
    """From the same start, the error is within 1% of scikit-learn's after as many iterations."""
    reason = "compares with scikit-learn, which only the test extra installs"
    cluster = pytest.importorskip("sklearn.cluster", reason=reason)
    blocks = mixture(3000, dim, 40)
    start = blocks[torch.randperm(3000)[:size]]
    ours = kmeans(blocks, size, 15, start=start)
    theirs = cluster.KMeans(size, init=start.numpy(), n_init=1, max_iter=15, tol=0).fit(
        blocks.numpy()
    )
    error = squared_error(blocks, ours.codebook, ours.indices)
    assert error == pytest.approx(theirs.inertia_, rel=0.01)


def test_codewords_are_means_of_their_blocks():
    """At the end of a converged run, each codeword is the mean of its blocks."""
    blocks = mixture(400, 4, 5)
    clusters = kmeans(blocks, 8, 1000, torch.Generator().manual_seed(0))
    for k, codeword in enumerate(clusters.codebook):
        members = blocks[clusters.indices == k]
        assert torch.allclose(codeword, members.mean(0), atol=1e-5)


@repeatable()
def test_same_generator_same_codebook():
    """The same seed gives the same bits, another seed another codebook."""
    blocks = mixture(500, 4, 20)
    one, same, other = (
        kmeans(blocks, 32, 5, torch.Generator().manual_seed(seed)).codebook for seed in (0, 0, 1)
    )
    assert same_bits(one, same)
    assert not same_bits(one, other)


def test_starts_from_random_blocks():
    """Without iterations, the codebook is made of different blocks of the data."""
    blocks = torch.arange(60.0).view(20, 3)
    clusters = kmeans(blocks, 7, 0, torch.Generator().manual_seed(0))
    rows = {tuple(row) for row in clusters.codebook.tolist()}
    assert len(rows) == 7
    assert rows <= {tuple(row) for row in blocks.tolist()}
    assert len(clusters.errors) == 1


def test_as_many_codewords_as_blocks():
    """With a codeword for each block, nothing is lost."""
    blocks = torch.randn(30, 4)
    clusters = kmeans(blocks, 30, 3)
    assert torch.allclose(clusters.codebook[clusters.indices], blocks, atol=1e-6)


def test_frequent_codewords_come_first():
    """Codewords are sorted by their number of members."""
    clusters = kmeans(mixture(600, 3, 10), 20, 4, torch.Generator().manual_seed(0))
    counts = torch.bincount(clusters.indices, minlength=20)
    assert counts.tolist() == sorted(counts.tolist(), reverse=True)


def test_empty_clusters_are_split():
    """Codewords that no block is near to end up with members, and the error falls by it."""
    blocks = mixture(2000, 4, 16)
    start = torch.full((16, 4), 50.0)
    start[0] = 0
    clusters = kmeans(blocks, 16, 30, torch.Generator().manual_seed(0), start)
    assert (torch.bincount(clusters.indices, minlength=16) > 0).all()
    honest = kmeans(blocks, 16, 30, torch.Generator().manual_seed(0))
    assert clusters.errors[-1] < 2 * honest.errors[-1] < 0.2 * clusters.errors[0]


def test_largest_cluster_of_equal_blocks_is_left_alone():
    """Where most blocks are zero, as after pruning, the others get the empty codewords."""
    blocks = torch.cat([torch.zeros(1000, 2), torch.randn(50, 2)])
    start = torch.zeros(8, 2)
    start[1] = 3
    clusters = kmeans(blocks, 8, 30, torch.Generator().manual_seed(0), start)
    assert (torch.bincount(clusters.indices, minlength=8) > 0).all()
    assert clusters.indices[:1000].unique().numel() == 1


def test_equal_blocks():
    """Blocks that are all equal get their value, however many codewords there are."""
    blocks = torch.full((20, 3), 0.1)
    clusters = kmeans(blocks, 4, 5)
    assert torch.allclose(clusters.codebook[clusters.indices], blocks)


def test_member_sums():
    """Sums of the members of each codeword, zero where there are none."""
    blocks = torch.arange(8.0).view(4, 2)
    sums = member_sums(blocks, torch.tensor([2, 0, 2, 2]), 4)
    assert sums.tolist() == [[2, 3], [0, 0], [10, 13], [0, 0]]


def test_report_counts_iterations():
    """The progress is told after each iteration."""
    told = []
    kmeans(mixture(300, 4, 30), 20, 4, torch.Generator().manual_seed(0), report=told.append)
    assert told == [1, 2, 3, 4]


@pytest.mark.parametrize("size", [0, -1, 11])
def test_more_codewords_than_blocks(size):
    """A codebook larger than the number of blocks, or empty, is refused."""
    with pytest.raises(diffq.ConfigError, match=rf"blocks \(10\), got {size}"):
        kmeans(torch.randn(10, 2), size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    """Blocks of any float dtype are clustered in float32."""
    blocks = mixture(200, 4, 5).to(dtype)
    clusters = kmeans(blocks, 5, 10, torch.Generator().manual_seed(0))
    assert clusters.codebook.dtype == torch.float32
    assert np.isfinite(clusters.errors[-1])


def test_zeros_replace_the_smallest_codewords():
    """Where blocks are zero, a start gives up the codewords whose largest magnitude is least."""
    start = torch.tensor([[3.0, 3.0], [0.0, 2.0], [-1.5, 1.5], [1.0, -4.0]])
    blocks = torch.cat([start, start, torch.zeros(3, 2)])
    found = kmeans_with_zeros(blocks, 4, start, iterations=0)
    kept = {tuple(word) for word in found.codebook[1:].tolist()}
    assert (found.codebook[0] == 0).all()
    assert kept == {(3.0, 3.0), (0.0, 2.0), (1.0, -4.0)}
