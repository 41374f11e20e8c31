"""Knowledge distillation: a student learns from a teacher's outputs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from diffq.checks import check_number
from diffq.errors import ConfigError

#: Targets that `torch.nn.functional.cross_entropy` leaves out unless told otherwise.
IGNORED = -100


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    temperature: float = 2.0,
    alpha: float = 0.5,
) -> Tensor:
    """A teacher's soft targets and the true ones, mixed (Hinton et al., arXiv:1503.02531).

    alpha * T**2 * KL(softmax(teacher / T) || softmax(student / T))
    + (1 - alpha) * cross entropy(student, targets), each a mean over the targets. T**2
    keeps the two in proportion whatever the temperature.

    Args:
        student_logits: [..., classes].
        teacher_logits: like `student_logits`; no gradient reaches the teacher.
        targets: int64 [...], class numbers; positions with -100 are left out.
        temperature: T, above 0; higher shows more of what the teacher thinks of
            unlikely classes.
        alpha: weight of the teacher, from 0 to 1.

    Returns:
        0-dim tensor.

    Raises:
        ConfigError: the shapes do not fit each other, or a number is out of range.
    """
    check_number(alpha, "alpha", 0, 1)
    check_number(temperature, "temperature", 0)
    shapes = student_logits.shape, teacher_logits.shape, targets.shape
    if temperature == 0 or not shapes[0] == shapes[1] == (*shapes[2], *shapes[0][-1:]):
        raise ConfigError(
            "distillation_loss needs a temperature above 0, logits [..., classes] of student and "
            f"teacher, and targets [...]; got {temperature} and {', '.join(map(str, shapes))}."
        )
    rows = -1, shapes[0][-1]
    student, teacher = student_logits.reshape(rows), teacher_logits.detach().reshape(rows)
    target = targets.reshape(-1)
    soft = F.kl_div(
        F.log_softmax(student / temperature, dim=-1),
        F.log_softmax(teacher / temperature, dim=-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    counted = target != IGNORED
    distance = (soft * counted).sum() / counted.sum()
    hard = F.cross_entropy(student, target, ignore_index=IGNORED)
    return alpha * temperature**2 * distance + (1 - alpha) * hard
