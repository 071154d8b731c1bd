"""Entry point: `python -m wlora.run`; see `wlora.cli.run`."""

from wlora.cli.run import main

if __name__ == "__main__":
    main()
