"""`setup_optimizer(opt, target_mb=..., steps=...)`: float first, a path to the size, then held."""

import copy
import io
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import diffq
from diffq.numerics.fineness import normal_entropy
from diffq.quantizers.landing import search
from diffq.quantizers.target import Phase, Plan, log_price, next_sum
from tests.compare import same_bits
from tests.models import QUANTIZERS, mlp, seeded, snapshot_of
from tests.processors import repeatable
from tests.quantizers.test_penalty import pickled

KINDS = ["diffq", "diffq-uniform", "diffq-rounding"]
STEPS = 40

plans = st.builds(
    Plan,
    steps=st.integers(10, 20_000),
    float_share=st.floats(0, 0.8),
    target=st.floats(0.001, 1e4),
)


# The plan.


@given(plans)
def test_phases_follow_each_other(plan):
    """The phases come in their order, and the last step settles."""
    phases = [plan.phase(step) for step in range(0, plan.steps, max(1, plan.steps // 500))]
    order = list(Phase)
    assert phases == sorted(phases, key=order.index)
    assert plan.phase(plan.steps - 1) is Phase.SETTLE
    assert plan.phase(plan.steps) is plan.phase(2 * plan.steps) is Phase.DONE


@given(plans, st.floats(0.001, 1e4))
def test_goal_goes_from_start_to_target(plan, start):
    """The goal is the first size at the first quantized step, the target after the path."""
    between = [plan.goal(start, step) for step in range(plan.begin, plan.path_end)]
    if between:
        assert math.isclose(between[0], start, rel_tol=1e-6)
    assert math.isclose(plan.goal(start, plan.path_end), plan.target, rel_tol=1e-6)
    steps = [math.log(b / a) for a, b in itertools.pairwise(between)]
    assert all(math.isclose(one, steps[0], rel_tol=1e-3, abs_tol=1e-6) for one in steps)


@given(plans)
def test_calibrations_are_few(plan):
    """The encoder is asked some 16 times, whatever the number of steps."""
    asked = sum(plan.calibrates(step) for step in range(plan.begin, plan.settle))
    assert asked <= 32
    read = sum(plan.controls(step) for step in range(plan.begin, plan.settle))
    assert read <= 3999


def test_price_on_a_ramp():
    """A plan with a price goes from 0 to it along the path, and stays."""
    plan = Plan(100, 0.5, lam=2.0)
    assert [plan.price(step) for step in (0, 49, 50)] == [0, 0, 0]
    assert math.isclose(plan.price(65), 1.0)
    assert plan.price(80) == plan.price(99) == plan.price(500) == 2.0
    assert plan.phase(99) is plan.phase(500) is Phase.HOLD


# The control.


@settings(max_examples=25, deadline=None)
@given(
    start=st.floats(-3, 8),
    fall=st.floats(0.3, 2.0),
    natural=st.floats(-8, 8),
    slope=st.floats(0.5, 6),
    off=st.floats(-3, 3),
    steps=st.integers(300, 3000),
)
def test_control_brings_the_size_to_the_target(start, fall, natural, slope, off, steps):
    """On a simulated training the size comes within 15 % of the target before bits are fixed.

    The size falls where the price is above what the present size is worth, which grows as the
    size falls, and it moves by little in a step. The first price may be wrong by a factor of 20.
    """
    target = math.exp(start - fall)
    plan = Plan(steps, 0.5, target=target)
    speed = 5 * fall / (plan.path_end - plan.begin)
    size, total, base = start, 0.0, natural + off
    for step in range(plan.begin, plan.settle):
        if plan.controls(step):
            error = size - math.log(plan.goal(math.exp(start), step))
            total = next_sum(total, error, plan.gain)
            price = log_price(base, total, error)
        worth = natural + slope * (start - size)
        size -= speed * math.tanh(price - worth)
    assert abs(size - math.log(target)) < 0.15


@given(st.floats(allow_nan=True), st.floats(allow_nan=True))
def test_control_stays_finite(total, error):
    """Whatever was measured, the next price is a number."""
    assert math.isfinite(next_sum(total, error, 0.1))
    assert math.isfinite(log_price(0.0, next_sum(total, error, 0.1), error))


# The search.


@given(
    jumps=st.lists(st.floats(-13, 13), min_size=5, max_size=400),
    share=st.floats(0.0, 1.0),
)
def test_search_finds_the_largest_size_below(jumps, share):
    """On a size that grows in jumps, the size found is in the window or just below it."""
    shifts = []

    def size_at(shift):
        shifts.append(shift)
        return 100.0 + sum(jump <= shift for jump in jumps)

    high = 100.0 + share * len(jumps) + 0.5
    size = search(size_at, 0.995 * high, high, 13.0)
    assert size == size_at(shifts[-1])
    if size > high:
        assert size == size_at(-13.0)
    else:
        largest = max(s for s in map(size_at, sorted({-13.0, 13.0, *jumps})) if s <= high)
        assert size >= 0.995 * high or largest - size <= _close_jumps(jumps)


def _close_jumps(jumps):
    """How many jumps are so close to one another that no try falls between them."""
    return max(sum(abs(a - b) < 1e-3 for b in jumps) for a in jumps)


def test_search_takes_few_tries():
    """On a smooth size a handful of tries is enough."""
    tries = []

    def size_at(shift):
        tries.append(shift)
        return 1.0 + 0.4 * max(2.0, min(15.0, 6.0 + shift))

    assert 1.99 <= search(size_at, 1.99, 2.0, 13.0) <= 2.0
    assert len(tries) <= 8


def test_entropy_of_normal_weights():
    """One bit says the sign, and a normal weight takes less than its bitwidth."""
    assert normal_entropy(1) == 1.0
    for bits in (2, 4, 8):
        assert bits - 2 < normal_entropy(bits) < bits
    expected = 8 - math.log2(9 / math.sqrt(2 * math.pi * math.e))
    assert math.isclose(normal_entropy(8), expected, abs_tol=0.02)


# Trainings.


def net():
    """14 thousand weights."""
    return nn.Sequential(nn.Linear(24, 160), nn.ReLU(), nn.Linear(160, 64), nn.ReLU())


def file_mb(quantizer):
    """MB of the file."""
    buffer = io.BytesIO()
    diffq.save(quantizer, buffer)
    return buffer.getbuffer().nbytes / 2**20


class _Run:
    """A model that trains by a plan, on its own random inputs in each step."""

    def __init__(self, kind="diffq", seed=0, make=net, momentum=0.9, **plan):
        self.model = seeded(make, seed)
        self.width = self.model[0].in_features
        self.optimizer = torch.optim.Adam(self.model.parameters(), 0.01, betas=(momentum, 0.99))
        self.quantizer = QUANTIZERS[kind](self.model)
        self.quantizer.setup_optimizer(self.optimizer, **{"steps": STEPS, **plan})

    def train(self, start=0, end=STEPS):
        for index in range(start, end):
            x = torch.randn(16, self.width, generator=torch.Generator().manual_seed(index))
            self.optimizer.zero_grad()
            (self.model.train()(x) - x[:, :1]).square().mean().backward()
            self.optimizer.step()
        return self

    def save(self):
        file = io.BytesIO()
        state = self.model.state_dict(), self.optimizer.state_dict(), torch.get_rng_state()
        torch.save(state, file)
        return file.getvalue()

    def load(self, data):
        model, optimizer, random = torch.load(io.BytesIO(data), weights_only=True)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        torch.set_rng_state(random)
        return self

    def result(self):
        return snapshot_of(self.model), self.optimizer.state_dict()["state"]


@pytest.mark.parametrize("float_share", [0, 0.5])
@pytest.mark.parametrize("target", [0.006, 0.009, 0.014])
@pytest.mark.parametrize("kind", KINDS)
def test_file_has_the_size(kind, target, float_share):
    """After the steps the file takes at most the target, and at most 1 % less."""
    run = _Run(kind, target_mb=target, float_share=float_share).train()
    assert 0.99 * target <= file_mb(run.quantizer) <= target
    assert run.quantizer.target.phase == "done"


def test_size_stays_after_the_steps():
    """Bitwidths stay as they are in steps after the last."""
    run = _Run(target_mb=0.008).train()
    before = run.quantizer.bits()
    run.train(STEPS, STEPS + 3)
    assert same_bits(run.quantizer.bits(), before)


def test_size_without_momentum_of_bits():
    """A learning rate of 0 for the bits leaves all of the way to the last steps."""
    run = _Run(target_mb=0.008, lr=0.0).train()
    assert 0.0079 <= file_mb(run.quantizer) <= 0.008


@repeatable()
def test_float_phase_is_plain_training():
    """Up to the float share the weights are those of a training without a quantizer."""
    run = _Run(target_mb=0.008, float_share=0.5).train(0, STEPS // 2)
    plain = seeded(net, 0)
    optimizer = torch.optim.Adam(plain.parameters(), 0.01, betas=(0.9, 0.99))
    for index in range(STEPS // 2):
        x = torch.randn(16, 24, generator=torch.Generator().manual_seed(index))
        optimizer.zero_grad()
        (plain(x) - x[:, :1]).square().mean().backward()
        optimizer.step()
    weights = dict(run.model.named_parameters())
    assert all(same_bits(weights[name], p) for name, p in plain.named_parameters())


def test_float_phase_reads_the_parameters():
    """In the float phase a training forward reads the Parameters, and then noisy weights."""
    run = _Run(target_mb=0.008)
    seen = []
    run.model[0].register_forward_hook(lambda module, args, out: seen.append(module.weight))
    run.train()
    half = STEPS // 2
    assert all(weight is run.model[0].weight for weight in seen[:half])
    assert all(weight is not run.model[0].weight for weight in seen[half:])


def test_float_phase_leaves_bits_alone():
    """In the float phase nothing moves what is learned, and eval computes with its bits."""
    run = _Run(target_mb=0.008)
    (learned,) = run.quantizer.learned_parameters()
    before = learned.detach().clone()
    run.train(0, STEPS // 2)
    assert same_bits(learned.detach(), before)
    assert not run.optimizer.state[learned]["exp_avg"].any()
    assert run.quantizer.mean_bits() == 8
    run.model.eval()
    with run.quantizer.computing():
        assert not same_bits(run.model[0].weight.detach(), run.model[0]._parameters["weight"])


@pytest.mark.parametrize("plan", [{"target_mb": 0.008}, {"lam": 20.0}], ids=["target", "lam"])
@pytest.mark.parametrize("cut", [7, 20, 27, 35, 38, 39])
@pytest.mark.parametrize("kind", ["diffq", "diffq-rounding"])
def test_resume(kind, cut, plan):
    """A training that is cut in any phase goes on bit for bit, to the same file."""
    whole, resumed = _cut(kind, cut, plan)
    assert same_bits(whole[0], resumed[0])
    assert same_bits(_plain(whole[1]), _plain(resumed[1]))


@repeatable()
def _cut(kind, cut, plan):
    torch.manual_seed(2)
    whole = _Run(kind, **plan).train()
    torch.manual_seed(2)
    first = _Run(kind, **plan)
    data = first.train(0, cut).save()
    second = _Run(kind, seed=5, **plan)
    torch.manual_seed(77)
    second.load(data).train(cut, STEPS)
    return whole.result(), second.result()


def _plain(state):
    return {f"{i}.{key}": value for i, each in state.items() for key, value in each.items()}


@pytest.mark.parametrize("cut", [7, 20, 38])
@repeatable()
def test_resume_from_a_distributed_checkpoint(cut, tmp_path):
    """torch.distributed.checkpoint carries the plan, and states of all parameters."""
    torch.manual_seed(2)
    whole = _Run(target_mb=0.008).train()
    torch.manual_seed(2)
    first = _Run(target_mb=0.008).train(0, cut)
    checkpoint.save(_state_of(first), checkpoint_id=tmp_path)
    random = torch.get_rng_state()
    second = _Run(target_mb=0.008, seed=4)
    state = _state_of(second)
    checkpoint.load(state, checkpoint_id=tmp_path)
    set_state_dict(
        second.model,
        second.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    torch.set_rng_state(random)
    second.train(cut)
    assert second.quantizer.target == whole.quantizer.target
    assert same_bits(snapshot_of(second.model), snapshot_of(whole.model))


def _state_of(run):
    model, optimizer = get_state_dict(run.model, run.optimizer)
    return {"model": model, "optimizer": optimizer}


def test_path_begins_with_a_fresh_state():
    """The first quantized step finds no state of what is learned, as in a new optimizer."""
    run = _Run(target_mb=0.008).train(0, STEPS // 2)
    (learned,) = run.quantizer.learned_parameters()
    run.train(STEPS // 2, STEPS // 2 + 1)
    assert run.optimizer.state[learned]["step"].item() == 1


@pytest.mark.parametrize("make", [torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.NAdam])
def test_other_optimizers(make):
    """Other optimizers reach the size too."""
    run = _Run(target_mb=0.008)
    run.optimizer = make(run.model.parameters(), lr=0.01)
    run.quantizer.setup_optimizer(run.optimizer)
    run.train()
    assert 0.99 * 0.008 <= file_mb(run.quantizer) <= 0.008


def test_load_before_setup():
    """A state that is loaded before setup_optimizer is taken up by it."""
    run = _Run(target_mb=0.008).train(0, 25)
    again = _Run(lam=1.0, steps=None)
    again.quantizer.setup_optimizer(again.optimizer, lam=0)
    again.load(run.save())
    assert again.quantizer.target is None
    again.quantizer.setup_optimizer(again.optimizer, target_mb=0.008, steps=STEPS)
    assert again.quantizer.target.step == 25
    again.quantizer.no_optimizer()
    assert again.quantizer.target is None


def test_checkpoint_without_a_plan():
    """A checkpoint from before the plan loads strictly, and leaves the plan where it stands."""
    plain = QUANTIZERS["diffq"](seeded(net, 1))
    run = _Run(target_mb=0.008).train(0, 5)
    run.model.load_state_dict(plain.model.state_dict())
    assert run.quantizer.target.step == 5
    plain.model.load_state_dict(run.model.state_dict())
    assert plain.target is None
    assert "_diffq.schedule" not in plain.model.state_dict()


def test_checkpoint_of_another_plan():
    """A checkpoint of another plan raises, and nothing is loaded."""
    run = _Run(target_mb=0.008).train(0, 25)
    other = _Run(target_mb=0.009, seed=3)
    before = snapshot_of(other.model)
    with pytest.raises(diffq.MismatchError, match=r"40, 0\.5, 0\.008, 0 in the checkpoint"):
        other.model.load_state_dict(run.model.state_dict())
    assert same_bits(snapshot_of(other.model), before)
    state = {k: v for k, v in run.model.state_dict().items() if k != "_diffq.schedule"}
    other.model.load_state_dict(state)
    assert other.quantizer.target.step == 0


def test_setup_again_goes_on():
    """Another optimizer, and a repeated call, go on with the plan."""
    run = _Run(target_mb=0.008).train(0, 10)
    run.quantizer.setup_optimizer(run.optimizer, lr=0.2)
    run.train(10, 20)
    run.optimizer = torch.optim.Adam(run.model.parameters(), 0.01)
    run.quantizer.setup_optimizer(run.optimizer, target_mb=0.008, steps=STEPS)
    run.train(20, STEPS)
    assert 0.99 * 0.008 <= file_mb(run.quantizer) <= 0.008


@pytest.mark.parametrize("clone", [copy.deepcopy, pickled])
def test_copies(clone):
    """A copy follows no plan until it is set up, and then goes on with that of the original."""
    run = _Run(target_mb=0.008).train(0, 5)
    other = clone(run.model)
    assert "_diffq.schedule" not in other.state_dict()
    seen = []
    other[0].register_forward_hook(lambda module, args, out: seen.append(module.weight))
    quantizer = diffq.quantizer_of(other)
    quantizer.no_optimizer()
    other.train()(torch.randn(3, 24))
    assert seen[0] is not other[0].weight
    third = clone(run.model)
    quantizer = diffq.quantizer_of(third)
    quantizer.setup_optimizer(torch.optim.Adam(third.parameters()))
    assert quantizer.target.step == 5
    assert quantizer.target.phase == "float"


def test_end_of_a_plan():
    """A price in its place, and `no_optimizer()`, end a plan in its float phase."""
    for end in (lambda q, o: q.setup_optimizer(o, lam=1.0), lambda q, o: q.no_optimizer()):
        run = _Run(target_mb=0.008).train(0, 5)
        end(run.quantizer, run.optimizer)
        seen = []
        run.model[0].register_forward_hook(lambda m, args, out, seen=seen: seen.append(m.weight))
        run.model.train()(torch.randn(3, 24))
        assert seen[0] is not run.model[0].weight
        assert run.quantizer.target is None


def test_target_in_the_log():
    """`quantizer.target` tells phase, step, size, goal and price, and shows them."""
    run = _Run(target_mb=0.008)
    assert repr(run.quantizer.target).startswith("Target(step 0 of 40, float, 0.01")
    assert run.quantizer.target.goal_mb is None
    run.train(0, 27)
    now = run.quantizer.target
    assert (now.phase, now.step, now.steps, now.target_mb) == ("path", 27, 40, 0.008)
    assert 0.008 < now.goal_mb < 0.02
    assert now.lam > 0
    assert abs(now.size_mb / file_mb(run.quantizer) - 1) < 0.05
    assert "goal" in repr(now)
    assert "lam" in repr(now)
    run.train(27)
    assert run.quantizer.target.phase == "done"
    assert abs(run.quantizer.target.size_mb / file_mb(run.quantizer) - 1) < 1e-3


def test_price_with_steps():
    """With `lam` and `steps` training is float first, the price rises, and bits are learned."""
    run = _Run(lam=300.0)
    prices = []
    for index in range(STEPS):
        run.train(index, index + 1)
        prices.append(run.quantizer.target.lam)
    assert prices[:20] == [0.0] * 20
    assert prices[20:32] == sorted(prices[20:32])
    assert prices[32:] == [300.0] * 8
    assert run.quantizer.target.phase == "hold"
    assert run.quantizer.mean_bits() < 7
    with pytest.raises(diffq.OptimizerError, match="one price"):
        run.quantizer.model_size().backward()


def test_skipped_steps_do_not_count():
    """A step that a GradScaler skips is not one of the plan."""
    model = seeded(mlp, 0)
    quantizer = QUANTIZERS["diffq"](model)
    optimizer = torch.optim.Adam(model.parameters())
    quantizer.setup_optimizer(optimizer, lam=1.0, steps=10)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(4, 16)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert quantizer.target.step == 2


def test_infinite_gradients_at_the_first_quantized_step():
    """The first price waits for finite gradients, where a fused optimizer skips the step."""
    model = seeded(net, 0)
    quantizer = QUANTIZERS["diffq"](model)
    optimizer = torch.optim.Adam(model.parameters(), 0.01, fused=True)
    quantizer.setup_optimizer(optimizer, target_mb=0.008, steps=STEPS, float_share=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for index in range(STEPS):
        optimizer.zero_grad()
        factor = float("inf") if index < 2 else 1.0
        scaler.scale(model(torch.randn(4, 24)).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert 0.99 * 0.008 <= file_mb(quantizer) <= 0.008


def test_compiled_step():
    """A compiled function that steps the optimizer follows the plan."""
    run = _Run(target_mb=0.008, steps=12)
    step = torch.compile(run.optimizer.step, backend="eager")
    for _ in range(12):
        run.optimizer.zero_grad()
        run.model(torch.randn(4, 24)).sum().backward()
        step()
    assert run.quantizer.target.phase == "done"
    assert 0.99 * 0.008 <= file_mb(run.quantizer) <= 0.008


def test_frozen_bits():
    """Bits that are frozen before the path are moved in the end only, to the size."""
    run = _Run(target_mb=0.008).train(0, 10)
    run.quantizer.freeze_bits()
    run.train(10, 30)
    assert run.quantizer.mean_bits() == 8
    run.train(30)
    assert 0.99 * 0.008 <= file_mb(run.quantizer) <= 0.008


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"lam": 1.0, "target_mb": 0.1, "steps": 100}, "pass one of them"),
        ({"target_mb": 0.1, "steps": None}, "target_mb needs to know when training ends"),
        ({"lam": 1.0, "float_share": 0.5, "steps": None}, "float_share needs to know when"),
        ({"steps": 100}, "pass target_mb="),
        ({"target_mb": 0.1, "steps": 0}, "steps must be a whole number"),
        ({"target_mb": 0.1, "steps": 9}, "10 steps or more"),
        ({"target_mb": 0.1, "steps": 100.5}, "steps must be a whole number"),
        ({"target_mb": -1, "steps": 100}, "target_mb must be a number"),
        ({"target_mb": float("nan"), "steps": 100}, "target_mb must be a number"),
        ({"target_mb": 0.1, "float_share": 0.9}, "float_share must be a number, from 0 to 0.8"),
        ({"target_mb": 0.001}, r"target_mb must be at least 0\.00\d+ for this model"),
        ({"target_mb": 0}, r"target_mb must be at least 0\.00\d+ for this model"),
    ],
)
def test_arguments(plan, message):
    """What cannot be planned raises, and neither optimizer nor bitwidths have changed."""
    model = seeded(net, 0)
    quantizer = QUANTIZERS["diffq"](model)
    optimizer = torch.optim.Adam(model.parameters())
    before = snapshot_of(model)
    with pytest.raises(diffq.ConfigError, match=message):
        quantizer.setup_optimizer(optimizer, **{"steps": STEPS, **plan})
    assert len(optimizer.param_groups) == 1
    assert same_bits(snapshot_of(model), before)
    assert quantizer.target is None


@pytest.mark.parametrize("kind", ["qat", "lsq", "diffq-fixed", "product"])
def test_methods_without_bitwidths(kind):
    """Where no bitwidths are learned, a target raises."""
    model = seeded(net, 0)
    quantizer = QUANTIZERS[kind](model)
    with pytest.raises(diffq.ConfigError, match=r"target_mb .* learns none"):
        quantizer.setup_optimizer(torch.optim.Adam(model.parameters()), target_mb=0.1, steps=STEPS)


def _least(kind="diffq"):
    """The least size that the error names."""
    with pytest.raises(diffq.ConfigError) as caught:
        _Run(kind, target_mb=0)
    return float(str(caught.value).split("at least ")[1].split(" ")[0])


def test_least_size():
    """No target at or above the size that the error names is refused."""
    assert _Run(target_mb=1.01 * _least()).quantizer.target.phase == "float"


def test_target_that_is_not_reached():
    """Where weights are less compressible than normal ones, a warning names the size."""
    run = _Run(target_mb=1.01 * _least())
    run.optimizer.param_groups[0]["lr"] = 0.0
    with pytest.warns(diffq.DiffqWarning, match=r"takes 0\.00\d+ MB as coarse as it gets"):
        run.train()


def test_large_target():
    """A target above all that the quantizer can fill is met from below."""
    run = _Run(target_mb=5.0).train()
    assert file_mb(run.quantizer) < 5.0
