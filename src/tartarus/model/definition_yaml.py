"""Reading ``templates/my.yaml``."""

from __future__ import annotations

from tartarus.model.definition import Definition, DefinitionRefused
from tartarus.model.structured_yaml import MAX_FILE_BYTES, StructReader

__all__ = ["MAX_FILE_BYTES", "read_definition"]


def read_definition(text: bytes | str, source: str = "the template") -> Definition:
    """Read one template's YAML.

    Args:
        text: the file, at most 256 KiB of UTF-8.
        source: what to call it in errors, such as its path.

    Raises:
        InvalidRequest: it is not YAML, has an unknown key (the likeliest one is suggested) or a wrong type; with the
            line, what was expected, and what to do.
    """
    reader = StructReader(source, Definition, see="see docs/template.schema.json for every key", holds="one template")
    try:
        return reader.read(text)
    except DefinitionRefused as error:
        raise reader.refused(error.key, error.what, why=error.why, fix=error.fix) from None
