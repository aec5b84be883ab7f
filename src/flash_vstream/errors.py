"""The one kind of error that a user is meant to read."""


class UserError(Exception):
    """Something the user can mend: the message names the thing and the remedy.

    The command line prints it on stderr and exits with 2; over HTTP it is a 4xx.
    """
