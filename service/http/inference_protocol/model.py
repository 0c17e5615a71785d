"""What the protocol is told of the model that is served. Its name is always `lrea`, its version the model_id."""

from model.identifiers import IdKind
from model.vocabulary import Vocabulary
from service.active import ActiveModel
from service.errors import ModelNotFound
from service.http.inference_protocol.schemas import Datatype, ModelMetadata, TensorMetadata
from service.http.inference_protocol.tensors import CONTEXT, FEATURES, TIMES

NAME = "lrea"
DATATYPES: dict[IdKind, Datatype] = {"int": "INT64", "string": "BYTES"}


def check_name(name: str) -> None:
    """Raises ModelNotFound for any other name."""
    if name != NAME:
        raise ModelNotFound(f"there is no model {name[:80]!r}: the one that is served is called {NAME!r}")


def check_version(version: str | None, model: ActiveModel) -> None:
    """Raises ModelNotFound for another version than the active one; None asks for that one."""
    if version is not None and version != model.model_id:
        found = f"version {version[:80]!r} of model {NAME!r} is not served, version {model.model_id!r} is"
        raise ModelNotFound(f"{found}: ask for that, or for none")


def metadata(model: ActiveModel) -> ModelMetadata:
    """The inputs that requests to `model` may have, and the outputs of its answers."""
    bundle = model.bundle
    items, users = DATATYPES[bundle.item_kind], DATATYPES[bundle.user_kind]
    return ModelMetadata(
        name=NAME,
        versions=[model.model_id],
        platform="lrea_torch",
        inputs=[
            _tensor("user_id", users, 1),
            *(_tensor(name, items) for name in ("candidates", *TIMES)),
            *(_tensor(name, "INT64") for name in TIMES.values()),
            *(_column(CONTEXT + name, column, 1) for name, column in bundle.context_features.vocabularies.items()),
            *(_column(FEATURES + name, column, -1) for name, column in bundle.catalogue.features.items()),
        ],
        outputs=[
            _tensor("items", items),
            _tensor("scores", "FP32"),
            _tensor("user_state", "BYTES", 1),
            _tensor("degraded", "BYTES"),
        ],
    )


def _column(name: str, column: Vocabulary, length: int) -> TensorMetadata:
    return _tensor(name, DATATYPES[column.kind], length)


def _tensor(name: str, datatype: Datatype, length: int = -1) -> TensorMetadata:
    return TensorMetadata(name=name, datatype=datatype, shape=[length])
