"""Entry point: `python -m wlora.report`; see `wlora.cli.report`."""

from wlora.cli.report import main

if __name__ == "__main__":
    main()
