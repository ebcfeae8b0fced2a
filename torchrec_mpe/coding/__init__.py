"""Transform-coded tables: rows rotated into the metric of the loss, and a bit-width a component and group of rows."""
