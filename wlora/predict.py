"""Entry point: `python -m wlora.predict`; see `wlora.cli.predict`."""

from wlora.cli.predict import main

if __name__ == "__main__":
    main()
