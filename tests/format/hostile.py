"""The corpus: one file for each known attack on formats of this kind.

`CASES` maps a name to (bytes, what the error must say).
"""

import json

import numpy as np

from tests.format.craft import (
    FLOAT32,
    MAGIC,
    Elements,
    File,
    Levels,
    chunk,
    floats,
    frame,
    grid,
    leb,
    name,
    product,
    raw,
    scaled,
    text,
)

SOUND = File().build()
HUGE = 2**62
PARAMETERS = Elements(floats(0, 3))
LEVELS = Levels(b"\xe4\x1b")


def one(tensor, *segments, **parts):
    """A file of one tensor."""
    return File(tensors=(tensor,), segments=segments or (PARAMETERS, LEVELS), **parts).build()


def levels(stored=b"\xe4\x1b", tensor=None, parameters=PARAMETERS, **fields):
    """A file of one grid with the given segment of levels."""
    return one(tensor or grid(), parameters, Levels(stored, **fields))


def indexed(index, **parts):
    """A file whose index has the given content."""
    return File(index=index, segments=(), **parts).build()


def named(*names, **parts):
    """A file of empty raw tensors with the given names."""
    tensors = tuple(bytes([0, FLOAT32, 1, 0, FLOAT32]) for _ in names)
    return File(names=names, tensors=tensors, segments=(), **parts).build()


def index_body(body):
    """A file whose INDX has the given body."""
    return File(index_body=body, segments=()).build()


def meta(content):
    """A file with the given metadata."""
    content = content if isinstance(content, bytes) else content.encode()
    return File(meta=text(content)).build()


def dictionary_frame(content):
    """A frame that asks for a dictionary: descriptor with a 1-byte dictionary id."""
    return b"\x28\xb5\x2f\xfd" + bytes([0x20 | 0x01, 7, len(content)]) + b"\x01\x00\x00"


def window_frame(size):
    """A frame with a window of 1 GiB: descriptor with a 4-byte content size."""
    return (
        b"\x28\xb5\x2f\xfd"
        + bytes([0x80, (30 - 10) << 3])
        + size.to_bytes(4, "little")
        + b"\x01\0\0"
    )


def unsized_frame(content):
    """A frame without a content size."""
    return frame(content, write_content_size=False)


ZEROS = bytes(1000)
SKIPPABLE = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"evil"


def framed(stored, size=1000):
    """A raw tensor of `size` bytes with the given stored bytes."""
    return one(raw((size,), dtype=1), Elements(stored))


WORDS = floats(*range(8))


def indexed_words(stored=b"\xe4", tensor=None, words=WORDS, **fields):
    """A file of four blocks of two weights and their codebook, by default of four codewords."""
    return one(tensor or product(), Elements(words), Levels(stored, **fields))


def scaled_words(scale=1.0, zero=0, words=bytes(8)):
    """A file of four blocks of two weights with uint8 codewords."""
    scale = floats(scale) + bytes([zero])
    return indexed_words(tensor=product(stored=1, scale=scale), words=words)


# A group of 2^20 + 8 weights at 2 bits fills two segments: 2^18 and 2 bytes.
SPLIT = grid(((1 << 20) + 8,), (1 << 20) + 8)
SPLIT_FIRST = Levels(frame(bytes(1 << 18)), payload=1 << 18)

