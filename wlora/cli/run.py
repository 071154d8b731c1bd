"""Entry point: `python -m wlora.run task=rte method=wlora_plus rank=4`, and Hydra multirun with `-m`.

Help, display of the configuration, configuration errors and a missing network are handled before torch is imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from wlora.cli.composing import composing_once
from wlora.cli.help import register_help
from wlora.cli.job import OUTCOMES, Outcome, attempt, fail, run_one
from wlora.cli.launching import collecting
from wlora.config.schema import config_folder, register_schema
from wlora.config.spelling import check_form, explain, quote_texts
from wlora.config.untrusted_yaml import guard_files, refuse_words
from wlora.console import protect_output
from wlora.distributed import TOLD, is_main, leave, require_launch
from wlora.errors import ConfigError, RunFault


def main() -> None:
    """Compose the configuration and execute the run or sweep. Exit codes: 0 success, 1 RunFault, 2 ConfigError."""
    # With this variable, Hydra raises its errors instead of printing them with a traceback.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    protect_output()
    OUTCOMES.outcomes, OUTCOMES.command = [], True
    TOLD.clear()
    code = _run(sys.argv[1:])
    if len(OUTCOMES.outcomes) > 1 and is_main():
        _print_sweep(OUTCOMES.outcomes)
    leave(max([code, *(outcome.exit_code for outcome in OUTCOMES.outcomes)]))


def _run(words: Sequence[str]) -> int:
    """Execute the command line; return 0, or the exit code of the error that stopped it."""
    import hydra
    from hydra.errors import HydraException

    register_schema()
    register_help()
    try:
        require_launch()
        if any(word.startswith("from=") for word in words):
            OUTCOMES.outcomes.append(attempt("", lambda: _repeat(words)))
        else:
            words = quote_texts(words)
            sys.argv[1:] = words  # read by Hydra
            check_form(words)
            refuse_words(words)
            guard_files()
            with composing_once(), collecting():
                hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")(run_one)()
    except (HydraException, OmegaConfBaseException) as error:
        fail(ConfigError(explain(error, words)))
    except YAMLError as error:
        fail(ConfigError(f"a YAML file cannot be read ({' '.join(str(error).split())[:250]})"))
    except (ConfigError, RunFault) as error:
        fail(error)
        return error.exit_code
    except KeyboardInterrupt as stop:
        fail(RunFault(f"interrupted: {stop}" if str(stop) else "interrupted"))
        leave(getattr(stop, "exit_code", 130))  # all processes of a run stop after the same step
    except OSError as error:
        fail(ConfigError(f"results_dir: {error.filename} cannot be written ({error.strerror})"))
    except (ValueError, TypeError, AttributeError, KeyError, AssertionError, ImportError, RuntimeError) as error:
        # Errors of a run are handled in `attempt`. These come from Hydra, for values that it does not expect.
        fail(ConfigError(f"the command line cannot be composed ({type(error).__name__}: {explain(error, words)})"))
    else:
        return 0
    return ConfigError.exit_code


def _repeat(words: Sequence[str]) -> Outcome:
    """Repeat a recorded run (`from=RUN_ID`). The exit code is 1 if any number differs from the record."""
    from wlora.experiment.rerun import repeat

    return Outcome("", "compared", None, 0 if repeat(words) else RunFault.exit_code)


def _print_sweep(outcomes: Sequence[Outcome]) -> None:
    """Print the summary of a sweep, one line per run: number, swept values, status, and score or error."""
    width, digits = max(len(outcome.name) for outcome in outcomes), len(str(len(outcomes)))
    print("\nsweep:")
    for number, outcome in enumerate(outcomes, start=1):
        score = "" if outcome.score is None else f"{outcome.score:.4f}"
        reason = (outcome.told.splitlines() or [""])[0]
        print(f"  {number:>{digits}}  {outcome.name:<{width}}  {outcome.status:<11} {score or reason}".rstrip())
