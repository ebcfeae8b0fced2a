"""Files: written whole or not at all, digests, tables as text and tables that people write down."""
