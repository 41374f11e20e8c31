"""Batches of tensors on a GPU, in a few kernels of Triton each.

A batch is tensors of one dtype, device and group size. It is given tensors and numbers, and knows
neither modules nor autograd. `Noisy` is for DiffQ, `Rounded` for QAT, Quant-Noise and true
quantization, `Scaled` for LSQ. One autograd node serves a batch: its forward calls `sample` and
keeps the state, its backward calls `gradients`. Weights and gradients are lists of tensors of any
shapes. What groups or tensors have one of is flat: logits, bitwidths and their gradients are
float32 [groups], scales and their gradients float32 [tensors].

| launches | forward | backward |
| --- | --- | --- |
| `Noisy` | seed, scan, sample | join, backward, finish |
| `Noisy`, noise "rounding" | scan, sample | join, backward, finish |
| `Rounded` | scan, sample | none |
| `Rounded`, blocks drawn | seed, scan, sample | none |
| `Scaled` | sample | join, backward, finish |

Their number does not grow with that of the tensors. *Scan* finds extremes, with their places, of
pieces of tensors, and *sample* draws noise and writes all values in one buffer. *Join* copies the
gradients of the values in one buffer, because autograd may share theirs. *Backward* draws the noise
again, so that only a seed and extremes are kept in between. *Finish* adds up sums over programs.
There are no atomic operations, so the same seed gives the same bits, and the host never waits for
the device.

`availability.available` says where kernels run, and `weights.handles` for which weights. Import the
classes from their modules, and only where there are kernels: they import Triton, which `diffq`
alone does not.
"""
