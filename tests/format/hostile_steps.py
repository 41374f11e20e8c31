"""Attacks on stepped tensors, which have a step for each group of weights.

`CASES` is like that of `hostile`.
"""

from tests.format.craft import Elements, File, Levels, floats, leb, name, raw, stepped, steps
from tests.format.hostile import HUGE, LEVELS, SPLIT_FIRST, indexed, one

STEP = steps(0)


def in_steps(tensor=None, stored=STEP, coded=LEVELS, version=(1, 1), **fields):
    """A file of one stepped tensor."""
    parts = Elements(stored, **fields), coded
    return one(tensor or stepped(), *parts, version=version)


CASES = {
    "stepped tensor in version 1.0": (
        in_steps(version=(1, 0)),
        r"'w': a stepped tensor needs a file of version 1\.1, got version 1\.0",
    ),
    "steps of 0 weights": (in_steps(stepped(group_size=0)), "from 1 to 8 weights, got 0"),
    "steps of 9 weights": (in_steps(stepped(group_size=9)), "from 1 to 8 weights, got 9"),
    "steps of 2^62 weights": (in_steps(stepped(group_size=HUGE)), "from 1 to 8 weights"),
    "steps beyond the budget": (
        in_steps(stepped((2**40,), 1), steps()),
        "budget of .*larger budget",
    ),
    "min bits 0 of steps": (in_steps(stepped(min_bits=0)), "min_bits is from 1 to 15, got 0"),
    "min bits 16 of steps": (in_steps(stepped(min_bits=16)), "min_bits is from 1 to 15, got 16"),
    "stepped tensor without its header": (
        indexed(leb(1) + leb(0) + name("w") + stepped(places=())[:5], version=(1, 1)),
        "min_bits needs 1 more bytes",
    ),
    "step of an integer": (
        in_steps(stepped().replace(b"\x04\x0b", b"\x04\x06", 1)),
        "levels decode to one of",
    ),
    "step below the lowest": (in_steps(stored=steps(-505)), "from -504 to 451, got -505 to -505"),
    "step above the highest": (in_steps(stored=steps(452)), "from -504 to 451, got 452 to 452"),
    "one step of several out of range": (
        in_steps(stepped(group_size=3), steps(0, 32767, -32768)),
        "from -504 to 451, got -32768 to 32767",
    ),
    "more steps than groups": (in_steps(stored=steps(0, 0)), "2 bytes is stored in 1 to as many"),
    "fewer steps than groups": (in_steps(stepped(group_size=4), steps(0)), "28 b5 2f fd"),
    "no steps": (in_steps(stored=b""), "2 bytes is stored in 1 to as many, got 0"),
    "checksum of steps": (in_steps(crc=1), r"Segment 0 \(tensor 'w'\): the checksum"),
    "steps among float32": (
        File(
            names=("b", "w"),
            tensors=(raw(), stepped(places=(1, 0))),
            segments=(Elements(floats(1, 2) + steps(0)), LEVELS),
            version=(1, 1),
        ).build(),
        "items of 2 bytes must join .* got 4",
    ),
    "stepped bitwidth below min bits": (
        in_steps(stepped(min_bits=3)),
        "bitwidths are at least 3, got 2",
    ),
    "stepped levels of 16 bits": (
        in_steps(coded=Levels(bytes(16), used=1, widths=(16,))),
        "levels are at most 15, got 16",
    ),
    "group of two bitwidths with a step": (
        one(
            stepped(((1 << 20) + 8,), (1 << 20) + 8),
            Elements(steps(0)),
            SPLIT_FIRST,
            Levels(bytes(3), used=1 << 3, widths=(3,)),
            version=(1, 1),
        ),
        "must have one bitwidth, got 2 and 3",
    ),
}