CONTAINER = {
    "empty": (b"", "A diffq file starts with"),
    "another kind of file": (b"PK\x03\x04" + bytes(100), "another kind of file"),
    "signature alone": (MAGIC, "more bytes"),
    "half a version": (MAGIC + b"\x01", "more bytes"),
    "no chunks": (MAGIC + b"\x01\x00", "more bytes"),
    "text mode: CR LF to LF": (SOUND.replace(b"\r\n", b"\n"), "text mode"),
    "text mode: LF to CR LF": (SOUND.replace(b"\n", b"\r\n"), "text mode"),
    "text mode: eighth bit dropped": (bytes(b & 0x7F for b in SOUND), "text mode"),
    "text mode: Latin-1 to UTF-8": (SOUND.decode("latin1").encode(), "text mode"),
    "text mode: stops at Ctrl-Z": (SOUND[: SOUND.index(b"\x1a")], "text mode"),
    "version 2": (File(version=(2, 0)).build(), r"versions 1\.0 to 1\.1 .* got version 2\.0"),
    "version 0": (File(version=(0, 1)).build(), r"versions 1\.0 to 1\.1 .* got version 0\.1"),
    "version 1.2": (File(version=(1, 2)).build(), r"got version 1\.2\. Install a diffq"),
    "version 1.255": (File(version=(1, 255)).build(), r"got version 1\.255\. Install a diffq"),
    "version 1.1 without need": (
        File(version=(1, 1)).build(),
        r"version 1\.1 has a segment of levels in rANS or a stepped tensor, got none",
    ),
    "unknown required chunk": (File(extra=(chunk(b"Evil"),)).build(), "Chunk Evil.*Upgrade"),
    "chunk larger than the file": (File(chunks=(chunk(b"INDX", b"", size=99),)).build(), "99 more"),
    "chunk of 2^64 - 1 bytes": (
        File(chunks=(chunk(b"INDX", b"", size=2**64 - 1),)).build(),
        "needs 18446744073709551615 more bytes",
    ),
    "tag of other bytes": (File(extra=(chunk(b"ab\x00d"),)).build(), "four letters"),
    "tag with a digit": (File(extra=(chunk(b"abc1"),)).build(), "four letters"),
    "no INDX": (File(chunks=("DATA", "DONE")).build(), "the chunks are INDX"),
    "no DATA": (File(chunks=("INDX", "DONE")).build(), "the chunks are INDX"),
    "no DONE": (File(chunks=("INDX", "DATA")).build(), "more bytes"),
    "INDX twice": (File(chunks=("INDX", "INDX", "DATA", "DONE")).build(), "the chunks are INDX"),
    "DATA twice": (File(chunks=("INDX", "DATA", "DATA", "DONE")).build(), "the chunks are INDX"),
    "meta twice": (
        File(meta=text(b"{}"), chunks=("INDX", "meta", "meta", "DATA", "DONE")).build(),
        "the chunks are INDX",
    ),
    "DATA before INDX": (File(chunks=("DATA", "INDX", "DONE")).build(), "the chunks are INDX"),
    "meta before INDX": (
        File(meta=text(b"{}"), chunks=("meta", "INDX", "DATA", "DONE")).build(),
        "the chunks are INDX",
    ),
    "meta after DATA": (
        File(meta=text(b"{}"), chunks=("INDX", "DATA", "meta", "DONE")).build(),
        "the chunks are INDX",
    ),
    "skippable chunk before INDX": (
        File(before=(chunk(b"evil"),)).build(),
        "the first chunk is INDX",
    ),
    "DONE with a body": (
        File(chunks=("INDX", "DATA", chunk(b"DONE", b"x"))).build(),
        "must be empty",
    ),
    "bytes after the end": (File(tail=b"x").build(), "left over"),
    "chunks after the end": (File(tail=chunk(b"evil")).build(), "left over"),
    "two files in one": (SOUND + SOUND, "left over"),
    "65 chunks": (File(extra=(chunk(b"evil"),) * 62).build(), "at most 64 chunks"),
    "checksum of INDX": (
        File(chunks=(chunk(b"INDX", text(b""), crc=1), "DATA", "DONE")).build(),
        "Chunk INDX: its checksum",
    ),
    "checksum of DATA": (
        File(chunks=("INDX", chunk(b"DATA", b"12345678", crc=1), "DONE")).build(),
        "Chunk DATA: its checksum",
    ),
    "checksum of a skippable chunk": (
        File(extra=(chunk(b"evil", b"x", crc=1),)).build(),
        "Chunk evil: its checksum",
    ),
    "checksum of DONE": (
        File(chunks=("INDX", "DATA", chunk(b"DONE", crc=1))).build(),
        "Chunk DONE: its checksum",
    ),
    "unreferenced bytes in DATA": (File(data=bytes(11)).build(), "take 10 bytes, got 11"),
    "DATA too short": (File(data=bytes(9)).build(), "take 10 bytes, got 9"),
}

