"""Capability tokens: for one sandbox, one action, some paths, a number of times and a short while."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Callable, Sequence

import msgspec

from tartarus.model.errors import InvalidRequest
from tartarus.policy import patterns
from tartarus.policy.acts import Act

DEFAULT_LIFETIME_S = 30.0
MAX_LIFETIME_S = 3600.0
MAX_OPERATIONS = 10_000
MAX_LIVE = 65_536
_KEY_BYTES = 32


class Token(msgspec.Struct, frozen=True):
    """A grant, as its holder carries it. Times are Unix seconds. `paths` None: any path; empty: none."""

    id: str
    nonce: int
    sandbox: str
    action: str
    paths: tuple[str, ...] | None
    operations: int
    expires_at: float
    signature: bytes = b""

    def __repr__(self) -> str:
        """Without what makes it valid."""
        return f"Token({self.id}, {self.action} for {self.sandbox})"


class TokenLedger:
    """Mints tokens and redeems them; safe to use from several threads. Only the kernel holds one.

    `last_nonce` is the highest that any earlier ledger with this key has given: nothing up to it is taken.
    """

    def __init__(self, *, key: bytes | None = None, last_nonce: int = 0, now: Callable[[], float] = time.time) -> None:
        self._key = key or secrets.token_bytes(_KEY_BYTES)
        self._nonce = last_nonce
        self._now = now
        self._left: dict[int, tuple[int, float]] = {}
        self._tests: dict[int, Callable[[str], bool]] = {}
        self._lock = threading.Lock()

    @property
    def last_nonce(self) -> int:
        """The highest nonce given so far, for the next ledger of this key."""
        return self._nonce

    def mint(
        self, sandbox: str, action: str, *, paths: Sequence[str] | None = None, operations: int = 1,
        lifetime_s: float = DEFAULT_LIFETIME_S,
    ) -> Token:  # fmt: skip
        """A new token. Raises InvalidRequest for what no token may be."""
        if not sandbox or not action or "*" in action:
            raise InvalidRequest("a token is for one sandbox and one action", fix="name both, without wildcards")
        if not 0 < operations <= MAX_OPERATIONS or not 0 < lifetime_s <= MAX_LIFETIME_S:
            raise InvalidRequest(
                "a token's operations or lifetime are out of range",
                fix=f"use 1 to {MAX_OPERATIONS} operations and at most {MAX_LIFETIME_S:g} s",
            )
        test = patterns.paths(tuple(paths), strict=False) if paths else None
        now = self._now()
        with self._lock:
            self._prune(now)
            if len(self._left) >= MAX_LIVE:
                raise InvalidRequest("too many tokens are outstanding", fix="wait until some have expired")
            self._nonce += 1
            token = Token(
                f"tok-{secrets.token_hex(8)}", self._nonce, sandbox, action, None if paths is None else tuple(paths),
                operations, now + lifetime_s,
            )  # fmt: skip
            self._left[token.nonce] = (operations, token.expires_at)
            if test is not None:
                self._tests[token.nonce] = test
        return msgspec.structs.replace(token, signature=self._sign(token))

    def redeem(self, token: Token, act: Act, now: float) -> bool:
        """Whether the token covers this act at that moment; if so, one of its operations is used up."""
        if not hmac.compare_digest(self._sign(token), token.signature):
            return False
        if token.expires_at <= now or token.sandbox != act.sandbox or token.action != act.action:
            return False
        with self._lock:
            left, _ = self._left.get(token.nonce, (0, 0.0))
            if left < 1 or not self._covers(token, act):
                return False
            if left == 1:
                self._forget(token.nonce)
            else:
                self._left[token.nonce] = (left - 1, token.expires_at)
        return True

    def revoke(self, token: Token) -> None:
        """From now on it is worth nothing."""
        with self._lock:
            self._forget(token.nonce)

    def _covers(self, token: Token, act: Act) -> bool:
        if token.paths is None:
            return True
        test = self._tests.get(token.nonce)
        return test is not None and bool(act.paths) and all(map(test, act.paths))

    def _prune(self, now: float) -> None:
        for nonce in [nonce for nonce, (_, expires_at) in self._left.items() if expires_at <= now]:
            self._forget(nonce)

    def _forget(self, nonce: int) -> None:
        self._left.pop(nonce, None)
        self._tests.pop(nonce, None)

    def _sign(self, token: Token) -> bytes:
        bare = msgspec.structs.replace(token, signature=b"")
        return hmac.new(self._key, msgspec.json.encode(bare), hashlib.sha256).digest()
