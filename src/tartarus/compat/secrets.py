"""Which variables of a container look like secrets: by their names, and by what they hold.

A guess on the careful side: what is named here is left out unless its owner says where to keep it.
"""

from __future__ import annotations

import re

_WORDS = frozenset({
    "PASS", "PASSWD", "PASSWORD", "PASSPHRASE", "PWD", "SECRET", "SECRETS", "TOKEN", "TOKENS", "CREDENTIAL",
    "CREDENTIALS", "CREDS", "AUTH", "APIKEY", "PRIVATEKEY", "SIGNING", "SALT", "COOKIE", "DSN", "SAS", "JWT", "BEARER",
})  # fmt: skip
_KEY_OF = re.compile(r"(?:^|_)(?:API|ACCESS|PRIVATE|SECRET|SESSION|ENCRYPTION|SIGNING|MASTER|SSH|ACCOUNT)_?KEY(?:_|$)")
_ENDINGS = ("PASSWORD", "PASSWD", "SECRET", "TOKEN", "APIKEY", "CREDENTIALS")
_VALUE = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY|"  # PEM
    r"\b[a-z][a-z0-9+.-]*://[^/\s:@]*:[^/\s@]+@|"  # a URL with a password
    r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_|\bglpat-|\bxox[abprs]-|\bsk-[A-Za-z0-9_-]{16,}|"
    r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ|"  # a JSON web token
    r"\bAIza[A-Za-z0-9_-]{30,}"
)
_SEARCHED = 64 * 1024


def looks_secret(name: str, value: str) -> bool:
    """Whether a variable is better not kept anywhere unasked."""
    if not value:
        return False
    upper = name[:_SEARCHED].upper()
    # PWD alone is the shell's working directory.
    if upper not in {"PWD", "OLDPWD"} and (_WORDS & set(re.split(r"[_.-]", upper)) or upper.endswith(_ENDINGS)):
        return True
    return bool(_KEY_OF.search(upper) or _VALUE.search(value[:_SEARCHED]))


def secret_arguments(argv: tuple[str, ...]) -> list[int]:
    """Positions of a command's words that look like secrets: ``--token=…``, and the word after ``--password``."""
    found = []
    for position, word in enumerate(argv):
        before = argv[position - 1] if position else ""
        option, equals, value = word.partition("=")
        follows = before.startswith("--") and "=" not in before
        name = option.lstrip("-") if equals else before.lstrip("-") if follows else ""
        if looks_secret(name, value if equals else word):
            found.append(position)
    return found
