"""What every model of a comparison is asked: the requests after T, and what is known of them whatever the model."""

import math
from dataclasses import dataclass

import numpy as np

from model.config import RankerConfig
from model.evaluation.evaluate import EvaluationConfig, requests_after
from model.evaluation.slices import is_new_item
from model.log.behaviours import NO_LABEL, Bools, Int64s, InteractionLog
from model.log.columns import fit_columns
from model.log.encoding import encode_log
from model.log.histories import Histories
from model.log.samples import Requests
from model.recipe import Recipe

LATE_SHARE = 0.1


@dataclass(frozen=True)
class Judged:
    """n requests with m candidates."""

    columns: RankerConfig  # the recipe's own model: which features there are
    requests: Requests
    dropped: int  # candidates that no row before T has, left out
    history_rows: Int64s  # [n], behaviours before the request's session
    new_items: Bools  # [m], the item is nowhere among those


def judged_requests(log: InteractionLog, recipe: Recipe, evaluation: EvaluationConfig) -> Judged:
    """The requests after T. Raises DataError if there are none, or if the recipe's columns are not in the data."""
    log.check_time(evaluation.as_of)
    columns, catalogue, users, context = fit_columns(log, evaluation.as_of, recipe.model)
    codes = encode_log(log, catalogue, users, context).context_codes.numpy()
    requests, dropped = requests_after(log, codes, evaluation)
    live = Histories.live(log)
    cuts = live.cuts_before(requests.user, requests.before)
    return Judged(columns, requests, dropped, cuts - live.offsets[requests.user], is_new_item(live, requests, cuts))


def late_cut(log: InteractionLog) -> int:
    """T where none is named: the newest tenth of the labelled rows is at it or after it, no more than rounding and
    ties make it."""
    times = np.sort(log.timestamp[log.label != NO_LABEL])
    if not len(times):  # what is done with it says that there is nothing to learn from
        return int(log.timestamp.max())
    return int(times[min(math.ceil(len(times) * (1 - LATE_SHARE)), len(times) - 1)])