TEXT = {
    "no size": (index_body(b""), "its size needs 1 more"),
    "size in a longer varint": (index_body(b"\x82\x00\x00\x00"), "shortest form"),
    "size of 2^63": (index_body(leb(2**63)), r"below 2\*\*63"),
    "endless varint": (index_body(b"\xff" * 100), r"below 2\*\*63"),
    "size of 2^62": (index_body(leb(HUGE) + frame(ZEROS)), "hold at most"),
    "index bomb": (index_body(leb(1 << 20) + frame(bytes(1 << 20))), "hold at most"),
    "index of 65 MiB": (index_body(leb(65 << 20) + bytes(2 << 20)), "hold at most 67108864"),
    "index shorter than its bytes": (index_body(leb(2) + b"abc"), "stored in as many or fewer"),
    "index that is no frame": (index_body(leb(100) + b"\x01" * 50), "start with 28 b5 2f fd"),
    "metadata bomb": (
        File(meta=leb(1 << 20) + frame(b"[" * (1 << 20))).build(),
        "hold at most",
    ),
}

INDEX = {
    "no content": (indexed(b""), "number of names"),
    "2^62 tensors": (indexed(leb(HUGE) + leb(0)), "at most 0 names"),
    "2^62 aliases": (indexed(leb(0) + leb(HUGE)), "at most 0 names"),
    "2^63 tensors in all": (indexed(leb(HUGE) + leb(HUGE)), "at most 0 names"),
    "name of 2^62 bytes": (indexed(leb(1) + leb(0) + leb(HUGE)), f"needs {HUGE} more"),
    "empty name": (named(""), "from 1 to 1024 bytes"),
    "name of 1025 bytes": (named("x" * 1025), "from 1 to 1024 bytes"),
    "name that is no UTF-8": (named(b"\xff\xfe"), "names must be sound"),
    "name with an overlong character": (named(b"\xc0\xaf"), "names must be sound"),
    "name with half a surrogate": (named(b"\xed\xa0\x80"), "names must be sound"),
    "name with a line break": (named("a\nb"), "control characters"),
    "name with an escape sequence": (named("\x1b[2J"), "control characters"),
    "name with NUL": (named("a\x00b"), "control characters"),
    "two tensors of a name": (named("w", "w"), "'w' twice"),
    "alias of a tensor's name": (named("w", aliases=("w",), targets=(0,)), "'w' twice"),
    "two aliases of a name": (named("w", aliases=("a", "a"), targets=(0, 0)), "'a' twice"),
    "alias to nothing": (named("w", aliases=("a",), targets=(1,)), "one of 1 tensors, got 1"),
    "alias to itself": (named("w", aliases=("a",), targets=(1,)), "one of 1 tensors"),
    "alias without tensors": (named(aliases=("a",), targets=(0,)), "one of 0 tensors"),
    "unknown kind": (one(raw(kind=5)), "knows the kinds 0 to 4, got 5.*upgrade"),
    "unknown dtype": (one(raw(dtype=17)), "knows the dtypes 0 to 16, got 17"),
    "unknown stored dtype": (one(raw(stored=200)), "stored dtypes 0 to 16, got 200"),
    "int stored as float16": (one(raw(dtype=6, stored=9)), "only floats"),
    "float32 stored as float64": (one(raw(stored=12)), "only floats"),
    "rank 33": (one(raw((1,) * 33)), "at most 32 dimensions, got 33"),
    "rank 255": (one(raw((1,) * 255)), "at most 32 dimensions, got 255"),
    "rank without sizes": (
        indexed(leb(1) + leb(0) + name("w") + bytes([0, FLOAT32, 255])),
        "a size needs",
    ),
    "size of 2^63 elements": (one(raw((2**63,))), r"below 2\*\*63"),
    "2^62 elements": (one(raw((HUGE,))), r"at most 2\*\*48"),
    "product that overflows 64 bits": (one(raw((2**40, 2**40))), r"at most 2\*\*48"),
    "product that wraps to 1": (one(raw((2**32, 2**32, 2**62, 4))), r"at most 2\*\*48"),
    "no elements, huge size": (one(raw((0, HUGE))), r"at most 2\*\*48"),
    "elements beyond the budget": (one(raw((2**40,))), "budget of .*larger budget"),
    "weights beyond the budget": (one(grid((2**40,))), "budget of .*larger budget"),
    "tensors beyond the budget together": (
        File(
            names=("a", "b", "c"),
            tensors=tuple(raw((3 << 20,), dtype=1) for _ in range(3)),
            segments=tuple(Elements(frame(bytes(3 << 20))) for _ in range(3)),
        ).build(),
        "The tensors up to 'c'",
    ),
    "groups of 0 weights": (one(grid(group_size=0)), "from 1 to 8 weights, got 0"),
    "groups larger than the tensor": (one(grid(group_size=9)), "from 1 to 8 weights, got 9"),
    "groups of 2^62 weights": (one(grid(group_size=HUGE)), "from 1 to 8 weights"),
    "groups of 2 in an empty tensor": (one(grid((0,), 2)), "from 1 to 1 weights"),
    "min bits 0": (one(grid(min_bits=0)), "min_bits is from 1 to 15, got 0"),
    "min bits 16": (one(grid(min_bits=16)), "min_bits is from 1 to 15, got 16"),
    "levels of an integer": (one(grid(dtype=6)), "levels decode to one of"),
    "unknown flag": (one(grid(flags=8)), "knows the flags 1, 2 and 4, got 8.*upgrade"),
    "zero point of a constant": (one(grid(flags=6, places=(0,)), PARAMETERS), "no flag 4"),
    "one group with a range per group": (one(grid(flags=1)), "no flag 1"),
    "place before the first segment": (one(grid(places=(1, 0))), "one of 0 segments, got 1"),
    "place 2^62": (one(grid(places=(HUGE, 0))), "one of 0 segments"),
    "levels among elements": (one(grid(places=(0, 1))), "items of 0 bytes must join"),
    "elements among levels": (
        File(
            names=("w", "b"), tensors=(grid(), raw(place=1)), segments=(PARAMETERS, LEVELS)
        ).build(),
        "items of 4 bytes must join",
    ),
    "elements among larger ones": (
        File(
            names=("a", "b"),
            tensors=(raw((1,), dtype=12), raw(place=1)),
            segments=(Elements(bytes(8)),),
        ).build(),
        "items of 4 bytes must join .* got 8",
    ),
    "segment that is full": (
        File(
            names=("a", "b"),
            tensors=(raw((1 << 22,), dtype=1), raw((1,), dtype=1, place=1)),
            segments=(Elements(frame(bytes(1 << 22))),),
        ).build(),
        "at most 4194304 items, got 4194305",
    ),
    "more segments than the index describes": (
        one(raw((8 << 20,), dtype=1), Elements(b"x")),
        "describes at most 1 segments, got 2",
    ),
    "tensors without descriptions": (
        indexed(leb(1) + leb(0) + name("w") + grid()),
        "describes at most 0 segments",
    ),
    "bytes after the index": (File(index_tail=b"x").build(), "left over, got 1"),
    "segment of 0 bytes": (
        one(grid(), Elements(b""), LEVELS),
        "stored in 1 to as many, got 0",
    ),
    "elements longer than they are": (
        one(grid(), Elements(bytes(9)), LEVELS),
        "8 bytes is stored in 1 to as many, got 9",
    ),
    "segment of 2^62 bytes": (
        one(grid(), Elements(floats(0, 3), size=HUGE), LEVELS),
        "stored in 1 to as many",
    ),
    "levels longer than they are": (levels(b"\xe4\x1b\x00", payload=2), "2 bytes is stored in 1"),
    "payload of 2^62": (levels(payload=HUGE), "8 levels in 1 groups take at most 85"),
    "no bitwidths in use": (levels(used=0, widths=()), "some of the bitwidths 1 to 16"),
    "stream of 16 bits at 8": (levels(used=1, widths=(8,)), "symbols of 16 bits"),
    "map without need": (levels(map_width=1), "symbols of 0 bits are packed at 0"),
    "no map where one is needed": (levels(used=0b1100, widths=(2, 3)), "symbols of 1 bits"),
    "stream at 0 bits": (levels(widths=(0,)), "symbols of 2 bits are packed at 2"),
    "stream at 1 bit": (levels(widths=(1,)), "symbols of 2 bits are packed at 2"),
    "stream at 3 bits": (levels(widths=(3,)), "symbols of 2 bits are packed at 2"),
    "stream at 16 bits": (levels(widths=(16,)), "symbols of 2 bits are packed at 2"),
    "stream at 255 bits": (levels(widths=(255,)), "symbols of 2 bits are packed at 2"),
    "wider than 8 bits": (levels(used=1 << 9, widths=(10,)), "symbols of 9 bits"),
}

