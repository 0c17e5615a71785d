"""A store that fails and flips of the active pair, in small, against real processes; and that nothing is overlooked."""

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loadtest.chaos.flips import Flipped, flips, one_bit_wrong
from loadtest.chaos.flips import Plan as FlipPlan
from loadtest.chaos.flips import result_of as result_of_flips
from loadtest.chaos.meanwhile import Watch
from loadtest.chaos.outcomes import Answer, Judged, OpenLoad, Outcome, Request
from loadtest.chaos.proxy import Counts
from loadtest.chaos.scenario import Result, Site
from loadtest.chaos.scenarios import SCENARIOS
from loadtest.chaos.store_faults import NEVER, Part, Plan, only_for_these_reasons, result_of, store_faults
from loadtest.chaos.truth import Question, Truth
from loadtest.synthetic_cache import GENERATION, Shape, make_bundle, publish
from model.bundle import BundleError, load_bundle

SHAPE = Shape(users=5, items=300, categories=9, rank=5, long_length=24, item_cells=64, feature_cells=32)
PLAN = Plan(users=120, candidates=20, rate_per_s=40.0, kills=1, pauses=1, cuts=6, delays=2, resets=2, holds=1)
FLIP_PLAN = FlipPlan(users=20, candidates=20, rate_per_s=40.0, flips=2)
DID = Counts(cut=PLAN.cuts, delayed=PLAN.delays, reset=PLAN.resets)
KINDS = ("killed and restarted", "paused", "connections cut", "replies delayed", "replies reset", "nothing passes")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """Scenarios pin the process that they run in."""
    cores = os.sched_getaffinity(0)
    yield Site(tmp_path, min(cores), max(cores))
    os.sched_setaffinity(0, cores)


def missed(result: Result) -> dict[str, str]:
    return {criterion.what: criterion.found for criterion in result.criteria if not criterion.met}


def test_both_are_among_the_scenarios() -> None:
    assert {store_faults, flips} <= set(SCENARIOS.values())


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_store_that_fails_brings_no_error_and_nobody_elses_answer(site: Site) -> None:
    result = store_faults(site, PLAN)
    slow = [what for what in missed(result) if what.startswith("slowest recovery")]  # as the machine may be
    assert missed(result).keys() - set(slow) == set()
    kinds = result.figures
    assert [kinds[name]["times"] for name in KINDS] == [1, 1, 6, 2, 2, 1]
    assert all(kinds[name]["recovery_worst_ms"] < 10_000 for name in KINDS)
    assert result.requests["200 cached"] > 100
    assert any(how.startswith("200 empty store_") for how in result.requests), "the faults were felt"


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_flips_lose_no_request_and_a_broken_bundle_is_refused(site: Site) -> None:
    result = flips(site, FLIP_PLAN)
    assert missed(result) == {}
    models = {how.split()[1] for how in result.requests}
    assert len(models) == 3
    assert all(how.startswith("200 ") for how in result.requests)


def outcome(status: int, how: str, fault: str | None = None) -> Outcome:
    return Outcome("quiet", 0.0, 0.0, 0.01, status, how, fault)


def part(*outcomes: Outcome, recovery_s: float = 0.1, metrics: str = "") -> Part:
    return Part(OpenLoad(outcomes), {"paused": [0.05, recovery_s]}, metrics)


@pytest.mark.parametrize(
    ("seen", "what", "found"),
    [
        (part(outcome(500, "internal")), "requests that ended otherwise", "1 (500 internal)"),
        (part(outcome(0, "connection lost")), "requests that ended otherwise", "1 (0 connection lost)"),
        (
            part(outcome(200, "cached", "another user's answer: 7")),
            "answers of another",
            "1 (another user's answer: 7)",
        ),
        (part(outcome(200, "empty", "found empty without a reason")), "answers that are wrong", "1 (found empty"),
        (part(outcome(200, "cached"), recovery_s=2.1), "slowest recovery of 2: paused", "2.1 s"),
        (part(outcome(200, "cached"), recovery_s=float("inf")), "slowest recovery of 2: paused", "inf s"),
        (part(outcome(200, "cached"), metrics=f'{NEVER[0]}{{reason="foreign_user"}} 1.0\n'), NEVER[0], "1"),
        (part(outcome(200, "cached"), metrics=f"{NEVER[1]} 2.0\n"), NEVER[1], "2"),
    ],
)
def test_what_must_not_happen_to_a_store_is_not_overlooked(seen: Part, what: str, found: str) -> None:
    good = part(outcome(200, "cached"), outcome(200, "empty store_timeout"), outcome(504, "deadline-exceeded"))
    assert missed(result_of([good], DID, PLAN, distance=0.1)) == {}
    [(name, value)] = missed(result_of([good, seen], DID, PLAN, distance=0.1)).items()
    assert name.startswith(what)
    assert value.startswith(found)


