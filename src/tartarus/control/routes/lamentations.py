"""Failed runs (Cocytus): list, show, forget, try again what never ran. Everybody's are their own."""

from __future__ import annotations

from litestar import delete, get, post
from litestar.params import FromPath, FromQuery

from tartarus.control.api import ApiRequest
from tartarus.control.decode import nearest
from tartarus.model.errors import InvalidRequest
from tartarus.model.lamentations import Category, Lamentation, LamentationFilter, Purged, PurgeLamentations
from tartarus.model.sandbox import SandboxRecord


@get("/v1/lamentations")
async def listing(
    request: ApiRequest,
    sandbox: FromQuery[str | None] = None,
    category: FromQuery[str | None] = None,
    since: FromQuery[float | None] = None,
    until: FromQuery[float | None] = None,
    dead_letters: FromQuery[bool] = False,
    limit: FromQuery[int] = 100,
) -> list[Lamentation]:
    """The caller's, newest first. `sandbox`: its id; `since` and `until`: Unix seconds."""
    wanted = LamentationFilter(
        sandbox_id=sandbox, category=None if category is None else _category(category), since=since, until=until,
        dead_letters=dead_letters, limit=limit,
    )  # fmt: skip
    return await request.api.lamentations.list(request.peer.tenant, wanted)


@get("/v1/lamentations/{lamentation_id:str}")
async def show(request: ApiRequest, lamentation_id: FromPath[str]) -> Lamentation:
    """One of them."""
    return await request.api.lamentations.get(request.peer.tenant, lamentation_id)


@post("/v1/lamentations/{lamentation_id:str}/retry", status_code=201, audit="lamentation.retry")
async def retry(request: ApiRequest, lamentation_id: FromPath[str]) -> SandboxRecord:
    """Make what a dead letter asked for."""
    sandbox = await request.api.lamentations.retry(request.peer.tenant, lamentation_id)
    sandbox.detach()
    return sandbox.record


@delete("/v1/lamentations", status_code=200, audit="lamentation.purge")
async def purge(request: ApiRequest, older_than_s: FromQuery[float] = 0.0) -> Purged:
    """Forget the caller's that are older than so many seconds."""
    asked = PurgeLamentations(older_than_s)
    return Purged(await request.api.lamentations.purge(request.peer.tenant, asked.older_than_s))


def _category(word: str) -> Category:
    try:
        return Category(word)
    except ValueError:
        known = [category.value for category in Category]
        raise InvalidRequest(f"there is no category {word!r}", fix=nearest(word, known)) from None


ROUTES = [listing, show, retry, purge]
