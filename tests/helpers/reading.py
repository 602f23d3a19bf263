"""Options of `gradmask run` as the command line reads them."""

from gradmask.cli.run import recipes_app


def read(*words):
    """What `run` is given; errors are those of cyclopts."""
    found = []
    run = recipes_app("run", lambda options: found.append(options) or 0, "")
    run(words, exit_on_error=False, print_error=False, result_action="return_value")
    return found[0]
