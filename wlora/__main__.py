"""`python -m wlora`: the command `wlora`."""

from wlora.cli.command import main

if __name__ == "__main__":
    main()
