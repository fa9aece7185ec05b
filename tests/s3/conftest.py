"""Fixtures of the tests on S3."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from fleetcast.config import S3Options
from object_store import BUCKET, ObjectStore
from proxy import Proxy, proxy


@pytest.fixture
def faulty(object_store: ObjectStore, bucket: str, use_s3: Callable[..., S3Options]) -> Iterator[Proxy]:
    """A proxy in front of the server, through which `s3://` is reached: three attempts of a second."""
    with proxy(object_store.endpoint) as place:
        use_s3(endpoint_url=place.endpoint, attempts=3, read_timeout=1)
        yield place
    use_s3()


@pytest.fixture
def bucket(use_s3: Callable[..., S3Options], tmp_path) -> str:
    """A prefix of this test alone."""
    use_s3()
    return f"s3://{BUCKET}/{tmp_path.name}"