FRAMES = {
    "checksum of a segment": (
        one(grid(), Elements(floats(0, 3), crc=1), LEVELS),
        r"Segment 0 \(tensor 'w'\): the checksum",
    ),
    "checksum of levels": (levels(crc=1), r"Segment 1 \(tensor 'w'\): the checksum"),
    "no frame": (framed(b"\x01" * 50), "start with 28 b5 2f fd, got 01 01 01 01"),
    "frame of an old version": (framed(b"\x27\xb5\x2f\xfd" + bytes(50)), "start with 28 b5 2f fd"),
    "frame without content size": (framed(unsized_frame(ZEROS)), "announce 1000 bytes"),
    "frame that announces more": (framed(frame(bytes(1001))), "announce 1000 bytes, got 1001"),
    "frame that announces less": (framed(frame(bytes(999))), "announce 1000 bytes, got 999"),
    "frame that lies about its content": (
        framed(frame(ZEROS).replace((1000 - 256).to_bytes(2, "little"), b"\x00\x01"), 512),
        "one zstd frame",
    ),
    "bomb of 1 GiB": (framed(frame(bytes(1 << 20)) + b""), "announce 1000 bytes, got 1048576"),
    "two frames": (framed(frame(ZEROS) * 2), "one zstd frame"),
    "bytes after the frame": (framed(frame(ZEROS) + b"x"), "one zstd frame"),
    "skippable frame": (framed(SKIPPABLE), "start with 28 b5 2f fd"),
    "skippable frame of the size": (
        framed(SKIPPABLE[:4] + b"\xe8\x03\0\0x"),
        "start with 28 b5 2f fd",
    ),
    "skippable frame before the frame": (framed(SKIPPABLE + frame(ZEROS)), "start with 28 b5"),
    "skippable frame after the frame": (framed(frame(ZEROS) + SKIPPABLE), "one zstd frame"),
    "frame cut short": (framed(frame(ZEROS)[:-1]), "one zstd frame"),
    "window of 1 GiB": (framed(window_frame(1000)), "window may have 8388608 bytes"),
    "frame with a dictionary": (framed(dictionary_frame(ZEROS[:200]), 200), "no dictionary"),
    "frame with a wrong checksum": (
        framed(frame(ZEROS, write_checksum=True)[:-1] + b"\x00"),
        "one zstd frame",
    ),
    "levels in a broken frame": (levels(b"\x01", payload=2), "start with 28 b5 2f fd, got 01"),
    "start of a frame alone": (framed(b"\x28\xb5\x2f\xfd"), "one zstd frame"),
}

