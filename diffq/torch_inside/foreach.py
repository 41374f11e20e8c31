"""Operations on many tensors at once: one kernel for a list of them, where torch has one."""

from __future__ import annotations

import torch

add_ = torch._foreach_add_
addcmul = torch._foreach_addcmul
div = torch._foreach_div
exp_ = torch._foreach_exp_
mul = torch._foreach_mul
mul_ = torch._foreach_mul_
round_ = torch._foreach_round_
sigmoid = torch._foreach_sigmoid
sub = torch._foreach_sub
sub_ = torch._foreach_sub_
