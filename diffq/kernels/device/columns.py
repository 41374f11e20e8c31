"""The columns of the tables that kernels read, and the kinds of noise, as Triton's constants.

| table | dtype | a row for each | columns |
| --- | --- | --- | --- |
| addresses | int64 | tensor | where the weight is, whether its zeros stay zero |
| table | int64 | tensor | those below, which never change |
| pieces | int32 | program of a scan | tensor, first and end: of weights, then of groups |
| chunks | int32 | program over weights | tensor, first tile row |
"""

import triton.language as tl

ADDRESS_COLUMNS = tl.constexpr(2)

#: Weights of the tensor.
NUMEL = tl.constexpr(0)
#: Where its values and gradients begin in the buffers of the batch.
PLACE = tl.constexpr(1)
#: Its first group in all groups of the batch, and their number.
GROUP = tl.constexpr(2)
GROUP_COUNT = tl.constexpr(3)
#: Weights of a group; the last may be short.
GROUP_SIZE = tl.constexpr(4)
#: Its first row of each table of programs, and their number. Pieces of groups count from 0.
PIECE = tl.constexpr(5)
PIECES = tl.constexpr(6)
GROUP_PIECE = tl.constexpr(7)
GROUP_PIECES = tl.constexpr(8)
CHUNK = tl.constexpr(9)
CHUNKS = tl.constexpr(10)
COLUMNS = tl.constexpr(11)

GAUSSIAN = tl.constexpr(0)
UNIFORM = tl.constexpr(1)
ROUNDING = tl.constexpr(2)
