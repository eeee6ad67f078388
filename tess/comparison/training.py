"""The trainings of a comparison, one after the other."""

from tess.comparison.arms import Arm, Trained, finished_arm, run_arm
from tess.comparison.distillation import distill
from tess.comparison.progress import AR_ROW, arm_work, text_work, update_work
from tess.comparison.state import Comparison


def train_all(run: Comparison) -> list[Trained]:
    """What all arms are trained to; those that are there are not trained again.

    Raises:
        UserError: one cannot be trained, or is not trained yet where that is not asked for.
    """
    trained = []
    for arm in run.arms:
        run.progress.begin(f"train {arm.label}")
        if run.only in ("decode", "report"):
            trained.append(finished_arm(arm))
            continue
        if arm.teacher is not None:
            _distill(run, arm)
        trained.append(_train(run, arm))
    return trained


def _distill(run: Comparison, arm: Arm) -> None:
    run.progress.begin(f"texts for {arm.label}")
    end = run.progress.done + text_work(arm)
    written = distill(arm, lambda rows: run.progress.advance(AR_ROW * rows))
    run.progress.skip(end - run.progress.done)
    what = f"{written} texts written" if written else "texts are there already"
    run.say(f"{arm.label}: {what} to learn from")
    run.progress.begin(f"train {arm.label}")


def _train(run: Comparison, arm: Arm) -> Trained:
    each, end = update_work(arm), run.progress.done + arm_work(arm)

    def advance(updates: int) -> None:
        run.progress.advance(min(updates * each, end - run.progress.done))

    found = run_arm(arm, advance)
    run.progress.skip(end - run.progress.done)
    what = f"trained, {found.ran} updates" if found.ran else "is trained already"
    run.say(f"{arm.label}: {what} ({found.updates} in all)")
    return found