CONTENT = {
    "range of NaN": (levels(parameters=Elements(floats(np.nan, 1))), "finite"),
    "range of a signaling NaN": (
        levels(parameters=Elements(b"\x01\x00\xa0\x7f" + floats(1))),
        "finite",
    ),
    "scale of a signaling NaN": (
        one(scaled(), Elements(b"\x01\x00\xa0\x7f"), LEVELS),
        "one scale",
    ),
    "range to infinity": (levels(parameters=Elements(floats(0, np.inf))), "finite"),
    "range upside down": (levels(parameters=Elements(floats(1, 0))), "low at most high"),
    "range that overflows": (levels(parameters=Elements(floats(-3e38, 3e38))), "overflow"),
    "constant without the flag": (levels(parameters=Elements(floats(1, 1))), "flag 2 must be 1"),
    "flag of a constant that is none": (
        one(grid(flags=2, places=(0,)), PARAMETERS),
        "flag 2 must be 0",
    ),
    "scale of NaN": (one(scaled(), Elements(floats(np.nan)), LEVELS), "one scale"),
    "scale that overflows": (one(scaled(), Elements(floats(3e38)), LEVELS), "one scale"),
    "scale of NaN without weights": (
        one(scaled((0,), 1, places=(0,)), Elements(floats(np.nan))),
        "one scale",
    ),
    "scale that overflows at 15 bits": (
        one(
            scaled((8,), 8, 15),
            Elements(floats(1e38)),
            Levels(bytes(15), used=1 << 15, widths=(15,)),
        ),
        "one scale",
    ),
    "bool of 2": (one(raw((2,), dtype=0), Elements(b"\x01\x02")), "0 or 1, got 2"),
    "level above its bitwidth": (
        levels(bytes([1, 2, 3, 4, 0, 0, 0, 0]), widths=(8,)),
        "levels of 2 bits must be below 4, got 4",
    ),
    "padding of levels": (
        levels(b"\xff\xff", grid((7,), 7)),
        "padding bits must be zero",
    ),
    "padding of the bit map": (
        levels(b"\xf1\xe4\x01", grid((8,), 4), used=0b1100, map_width=1, widths=(2, 3)),
        "padding bits must be zero",
    ),
    "bit map above the bitwidths in use": (
        levels(b"\x30" + bytes(5), grid((8,), 4), used=0b10100, map_width=4, widths=(2, 4)),
        "at most 4, got 5",
    ),
    "bit map that wraps around": (
        levels(b"\x00\xff" + bytes(5), grid((8,), 4), used=0b1100, map_width=8, widths=(2, 3)),
        "at most 3, got 257",
    ),
    "bit map without a bitwidth in use": (
        levels(b"\x00" + bytes(5), grid((8,), 4), used=0b1100, map_width=1, widths=(2, 3)),
        r"use the bitwidths \[2, 3\], got \[2\]",
    ),
    "bit map with an unused bitwidth": (
        levels(
            b"\x24" + bytes(6),
            grid((12,), 4),
            used=0b10100,
            map_width=2,
            widths=(2, 4),
        ),
        r"use the bitwidths \[2, 4\], got \[2, 3, 4\]",
    ),
    "bitwidth below min bits": (levels(tensor=grid(min_bits=3)), "bitwidths are at least 3, got 2"),
    "payload too short": (levels(b"\xe4"), "a stream needs 2 more bytes"),
    "payload too long": (levels(b"\xe4\x1b\x00"), "left over, got 1"),
    "payload without its map": (
        levels(b"", grid((8,), 4), used=0b1100, map_width=1, widths=(2, 3), size=1, payload=1),
        "take 9 bytes, got 8",
    ),
    "group of two bitwidths": (
        one(
            SPLIT,
            PARAMETERS,
            SPLIT_FIRST,
            Levels(bytes(3), used=1 << 3, widths=(3,)),
        ),
        "must have one bitwidth, got 2 and 3",
    ),
}

