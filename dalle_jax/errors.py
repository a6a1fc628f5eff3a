"""The error of this package that a user can mend."""


class UserError(ValueError):
    """An option, a file or a setting that cannot be used.

    Its message says what was got, what is allowed and what to do. Programs print it alone and end
    with exit status 2; every other error is a fault of the program and shows its traceback.
    """
