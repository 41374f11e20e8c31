"""What users do to a model around a quantizer, and what must not go wrong in silence."""

import pytest
import torch
from torch import nn

import diffq
from tests.compare import same_bits
from tests.models import computed, mlp, seeded, snapshot_of


def _trained_in_eval(make_optimizer):
    model = mlp()
    quantizer = diffq.QATQuantizer(model, bits=4, min_size=0)
    optimizer = make_optimizer(model.parameters())
    model.eval()
    model(torch.ones(2, 16)).sum().backward()
    optimizer.step()
    return model, quantizer


def test_fused_optimizers_in_eval_mode():
    """A fused step, which leaves no trace on a tensor, is seen by the cached weights."""
    model, quantizer = _trained_in_eval(lambda p: torch.optim.AdamW(p, 0.1, fused=True))
    plain = diffq.restore_quantized_state(mlp(), quantizer.get_quantized_state())
    assert same_bits(computed(model), computed(plain))


@pytest.mark.parametrize("training", [True, False])
def test_writes_to_what_is_computed_with_are_refused(training):
    """Writing to the tensor that a forward hands out is an error, and does not last."""
    model = mlp().train(training)
    quantizer = diffq.QATQuantizer(model, bits=4, min_size=0)
    before, stored = computed(model), snapshot_of(model)
    with (
        torch.no_grad(),
        pytest.raises(diffq.AttachError, match=r"must not write.*0\.weight.*exclude"),
        quantizer.computing(),
    ):
        model[0].weight.zero_()
    assert same_bits(computed(model), before)
    assert same_bits(snapshot_of(model), stored)


@pytest.mark.parametrize("training", [True, False])
def test_writes_between_forwards_last(training):
    """A write to `module.weight` is one to the Parameter, which the next forward computes with."""
    model, other = (seeded(mlp).train(training) for _ in range(2))
    weight = model[0].weight
    diffq.QATQuantizer(model, bits=4, min_size=0)
    model(torch.ones(2, 16))
    for written in (model, other):
        with torch.no_grad():
            written[0].weight.mul_(2)
    assert model[0].weight is weight
    diffq.QATQuantizer(other, bits=4, min_size=0)
    assert same_bits(computed(model), computed(other))


@pytest.mark.parametrize("add", ["register_buffer", "register_parameter"])
def test_tensors_added_later_are_not_left_out(add):
    """A state of a model that got a tensor after attaching is refused, by its name."""
    model = mlp()
    quantizer = diffq.QATQuantizer(model, min_size=0)
    getattr(model, add)("late", nn.Parameter(torch.zeros(3)))
    with pytest.raises(diffq.AttachError, match="late"):
        quantizer.get_quantized_state()


@pytest.mark.parametrize("options", [{"sparse": True}, {"max_norm": 1.0}])
def test_embeddings_that_write_to_their_weight(options):
    """Sparse and renormalizing embeddings are refused with the remedy, and taken if excluded."""
    model = nn.Sequential(nn.Embedding(32, 8, **options), nn.Linear(8, 4))
    with pytest.raises(diffq.AttachError, match="exclude"):
        diffq.DiffQuantizer(model, min_size=0)
    diffq.DiffQuantizer(model, min_size=0, exclude=["0.weight"])


def test_a_scheduler_before_setup_optimizer():
    """setup_optimizer after the scheduler is an error that gives the order; nothing changes."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(diffq.OptimizerError, match="scheduler"):
        diffq.DiffQuantizer(model, min_size=0).setup_optimizer(optimizer)
    assert len(optimizer.param_groups) == 1


def test_states_of_another_bitwidth_do_not_load():
    """The state dict of one fixed bitwidth is refused by a quantizer of another."""
    one, other = mlp(), mlp()
    diffq.DiffQuantizer(one, bits=4, min_size=0)
    diffq.DiffQuantizer(other, bits=8, min_size=0)
    with pytest.raises(diffq.MismatchError, match=r"0\.weight"):
        other.load_state_dict(one.state_dict())


def test_parameters_among_the_outputs_get_no_hooks():
    """A parameter that the model returns does not gather a hook at each forward."""

    class _Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.scale = mlp(), nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.body(x), self.scale

    model = _Scaled()
    diffq.DiffQuantizer(model, min_size=0, exclude=["scale"]).no_optimizer()
    for _ in range(3):
        model(torch.ones(2, 16))
    assert not model.scale._backward_hooks
