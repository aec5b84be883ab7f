"""The error that users read."""


class UserError(Exception):
    """A mistake that the user can fix: the message names the thing and the remedy.

    The command line prints it on stderr and exits with 2; the server answers with a 4xx.
    """
