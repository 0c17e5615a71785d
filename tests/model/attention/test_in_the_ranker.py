"""Every method trained, judged, and read back from its bundle."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.bundle import load_bundle
from model.evaluation.evaluate import EvaluationConfig, evaluate
from model.log.behaviours import read_log
from model.methods import method_options
from tests.tiny import AS_OF, tiny_bundle

HASHED = ("eta", "sdim")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("din_long_softmax", {}),
        ("sim", {}),
        ("sim_soft", {"retrieved": 5, "heads": 2}),
        ("eta", {}),
        ("sdim", {}),
        ("twin_match", {"retrieved": 6}),
    ],
)
def test_a_method_is_trained_judged_and_read_back(
    tmp_path: Path, data: Path, method: str, options: dict[str, Any]
) -> None:
    bundle = tiny_bundle(tmp_path, data, **method_options(method), **options)
    log, config = read_log(data), EvaluationConfig(AS_OF)
    fresh, frozen = (evaluate(bundle, log, protocol, config) for protocol in ("fresh", "as-of"))
    assert fresh.metrics()["auc"] > 0.6
    assert np.abs(fresh.logits - frozen.logits).max() > 1e-3
    again = load_bundle(tmp_path / bundle.model_id)
    np.testing.assert_array_equal(evaluate(again, log, "fresh", config).logits, fresh.logits)
    # BatchNorm folded: what was exported is what was trained, with the same hashes.
    assert bundle.metadata["absorption_gap"]["logit_max"] < 1e-4
    assert ("long.projection" in bundle.ranker.state_dict()) == (method in HASHED)
    assert not bundle.config.cacheable
    with pytest.raises(ValueError, match='only a model with long_attention = "lrea"'):
        bundle.state_from_history([])
