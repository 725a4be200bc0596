"""The exception for errors that the user can fix."""


class UserError(Exception):
    """An error that the user can fix: wrong setting, missing file, unsuitable data.

    The message is one line: what was found, what was expected, and what to do. Scripts print it without a traceback
    and exit with code 2. Every other exception is a defect of this project (traceback, exit code 1).
    """
