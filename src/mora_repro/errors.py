"""The one exception that a user's mistake raises, and the words for near matches."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can mend. Shown without a traceback; the process exits with status 2.

    The message says what was asked, why it can't be, what can, and a command that works.
    """


class Diverged(UserError):
    """The loss is not finite: what these settings lead to, and would again."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' Did you mean a or b?' for the known words near `word`, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=2, cutoff=0.5)
    return f" Did you mean {' or '.join(near)}?" if near else ""
