"""Functions of the user's own, by name."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from functools import reduce
from typing import Any

from gradmask.errors import OptionError


def named(option: str, name: str) -> Callable[..., Any]:
    """A function by its name, `module:function`; modules in the working folder are found as well.

    Args:
        option: The option that names it, for messages.
        name: The name.

    Returns:
        The function.

    Raises:
        OptionError: If there is none.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise OptionError(f"{option}={name!r} must be written module:function.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that it hides nothing
    try:
        function = reduce(getattr, attribute.split("."), importlib.import_module(module))
    except (Exception, SystemExit) as error:  # of the user's module as well
        raise OptionError(
            f"{option}={name!r} cannot be imported ({type(error).__name__}: {error}): expected "
            "module:function, of an installed module or a file in the working folder."
        ) from error
    if not callable(function):
        raise OptionError(f"{option}={name!r} is no function, but {type(function).__name__}.")
    found: Callable[..., Any] = function
    return found
