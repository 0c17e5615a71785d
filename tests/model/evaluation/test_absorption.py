"""The absorption gap and its gate, and that every form and arrangement is built, served and trained as one function."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from model.bundle import Bundle
from model.evaluation.absorption import AbsorptionError, AbsorptionGap
from model.evaluation.served import served_logits
from model.log.batches import BatchSource
from model.log.behaviours import read_log
from model.log.encoding import encode_log
from model.log.histories import Histories
from model.log.samples import collect_requests
from model.log.user_batches import CacheableUsers
from tests.tiny import AS_OF, TRAINING, tiny_bundle

OTHERS: dict[str, dict[str, Any]] = {
    "hard": {"form": "hard"},
    "log": {"blocks": "log"},
    "actual": {"blocks": "actual"},
    "content": {"blocks": "content"},
}


@pytest.fixture(scope="module", params=OTHERS)
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, data: Path) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp(request.param), data, **OTHERS[request.param])


def test_the_builder_s_state_is_that_of_a_history_and_of_the_trained_model(other: Bundle, data: Path) -> None:
    log, histories = read_log(data), Histories.frozen(read_log(data), AS_OF)
    code_of_user = {user: code for code, user in enumerate(log.user_ids.to_pylist())}
    seen = 0
    for batch in CacheableUsers(log, other, AS_OF).batches(7):
        slots = other.ranker.compress(batch.long)
        for index, user in enumerate(batch.user_ids):
            code = code_of_user[user]
            rows = histories.items[histories.offsets[code] : histories.offsets[code + 1]]
            state = other.state_from_history(log.item_ids.take(rows).to_pylist())
            torch.testing.assert_close(state.keys_Rd, slots.keys_URd[index])
            torch.testing.assert_close(state.values_Rd, slots.values_URd[index])
            seen += int(state.keys_Rd.abs().sum() > 0)
    assert seen > 20


def test_what_is_served_is_what_was_trained(other: Bundle, data: Path) -> None:
    log = read_log(data)
    encoded = encode_log(log, other.catalogue, other.user_features, other.context_features)
    source = BatchSource(encoded, Histories.live(log), other.config, torch.device("cpu"))
    for batch in source.batches(collect_requests(log, encoded.context_codes.numpy(), 5_000, 5_500), 16):
        torch.testing.assert_close(served_logits(other.ranker, batch), other.ranker.logits(batch), atol=1e-5, rtol=1e-5)
    gap = other.metadata["absorption_gap"]
    assert gap["interest_relative_error"] < 1e-5
    assert gap["logit_max"] < 1e-4
    assert gap["form"] == other.config.form


def test_the_paper_s_form_is_refused_with_the_reason(tmp_path: Path, data: Path) -> None:
    with pytest.raises(AbsorptionError) as refused:
        tiny_bundle(tmp_path / "out", data, form="paper")
    message = str(refused.value)
    for part in ("wanted at most 0.001", "ΔAUC", "with φ after W_decomp has mixed the slots", 'form = "absorbed"'):
        assert part in message
    assert not (tmp_path / "out").exists()


def test_the_paper_s_gap_is_written_with_the_difference_in_auc(tmp_path: Path, data: Path) -> None:
    loose = dataclasses.replace(TRAINING, absorption_tolerance=1e9)
    gap = tiny_bundle(tmp_path, data, training=loose, form="paper").metadata["absorption_gap"]
    assert gap["logit_mean"] > 0.01
    assert gap["form"] == "paper"
    assert gap["auc_delta"] == pytest.approx(gap["auc_served"] - gap["auc_trained"])
    assert gap["auc_delta"] != 0


def test_a_form_that_should_have_no_gap_is_refused_as_a_fault() -> None:
    with pytest.raises(AbsorptionError, match=r"ΔAUC -0\.1000\)\. This form is served as it is trained"):
        AbsorptionGap(0.1, 0.5, 2.0, 0.8, 0.7, "hard").check(0.01)
    AbsorptionGap(0.1, 0.01, 2.0, 0.8, 0.7, "hard").check(0.01)
