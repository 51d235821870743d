"""The one exception that users see: a sentence that names the file, field or line at fault."""

# Wrong input, told in one line: running again would not help. The supervisor of a batch job knows this number too.
USER_ERROR_EXIT_CODE = 2


class UserError(Exception):
    """Bad input, told in one line.

    `medllm` prints the message without a traceback (unless `--debug`) and exits with status 2.
    Raise it where the culprit's name is known; never to hide a bug of ours.
    """
