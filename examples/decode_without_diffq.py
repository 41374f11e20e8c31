"""Reads a .diffq file without diffq: NumPy, zstandard and the standard library suffice.

Written from docs/format.md alone, whose sections the comments name, to show that the
page says enough. It checks what a file must be to make sense, but takes its sizes on
trust: for files from anywhere use `diffq.load`.

    python examples/decode_without_diffq.py model.diffq [arrays.npz]

bfloat16 tensors become float32 and keep their values; float8 tensors become their bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import zstandard

SIGNATURE = b"\x89DFQ\r\n\x1a\n"

# Section 4: the NumPy dtype of each code's bytes.
INTEGERS = ("?", "u1", "i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8")
STORED = (*INTEGERS, "<f2", "<u2", "<f4", "<f8", "<c8", "<c16", "u1", "u1")
UINT8, BFLOAT16 = 1, 10

RAW, GRID, SCALED, PRODUCT, STEPPED = 0, 1, 2, 3, 4
PER_GROUP, CONSTANT, ZERO_POINT = 1, 2, 4

# Section 10: 2 to the power of 0, 1/4, 1/2 and 3/4, and the numbers of steps.
ROOTS = np.array([0x3F800000, 0x3F9837F0, 0x3FB504F3, 0x3FD744FD], "<u4").view("<f4")
STEPS = range(-504, 452)


def decode(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str], dict]:
    """Arrays by name, aliases (further name -> name), metadata."""
    bodies = read_chunks(data)
    index = Index(read_text(bodies[b"INDX"]))
    metadata = json.loads(read_text(bodies[b"meta"])) if b"meta" in bodies else {}
    offset, contents = 0, []
    for segment in index.segments:
        stored = bodies[b"DATA"][offset : offset + segment["size"]]
        check(zlib.crc32(stored) == segment["crc"], "the checksum of a segment")
        contents.append(read_segment(segment, stored))
        offset += segment["size"]
    check(offset == len(bodies[b"DATA"]), "the size of DATA")
    arrays = {name: restore(t, contents) for name, t in pairs(index.names, index.tensors)}
    return arrays, index.aliases, metadata


def pairs(first: Sequence, second: Sequence) -> list[tuple]:
    return list(zip(first, second, strict=True))


def check(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"The file is damaged: {what} is wrong.")


# Section 3


def read_chunks(data: bytes) -> dict[bytes, bytes]:
    check(data[:8] == SIGNATURE, "the signature")
    major, minor = data[8], data[9]
    check((major, minor) in ((1, 0), (1, 1)), f"version {major}.{minor}, unknown to this reader,")
    bodies, offset, tag = {}, 10, b""
    while tag != b"DONE":
        tag, size, crc = struct.unpack_from("<4sQI", data, offset)
        body = data[offset + 16 : offset + 16 + size]
        check(len(body) == size, "the size of a chunk")
        covered = b"" if tag == b"DATA" else body
        check(zlib.crc32(data[offset : offset + 12] + covered) == crc, "the checksum of a chunk")
        check(tag in (b"INDX", b"meta", b"DATA", b"DONE") or tag[:1].islower(), f"chunk {tag}")
        bodies[tag] = body
        offset += 16 + size
    check(offset == len(data), "the end of the file")
    return bodies


def expand(stored: bytes, size: int) -> bytes:
    if len(stored) == size:
        return stored
    check(zstandard.get_frame_parameters(stored).content_size == size, "the size of a frame")
    return zstandard.ZstdDecompressor().decompress(stored, allow_extra_data=False)


def read_text(body: bytes) -> bytes:
    cursor = Cursor(body)
    size = cursor.varint()
    return expand(body[cursor.offset :], size)


# Section 2


class Cursor:
    def __init__(self, data: bytes) -> None:
        self.data, self.offset = data, 0

    def take(self, size: int) -> bytes:
        self.offset += size
        check(self.offset <= len(self.data), "the index")
        return self.data[self.offset - size : self.offset]

    def unsigned(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def varint(self) -> int:
        number = shift = 0
        while True:
            byte = self.unsigned(1)
            number |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return number


# Sections 4 and 5


class Index:
    """Names, tensors and segments. LEVELS stands for the item size of a segment of levels."""

    LEVELS = 0

    def __init__(self, content: bytes) -> None:
        cursor = Cursor(content)
        counts = cursor.varint(), cursor.varint()
        names = [cursor.take(cursor.varint()).decode() for _ in range(sum(counts))]
        self.names = names[: counts[0]]
        self.aliases = {name: self.names[cursor.varint()] for name in names[counts[0] :]}
        self.segments: list[dict] = []
        self.tensors = [self.read_tensor(cursor) for _ in self.names]
        for segment in self.segments:
            self.read_segment(cursor, segment)
        check(cursor.offset == len(content), "the end of the index")

    def read_tensor(self, cursor: Cursor) -> dict:
        tensor = {"kind": cursor.unsigned(1), "dtype": cursor.unsigned(1)}
        check(tensor["kind"] in (RAW, GRID, SCALED, PRODUCT, STEPPED), "a kind of tensor")
        shape = tuple(cursor.varint() for _ in range(cursor.unsigned(1)))
        numel = math.prod(shape)
        tensor |= {"shape": shape, "numel": numel}
        if tensor["kind"] in (RAW, PRODUCT):
            tensor["stored"] = cursor.unsigned(1)
            item = np.dtype(STORED[tensor["stored"]]).itemsize
        if tensor["kind"] == RAW:
            parts = [("elements", item, numel, 1)]
        elif tensor["kind"] == PRODUCT:
            size, words = cursor.varint(), cursor.varint()
            check(size > 0 and numel % size == 0 and 0 < words <= numel // size, "a codebook")
            tensor |= {"block_size": size, "codewords": words}
            if tensor["stored"] == UINT8:
                tensor["scale"] = np.frombuffer(cursor.take(4), "<f4")[0]
                tensor["zero"] = cursor.unsigned(1)
            parts = [("codebook", item, words * size, 1)]
            if words > 1:
                parts.append(("indices", self.LEVELS, numel // size, numel // size))
        else:
            tensor["group_size"], tensor["min_bits"] = cursor.varint(), cursor.unsigned(1)
            flags = cursor.unsigned(1) if tensor["kind"] == GRID else 0
            check(not flags & ~(PER_GROUP | CONSTANT | ZERO_POINT), "the flags")
            tensor["zero_point"] = bool(flags & ZERO_POINT)
            groups = -(-numel // tensor["group_size"])
            ranges = groups if flags & PER_GROUP else 1
            parameters = {GRID: (4, 2 * ranges), SCALED: (4, 1), STEPPED: (2, groups)}
            parts = [("parameters", *parameters[tensor["kind"]], 1)]
            if not flags & CONSTANT:
                parts.append(("levels", self.LEVELS, numel, tensor["group_size"]))
        for name, item, count, group_size in parts:
            tensor[name] = self.place(cursor.varint(), item, count, group_size) if count else []
        return tensor

    def place(self, back: int, item: int, count: int, group_size: int) -> list[tuple[int, int]]:
        """Where a part is: for each of its pieces, the segment and the piece's number in it."""
        if back:
            number = len(self.segments) - back
            check(number >= 0 and self.segments[number]["item"] == item, "a place")
            self.segments[number]["pieces"].append((count, min(group_size, count)))
            self.segments[number]["starts"].append(0)
            return [(number, len(self.segments[number]["pieces"]) - 1)]
        first, start = len(self.segments), 0
        for piece in cut(item, count, group_size):
            pieces = [(piece, min(group_size, piece))]
            self.segments.append({"item": item, "pieces": pieces, "starts": [start]})
            start += piece
        return [(number, 0) for number in range(first, len(self.segments))]

    def read_segment(self, cursor: Cursor, segment: dict) -> None:
        segment |= {"size": cursor.varint(), "crc": cursor.unsigned(4)}
        if segment["item"] == self.LEVELS:
            segment["payload"], used = cursor.varint(), cursor.unsigned(2)
            widths = [bits for bits in range(1, 17) if used >> bits % 16 & 1]
            if not segment["payload"]:
                segment["widths"] = widths
                return
            segment["map_width"] = cursor.unsigned(1)
            segment["widths"] = {bits: cursor.unsigned(1) for bits in widths}


