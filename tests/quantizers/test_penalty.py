"""`setup_optimizer(opt, lam=...)`: the price of size, added to gradients before a step."""

import copy
import pickle

import pytest
import torch
from torch import nn

import diffq
from tests.compare import close, same_bits
from tests.models import QUANTIZERS, TiedModules, mlp, seeded

LAM = 50.0

KINDS = ["diffq", "diffq-uniform", "diffq-rounding"]


class _Taken(torch.optim.SGD):
    """Keeps the gradient of what is learned that each step was made with."""

    def __init__(self, params, lr=0.0):
        super().__init__(params, lr)
        self.grads = []

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for learned in self.param_groups[-1]["params"]:
            self.grads.append(None if learned.grad is None else learned.grad.clone())
        super().step()
        return loss


def _quantized(kind="diffq", make=mlp, lam=LAM, optimizer=_Taken):
    model = seeded(make, 0)
    quantizer = QUANTIZERS[kind](model)
    opt = optimizer(model.parameters())
    quantizer.setup_optimizer(opt, lr=0.0, lam=lam)
    return model, quantizer, opt


def _loss(model, index=0):
    torch.manual_seed(index)
    return model(torch.randn(4, 16)).square().mean()


def pickled(model):
    """A model that has gone through a pickle."""
    return pickle.loads(pickle.dumps(model))  # noqa: S301


def _expected(kind="diffq", make=mlp, losses=1, lam=LAM, weight=1.0):
    """The gradient of the paper's form: the mean of the losses plus the size's price."""
    model, quantizer, _ = _quantized(kind, make, lam=None)
    for index in range(losses):
        (weight * _loss(model, index) / losses).backward()
    (lam * quantizer.model_size()).backward()
    return next(iter(quantizer.learned_parameters())).grad


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_that_of_the_paper(kind):
    """A step with `lam` has the gradient of `loss + lam * model_size()`."""
    model, _, opt = _quantized(kind)
    _loss(model).backward()
    opt.step()
    assert close(opt.grads[0], _expected(kind))


@pytest.mark.parametrize("parts", [1, 4])
def test_accumulated_gradients(parts):
    """Several backwards before a step take the price once, whatever their number."""
    model, _, opt = _quantized()
    for index in range(parts):
        (_loss(model, index) / parts).backward()
    opt.step()
    assert close(opt.grads[0], _expected(losses=parts))


def test_each_step_takes_the_price_once():
    """Steps one after the other with zeroed gradients each have the price."""
    model, _, opt = _quantized()
    for _ in range(3):
        opt.zero_grad()
        _loss(model).backward()
        opt.step()
    expected = _expected()
    for grad in opt.grads:
        assert close(grad, expected)


@pytest.mark.parametrize("keyword", [False, True])
def test_closure(keyword):
    """A closure's gradients get the price after each of its backwards, and its loss comes back."""
    model, _, opt = _quantized()

    def closure():
        opt.zero_grad()
        loss = _loss(model)
        loss.backward()
        return loss

    loss = opt.step(closure=closure) if keyword else opt.step(closure)
    assert close(loss.detach(), _loss(_quantized(lam=None)[0]).detach())
    assert close(opt.grads[0], _expected())


def test_clipped_gradients():
    """The price is added after gradients were clipped: it is neither in the norm nor reduced."""
    model, _, opt = _quantized()
    _loss(model).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    opt.step()
    factor = (1e-3 / norm).item()
    assert close(opt.grads[0], _expected(weight=factor))


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(fused, unscale):
    """Under a GradScaler bits train as without one, also where a fused kernel unscales."""
    results = []
    for scaled in (False, True):
        model = seeded(mlp, 0)
        quantizer = QUANTIZERS["diffq"](model)
        opt = torch.optim.Adam(model.parameters(), 1e-3, fused=fused)
        quantizer.setup_optimizer(opt, lr=0.1, lam=LAM)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for index in range(3):
            opt.zero_grad()
            scaler.scale(_loss(model, index)).backward()
            if unscale:
                scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
        results.append(next(iter(quantizer.learned_parameters())).detach())
    assert close(*results)


@pytest.mark.parametrize("fused", [False, True])
def test_skipped_step(fused):
    """A step that a GradScaler skips changes no bitwidth, and leaves nothing for the next."""
    skipping, plain = (_bits_with_scaler(fused, skip) for skip in (True, False))
    assert close(skipping, plain)


