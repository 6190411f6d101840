"""Secrets: what must never reach a screen, a log or a file."""

import os
import re

_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$")
_PASSWORD = re.compile(r"(?<=://)[^\s/@]+@")  # of an address such as a proxy's
MIN_LEN = 6  # characters; something shorter is a placeholder such as "none"


def redact(text: str) -> str:
    """Return the text with the values of secret environment variables, and passwords in addresses, replaced."""
    for name, value in os.environ.items():
        for secret in (value, value.strip()):  # which is what is sent
            if _NAME.search(name) and len(secret) >= MIN_LEN:
                text = text.replace(secret, f"[{name}]")
    return _PASSWORD.sub("[password]@", text)
