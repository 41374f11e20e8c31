"""The kinds of records, a module each."""
