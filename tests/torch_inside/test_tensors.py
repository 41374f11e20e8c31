"""What torch counts of writes to tensors."""

import torch

from diffq.torch_inside.tensors import INTEGERS, stamp, stamps, version_of


def test_writes_raise_the_version():
    """A write in place raises the version of a tensor, and that of its views."""
    tensor = torch.zeros(4)
    view, before = tensor[1:], version_of(tensor)
    tensor.add_(1)
    assert version_of(tensor) == version_of(view) == before + 1


def test_stamp_changes_with_writes_and_with_other_memory():
    """A stamp changes with a write, with other memory, and with another shape, and else not."""
    tensor = torch.zeros(4)
    first = stamp(tensor)
    assert stamp(tensor) == first
    tensor.add_(1)
    second = stamp(tensor)
    tensor.data = torch.zeros(4)
    third = stamp(tensor)
    tensor.data = tensor.data.view(2, 2)
    assert len({first, second, third, stamp(tensor)}) == 4


def test_inference_tensors_count_nothing():
    """Tensors of inference mode have neither a version nor a stamp."""
    with torch.inference_mode():
        tensor = torch.zeros(4)
    assert version_of(tensor) is None
    assert stamp(tensor) is None


def test_stamps_are_those_of_each():
    """The stamps of a list are those of its tensors."""
    tensors = [torch.zeros(2), torch.ones(3).add_(1)]
    assert stamps(tensors) == [stamp(tensor) for tensor in tensors]


def test_integers_have_the_bytes_of_their_key():
    """Each integer type has as many bytes as its key says."""
    assert {size: torch.empty(0, dtype=kind).element_size() for size, kind in INTEGERS.items()} == {
        size: size for size in INTEGERS
    }
