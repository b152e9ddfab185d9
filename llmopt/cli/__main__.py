"""``python -m llmopt.cli``: the command line without its script."""

from llmopt.cli import main

main()
