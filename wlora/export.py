"""Entry point: `python -m wlora.export`; see `wlora.cli.export`."""

from wlora.cli.export import main

if __name__ == "__main__":
    main()
