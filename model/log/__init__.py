"""A data folder read: from Parquet files to what a model reads, in batches."""