def cut(item: int, count: int, group_size: int) -> list[int]:
    """Section 5: the sizes of the pieces of a part that opens segments."""
    limit = (1 << 22) // item if item else 1 << 20
    if group_size > limit:
        groups = [min(group_size, count - start) for start in range(0, count, group_size)]
        return [piece for group in groups for piece in cut(item, group, 1)]
    step = limit // group_size * group_size
    return [min(step, count - start) for start in range(0, count, step)]


# Section 6


def unpack(data: bytes, count: int, width: int) -> tuple[np.ndarray, bytes]:
    """The packed numbers and the bytes after them."""
    values, left = np.zeros(count, np.uint16), width
    for field in (8, 8, 4, 2, 1):
        if left < field:
            continue
        left -= field
        size = -(-count * field // 8)
        bits = np.unpackbits(np.frombuffer(data[:size], np.uint8), bitorder="little")
        check(len(bits) == 8 * size and not bits[count * field :].any(), "a packed stream")
        digits = bits[: count * field].reshape(count, field).astype(np.uint16)
        values += (digits << np.arange(field, dtype=np.uint16)).sum(1, dtype=np.uint16) << left
        data = data[size:]
    return values, data


# Sections 7 and 8


def read_segment(segment: dict, stored: bytes) -> list:
    """Each piece's bytes, or its bitwidths and levels."""
    if segment["item"] == Index.LEVELS:
        if not segment["payload"]:
            return read_runs(segment, stored)
        return read_levels(segment, expand(stored, segment["payload"]))
    item, counts = segment["item"], [count for count, _ in segment["pieces"]]
    payload = expand(stored, item * sum(counts))
    if len(stored) < len(payload):
        planes = np.frombuffer(payload, np.uint8).reshape(item, -1)
        payload = planes.T.tobytes()
    ends = np.cumsum(counts) * item
    return [payload[end - item * count : end] for end, count in pairs(ends, counts)]


def read_levels(segment: dict, payload: bytes) -> list[tuple[np.ndarray, np.ndarray]]:
    pieces = segment["pieces"]
    counts = [-(-count // group_size) for count, group_size in pieces]
    lowest = min(segment["widths"])
    bits = np.full(sum(counts), lowest)
    if segment["map_width"]:
        offsets, payload = unpack(payload, sum(counts), segment["map_width"])
        bits = bits + offsets
    maps = np.split(bits, np.cumsum(counts)[:-1])
    of_weights = [
        np.repeat(bits, group_size)[:count] for bits, (count, group_size) in pairs(maps, pieces)
    ]
    all_bits = np.concatenate(of_weights)
    levels = np.zeros(len(all_bits), np.uint16)
    for width, packed_width in segment["widths"].items():
        chosen = all_bits == width
        levels[chosen], payload = unpack(payload, chosen.sum(), packed_width)
        check((levels[chosen] <= (1 << width) - 1).all(), "a level")
    check(not payload and set(all_bits) == set(segment["widths"]), "a segment of levels")
    return pairs(of_weights, np.split(levels, np.cumsum([len(bits) for bits in of_weights])[:-1]))


# Section 14


class Lanes:
    """States that take turns, and the words that all of them read."""

    def __init__(self, cursor: Cursor) -> None:
        lanes, words = cursor.varint(), cursor.varint()
        self.states = list(struct.unpack(f"<{lanes}I", cursor.take(4 * lanes)))
        check(bool(lanes) and min(self.states) >= 1 << 16, "a state")
        self.words = list(struct.unpack(f"<{words}H", cursor.take(2 * words)))[::-1]
        self.cursor = cursor

    def run(self, count: int) -> list[int]:
        """The next run of symbols, and before it its frequencies."""
        slots = self.read_slots()
        out = []
        for number in range(count):
            lane = number % len(self.states)
            x = self.states[lane]
            symbol, start, frequency = slots[x % (1 << 16)]
            x = frequency * (x >> 16) + x % (1 << 16) - start
            if x < 1 << 16:
                check(bool(self.words), "the number of words")
                x = x << 16 | self.words.pop()
            self.states[lane] = x
            out.append(symbol)
        return out

    def read_slots(self) -> list[tuple[int, int, int]]:
        """For each slot its symbol, with start and frequency."""
        symbol, slots = self.cursor.varint(), []
        while len(slots) < 1 << 16:
            frequency = self.cursor.varint()
            check(len(slots) + frequency <= 1 << 16, "a sum of frequencies")
            slots += [(symbol, len(slots), frequency)] * frequency
            symbol += 1 if frequency else 1 + self.cursor.varint()
        return slots

    def end(self) -> None:
        check(not self.words and set(self.states) == {1 << 16}, "the end of the lanes")
        check(self.cursor.offset == len(self.cursor.data), "the end of a segment")


def read_runs(segment: dict, stored: bytes) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each piece's bitwidths and levels."""
    pieces, widths, cursor = segment["pieces"], segment["widths"], Cursor(stored)
    lanes = Lanes(cursor)
    lowest, highest = cursor.unsigned(1), cursor.unsigned(1)
    columns = [cursor.varint() for _ in pieces]
    rows = [rows_of(*piece) for piece in zip(segment["starts"], pieces, columns, strict=True)]
    marks = np.array(lanes.run(sum(rows) + sum(columns)))
    counts = [-(-count // group_size) for count, group_size in pieces]
    maps = np.array(lanes.run(sum(counts)) if len(widths) > 1 else widths * sum(counts))
    of_weights, classes = [], []
    for number, (count, group_size) in enumerate(pieces):
        bits, maps = maps[: counts[number]], maps[counts[number] :]
        of_weights.append(np.repeat(bits, group_size)[:count])
        places = segment["starts"][number] + np.arange(count)
        sums = np.full(count, marks[0])
        if columns[number]:
            row = places // columns[number] - places[0] // columns[number]
            sums = marks[row] + marks[rows[number] + places % columns[number]]
        marks = marks[rows[number] + columns[number] :]
        classes.append(np.clip(sums, lowest, highest))
    all_bits, all_classes = np.concatenate(of_weights), np.concatenate(classes)
    check(sorted(set(all_bits)) == widths, "a segment of levels")
    levels = np.zeros(len(all_bits), np.uint16)
    for width in widths:
        for number in np.unique(all_classes[all_bits == width]):
            chosen = (all_bits == width) & (all_classes == number)
            run = lanes.run(int(chosen.sum()))
            check(max(run) < 1 << width, "a level")
            levels[chosen] = run
    lanes.end()
    return pairs(of_weights, np.split(levels, np.cumsum([count for count, _ in pieces])[:-1]))


def rows_of(start: int, piece: tuple[int, int], columns: int) -> int:
    """The number of rows that a piece has weights in."""
    return (start + piece[0] - 1) // columns - start // columns + 1 if columns else 1


# Section 10


def restore(tensor: dict, contents: list[list]) -> np.ndarray:
    def pieces(part: str) -> list:
        return [contents[segment][piece] for segment, piece in tensor.get(part, ())]

    dtype = "<f4" if tensor["dtype"] == BFLOAT16 else STORED[tensor["dtype"]]
    if tensor["kind"] == RAW:
        data = np.frombuffer(b"".join(pieces("elements")), STORED[tensor["stored"]])
        if tensor["stored"] == BFLOAT16:
            data = (data.astype(np.uint32) << 16).view(np.float32)
        return data.astype(dtype).reshape(tensor["shape"])
    if tensor["kind"] == PRODUCT:
        values = restore_blocks(tensor, b"".join(pieces("codebook")), pieces("indices"))
    else:
        values = restore_values(tensor, b"".join(pieces("parameters")), pieces("levels"))
    if tensor["dtype"] == BFLOAT16:
        values = round_to_bfloat16(values)
    return values.astype(dtype).reshape(tensor["shape"])


def restore_values(tensor: dict, parameters: bytes, pieces: list) -> np.ndarray:
    numbers = np.frombuffer(parameters, "<i2" if tensor["kind"] == STEPPED else "<f4")
    group_size, numel = tensor["group_size"], tensor["numel"]
    bits, levels = np.full(numel, tensor["min_bits"]), np.zeros(numel, np.uint16)
    if pieces:
        bits, levels = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    check(bool((bits >= tensor["min_bits"]).all()), "a bitwidth")
    if tensor["kind"] == STEPPED:
        check(all(number in STEPS for number in numbers.tolist()), "the number of a step")
        steps = np.ldexp(ROOTS[numbers % 4], numbers // 4)
        numbers = np.repeat(steps, group_size)[:numel]
    if tensor["kind"] in (SCALED, STEPPED):
        return (levels.astype(np.float32) - (1 << bits >> 1).astype(np.float32)) * numbers
    low, high = numbers.reshape(-1, 2).T
    if len(low) > 1:
        low, high = (np.repeat(side, group_size)[:numel] for side in (low, high))
    top = ((1 << bits) - 1).astype(np.float32)
    step = (high - low) / top
    levels = levels.astype(np.float32)
    if tensor["zero_point"]:
        zero = np.minimum(np.rint(-low / np.where(step > 0, step, np.float32(1))), top)
        inside = (low <= 0) & (high >= 0)
        return np.where(inside, (levels - zero) * step, levels * step + low)
    return levels * step + low


def restore_blocks(tensor: dict, codebook: bytes, pieces: list) -> np.ndarray:
    words = np.frombuffer(codebook, STORED[tensor["stored"]]).astype(np.float32)
    words = words.reshape(tensor["codewords"], tensor["block_size"])
    if tensor["stored"] == UINT8:
        words = (words - np.float32(tensor["zero"])) * tensor["scale"]
    indices = np.zeros(tensor["numel"] // tensor["block_size"], np.uint16)
    if pieces:
        bits, indices = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
        check(bool((bits == (tensor["codewords"] - 1).bit_length()).all()), "bits of an index")
        check(bool((indices < tensor["codewords"]).all()), "an index")
    return words[indices]


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.uint32).astype(np.uint64)
    bits = bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("arrays", type=Path, nargs="?", help=".npz file to write")
    args = parser.parse_args()
    arrays, aliases, metadata = decode(args.file.read_bytes())
    for name, array in arrays.items():
        print(f"{name:40} {array.dtype!s:10} {list(array.shape)}")
    for name, target in aliases.items():
        print(f"{name:40} = {target}")
    print(json.dumps(metadata))
    if args.arrays:
        np.savez(args.arrays, **arrays)


if __name__ == "__main__":
    main()
