"""Entry point: `python -m wlora.export`; see `wlora.experiment.export`."""

from wlora.experiment.export import main

if __name__ == "__main__":
    main()
