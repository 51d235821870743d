"""The one exception that users see: a sentence that names the file, field or line at fault."""

import re

# Wrong input, told in one line: running again would not help. The supervisor of a batch job knows this number too.
USER_ERROR_EXIT_CODE = 2

_LINE_BREAKS = re.compile("[\\n\\r\\v\\f\\x1c-\\x1e\\x85\\u2028\\u2029]+")
_CONTROL = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\ud800-\\udfff]")  # escape sequences, halves of characters


class UserError(Exception):
    """Bad input, told in one line.

    `medllm` prints the message without a traceback (unless `--debug`) and exits with status 2.
    Raise it where the culprit's name is known; never to hide a bug of ours.
    """

    def __str__(self) -> str:
        """The message as one line that a terminal can show, whatever the user's names and values hold."""
        return _CONTROL.sub(lambda found: repr(found[0])[1:-1], _LINE_BREAKS.sub(" ", super().__str__().strip()))
