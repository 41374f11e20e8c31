"""What modules are told when torch moves, saves and loads them."""

import torch
from torch import nn

from diffq.torch_inside.overrides import Overridable, after_loads, before_moves
from tests.compare import same_bits


class _Told(Overridable):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.calls = []

    def before_saving(self):
        self.weight.data.fill_(3)

    def saved_besides(self):
        return {"besides": torch.ones(1)}

    def moving(self, move):
        self.calls.append("moving")
        return lambda tensor: move(tensor).float()

    def after_moving(self):
        self.calls.append("moved")


def test_saving():
    """A state dict has what `before_saving` makes of the tensors, and what is saved besides."""
    state = nn.ModuleList([_Told()]).state_dict()
    assert list(state) == ["0.weight", "0.besides"]
    assert same_bits(state["0.weight"], torch.full((2,), 3.0))


def test_moving():
    """A cast of the model applies the function that `moving` gives, and then tells its end."""
    model = nn.ModuleList([_Told(), nn.Linear(2, 2)]).half()
    assert model[0].weight.dtype == torch.float32
    assert model[1].weight.dtype == torch.float16
    assert model[0].calls == ["moving", "moved"]


def test_before_moves():
    """A module is told of a cast before its tensors change."""
    seen = []
    members = before_moves(nn.Linear, lambda module: seen.append(module.weight.dtype))
    layer = type("Linear", (nn.Linear,), members)(2, 2)
    nn.Sequential(layer).half()
    assert seen == [torch.float32]
    assert layer.weight.dtype == torch.float16


def test_after_loads():
    """A module is told of a load of the model that holds it, after its tensors have changed."""
    seen = []
    members = after_loads(nn.Linear, lambda module: seen.append(module.weight.detach().clone()))
    model = nn.Sequential(type("Linear", (nn.Linear,), members)(2, 2))
    model.load_state_dict({"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2)})
    assert len(seen) == 1
    assert same_bits(seen[0], torch.ones(2, 2))
