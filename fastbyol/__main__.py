"""``python -m fastbyol``: the program of an environment that is not on the PATH."""

from fastbyol.cli.main import main

if __name__ == "__main__":
    main()
