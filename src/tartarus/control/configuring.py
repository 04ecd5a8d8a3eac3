"""Reading the daemon's configuration file, if there is one."""

from __future__ import annotations

import os
import stat

from tartarus.model.errors import InvalidRequest
from tartarus.model.settings import Settings


def read_configuration(settings: Settings) -> Settings:
    """`settings` with what their file says. Raises InvalidRequest for a file that others can write, or a wrong one.

    Whoever writes it decides how strongly sandboxes are held: it must be root's or the daemon's own user's.
    """
    place = settings.config_file
    if place is None:
        return settings
    try:
        fd = os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return settings
    except OSError as error:
        raise InvalidRequest(
            f"{place} can't be read", why=error.strerror or "", fix="mend it or take it away"
        ) from None
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid not in {0, os.geteuid()} or found.st_mode & 0o022:
            raise InvalidRequest(
                f"{place} is not used", why="others than root and the daemon's user could have written it",
                fix=f"chown it to the daemon's user, and chmod go-w {place}",
            )  # fmt: skip
        # Most daemons have no file, and start without these.
        from tartarus.model.configuration import configured
        from tartarus.model.structured_yaml import MAX_FILE_BYTES

        return configured(settings, file.read(MAX_FILE_BYTES + 1), str(place))
