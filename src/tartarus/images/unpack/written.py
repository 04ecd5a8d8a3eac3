"""What a saved sandbox wrote, as one archive beside its memory; what runtimes keep and bring back files with."""

from __future__ import annotations

from tartarus.images.unpack.inside import pack
from tartarus.images.unpack.inside.refusal import Refused
from tartarus.images.unpack.jailed import run_jailed
from tartarus.images.unpack.limits import Limits
from tartarus.model.errors import ImageRefused

_LEAST_BYTES = 64 << 20


class WrittenFiles:
    """Archives of overlays' upper directories."""

    def pack(self, tree: str, archive: int, *, most_bytes: int, id_base: int) -> str:
        """Write the directory `tree` to the open file `archive`; its digest. Raises ImageRefused or OSError; blocks.

        Not in a jail, which takes longer to build than a paused sandbox should wait: nobody may write to the tree
        meanwhile. It is only read, by descriptors, and no path in it is resolved. `id_base`: the host id of the
        sandbox's root.
        """
        try:
            facts = pack.pack(tree, archive, _limits(most_bytes), compressed=False, id_base=id_base)
        except Refused as refused:
            raise ImageRefused(refused.what, why=refused.why) from None
        return str(facts["diff_id"])

    async def unpack(self, archive: int, tree: int, digest: str, *, most_bytes: int, id_base: int) -> None:
        """Fill the open directory `tree` from an archive of any origin, in a jail. Raises ImageRefused or NoSpace."""
        fds = {"blob": archive, "tree": tree}
        await run_jailed(
            "unpack", "the saved sandbox's files", [], id_base, _limits(most_bytes), fds=fds, diff_id=digest
        )


def _limits(most_bytes: int) -> Limits:
    # Archives have headers, and files may have holes.
    return Limits(bytes=max(2 * most_bytes, _LEAST_BYTES))
