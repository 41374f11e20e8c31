"""States and files of the earlier package, read without running anything they hold.

`unpickle` opens a file, `layout` reads a state's outside, `entries` its levels (with
`planes`), and `load` puts them into a model or into records. See docs/legacy.md.
"""
