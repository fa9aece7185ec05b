"""The stream: where scrapes come from and actions go to.

Whatever is read is answered for in one transaction: the offset moves on, and the action, or the message that
could not be used, is written; all or nothing. So a consumer that dies at any point neither loses an action
nor gives one twice. Another broker is another class with these methods.
"""

from __future__ import annotations

import time
from typing import Any, Protocol
from urllib.parse import urlsplit

import redis

from fleetcast.errors import InputError

#: Before the first message.
BEGINNING = "0-0"

#: KEYS: state, actions, dead letters. ARGV: expected offset, new offset, action, reason, body, most entries.
_COMMIT = """
local have = redis.call('HGET', KEYS[1], 'offset') or '0-0'
if have ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'offset', ARGV[2])
if ARGV[3] ~= '' then
  redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[6], ARGV[2], 'action', ARGV[3])
end
if ARGV[4] ~= '' then
  redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[6], ARGV[2], 'reason', ARGV[4], 'scrape', ARGV[5])
  redis.call('HINCRBY', KEYS[1], 'rejected', 1)
end
return 1
"""


#: What a broker raises when it cannot be reached, or cannot do what it is asked to.
FAILURES = (redis.RedisError, OSError)


class Moved(Exception):
    """Another consumer has answered for the message: the offset is not where it was."""


class Broker(Protocol):
    """What the consumer needs of a stream."""

    def offset(self) -> str:
        """The last message that was answered for."""

    def read(self, after: str, count: int, wait: float) -> list[tuple[str, bytes]]:
        """The next messages, in order; waits for the first one for so many seconds."""

    def before(self, offset: str, count: int) -> list[tuple[str, bytes]]:
        """The last messages up to an offset, that one included, in order."""

    def commit(
        self, expected: str, offset: str, action: bytes | None, rejected: str | None, body: bytes
    ) -> None:
        """Answers for a message. Raises Moved if the offset is not the expected one any more."""

    def killed(self) -> bool:
        """Whether the kill switch is on."""

    def kill(self, on: bool) -> None:
        """Turns the kill switch."""

    def last_action(self) -> bytes | None:
        """The newest action."""

    def counts(self) -> dict[str, int]:
        """Messages in the stream, and rejected ones."""


class RedisStreams:
    """Redis Streams: `<prefix>:telemetry`, `:actions` and `:rejected`, and the hash `<prefix>:state`.

    An action has the offset of its scrape as its own. Redis should write its log (`appendonly yes`): what it
    forgets in a crash is as if it had not been sent.
    """

    def __init__(self, url: str, prefix: str = "fleetcast", most: int = 100_000) -> None:
        """`most` entries are kept of each stream. Raises InputError if Redis does not answer."""
        self.prefix, self._most = prefix, most
        self.place = _without_password(url)
        """The URL, as it may be shown."""
        try:
            self._redis = redis.Redis.from_url(
                url, socket_connect_timeout=5, socket_timeout=10, health_check_interval=30
            )
            self._redis.ping()
        except (redis.RedisError, ValueError) as error:
            raise InputError(
                f"redis {self.place}: cannot be reached ({type(error).__name__}), expected redis://host:port/0"
            ) from error
        self._commit = self._redis.register_script(_COMMIT)

    def key(self, name: str) -> str:
        """The full name of a stream or hash."""
        return f"{self.prefix}:{name}"

    def send(self, body: bytes) -> str:
        """Adds a scrape to the stream, as the monitoring does; returns its offset."""
        found = self._redis.xadd(self.key("telemetry"), {"scrape": body}, maxlen=self._most, approximate=True)
        return _text(found)

    def offset(self) -> str:
        found = self._redis.hget(self.key("state"), "offset")
        return BEGINNING if found is None else _text(found)

    def read(self, after: str, count: int, wait: float) -> list[tuple[str, bytes]]:
        found: Any = self._redis.xread(
            {self.key("telemetry"): after}, count=count, block=max(1, int(1000 * wait))
        )
        return [message for _, messages in found for message in _bodies(messages, b"scrape")]

    def before(self, offset: str, count: int) -> list[tuple[str, bytes]]:
        found = self._redis.xrevrange(self.key("telemetry"), max=offset, count=count)
        return _bodies(found, b"scrape")[::-1]

    def commit(
        self, expected: str, offset: str, action: bytes | None, rejected: str | None, body: bytes
    ) -> None:
        keys = [self.key(name) for name in ("state", "actions", "rejected")]
        done = self._commit(
            keys=keys, args=[expected, offset, action or b"", rejected or "", body, self._most]
        )
        if not done:
            raise Moved(f"the offset is {self.offset()}, expected {expected}")

    def killed(self) -> bool:
        return self._redis.hget(self.key("state"), "killed") == b"1"

    def kill(self, on: bool) -> None:
        self._redis.hset(self.key("state"), "killed", "1" if on else "0")

    def last_action(self) -> bytes | None:
        found = _bodies(self._redis.xrevrange(self.key("actions"), count=1), b"action")
        return found[0][1] if found else None

    def next_action(self, after: str, wait: float) -> tuple[str, bytes] | None:
        """The first action behind an offset; waits for it for so many seconds."""
        deadline = time.monotonic() + wait
        while (left := deadline - time.monotonic()) > 0:
            block = max(1, int(1000 * min(left, 1)))
            found: Any = self._redis.xread({self.key("actions"): after}, count=1, block=block)
            if found:
                return _bodies(found[0][1], b"action")[0]
        return None

    def actions(self) -> list[tuple[str, bytes]]:
        """All actions that are kept, in order."""
        return _bodies(self._redis.xrange(self.key("actions")), b"action")

    def rejected(self) -> list[tuple[str, bytes]]:
        """(offset, reason) of all messages that could not be used."""
        return _bodies(self._redis.xrange(self.key("rejected")), b"reason")

    def counts(self) -> dict[str, int]:
        rejected = self._redis.hget(self.key("state"), "rejected")
        return {"telemetry": int(self._redis.xlen(self.key("telemetry"))), "rejected": int(rejected or 0)}


def _bodies(messages: Any, name: bytes) -> list[tuple[str, bytes]]:
    return [(_text(offset), fields.get(name, b"")) for offset, fields in messages or ()]


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"
