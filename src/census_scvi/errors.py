"""The one exception that stands for a mistake the user can fix."""


class UserError(Exception):
    """Something the user can fix: wrong setting, missing file, unsuitable data.

    The message is one line that says what was found, what was expected and what to do. Scripts print it without a
    traceback and exit with code 2; every other exception is a defect of ours (traceback, exit code 1).
    """
