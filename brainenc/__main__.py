"""``python -m brainenc``: the same as the console script, for machines where that is not on the path."""

from brainenc.cli.main import main

if __name__ == "__main__":
    main()
