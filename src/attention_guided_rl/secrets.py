"""Secrets: what must never reach a screen, a log or a file."""

import base64
import os
import re
from collections.abc import Iterator
from urllib.parse import unquote

_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)
_PASSWORD = re.compile(r"(?<=://)[^\s/@]+@")  # of an address such as a proxy's
MIN_LEN = 6  # characters; something shorter is a placeholder such as "none"


def redact(text: str) -> str:
    """Return the text with the values of secret environment variables, and passwords in addresses, replaced."""
    for name, secret in _secrets():
        if len(secret) >= MIN_LEN:
            text = text.replace(secret, f"[{name}]")
    return _PASSWORD.sub("[password]@", text)


def _secrets() -> Iterator[tuple[str, str]]:
    """Yield the secrets of the environment as they are, as they are sent, and as a service may repeat them."""
    for name, value in os.environ.items():
        if _NAME.search(name):
            yield name, value
            yield name, value.strip()
        for found in _PASSWORD.findall(value):
            user_and_password = unquote(found[:-1])
            yield name, base64.b64encode(user_and_password.encode()).decode()  # as in a Proxy-Authorization header
            yield name, user_and_password.partition(":")[2]
