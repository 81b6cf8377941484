"""python -m trilens."""

from trilens.cli.main import main

if __name__ == "__main__":
    main()
