"""`python -m gradmask`."""

import gradmask.cli.__main__  # noqa: F401
