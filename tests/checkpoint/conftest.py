from __future__ import annotations

import pytest
from etils import epath

from tests.checkpoint.bucket import Bucket


@pytest.fixture
def bucket(monkeypatch):
    """gs:// paths lead to an empty Bucket."""
    backend = epath.backend.fsspec_backend
    monkeypatch.setattr(type(backend), "_get_filesystem", lambda self, name: Bucket())
    Bucket.store.clear()
    return epath.Path("gs://bucket")
