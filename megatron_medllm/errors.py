"""The one exception that users see: a sentence that names the file, field or line at fault."""


class UserError(Exception):
    """Bad input, told in one line.

    `medllm` prints the message without a traceback (unless `--debug`) and exits with status 2.
    Raise it where the culprit's name is known; never to hide a bug of ours.
    """
