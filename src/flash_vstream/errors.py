"""The exception for errors shown to users."""


class UserError(Exception):
    """A problem the user can fix: the message names the cause and the remedy.

    The command line prints it on stderr and exits with 2; the server answers with a 4xx.
    """
