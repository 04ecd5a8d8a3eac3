"""A place in S3 as a configuration writes it: ``s3://BUCKET/PREFIX?region=R&retain=365d&endpoint=https://…``."""

from __future__ import annotations

import re
from typing import NamedTuple, Self
from urllib.parse import parse_qsl, urlsplit

from tartarus.model.errors import InvalidRequest
from tartarus.model.units import parse_duration

SCHEME = "s3://"
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIX = re.compile(r"[A-Za-z0-9!_.'()/-]{0,512}")
_OPTIONS = frozenset({"region", "retain", "endpoint"})


class Bucket(NamedTuple):
    """`retain_s`: for how many seconds its object lock keeps what is put there; 0: as the bucket itself says."""

    name: str
    prefix: str
    region: str
    retain_s: float = 0.0
    endpoint: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read one. Raises InvalidRequest."""
        parts = urlsplit(text)
        pairs = parse_qsl(parts.query, keep_blank_values=True)
        options = dict(pairs)
        prefix = parts.path.strip("/")
        known = len(options) == len(pairs) and options.keys() <= _OPTIONS and all(options.values())
        if not (
            parts.scheme == "s3" and _NAME.fullmatch(parts.netloc) and _PREFIX.fullmatch(prefix) and known
            and "region" in options and not parts.fragment
        ):  # fmt: skip
            raise InvalidRequest(
                f"{text!r} is no place in S3", fix="write it like s3://bucket/prefix?region=eu-central-1&retain=365d"
            )
        retain = options.get("retain", "")
        return cls(
            parts.netloc, prefix, options["region"], parse_duration(retain) if retain else 0.0,
            options.get("endpoint", ""),
        )  # fmt: skip