def _bits_with_scaler(fused, skip):
    model = seeded(mlp, 0)
    quantizer = QUANTIZERS["diffq"](model)
    opt = torch.optim.Adam(model.parameters(), 1e-3, fused=fused)
    quantizer.setup_optimizer(opt, lr=0.1, lam=LAM)
    (learned,) = quantizer.learned_parameters()
    before = learned.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    if skip:
        scaler.scale(_loss(model) * float("inf")).backward()
        scaler.step(opt)
        scaler.update()
        assert same_bits(learned.detach(), before)
        opt.zero_grad()
    scaler.scale(_loss(model)).backward()
    scaler.step(opt)
    assert not same_bits(learned.detach(), before)
    return learned.detach()


def test_bits_learn_where_noise_acted():
    """The price reaches the tensors that the step has read with gradients, and no others."""
    model, quantizer, opt = _quantized()
    model[0].eval()
    _loss(model).backward()
    with pytest.warns(diffq.DiffqWarning, match=r"0\.weight"):
        opt.step()
    parts = quantizer._attachment.learned.parts(opt.grads[0])
    first = [
        part
        for q, part in zip(quantizer._attachment.quantizers, parts, strict=True)
        if q.plan.name.startswith("0.")
    ]
    assert all(not part.any() for part in first)
    assert opt.grads[0].any()


def test_step_without_forward():
    """A step without a forward, such as one that fills an optimizer's state, has no price."""
    model, _, opt = _quantized()
    opt.step()
    assert opt.grads == [None]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    opt.step()
    assert not opt.grads[1].any()


def test_learned_parameter_without_gradient():
    """Where the loss gives the learned parameter no gradient, the price is all of it."""
    model, quantizer, opt = _quantized()
    (learned,) = quantizer.learned_parameters()
    _loss(model).backward()
    learned.grad = None
    opt.step()
    reference, other, _ = _quantized(lam=None)
    _loss(reference)
    (LAM * other.model_size()).backward()
    assert close(opt.grads[0], next(iter(other.learned_parameters())).grad)


def test_optimizer_of_their_own():
    """Only the optimizer that holds what is learned adds the price, once in a step of both."""
    model = seeded(mlp, 0)
    weights = _Taken(model.parameters())
    quantizer = QUANTIZERS["diffq"](model)
    bits = _Taken(quantizer.learned_parameters())
    quantizer.setup_optimizer(bits, lam=LAM)
    _loss(model).backward()
    before = model[0].weight.grad.clone()
    weights.step()
    bits.step()
    assert close(model[0].weight.grad, before)
    assert close(bits.grads[0], _expected())


@pytest.mark.parametrize("lr", [None, 0.5])
def test_price_stays(lr):
    """Later calls without `lam` keep it, for the same optimizer and for another one."""
    model, quantizer, first = _quantized()
    quantizer.setup_optimizer(first, lr=lr)
    second = _Taken(model.parameters())
    quantizer.setup_optimizer(second, lr=lr)
    _loss(model).backward()
    second.step()
    first.step()
    assert close(second.grads[0], _expected())


@pytest.mark.parametrize(
    "end",
    [
        lambda quantizer, opt: quantizer.setup_optimizer(opt, lam=0),
        lambda quantizer, opt: quantizer.no_optimizer(),
        lambda quantizer, opt: quantizer.detach(),
    ],
    ids=["zero", "no-optimizer", "detach"],
)
def test_price_ends(end):
    """After `lam=0`, `no_optimizer()` or `detach()` a step adds nothing."""
    model, quantizer, opt = _quantized()
    (learned,) = quantizer.learned_parameters()
    end(quantizer, opt)
    _loss(model).backward()
    before = None if learned.grad is None else learned.grad.clone()
    opt.step()
    assert (before is None) == (learned.grad is None)
    assert before is None or close(learned.grad, before)


def test_two_prices():
    """A backward of the size raises while steps add its gradient, before it reaches the bits."""
    model, quantizer, opt = _quantized()
    size = quantizer.model_size()
    with pytest.raises(diffq.OptimizerError, match=r"one price.*lam=50.*lam=0"):
        size.backward()
    (learned,) = quantizer.learned_parameters()
    assert learned.grad is None
    quantizer.setup_optimizer(opt, lam=0)
    (_loss(model) + LAM * quantizer.model_size()).backward()
    opt.step()
    assert close(opt.grads[0], _expected())


