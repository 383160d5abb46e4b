"""Every error of the project, in one tree.

    AusteerError
    ├── UsageError          an option or argument that cannot be meant (exit code 2)
    ├── InputError          a file that cannot be used
    │   ├── PairsError          a pairs or texts file
    │   ├── CheckpointError     a model directory or Hub repository
    │   └── ProgramError        a program, or a program for another model
    │       └── SpaceError          a vector of one space meets a tensor of another
    ├── Refused             understood, but there is no legal way to do it
    ├── OutputError         the output cannot be written
    └── CheckFailed         a check of the product's own ended badly

A message says what, where, why, and what to do. The command line prints it and exits with `exit_code`.
"""


class AusteerError(Exception):
    """Base of every error that is the user's to read; its text needs no traceback."""

    exit_code = 1


class UsageError(AusteerError):
    """An option or argument that cannot be meant."""

    exit_code = 2


class InputError(AusteerError):
    """A file that cannot be used."""


class PairsError(InputError):
    """A pairs or texts file that cannot be used; the message names file and line."""


class CheckpointError(InputError):
    """A model directory or Hub repository that is broken or incomplete."""


class ProgramError(InputError):
    """A program that is malformed, contradictory, or made for another model."""


class SpaceError(ProgramError):
    """A vector of one space was about to meet a tensor of another."""


class Refused(AusteerError):
    """Understood, but there is no legal way to do it; the message gives the reason and the way out."""


class OutputError(AusteerError):
    """The output cannot be written; nothing is left at its place."""


class CheckFailed(AusteerError):
    """A check ended badly: a certificate that does not hold, or steering that does not help."""