PRODUCT = {
    "blocks of 0 weights": (indexed_words(tensor=product(block_size=0)), "got blocks of 0"),
    "blocks that do not divide": (
        indexed_words(tensor=product(block_size=3)),
        "divide a tensor's 8 weights, got blocks of 3",
    ),
    "blocks of 2^62 weights": (indexed_words(tensor=product(block_size=HUGE)), "got blocks of"),
    "no codewords": (indexed_words(tensor=product(codewords=0)), "from 1 to 4 codewords, got 0"),
    "more codewords than blocks": (
        indexed_words(tensor=product(codewords=5)),
        "from 1 to 4 codewords, got 5",
    ),
    "2^62 codewords": (indexed_words(tensor=product(codewords=HUGE)), "from 1 to 4 codewords"),
    "more than 65536 codewords": (
        indexed_words(tensor=product((1 << 17,), 1, (1 << 16) + 1)),
        "from 1 to 65536 codewords, got 65537",
    ),
    "product without weights": (indexed_words(tensor=product((0,))), "from 1 to 0 codewords"),
    "blocks beyond the budget": (indexed_words(tensor=product((2**40,))), "budget of .*larger"),
    "codebook beyond the budget": (
        indexed_words(tensor=product((1 << 20,), 1 << 10, 1 << 10)),
        "budget of .*larger",
    ),
    "codewords of int8": (indexed_words(tensor=product(stored=2)), "codewords are uint8"),
    "codewords of float64": (indexed_words(tensor=product(stored=12)), "codewords are uint8"),
    "product of an integer": (
        indexed_words(tensor=product().replace(b"\x03\x0b", b"\x03\x06", 1)),
        "levels decode to one of",
    ),
    "no scale": (
        indexed(leb(1) + leb(0) + name("w") + product(stored=1, places=())),
        "a scale and a zero point needs 5 more bytes",
    ),
    "uint8 scale of NaN": (scaled_words(np.nan), "scale from 0"),
    "uint8 scale of infinity": (scaled_words(np.inf), "scale from 0"),
    "uint8 scale below zero": (scaled_words(-1), "scale from 0"),
    "uint8 scale that overflows": (scaled_words(2e36), "scale from 0"),
    "codeword of NaN": (indexed_words(words=floats(0, 0, 0, np.nan, *[0] * 4)), "must be finite"),
    "codeword of a signaling NaN": (
        indexed_words(words=b"\x01\x00\xa0\x7f" + floats(*range(7))),
        "must be finite",
    ),
    "codeword of infinity": (
        indexed_words(tensor=product(stored=9), words=b"\x00\x7c" + bytes(14)),
        "must be finite",
    ),
    "codebook too short": (indexed_words(words=floats(*range(7))), "28 b5 2f fd"),
    "index above the codewords": (
        indexed_words(tensor=product(codewords=3), words=floats(*range(6))),
        "below 3, got 3",
    ),
    "indices of another bitwidth": (
        indexed_words(b"\x00\x00", used=1 << 3, widths=(3,)),
        "indices of 4 codewords have 2 bits, got 3",
    ),
    "indices among elements": (
        indexed_words(tensor=product(places=(0, 1))),
        "items of 0 bytes must join",
    ),
    "index for one codeword": (
        indexed_words(tensor=product(codewords=1, places=(0,)), words=floats(0, 1)),
        "left over",
    ),
    "levels of 16 bits": (levels(bytes(16), used=1, widths=(16,)), "levels are at most 15, got 16"),
}

