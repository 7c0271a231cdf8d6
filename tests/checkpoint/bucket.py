"""A bucket in memory."""

from __future__ import annotations

from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
    """A store in memory in the place of Google's, behind the same interface: directories are but the names of objects."""

    protocol = ("gcs", "gs")
    store: dict = {}
    pseudo_dirs: list = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("gs://", "memory://").replace("gcs://", "memory://"))

    def mkdir(self, path, create_parents=True, **kwargs):
        pass

    def makedirs(self, path, exist_ok=False):
        pass
