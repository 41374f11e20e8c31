"""Attacks on segments in rANS (docs/format.md, section 14).

`CASES` is like that of `hostile`.
"""

from tests.format.craft import (
    TOTAL,
    Elements,
    Runs,
    floats,
    frequencies,
    grid,
    in_runs,
    leb,
    product,
)
from tests.format.hostile import HUGE, PARAMETERS, SPLIT, SPLIT_FIRST, one

EVEN = dict.fromkeys(range(4), TOTAL // 4)
RUN = (0, 1, 2, 3, 3, 2, 1, 0), EVEN
# Levels that need a word each: the rarest one eight times.
RARE = (1,) * 8, {0: TOTAL - 1, 1: 1}
# Runs that hardly need bytes.
SKEWED = (0,) * 1000, {0: TOTAL - 1, 1: 1}
IDLE_RUN = (0,) * TOTAL, SKEWED[1]
SEVEN = [TOTAL - 1] * 7
# The states of lanes with a symbol of `RUN` each, and of one that has none.
IDLE = [*(4 * TOTAL + level * TOTAL // 4 for level in RUN[0]), TOTAL + 1]
MARKS = frequencies({0: TOTAL})


def coded(stored, tensor=None, **fields):
    """A file of version 1.1 of one grid, whose levels are the given bytes in rANS."""
    parts = PARAMETERS, Runs(stored, **fields)
    return one(tensor or grid(), *parts, version=(1, 1))


def with_tables(*tables):
    """A file with these bytes in place of the frequencies of marks and levels."""
    return coded(in_runs(RUN, tables=tables))


def mapped(bits, runs, tensor=None):
    """A file of two groups of 4 levels with 2 and 3 bits, and a map of the given bitwidths."""
    table = {width: TOTAL // len(set(bits)) for width in sorted(set(bits))}
    return coded(in_runs((bits, table), *runs), tensor or grid((8,), 4), used=0b1100)


TWO, THREE = ((0,) * 4, {0: TOTAL}), ((7,) * 4, {7: TOTAL})

CASES = {
    "rANS in version 1.0": (
        one(grid(), PARAMETERS, Runs(in_runs(RUN))),
        "the width of a stream needs 1 more bytes",
    ),
    "rANS of no bytes": (coded(b""), "85 bytes is stored in 1 to as many, got 0"),
    "rANS longer than levels can be": (
        coded(in_runs(RUN, tail=bytes(80))),
        "85 bytes is stored in 1 to as many",
    ),
    "rANS of 2^62 bytes": (coded(in_runs(RUN), size=HUGE), "85 bytes is stored in 1 to as many"),
    "rANS of no bitwidths": (coded(in_runs(RUN), used=0), "some of the bitwidths 1 to 16"),
    "checksum of rANS": (coded(in_runs(RUN), crc=1), r"Segment 1 \(tensor 'w'\): the checksum"),
    "no lanes": (coded(in_runs(RUN, states=[])), "from 1 to 4096 lanes, got 0"),
    "too few lanes": (
        one(
            grid((TOTAL,), TOTAL),
            PARAMETERS,
            Runs(in_runs(IDLE_RUN, tail=bytes(2000))),
            version=(1, 1),
        ),
        "may take 16384 rows of 1 lanes, got 65536",
    ),
    "too few lanes for so few bytes": (
        one(grid((1000,), 1000), PARAMETERS, Runs(in_runs(SKEWED)), version=(1, 1)),
        r"may take \d{3} rows of 1 lanes, got 1000",
    ),
    "4097 lanes": (coded(leb(4097) + leb(0)), "from 1 to 4096 lanes, got 4097"),
    "2^62 lanes": (coded(leb(HUGE) + leb(0)), "from 1 to 4096 lanes"),
    "lanes without states": (coded(leb(4096) + leb(0)), "the states needs 16384 more bytes"),
    "2^62 words": (coded(leb(1) + leb(HUGE) + bytes([0, 0, 1, 0])), "the words needs"),
    "words that are missing": (coded(leb(1) + leb(9) + bytes([0, 0, 1, 0])), "18 more bytes"),
    "state of 0": (coded(in_runs(RUN, states=[0])), "a state is at least 65536, got 0"),
    "state below 2^16": (coded(in_runs(RUN, lanes=2, states=[1 << 16, 65535])), "got 65535"),
    "too few words": (coded(in_runs(RARE, words=[])), "the runs must need 0 words, got more"),
    "one word too few": (
        coded(in_runs(RARE, words=SEVEN)),
        "must need 7 words, got more",
    ),
    "too many words": (coded(in_runs(RUN, words=[1, 2])), "no word may be left over, got 1"),
    "words of no use": (
        coded(in_runs(((0,) * 8, {0: TOTAL}), words=[7])),
        "no word may be left over, got 1",
    ),
    "another word": (coded(in_runs(RUN, words=[3])), "the lanes must end at 65536"),
    "another state": (coded(in_runs(RUN, states=[1 << 31])), "the lanes must end at|left over"),
    "a lane of no use": (
        coded(in_runs(RUN, lanes=9, states=IDLE)),
        "the lanes must end at 65536",
    ),
    "bytes after the runs": (coded(in_runs(RUN, tail=b"x")), "left over, got 1"),
    "classes upside down": (coded(in_runs(RUN, bounds=(1, 0))), "below 31, got 1 to 0"),
    "31 classes and one more": (coded(in_runs(RUN, bounds=(0, 31))), "below 31, got 0 to 31"),
    "no classes": (coded(in_runs(RUN)[:8]), "needs 1 more bytes"),
    "more columns than levels": (coded(in_runs(RUN, columns=(9,))), "8 levels .* got 9"),
    "2^62 columns": (coded(in_runs(RUN, columns=(HUGE,))), "rows of at most as many"),
    "mark of 31": (
        coded(in_runs(RUN, marks=((31,), {31: TOTAL}))),
        "a symbol must be below 31, got 31",
    ),
    "mark of 2^62": (with_tables(leb(HUGE), frequencies(EVEN)), "a symbol must be below 31"),
    "marks without frequencies": (with_tables(b""), "a symbol needs 1 more"),
    "levels without frequencies": (with_tables(MARKS), "a symbol needs 1 more"),
    "frequencies that end early": (with_tables(MARKS, leb(0) + leb(1)), "needs 1 more"),
    "frequencies above their sum": (
        with_tables(MARKS, leb(0) + leb(TOTAL - 1) + leb(2)),
        "sum to 65536, got 65537",
    ),
    "frequency of 2^62": (with_tables(MARKS, leb(0) + leb(HUGE)), "sum to 65536"),
    "frequencies of nothing": (with_tables(MARKS, leb(0) + leb(0) * 20), "must be below 4, got 4"),
    "gap of 2^62": (with_tables(MARKS, leb(0) + leb(0) + leb(HUGE) + leb(TOTAL)), "below 4, got"),
    "level of 2^b in rANS": (
        with_tables(MARKS, leb(4) + leb(TOTAL)),
        "a symbol must be below 4, got 4",
    ),
    "bitwidth of 17 in rANS": (
        mapped((17, 2), (TWO, THREE)),
        "a symbol must be below 17, got 17",
    ),
    "rANS without a bitwidth in use": (
        mapped((2, 2), (TWO, TWO)),
        r"use the bitwidths \[2, 3\], got \[2\]",
    ),
    "rANS with an unused bitwidth": (
        mapped((2, 4), (TWO, THREE)),
        r"use the bitwidths \[2, 3\], got \[2, 4\]",
    ),
    "rANS of bitwidth 0": (mapped((0, 2), (TWO, TWO)), r"bitwidths \[2, 3\], got \[0, 2\]"),
    "rANS below min bits": (
        mapped((2, 3), (TWO, THREE), grid((8,), 4, 3)),
        "bitwidths are at least 3, got 2",
    ),
    "levels of 16 bits in rANS": (
        coded(in_runs(((0,) * 8, {0: TOTAL})), used=1),
        "levels are at most 15, got 16",
    ),
    "index above the codewords in rANS": (
        one(
            product(codewords=3),
            Elements(floats(*range(6))),
            Runs(in_runs(((0, 1, 2, 3), EVEN))),
            version=(1, 1),
        ),
        "below 3, got 3",
    ),
    "group of two bitwidths in rANS": (
        one(
            SPLIT,
            PARAMETERS,
            SPLIT_FIRST,
            Runs(in_runs(((0,) * 8, {0: TOTAL})), used=1 << 3),
            version=(1, 1),
        ),
        "must have one bitwidth, got 2 and 3",
    ),
}
