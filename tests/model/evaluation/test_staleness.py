"""Stale records against the service's contract, request by request, in ids."""

from pathlib import Path

import numpy as np
import pytest
import torch

from model.bundle import Bundle
from model.evaluation.evaluate import EvaluationConfig, Judge
from model.evaluation.staleness import read_staleness
from model.log.behaviours import InteractionLog, id_list, read_log
from model.ranker import ScoringInput
from tests.tiny import AS_OF, MODEL

S = int(MODEL["short_length"])  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def log(data: Path) -> InteractionLog:
    return read_log(data)


@pytest.fixture(scope="module")
def judge(log: InteractionLog, bundle: Bundle) -> Judge:
    return Judge(bundle, log, EvaluationConfig(AS_OF, until=AS_OF + 200))


def logits_of(
    bundle: Bundle, log: InteractionLog, judge: Judge, index: int, lacking: int, recent: bool
) -> torch.Tensor:
    """Logits of one request, as service.md says: the short window is the last S of (stored tail ++ recent)."""
    requests = judge.requests
    user = requests.user[index]
    mine = (log.user == user) & log.in_history & (log.timestamp < requests.before[index])
    history = id_list(log.item_ids.take(log.item[mine]))
    stored, later = history[: max(0, len(history) - lacking)], history[max(0, len(history) - lacking) :]
    brought = later if recent else []
    if stored:
        state = bundle.state_from_history(stored)
        short = bundle.short_window(stored[-S:] + brought)
        users = log.users_table()
        assert users is not None
        regions = {row["user_id"]: row["region"] for row in users.to_pylist()}
        codes = bundle.user_features.encode({"region": regions.get(log.user_ids[user].as_py())})
    else:  # no record: the recent items are all that is known of him
        state, short = bundle.state_from_history(brought), bundle.short_window(brought)
        codes = bundle.user_features.encode({})
    context = {"device": log.context["device"][int(requests.row[index])].as_py()}
    items = requests.items[requests.offsets[index] : requests.offsets[index + 1]]
    candidates = bundle.catalogue.encode(id_list(log.item_ids.take(items)))
    return bundle.ranker.score(ScoringInput(state, short, codes, bundle.context_features.encode(context), candidates))


@pytest.mark.parametrize("lacking", [0, S // 2, S, 2 * S, 60])
@pytest.mark.parametrize("recent", [True, False])
def test_stale_records_score_as_the_service_would(
    bundle: Bundle, log: InteractionLog, judge: Judge, lacking: int, recent: bool
) -> None:
    found = judge.stale(lacking, recent_items=recent)
    for index in range(len(judge.requests)):
        span = slice(judge.requests.offsets[index], judge.requests.offsets[index + 1])
        expected = logits_of(bundle, log, judge, index, lacking, recent)
        np.testing.assert_allclose(found.logits[span], expected.numpy(), atol=2e-5)
    unrecorded = int((judge.judge("fresh").history_rows <= lacking).sum())
    assert (0 < unrecorded < len(judge.requests)) == (lacking == 60)


def test_a_record_that_lacks_nothing_is_fresh(judge: Judge) -> None:
    fresh, rows = judge.judge("fresh"), judge.staleness([0, S, 2 * S])
    np.testing.assert_array_equal(judge.stale(0).logits, fresh.logits)
    np.testing.assert_array_equal(judge.stale(0, recent_items=False).logits, fresh.logits)
    metrics = fresh.metrics()
    assert rows[0] == {
        "behaviours": 0, **metrics,
        "auc_without_recent": metrics["auc"], "gauc_without_recent": metrics["gauc"],
    }  # fmt: skip
    assert rows[1]["behaviours"] == S
    assert rows[1]["auc"] == judge.stale(S).metrics()["auc"] != rows[0]["auc"]
    assert rows[2]["gauc_without_recent"] == judge.stale(2 * S, recent_items=False).metrics()["gauc"]


def test_numbers_of_behaviours_are_read() -> None:
    assert read_staleness("0,16, 32") == [0, 16, 32]


@pytest.mark.parametrize("text", ["", "4,", "-1", "1.5", "S/2", "²"])
def test_what_is_no_number_of_behaviours_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"staleness is .*: wanted numbers of behaviours, 0 or more, such as 0,16,32"):
        read_staleness(text)
