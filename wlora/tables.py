"""Entry point: `python -m wlora.tables`; see `wlora.cli.tables`."""

from wlora.cli.tables import main

if __name__ == "__main__":
    main()
