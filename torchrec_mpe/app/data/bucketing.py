"""Numbers as categories and as dense features."""

import polars as pl


def bucket_text(values: pl.Series) -> pl.Series:
    """Bucket of each number as text, as in the MPE paper: ``floor(ln(v)^2)`` for v > 2, otherwise v itself.

    Args:
        values: float64 [n], finite or null.

    Returns:
        String [n] without nulls: an integer without a decimal point where the value is whole, the empty text for null.
    """
    column = pl.col("v")
    bucket = pl.when(column > 2).then((column.log() ** 2).floor()).otherwise(column)
    buckets = values.alias("v").to_frame().select(bucket).to_series()
    whole = (buckets.floor() == buckets) & (buckets.abs() < 2**53)
    text = buckets.cast(pl.Int64, strict=False).cast(pl.String)
    if not whole.fill_null(True).all():
        text = buckets.cast(pl.String).zip_with(whole.fill_null(True).not_(), text)
    result: pl.Series = text.fill_null("").rename(values.name)
    return result


def dense_feature(values: pl.Expr) -> pl.Expr:
    """Dense feature of each number: ``log1p(max(v, 0))`` as float32, 0 for null."""
    return values.clip(lower_bound=0.0).log1p().fill_null(0.0).cast(pl.Float32)
