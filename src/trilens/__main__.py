"""python -m trilens."""

from trilens.cli import main

if __name__ == "__main__":
    main()
