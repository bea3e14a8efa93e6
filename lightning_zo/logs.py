"""What the loggers of a trainer get beside the values that the module logs."""

from __future__ import annotations

from typing import Any

from zo_core import Summary, ZeroOrder


def log_line(trainer: Any, summary: Summary, zo: ZeroOrder) -> None:
    """Gives the loggers the numbers of a summary, under the same step as the module's own, if it is their turn.

    So they do with the distance from the start, if the rule keeps that. The numbers go to the loggers directly, as
    those of Lightning's own callbacks do. Through ``module.log`` they would join the module's metrics, where a count
    that most lines leave out would stay until the end of the epoch.

    Args:
        trainer: at the end of a step, whose ``log_every_n_steps`` decides.
        summary: begins its next line if this one was logged.
        zo: the engine.
    """
    if trainer.loggers and trainer._logger_connector.should_update_logs:
        numbers = summary.numbers() | ({"zo_distance": zo.distance()} if zo.rule.anchored else {})
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
