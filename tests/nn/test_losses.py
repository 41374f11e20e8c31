"""Distillation."""

import pytest
import torch
import torch.nn.functional as F

from diffq import distillation_loss
from diffq.errors import ConfigError
from tests.compare import close


def test_without_teacher_it_is_cross_entropy():
    """With alpha 0 the loss is the cross entropy, of logits with any leading dimensions."""
    student, teacher = torch.randn(2, 4, 3, 5)
    targets = torch.randint(5, (4, 3))
    loss = distillation_loss(student, teacher, targets, alpha=0.0)
    assert close(loss, F.cross_entropy(student.view(12, 5), targets.view(12)))


def test_matches_the_formula():
    """The loss is alpha T^2 KL(teacher || student) + (1 - alpha) cross entropy, in float64."""
    student, teacher = torch.randn(2, 6, 5, dtype=torch.float64)
    targets = torch.randint(5, (6,))
    soft, hard = (torch.softmax(x / 3, 1) for x in (teacher, student))
    distance = (soft * (soft / hard).log()).sum(1).mean()
    wanted = 0.7 * 9 * distance + 0.3 * F.cross_entropy(student, targets)
    torch.testing.assert_close(distillation_loss(student, teacher, targets, 3.0, 0.7), wanted)


def test_a_student_like_its_teacher_has_no_distance():
    """With alpha 1 and equal logits, loss and gradient are zero."""
    student = torch.randn(6, 5, requires_grad=True)
    loss = distillation_loss(student, student.detach(), torch.zeros(6, dtype=torch.long), alpha=1.0)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert student.grad.abs().max() < 1e-6


def test_no_gradient_reaches_the_teacher():
    """Only the student learns."""
    student, teacher = (torch.randn(6, 5, requires_grad=True) for _ in range(2))
    distillation_loss(student, teacher, torch.zeros(6, dtype=torch.long)).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_ignored_targets_do_not_count():
    """Positions whose target is -100 change neither part of the loss."""
    student, teacher = torch.randn(2, 6, 5)
    targets = torch.tensor([0, 1, -100, 2, -100, 3])
    kept = targets >= 0
    loss = distillation_loss(student, teacher, targets)
    torch.testing.assert_close(loss, distillation_loss(student[kept], teacher[kept], targets[kept]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha must be a number, from 0 to 1"),
        ({"temperature": 0}, "a temperature above 0"),
        ({"targets": torch.zeros(5, dtype=torch.long)}, r"targets \[\.\.\.\]"),
        ({"teacher_logits": torch.zeros(6, 4)}, r"torch.Size\(\[6, 4\]\)"),
    ],
)
def test_wrong_arguments(options, message):
    """Numbers out of range and shapes that do not fit are refused."""
    arguments = {
        "student_logits": torch.zeros(6, 5),
        "teacher_logits": torch.zeros(6, 5),
        "targets": torch.zeros(6, dtype=torch.long),
    }
    with pytest.raises(ConfigError, match=message):
        distillation_loss(**{**arguments, **options})
