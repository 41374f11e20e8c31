"""Many tensors in one buffer."""

import torch

from diffq.torch_inside import unflatten
from tests.compare import same_bits


def test_joined_tensors_are_copies():
    """The buffer holds all elements, in C order, and shares memory with no tensor."""
    tensors = [torch.randn(2, 3).t(), torch.randn(()), torch.randn(4).expand(2, 4)]
    for some in (tensors, tensors[:1], tensors[1:2]):
        buffer = unflatten.joined(some)
        assert same_bits(buffer, torch.cat([tensor.reshape(-1) for tensor in some]))
        assert all(buffer.data_ptr() != tensor.data_ptr() for tensor in some)


def test_cut_gives_views():
    """The views have the shapes of their models, one after the other, in the buffer's memory."""
    buffer = torch.arange(11.0)
    shapes = [(2, 3), (0,), (), (4,)]
    views = unflatten.cut(buffer, [torch.empty(shape) for shape in shapes])
    assert [tuple(view.shape) for view in views] == shapes
    buffer.add_(1)
    assert same_bits(views[3], torch.tensor([8.0, 9.0, 10.0, 11.0]))
    assert views[2].item() == 7
