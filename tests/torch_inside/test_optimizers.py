"""What optimizers of torch hold besides their groups and states."""

import torch

from diffq.torch_inside.optimizers import has_step_hooks


class Wrapper(torch.optim.Optimizer):
    """An optimizer by its class that wraps another, as trainers have."""

    def __init__(self, inner):
        self.param_groups = inner.param_groups


def test_has_step_hooks():
    """Optimizers of torch call hooks; one that was not made as one has none."""
    inner = torch.optim.SGD([torch.zeros(2, requires_grad=True)], 0.1)
    assert has_step_hooks(inner)
    assert not has_step_hooks(Wrapper(inner))
