"""The exceptions a user can cause, each with its documented exit code. Anything else is our bug (exit 70)."""


class AgrlError(Exception):
    """Base of all errors reported as one line; `exit_code` is the command's exit status."""

    exit_code = 70


class ConfigError(AgrlError):
    """The configuration or the command line cannot be used."""

    exit_code = 2


class CorpusError(AgrlError):
    """The corpus is missing, empty or has nothing usable."""

    exit_code = 3


class CredentialsError(AgrlError):
    """A key or token is missing or refused."""

    exit_code = 4


class RemoteError(AgrlError):
    """A remote service cannot be reached or used."""

    exit_code = 5


class SpendError(AgrlError):
    """The spending cap, or the quota at the service, is reached."""

    exit_code = 6


class CheckpointError(AgrlError):
    """A checkpoint or run folder is damaged or does not fit."""

    exit_code = 7


class StorageError(AgrlError):
    """The disk refused a write."""

    exit_code = 8


class NumericError(AgrlError):
    """Non-finite numbers kept coming."""

    exit_code = 9


class MemoryLimitError(AgrlError):
    """Memory ran out, and there is nothing left to do in smaller parts."""

    exit_code = 10


class PeerLostError(AgrlError):
    """Another process of the run has ended or does not answer."""

    exit_code = 11


class RunInUseError(AgrlError):
    """The run folder exists already, or another process works in it."""

    exit_code = 12


class UnsafeError(AgrlError):
    """Refused for safety."""

    exit_code = 13
