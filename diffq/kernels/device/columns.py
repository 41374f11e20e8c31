"""The columns of the tables that kernels read, and the kinds of noise, as Triton's constants.

| table | dtype | a row for each | columns |
| --- | --- | --- | --- |
| addresses | int64 | tensor | where the weight is, whether its zeros stay zero |
| table | int64 | tensor | those below, which never change |
| pieces | int32 | program of a scan | tensor, first weight and end |
| chunks | int32 | program over weights | tensor, first tile row |
"""

import triton.language as tl

ADDRESS_COLUMNS = tl.constexpr(2)

#: Weights of the tensor.
NUMEL = tl.constexpr(0)
#: Where its values and gradients begin in the buffers of the batch.
PLACE = tl.constexpr(1)
#: Its first group in all groups of the batch.
GROUP = tl.constexpr(2)
#: Its first row of each table of programs, and their number.
PIECE = tl.constexpr(3)
PIECES = tl.constexpr(4)
CHUNK = tl.constexpr(5)
CHUNKS = tl.constexpr(6)
COLUMNS = tl.constexpr(7)

GAUSSIAN = tl.constexpr(0)
UNIFORM = tl.constexpr(1)
ROUNDING = tl.constexpr(2)