def test_a_run_in_which_the_proxy_did_little_or_users_are_alike_has_shown_nothing() -> None:
    good = part(outcome(200, "cached"))
    assert set(missed(result_of([good], Counts(), PLAN, distance=1e-4))) == {
        "least distance between two right answers, on the logit",
        "connections cut",
        "replies delayed",
        "replies reset",
    }


@pytest.mark.parametrize(
    ("how", "fault"),
    [
        ("cached", None),
        ("empty store_timeout", None),
        ("cached store_circuit_open", None),
        ("empty record_foreign", "degraded by record_foreign"),
        ("empty store_timeout no_active_generation", "degraded by no_active_generation"),
    ],
)
def test_a_store_that_fails_explains_some_reasons_only(how: str, fault: str | None) -> None:
    judge = only_for_these_reasons(Request("score", b"", lambda _: Judged(how))).judge
    assert judge(Answer(200, b"", b"")) == Judged(how, fault)


def test_what_must_not_happen_at_a_flip_is_not_overlooked() -> None:
    load, found = OpenLoad([outcome(200, "abc cached")]), Flipped([0.3, 0.4], strays=0, refused=1, mended_s=0.5)
    assert missed(result_of_flips(FLIP_PLAN, load, found, distance=0.1)) == {}
    failed = OpenLoad([*load.outcomes, outcome(503, "not-ready")])
    assert missed(result_of_flips(FLIP_PLAN, failed, found, distance=0.1)) == {"failed requests": "1 (503 not-ready)"}
    bad = replace(found, switch_s=[0.3, float("inf")], strays=2, refused=0, mended_s=float("inf"))
    assert missed(result_of_flips(FLIP_PLAN, load, bad, distance=0.01)) == {
        "least distance between two right answers, on the logit": "0.01",
        "answers of the old model after the new one's": "2",
        "slowest flip until only the new model answers": "inf s",
        "broken publications refused": "0",
        "the mended one is served after": "inf s",
    }


def test_one_bit_is_enough_to_break_a_bundle_and_is_mended(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, SHAPE)
    folder = tmp_path / bundle.model_id
    with one_bit_wrong(folder / "weights.safetensors"), pytest.raises(BundleError):
        load_bundle(folder)
    assert load_bundle(folder).model_id == bundle.model_id


def test_strangers_are_empty_without_a_reason_and_nobody_else_is(
    tmp_path: Path, store_url: str, key_prefix: str
) -> None:
    bundle = make_bundle(tmp_path, SHAPE)
    publish(store_url, key_prefix, bundle, SHAPE)
    truth = Truth(SHAPE.user_ids, [list(SHAPE.item_ids)[:20]], strangers=[99])
    truth.add_stored(store_url, key_prefix, bundle, GENERATION)
    assert [question.user_id for question in truth.questions()] == [1, 2, 3, 4, 5, 99]
    logits = truth.logits(bundle.model_id, None, "empty", Question(99, 0))
    assert logits is not None
    scores = (1 / (1 + np.exp(-logits))).tolist()
    said = (bundle.model_id, GENERATION)
    assert truth.fault_of_scores(Question(99, 0), *said, "empty", [], scores) is None
    assert "without a reason" in str(truth.fault_of_scores(Question(1, 0), *said, "empty", [], scores))
    assert "wanted one that was published" in str(truth.fault_of_scores(Question(99, 0), *said, "cached", [], scores))
    assert truth.least_distance() > 1e-2


def answered(watch: Watch, *hows: str) -> None:
    for how in hows:
        watch.watched(Request("score", b"", lambda _, how=how: Judged(how))).judge(Answer(200, b"", b""))  # type: ignore[misc]


def test_all_is_well_from_the_first_good_answer_after_the_last_bad_one() -> None:
    watch = Watch()
    answered(watch, "good", "good", "good")
    mark = watch.mark()
    answered(watch, "good", "bad", "good")
    time.sleep(0.2)
    answered(watch, "bad")
    well_at = time.perf_counter()
    late = threading.Timer(0.2, answered, (watch, "good"))
    answered(watch, "good", "good")
    late.start()
    found = watch.seconds_from(mark, lambda how: how == "good", answers=3, patience_s=10)
    late.join()
    assert well_at - mark.at <= found < well_at - mark.at + 0.15, "not the end of the row"


def test_answers_that_do_not_come_are_never_well() -> None:
    watch = Watch()
    mark = watch.mark()
    answered(watch, "good")
    assert watch.seconds_from(mark, lambda how: how == "good", answers=2, patience_s=0.1) == float("inf")
