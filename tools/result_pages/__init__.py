"""What each record of benchmarks/results says, as text of pages: figures by name, tables as Markdown."""
