"""Entry point: `python -m wlora.memory`; see `wlora.cli.memory`."""

from wlora.cli.memory import main

if __name__ == "__main__":
    main()
