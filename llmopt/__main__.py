"""``python -m llmopt``: the same as the ``llmopt`` command."""

from llmopt.cli import main

if __name__ == "__main__":
    main()
