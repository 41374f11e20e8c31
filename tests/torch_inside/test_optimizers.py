"""What optimizers of torch hold besides their groups and states."""

import pytest
import torch

from diffq.torch_inside.optimizers import has_step_hooks, when_made


class Wrapper(torch.optim.Optimizer):
    """An optimizer by its class that wraps another, as trainers have."""

    def __init__(self, inner):
        self.param_groups = inner.param_groups


def test_has_step_hooks():
    """Optimizers of torch call hooks; one that was not made as one has none."""
    inner = torch.optim.SGD([torch.zeros(2, requires_grad=True)], 0.1)
    assert has_step_hooks(inner)
    assert not has_step_hooks(Wrapper(inner))


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad])
def test_when_made(kind):
    """An optimizer is told of with its groups, and a group that it is given then stays."""
    weight, bits = (torch.zeros(2, requires_grad=True) for _ in range(2))
    made = []

    def tell(optimizer):
        made.append(optimizer)
        optimizer.add_param_group({"params": [bits], "lr": 0.5})

    with when_made(tell):
        optimizer = kind([weight], 0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    assert [id(each) for each in made] == [id(optimizer)]
    assert scheduler.get_last_lr() == [0.1, 0.5]
    bits.grad = torch.ones(2)
    optimizer.step()
    assert bits.detach().ne(0).all()


def test_when_made_ends_with_the_block():
    """Optimizers after the block, and after an error in it, are made as ever."""
    make, made = torch.optim.Optimizer.__init__, []
    with pytest.raises(ZeroDivisionError), when_made(made.append):
        1 / 0  # noqa: B018
    torch.optim.SGD([torch.zeros(1)], 0.1)
    assert made == []
    assert torch.optim.Optimizer.__init__ is make
