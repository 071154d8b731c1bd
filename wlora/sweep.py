"""Entry point: `python -m wlora.sweep`; see `wlora.cli.sweep`."""

from wlora.cli.sweep import main

if __name__ == "__main__":
    main()
