"""Readers of slides: one protocol, one file per reader, and `registry.open_reader`, the door."""