METADATA = {
    "no JSON": (meta("{"), "must be JSON"),
    "metadata of nothing": (meta(""), "must be JSON"),
    "an array": (meta("[]"), "must be a JSON object, got list"),
    "a number": (meta("1"), "must be a JSON object, got int"),
    "two values": (meta("{}{}"), "must be JSON"),
    "NaN": (meta('{"a":NaN}'), "must be JSON"),
    "Infinity": (meta('{"a":-Infinity}'), "must be JSON"),
    "a number beyond float64": (meta('{"a":1e999}'), "must be JSON, got the number 1e999"),
    "a key twice": (meta('{"a":1,"a":2}'), "a key that occurs twice"),
    "no UTF-8": (meta(b'{"a":"\xff"}'), "must be JSON"),
    "UTF-16": (meta('{"a":1}'.encode("utf-16")), "must be JSON"),
    "33 levels": (meta('{"a":' * 33 + "1" + "}" * 33), "at most 32 deep"),
    "deep objects": (meta('{"a":' * 5000 + "1" + "}" * 5000), "must be JSON|32 deep"),
    "deep arrays": (meta("[" * 60_000), "must be JSON"),
    "number of 100,000 digits": (meta('{"a":' + "9" * 100_000 + "}"), "must be JSON"),
    "more than 1 MiB": (meta(json.dumps({"a": "x" * (1 << 20)})), "at most 1048576 bytes"),
}

CASES = CONTAINER | TEXT | INDEX | FRAMES | CONTENT | PRODUCT | METADATA