def test_size_in_the_log():
    """The size may be read in each step while steps add its gradient."""
    model, quantizer, opt = _quantized()
    for _ in range(2):
        opt.zero_grad()
        _loss(model).backward()
        assert quantizer.model_size().item() > 0
        opt.step()


@pytest.mark.parametrize("kind", ["qat", "lsq", "diffq-fixed", "quant-noise", "product"])
def test_methods_without_bitwidths(kind):
    """Where no bitwidths are learned, `lam` raises, and the optimizer stays as it was."""
    model = seeded(mlp, 0)
    quantizer = QUANTIZERS[kind](model)
    opt = torch.optim.SGD(model.parameters(), 0.1)
    groups = [dict(group) for group in opt.param_groups]
    with pytest.raises(diffq.ConfigError, match=r"lam .* learns none"):
        quantizer.setup_optimizer(opt, lam=1.0)
    assert [dict(group) for group in opt.param_groups] == groups


@pytest.mark.parametrize("lam", [-1.0, float("nan"), float("inf"), "1", True])
def test_no_price(lam):
    """What is no price raises, and changes nothing."""
    model = seeded(mlp, 0)
    quantizer = QUANTIZERS["diffq"](model)
    opt = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(diffq.ConfigError, match="lam must be a number"):
        quantizer.setup_optimizer(opt, lam=lam)
    assert len(opt.param_groups) == 1


def test_lbfgs():
    """LBFGS compares losses, so it refuses a price that is in none of them."""
    model = seeded(mlp, 0)
    quantizer = QUANTIZERS["diffq"](model)
    opt = torch.optim.LBFGS(quantizer.learned_parameters())
    with pytest.raises(diffq.OptimizerError, match="LBFGS compares losses"):
        quantizer.setup_optimizer(opt, lam=1.0)


class _Wrapper(torch.optim.Optimizer):
    """An optimizer in name only, as some trainers make."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.state = optimizer.state
        self.defaults = optimizer.defaults

    def add_param_group(self, group):
        self.optimizer.add_param_group(group)

    def step(self, closure=None):
        return self.optimizer.step(closure)


def test_wrapped_optimizer():
    """A wrapper without hooks is refused; the optimizer in it adds the price."""
    model = seeded(mlp, 0)
    quantizer = QUANTIZERS["diffq"](model)
    inner = _Taken(model.parameters())
    wrapper = _Wrapper(inner)
    with pytest.raises(diffq.OptimizerError, match="Call setup_optimizer on the inner"):
        quantizer.setup_optimizer(wrapper, lam=LAM)
    quantizer.setup_optimizer(inner, lam=LAM)
    _loss(model).backward()
    wrapper.step()
    assert close(inner.grads[0], _expected())


def test_optimizer_that_unscales_by_itself():
    """An optimizer that is given the scaler gets no price in the wrong unit."""

    class Unscaling(torch.optim.SGD):
        def step(self, closure=None, *, grad_scaler=None):
            return super().step(closure)

    model, _, opt = _quantized(optimizer=lambda params: Unscaling(params, 0.1))
    _loss(model).backward()
    with pytest.raises(diffq.OptimizerError, match="in units of the loss"):
        opt.step(grad_scaler=torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize("clone", [copy.deepcopy, pickled])
def test_copies(clone):
    """A copy has no optimizer and takes the price with one of its own; the original goes on."""
    model, _, opt = _quantized()
    other = clone(model)
    quantizer = diffq.quantizer_of(other)
    (quantizer.model_size()).backward()
    other.zero_grad()
    second = _Taken(other.parameters())
    quantizer.setup_optimizer(second)
    for each, steps in ((model, opt), (other, second)):
        _loss(each).backward()
        steps.step()
    assert close(opt.grads[0], second.grads[0])
    assert close(opt.grads[0], _expected())


def test_tied_tensors():
    """A tied tensor has one price."""
    model, _, opt = _quantized(make=TiedModules)
    reference, other, _ = _quantized(make=TiedModules, lam=None)
    tokens = torch.arange(8)
    for each in (model, reference):
        torch.manual_seed(0)
        each(tokens).square().mean().backward()
    (LAM * other.model_size()).backward()
    opt.step()
    assert close(opt.grads[0], next(iter(other.learned_parameters())).grad)


def test_frozen_bits():
    """Frozen bits have no price, and training goes on."""
    model, quantizer, opt = _quantized()
    quantizer.freeze_bits()
    _loss(model).backward()
    opt.step()
    assert opt.grads[0] is None or not opt.grads[0].any()
