"""A kind of record that only this test has: files take it once it is in the list."""

import struct
from dataclasses import dataclass

import numpy as np
import pytest

from diffq.errors import FormatError
from diffq.format import index
from diffq.format.container import encode
from diffq.format.kinds.base import QuantizedEntry, QuantizedRecord
from diffq.format.layout import Part
from diffq.format.reader import Reader
from tests.format.samples import assert_same, small_model


@dataclass(frozen=True, eq=False)
class SignRecord(QuantizedRecord):
    """Weights of one magnitude. Their signs have a coder of their own, eight to a byte."""

    state_kinds = ("sign",)

    scale: float
    signs: np.ndarray

    @property
    def elements(self):
        """The coded signs."""
        return self.signs

    def values(self):
        """The decoded weights."""
        signs = np.unpackbits(self.signs, count=self.numel).astype(np.float32)
        return ((1 - 2 * signs) * np.float32(self.scale)).reshape(self.shape)

    def entry(self, name):
        """Describes the record."""
        return SignEntry(name, self.shape, self.dtype, self.scale)

    def fields(self, packed):
        """What a state holds."""
        return {"kind": "sign", "scale": self.scale, "signs": self.signs}

    @classmethod
    def from_fields(cls, fields):
        """Inverse of `fields`."""
        signs = fields.array("signs", 1, "uint8")
        return cls(fields.shape, fields.dtype, fields.number("scale"), signs)


@dataclass(frozen=True)
class SignEntry(QuantizedEntry):
    """What the index says about it."""

    kind = "sign"
    record_type = SignRecord

    scale: float

    @classmethod
    def read(cls, cursor, where):
        """Reads the scale."""
        return dict(zip(["scale"], struct.unpack("<f", cursor.take(4, "a scale")), strict=True))

    def write(self):
        """Inverse of `read`."""
        return struct.pack("<f", self.scale)

    def check(self):
        """Checks the scale."""
        super().check()
        if not self.scale >= 0:
            raise FormatError(f"A scale is at least 0, got {self.scale}.")

    @property
    def arrays(self):
        """The coded signs."""
        return [Part(1, -(-self.numel // 8))]

    @property
    def integers(self):
        """None beside the elements."""
        return 0

    def check_elements(self, elements):
        """Nothing: all bytes are sound."""

    def check_piece(self, decoded, elements):
        """Nothing: there are no pieces of integers."""

    def decode(self, elements, piece, decoded, out):
        """Nothing: there are no pieces of integers."""

    def fill(self, elements, out):
        """Decodes the signs."""
        out[:] = self.record(elements, None, None).values().reshape(-1)

    def record(self, elements, levels, bits):
        """The record."""
        return SignRecord(self.shape, self.dtype, self.scale, elements)


@pytest.mark.parametrize("codec", ["zstd", "rans", "packed"])
def test_new_kinds_are_written_and_read(codec, monkeypatch):
    """A kind that is added to the list is written and read beside the others, in every way."""
    monkeypatch.setattr(index, "KINDS", (*index.KINDS, SignEntry))
    signs = np.random.default_rng(0).integers(0, 256, 125).astype(np.uint8)
    records = {**small_model(), "new": SignRecord((10, 100), "float16", 0.5, signs)}
    reader = Reader(encode(records, codec=codec))
    reader.verify()
    for name, record in records.items():
        assert_same(reader.record(name), record)
    assert reader.entries["new"].kind == "sign"
    assert reader.values("new").tobytes() == records["new"].values().tobytes()
    assert records["new"].stored_bits() == records["new"].entropy_bound_bits() == 1000


def test_kinds_that_are_not_known_are_refused(monkeypatch):
    """A reader without the kind says that the file may be newer; a wrong header is damage."""
    with monkeypatch.context() as patch:
        patch.setattr(index, "KINDS", (*index.KINDS, SignEntry))
        data = encode({"new": SignRecord((8,), "float32", 0.5, np.zeros(1, np.uint8))})
        with pytest.raises(FormatError, match="tensor 'new': A scale is at least 0, got -1"):
            encode({"new": SignRecord((8,), "float32", -1.0, np.zeros(1, np.uint8))})
    with pytest.raises(FormatError, match=r"knows the kinds 0 to 4, got 5.*upgrade"):
        Reader(data)
