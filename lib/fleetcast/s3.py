"""S3 as the store and the sources see it: s3fs, with errors that name the object and without old listings.

Every request goes through `_call_s3`: here alone it is seen to that requests are repeated, and told what went
wrong. `store.py` registers the class for `s3://`; its options are those of `config.S3Options`.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import aiohttp
import s3fs
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
)
from fsspec.asyn import sync_wrapper
from s3fs.errors import translate_boto_error

#: Bytes of a part of an upload, and how many parts are on their way at once: what an upload holds in memory.
_PART_BYTES, _PARTS = 16 << 20, 4
_KEYS = (
    "expected keys that may do this, from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
    "~/.aws or the role of the node"
)
_Answer = dict[str, Any]
#: What breaks off while a body is read.
_BROKEN = (HTTPClientError, IncompleteReadError, aiohttp.ClientError, asyncio.TimeoutError)


class S3FileSystem(s3fs.S3FileSystem):
    """Requests that fail raise OSError: FileNotFoundError where there is no such object, PermissionError
    where keys are wrong or may not do it. `filename` is the object, `strerror` what happened, and what was
    expected."""

    #: Of s3fs itself, which would multiply with those of botocore.
    retries = 1
    #: What is read ahead of a stream.
    default_block_size = 8 << 20

    def __init__(self, **options: Any) -> None:
        # Listings that are kept would hide from a server what a job has published since.
        super().__init__(**{"use_listings_cache": False, "max_concurrency": _PARTS, **options})
        self.attempts: int = self.config_kwargs.get("retries", {}).get("total_max_attempts", 5)

    async def _call_s3(self, method: str, *more: dict[str, Any], **arguments: Any) -> _Answer:
        """One request, tried as often as is wanted."""
        named = (str(arguments[name]) for name in ("Bucket", "Key", "Prefix") if arguments.get(name))
        place = "/".join(named).rstrip("/")
        try:
            await self.set_session()
            call = getattr(await self.get_s3(arguments.get("Bucket")), method)
            ask = partial(call, **self._get_s3_method_kwargs(call, *more, **arguments))
            answer: _Answer = await ask()
        except (ClientError, BotoCoreError, ValueError) as error:
            raise _told(error, f"s3://{place}", self.attempts) from error
        if "Body" in answer:
            answer["Body"] = _Body(answer["Body"], ask, f"s3://{place}", self.attempts)
        for refused in answer.get("Errors", []):  # some of many that were to be deleted
            raise _refused(refused, f"s3://{arguments['Bucket']}/{refused.get('Key', '')}")
        return answer

    call_s3 = sync_wrapper(_call_s3)

    async def _put_file(self, lpath: str, rpath: str, *args: Any, **options: Any) -> None:
        await super()._put_file(lpath, rpath, *args, **{"chunksize": _PART_BYTES, **options})


class _Body:
    """The body of an answer; read as a whole, it is asked for again where it breaks off."""

    def __init__(self, body: Any, ask: Callable[[], Awaitable[_Answer]], place: str, attempts: int) -> None:
        self._body, self._ask, self._place, self._attempts = body, ask, place, attempts

    async def read(self, amount: int | None = None) -> bytes:
        if amount is not None:
            return bytes(await self._body.read(amount))
        for attempt in range(self._attempts):
            try:
                if attempt:
                    await asyncio.sleep(min(0.1 * 2**attempt, 5))
                    self._body = (await self._ask())["Body"]
                return bytes(await self._body.read())
            except _BROKEN as error:
                failure: Exception = error
                self.close()
            except (ClientError, BotoCoreError) as error:
                raise _told(error, self._place, self._attempts) from error
        raise _told(failure, self._place, self._attempts) from failure

    def close(self) -> None:
        self._body.close()


def _told(error: Exception, place: str, attempts: int) -> OSError:
    """The OSError that says what happened to an object, or to a bucket."""
    if isinstance(error, ClientError):
        tries = error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0) + 1
        return _refused(error.response.get("Error", {}), place, tries, translate_boto_error(error))
    why = " ".join(str(error).split()) or type(error).__name__
    times = f"{attempts} attempts" if attempts > 1 else "1 attempt"
    if isinstance(
        error, NoCredentialsError | PartialCredentialsError | CredentialRetrievalError | ProfileNotFound
    ):
        return OSError(errno.EACCES, f"{why}; {_KEYS}", place)
    if isinstance(error, ReadTimeoutError | asyncio.TimeoutError):
        return OSError(errno.EIO, f"the server stopped answering, in {times} ({why})", place)
    if isinstance(error, EndpointConnectionError | ConnectTimeoutError):
        expected = "expected an S3 server there (--s3.endpoint-url, AWS_ENDPOINT_URL)"
        return OSError(errno.EHOSTUNREACH, f"{why}, in {times}; {expected}", place)
    if isinstance(error, _BROKEN):
        return OSError(errno.ECONNRESET, f"the connection broke off, in {times} ({why})", place)
    return OSError(errno.EINVAL, why, place)


def _refused(error: dict[str, Any], place: str, tries: int = 1, known: Exception | None = None) -> OSError:
    """The OSError of an answer with an error in it; `known` is what s3fs makes of it."""
    code, message = error.get("Code", ""), " ".join(str(error.get("Message", "")).split())
    why = f"{message.rstrip('.')} ({code})" if message else str(code)
    if code == "NoSuchBucket":
        return OSError(errno.ENXIO, f"{why}; expected a bucket that is there", place)
    if code in ("PreconditionFailed", "412"):
        return OSError(errno.ESTALE, "was replaced while it was read", place)
    if isinstance(known, FileNotFoundError):
        return OSError(errno.ENOENT, f"no such object ({code})", place)
    if isinstance(known, PermissionError) or code == "AccessDenied":
        return OSError(errno.EACCES, f"{why}; {_KEYS}", place)
    again = f", in {tries} attempts" if tries > 1 else ""
    return OSError(getattr(known, "errno", None) or errno.EIO, f"{why}{again}", place)
