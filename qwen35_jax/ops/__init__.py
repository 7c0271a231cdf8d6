"""Pure functions on one device's shard. Each kernel is a folder: reference.py, xla.py and later one file per device."""
