"""Entry point: `python -m wlora.figures`; see `wlora.cli.figures`."""

from wlora.cli.figures import main

if __name__ == "__main__":
    main()
