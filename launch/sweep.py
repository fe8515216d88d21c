"""Search for the settings that suit a text: trials of lmdist-train, chosen and cut short by Optuna.

    pip install '.[train,cpu,sweep]'
    python launch/sweep.py sweeps/news --trials 20 --config demo --data.folder data/news

Every trial is a run in the sweep's folder; what follows the options of the sweep goes to lmdist-train. `suggest` says what is
searched: change it to your needs. The trials are in FOLDER/optuna.db, also for optuna-dashboard, and in MLflow as the children
of one run. A sweep that was stopped goes on where it was, in the middle of a trial, when the same command is run again.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from lmdist.command_line import CommandParser, exit_on_error
from lmdist.errors import EXIT_USAGE, DataError
from lmdist.storage.locks import exclusive_lock
from lmdist.tracking.address import configure, store_address
from lmdist.tracking.failures import reason_without_secrets
from lmdist.tracking.metadata import read_metadata
from lmdist.tracking.run_folder import METRICS, read_metrics
from lmdist.tracking.store import Store

with exit_on_error("sweep.py"):  # names the extra where it is missing
    import optuna
    from optuna.trial import Trial, TrialState

SECONDS_BETWEEN_LOOKS = 2
PARENT = "mlflow_run_id"
"""The attribute of the study with the id of its run in MLflow."""


def suggest(trial: Trial) -> dict[str, object]:
    """Return the settings of a trial."""
    return {
        "optimizer.learning_rate": trial.suggest_float("optimizer.learning_rate", 1e-3, 2e-2, log=True),
        "model.dropout": trial.suggest_float("model.dropout", 0.0, 0.6, step=0.1),
        "model.hidden_size": trial.suggest_categorical("model.hidden_size", [128, 256, 512]),
    }


def main() -> None:
    """Run the trials that are left, and print the best one."""
    parser = CommandParser(prog="sweep.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the sweep, such as sweeps/news")
    parser.add_argument("--trials", type=int, default=20, help="trials in all, by default 20")
    arguments, flags = parser.parse_known_args()
    folder = arguments.folder
    with exit_on_error("sweep.py"), exclusive_lock(folder / ".lock", 0):
        study = optuna.create_study(
            storage=f"sqlite:///{folder / 'optuna.db'}",
            study_name=folder.name,
            pruner=optuna.pruners.MedianPruner(),
            load_if_exists=True,
        )
        for trial in trials_left(study, arguments.trials):
            run = folder / f"trial-{trial.number:03}"
            value, state = train(trial, run, flags)
            study.tell(trial, value, state)
            add_to_mlflow(study, run)
        if not study.get_trials(states=(TrialState.COMPLETE,)):
            raise DataError(f"none of {len(study.trials)} trials was trained to its end, so none is best: give more --trials")
        best = study.best_trial
    settings = " ".join(f"--{name} {value}" for name, value in best.params.items())
    print(f"best: trial {best.number}, valid perplexity {best.value:.2f}: {settings}")


def trials_left(study: optuna.Study, number: int) -> Iterator[Trial]:
    """Yield the trials that a stopped sweep has not ended, then new ones, until there are `number`."""
    for frozen in study.get_trials(states=(TrialState.RUNNING,)):
        yield Trial(study, frozen._trial_id)  # the only way to go on with a trial of another process
    while len(study.trials) < number:
        yield study.ask()


def train(trial: Trial, run: Path, flags: list[str]) -> tuple[float | None, TrialState]:
    """Train a trial, or what is left of it; return its best valid perplexity and how it ended.

    Exit where no trial could be trained, or the sweep is to stop.
    """
    settings = [f"--{name}={value}" for name, value in suggest(trial).items()]
    print(f"trial {trial.number}: {' '.join(settings)}", flush=True)
    command = ["lmdist-train", *flags, *settings, "--run_folder", str(run), "--resume=auto"]
    found: list[float] = []
    pruned = False
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as job:
        try:
            while job.returncode is None:  # what is read below is all there is once the job has ended
                try:
                    job.wait(SECONDS_BETWEEN_LOOKS)
                except subprocess.TimeoutExpired:
                    if not pruned and trial.should_prune():
                        pruned = True
                        job.send_signal(signal.SIGTERM)
                before, found = len(found), validations(run)
                for number, perplexity in enumerate(found[before:], before):
                    trial.report(perplexity, number)
        except KeyboardInterrupt:
            job.send_signal(signal.SIGTERM)  # a Ctrl-C has reached it as well, a signal to this process alone has not
            job.wait()
            raise
    if pruned:
        print(f"trial {trial.number} is cut short: others were better after as many validations")
        return None, TrialState.PRUNED
    if job.returncode == EXIT_USAGE and (run / METRICS).exists():  # it has diverged
        return None, TrialState.FAIL
    if job.returncode:
        sys.exit(job.returncode)
    if not found:
        raise DataError("the data folder has no valid split, by which trials could be compared")
    return min(found), TrialState.COMPLETE


def validations(run: Path) -> list[float]:
    """Return the valid perplexities of a run so far."""
    return [row["valid/perplexity"] for row in read_metrics(run / METRICS) if "valid/perplexity" in row]


def add_to_mlflow(study: optuna.Study, run: Path) -> None:
    """Make a trial's run in MLflow, if there is one, a child of the sweep's, and note the best trial there."""
    child = read_metadata(run).get("run_id")
    if not child:
        return
    configure()
    try:
        client = Store(store_address()).client
        if PARENT not in study.user_attrs:
            experiment = client.get_run(child).info.experiment_id
            study.set_user_attr(PARENT, client.create_run(experiment, run_name=study.study_name).info.run_id)
        parent = study.user_attrs[PARENT]
        client.set_tag(child, "mlflow.parentRunId", parent)
        if study.get_trials(states=(TrialState.COMPLETE,)):
            client.log_metric(parent, "valid/best_perplexity", study.best_value, step=len(study.trials))
            client.set_tag(parent, "best trial", f"trial-{study.best_trial.number:03}")
        client.set_terminated(parent)
    except Exception as error:  # MLflow never ends a sweep
        print(f"MLflow does not show {run} as part of the sweep: {reason_without_secrets(error)}", file=sys.stderr)


if __name__ == "__main__":
    main()
