"""``python -m llmopt``: the same as the ``llmopt`` command."""

if __name__ == "__main__":
    try:
        from llmopt.cli import main

        main()
    finally:
        # CPython notes a Ctrl-C that struck inside `exec` of a string (a dataclass in the making)
        # and, after `-m`, dies of SIGINT in the end although it was caught. Another `exec` of a
        # string clears the note, and the exit code is the one that was chosen.
        exec("")  # noqa: S102 - an empty string
