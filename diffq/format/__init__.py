"""Levels, records and bytes: the part of diffq that needs NumPy and zstandard but no torch.

From the inside out, each module importing only from those above it:

    bitpack        integers of 1 to 16 bits to bytes
    groups         levels sorted by bitwidth
    dtypes         what elements are stored as
    wire           bounded reading of numbers
    source         the bytes of a file, in memory or on the disk
    frames         one zstd frame
    layout         which segment holds which part of which tensor
    costs          what coding costs, in whole numbers
    entropy        segments of levels in zstd
    contexts       classes of levels by rows and columns
    rans           symbols to few bits
    runs           segments of levels in rANS
    elements       segments of whole elements
    kinds.base     what a kind of record is
    kinds.affine   levels to values
    kinds.raw      one tensor as it is
    kinds.levels   what grids and scaled tensors share
    kinds.grid     levels on an even grid
    kinds.scaled   levels times a scale
    kinds.stepped  levels times a step for each group
    kinds.product  indices into a codebook
    records        the kinds in the order of their codes
    index          names, tensors, segments
    metadata       the user's JSON
    chunks         signature, version, chunks
    pooling        which short tensors share a segment
    threads        work on several cores
    decoding       segments to tensors
    reader         `Reader`: a file from the outside in
    container      `encode` and `decode`

docs/format.md specifies the bytes.
"""
