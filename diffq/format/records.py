"""The kinds of records, in the order of their codes, and the names that other packages use.

A kind is registered in `KINDS`; nothing else in diffq lists them.
"""

from __future__ import annotations

from diffq.format.dtypes import ITEM_SIZES as ITEM_SIZES
from diffq.format.groups import group_count as group_count
from diffq.format.kinds.base import Entry
from diffq.format.kinds.base import Record as Record
from diffq.format.kinds.grid import RANGE_BITS as RANGE_BITS
from diffq.format.kinds.grid import GridEntry
from diffq.format.kinds.grid import GridRecord as GridRecord
from diffq.format.kinds.grid import check_ranges as check_ranges
from diffq.format.kinds.levels import MAX_RANGE as MAX_RANGE
from diffq.format.kinds.levels import WIDTH_BITS as WIDTH_BITS
from diffq.format.kinds.product import ProductEntry
from diffq.format.kinds.raw import RawEntry
from diffq.format.kinds.raw import RawRecord as RawRecord
from diffq.format.kinds.scaled import SCALE_BITS as SCALE_BITS
from diffq.format.kinds.scaled import ScaledEntry
from diffq.format.kinds.scaled import ScaledRecord as ScaledRecord
from diffq.format.kinds.scaled import check_scale as check_scale
from diffq.format.kinds.stepped import FIRST_STEP as FIRST_STEP
from diffq.format.kinds.stepped import LAST_STEP as LAST_STEP
from diffq.format.kinds.stepped import PER_OCTAVE as PER_OCTAVE
from diffq.format.kinds.stepped import STEPS as STEPS
from diffq.format.kinds.stepped import SteppedEntry
from diffq.format.kinds.stepped import SteppedRecord as SteppedRecord

#: docs/format.md, section 4: a kind's code is its place in this list.
KINDS: tuple[type[Entry], ...] = (
    RawEntry,
    GridEntry,
    ScaledEntry,
    ProductEntry,
    SteppedEntry,
)
