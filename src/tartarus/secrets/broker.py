"""Who may have which secret, and the fetching of it: listed references only, each with a deadline and a cap."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Sequence

import msgspec
import structlog

from tartarus.model.errors import InvalidRequest, SecretRefused, SecretUnavailable, TartarusError
from tartarus.model.secrets import MAX_HEADER_BYTES, MAX_SECRET_BYTES, Reference, SecretGrant, SecretsSection, SecretUse
from tartarus.secrets.held import Secret
from tartarus.secrets.providers import Provider, make

_log = structlog.get_logger("tartarus.secrets")
FETCH_LIMIT_S = 10.0
_MOST_WAITING = 16


class Granted(msgspec.Struct, frozen=True):
    """A use that is allowed, by its grant's name, where its value is kept, and that grant."""

    use: SecretUse
    reference: Reference
    grant: SecretGrant


class Broker:
    """One daemon's. Raises InvalidRequest for a configuration that can't be, before anything starts."""

    def __init__(self, settings: SecretsSection) -> None:
        self._grants = settings.allow
        self._providers: dict[str, Provider] = {one.name: make(one) for one in settings.providers}
        self._waiting: Counter[str] = Counter()
        self._warned = False

    def grant(self, tenant: str, template: str, uses: Sequence[SecretUse]) -> tuple[Granted, ...]:
        """What is allowed. Raises SecretRefused, in the same words for what is another's and what there is not."""
        granted = []
        for use in uses:
            found = next((grant for grant in self._grants if _is_meant(grant, use, tenant, template)), None)
            if found is None:
                raise SecretRefused(
                    "a secret that was asked for is not one that this sandbox may have",
                    why=f"no grant of the host's configuration lists {use.ref!r} for it, as {use.as_}",
                    fix="ask whoever runs the daemon: secrets.allow in config.yaml",
                )
            granted.append(Granted(use.by(found), Reference.parse(found.ref), found))
        targets = [one.use.target for one in granted]
        if len(set(targets)) < len(targets):
            raise InvalidRequest("two secrets have the same target", fix="give each its own")
        return tuple(granted)

    def knows(self, ref: str) -> bool:
        """Whether any sandbox may have it."""
        return any(ref in {grant.name, grant.ref} for grant in self._grants)

    async def fetch(self, granted: Granted) -> Secret:
        """The value. Raises SecretUnavailable, which never says any of it."""
        name = granted.reference.provider
        if self._waiting[name] >= _MOST_WAITING:
            raise SecretUnavailable(f"secrets provider {name!r} does not answer", why="earlier requests still wait")
        try:
            async with asyncio.timeout(FETCH_LIMIT_S):
                value = await self._asked(name, granted.reference)
        except TimeoutError:
            raise SecretUnavailable(f"secrets provider {name!r} did not answer within {FETCH_LIMIT_S:g} s") from None
        except SecretUnavailable as error:
            raise SecretUnavailable(f"secret {granted.use.ref!r}: {error.what}", why=error.why, fix=error.fix) from None
        # A provider may be a plugin, which says what it likes.
        checked: object = value
        if not isinstance(checked, (bytes, bytearray)) or not checked:
            raise SecretUnavailable(f"secret {granted.use.ref!r} is empty, or no text")
        if len(value) > MAX_SECRET_BYTES:
            raise SecretUnavailable(f"secret {granted.use.ref!r} is larger than {MAX_SECRET_BYTES} bytes")
        if granted.use.as_ == "env" and b"\0" in value:
            raise SecretUnavailable(f"secret {granted.use.ref!r} has a NUL byte", fix="take it as a file")
        if granted.use.as_ == "proxy" and (len(value) > MAX_HEADER_BYTES or not all(32 < each < 127 for each in value)):
            raise SecretUnavailable(
                f"secret {granted.use.ref!r} can't be said in a header", why="it is too long, or not plain characters"
            )
        held = Secret(value)
        if not held.is_locked and not self._warned:
            self._warned = True
            _log.warning("secrets_not_locked", why="RLIMIT_MEMLOCK is used up: values could be swapped out")
        return held

    async def _asked(self, name: str, reference: Reference) -> bytes | bytearray:
        """In a thread that nobody waits for when it hangs, also not at the daemon's end."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[bytes | bytearray] = loop.create_future()
        provider = self._providers[name]

        def work() -> None:
            value: bytes | bytearray | TartarusError
            try:
                value = provider.fetch(reference)
            except SecretUnavailable as error:
                value = error
            except BaseException as error:  # noqa: BLE001 - its text may be anything, the value included
                value = SecretUnavailable(f"secrets provider {name!r} broke", why=type(error).__name__)
            try:
                loop.call_soon_threadsafe(settle, value)
            except RuntimeError:
                return  # the daemon is gone

        def settle(value: bytes | bytearray | TartarusError) -> None:
            self._waiting[name] -= 1
            if answer.done():
                return
            if isinstance(value, TartarusError):
                answer.set_exception(value)
            else:
                answer.set_result(value)

        self._waiting[name] += 1
        threading.Thread(target=work, name=f"secrets-{name}", daemon=True).start()
        return await answer


def _is_meant(grant: SecretGrant, use: SecretUse, tenant: str, template: str) -> bool:
    return grant.is_for(use) and grant.holds_for(tenant, template)
