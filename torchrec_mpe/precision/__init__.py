"""Which bits a row gets: lookups counted, feature groups, initial rows, and every way to make a PrecisionPlan."""
