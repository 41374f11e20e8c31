"""States and files of the earlier package, read without running anything they hold.

Data flows `unpickle -> layout (with planes) -> load -> convert`; docs/legacy.md says what is read.
"""
